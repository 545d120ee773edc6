"""The same integers in every mobile runtime's own format.

Each target is one module, chosen from `TARGETS` and imported only when it is asked for. It offers
these functions:

    check(model, options)              refuse what the target cannot hold, before any work
    write(model, out, options, progress)   make the file or folder ``out``, which does not exist
    open(path, *, threads)             -> Runner, which executes it in the target's own runtime
    stored(path)                       -> Iterator[Stored]: the integers, read back from the file
    trace(path, tokens, past=())       -> results of the pass over ``tokens``, by their names in
                                          `decoder`, once the cache holds the tokens of ``past``,
                                          fed in its `pieces`
    tracer(path)                       -> context that gives `trace` of one file, opened once
    kernels(path, model)               -> Kernels, how its runtime rounds what it multiplies
    made_with(path)                    -> Made, the options that make the file again
    constants(path)                    -> Iterator[Constant]: every constant of the file
    versions()                         -> the libraries that took part: name -> version

    sizes(model, options)              -> Iterator[Size]: bits and bytes of each matrix

and, where the target can say:

    remarks(model, options)            -> sentences on what is chosen, and what that costs

    memory(model, options)             -> bytes that `write` takes at its peak beside the model's
                                          mapped file; without it, no limit can be promised
    execute(path)                      -> Execution of any file of that format, ours or not
    tokenizer(path, source)            -> TargetTokenizer of `edgeq.converters.validate.texts`, or
    None if
                                          the output holds no tokenizer; ``source`` is the model's
                                          own tokenizer
    not_run()                          -> why the target's own runtime does not run it, or None

A refusal is an EdgeqError of `check`, a missing package a MissingDependencyError of `check`,
`open`, `stored` or `trace`. `write` may make further files beside ``out`` whose names begin with
its name; it is given an empty folder to do so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from edgeq.core.errors import FormatError, UsageError, require, unknown

if TYPE_CHECKING:  # the command line reads `TARGETS` and needs no NumPy for it
    import numpy as np
    from numpy.typing import NDArray

Precision = Literal["float32", "float16", "int8"]
"""What the least exact of activations, cache and arithmetic is held in while a target computes."""

TARGETS = {
    "ort": "ONNX Runtime: model.onnx and its data file model.onnx.data",
    "genai": "onnxruntime-genai: a folder with model, configuration, tokenizer and chat template",
    "tflite": "LiteRT (TensorFlow Lite): a .tflite file with prefill and decode signatures",
    "litertlm": "LiteRT-LM: a .litertlm bundle with tokenizer and chat template",
    "coreml": "Core ML: an .mlpackage for iOS 18 / macOS 15, or for iOS 16",
    "gguf": "llama.cpp: a .gguf file with tokenizer and chat template",
}
"""Name -> what is made."""

_MODULES = {
    "ort": "ort.target",
    "genai": "ort.genai",
    "tflite": "tflite.target",
    "litertlm": "tflite.litertlm",
    "coreml": "coreml.target",
    "gguf": "gguf.target",
}
"""Name -> its module in `edgeq.converters`."""

PACKAGES = {
    "ort": ("onnx", "onnxruntime"),
    "genai": ("onnx", "onnxruntime", "onnxruntime_genai"),
    "tflite": ("ai_edge_litert", "flatbuffers"),
    "litertlm": ("ai_edge_litert", "flatbuffers", "litert_lm_builder"),
    "coreml": ("coremltools",),
    "gguf": (),
}
"""Target -> packages that writing and validating it takes; the extra is called like the target."""


@dataclass(frozen=True)
class Options:
    """What a conversion may be told; each target documents which it heeds.

    Args:
        context: length of the cache, in tokens; if None the model's own, at most 4096, or 1280
            for LiteRT.
        kv: how the target holds keys and values; None for its default.
        compute: "float" multiplies dequantized weights in floating point, which is exact;
            "int8" rounds activations to 8 bits as the target's fast kernels do. None for the
            target's default.
        prefill: lengths of the prefill signatures or functions, where a target fixes them.
        extra: options of one target alone.
    """

    context: int | None = None
    kv: Literal["float32", "float16", "int8"] | None = None
    compute: Literal["float", "int8"] | None = None
    prefill: tuple[int, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """A weight matrix as a target's file holds it, brought to common terms.

    The weight is ``scales * (levels - zero_points)``.

    Args:
        name: our name of the tensor.
        levels: int16 [N, K], unpadded: signed integers as they are multiplied with scales, the
            fixed zero point of a symmetric scheme taken off (-8 .. 7 for 4 bits); the entry of
            the table for a palette; with zero points, the unsigned codes.
        scales: float32 [N, G].
        zero_points: [N, G], or None for a symmetric scheme.
        first: the row they begin with, where a matrix comes in pieces of N rows.
    """

    name: str
    levels: NDArray[np.int16]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.int16] | None = None
    first: int = 0


class Runner(Protocol):
    """A converted model in its own runtime, with a cache that each call extends."""

    runtime: str
    """What executes it, with its version: "onnxruntime 1.31.1"."""
    precision: Precision
    """How it computes, which says how near to the source it must come."""
    context: int
    """Tokens it has room for."""

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of the tokens that follow [T, V], or [1, V] where only the last are made."""

    def reset(self) -> None:
        """Forget all tokens."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True)
class Execution:
    """A file of a target's format, ours or not, run once on random inputs.

    Args:
        runtime: what executed it, with its version.
        ops: operator -> how many there are.
        inputs: name -> shape of what it was given.
        outputs: name -> what came of it.
    """

    runtime: str
    ops: Mapping[str, int]
    inputs: Mapping[str, tuple[int, ...]]
    outputs: Mapping[str, NDArray[Any]]


Past = Sequence[int] | Sequence[Sequence[int]]
"""Tokens fed before a pass: at once, or piece by piece, as a prompt and then token after token."""
Trace = Callable[[Sequence[int], Past], "Mapping[str, NDArray[np.float32]]"]
"""(tokens, past) -> a target's results of the pass over the tokens, past being in its cache."""


def pieces(past: Past) -> list[list[int]]:
    """The pieces in which tokens are fed."""
    if len(past) and hasattr(past[0], "__len__"):
        return [list(piece) for piece in past]  # type: ignore[arg-type]
    return [list(past)] if len(past) else []  # type: ignore[arg-type]


def target_module(name: str) -> ModuleType:
    """The module of a target.

    Raises:
        UsageError: there is no such target; lists them.
    """
    if name not in TARGETS:
        raise UsageError(unknown("target", name, tuple(TARGETS)))
    return importlib.import_module(f"edgeq.converters.{_MODULES[name]}")


def require_target(name: str) -> None:
    """Refuse a target whose packages are not installed, before any work.

    Raises:
        UsageError: there is no such target; lists them.
        MissingDependencyError: names every missing package, and the target's extra.
    """
    if name not in TARGETS:
        raise UsageError(unknown("target", name, tuple(TARGETS)))
    require(name, PACKAGES[name], f"for the target {name}")


_SUFFIXES = {
    ".onnx": "ort",
    ".ort": "ort",
    ".tflite": "tflite",
    ".litertlm": "litertlm",
    ".mlpackage": "coreml",
    ".mlmodel": "coreml",
    ".gguf": "gguf",
}


def target_of(path: Path) -> str:
    """The target that a file or folder is of, by its name and what lies in it.

    Raises:
        FormatError: it does not exist, or is of none.
    """
    if not path.exists():
        raise FormatError(f"{path} does not exist; give the output of edgeq convert")
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    for inside, target in (("genai_config.json", "genai"), ("model.onnx", "ort")):
        if (path / inside).exists():
            return target
    raise FormatError(
        f"the format of {path} is unknown; name it with --target, one of {', '.join(TARGETS)}, "
        f"or give a file that ends in {', '.join(sorted(_SUFFIXES))}"
    )


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Args:
        target: its name.
        path: the file or folder.
        nbytes: of all its files.
        seconds: wall-clock time of writing.
        certificate: what validation found; None if it was left out.
    """

    target: str
    path: Path
    nbytes: int
    seconds: float
    certificate: Mapping[str, Any] | None = None
