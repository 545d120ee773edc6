"""Core ML: one .mlpackage that holds the artifact's own integers, packed.

What is written, and how the graph looks, is told in `coreml_graph`, how weights are held in
`coreml_weights`. On this machine a package is executed by `coreml_exec`, in NumPy and float32:
that shows that the program means what it should. It says nothing of Apple's compiler, the Neural
Engine, or speed; ``examples/coreml_smoke_test.py`` runs a package on a Mac and compares.

Options of `edgeq.converters.Options`:
    context   positions of the cache; the model's own, at most 4096
    prefill   numbers of tokens a call may have beside 1; 64
    kv        "float16", the only type of Core ML's states
    compute   "float"
    extra     target_os  "ios18" (also macOS 15; the default) or "ios16" (macOS 13)
              precision  "mixed" (float16 products, float32 between; the default), "float16" (for
                         the Neural Engine) or "float32"
              shapes     "functions" (one for each number of tokens) or "enumerated" (one for all)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters import Execution, Options, Past, Precision, Stored, Trace, pieces
from edgeq.converters.constants import Constant, Made
from edgeq.converters.coreml_exec import open_model
from edgeq.converters.coreml_exec.blob import KINDS
from edgeq.converters.coreml_exec.load import (
    File,
    Function,
    Op,
    Tensor,
    functions,
    open_file,
    protobuf,
)
from edgeq.converters.coreml_exec.machine import Arithmetic, Machine, State
from edgeq.converters.coreml_graph import Settings, function_name, program
from edgeq.converters.coreml_package import VERSIONS, write_package
from edgeq.converters.coreml_weights import identifier, matrices, read_matrix
from edgeq.converters.decoder import LAYER_STEPS
from edgeq.converters.kernels import Kernels
from edgeq.converters.size import Size
from edgeq.errors import FormatError, UnsupportedError, UsageError, unknown
from edgeq.model import Model, ModelConfig
from edgeq.tensor import QuantTensor

TARGETS = ("ios18", "ios16")
PRECISIONS = {"mixed": ("fp16", "fp32"), "float16": ("fp16", "fp16"), "float32": ("fp32", "fp32")}
"""Name -> (type of products, type of all between them)."""
SHAPES = ("functions", "enumerated")
DEFAULT_CONTEXT, DEFAULT_PREFILL = 4096, 64
_LIBRARY, _BLOCK, _PER_LAYER = 320 << 20, 64 << 20, 2 << 20
"""Bytes: of coremltools with what it imports, of a block of weights, of a layer's graph."""
_ENTRY, _FORMAT = "edgeq", 1
"""Entry of the model's user-defined metadata, and its version."""
_RUNTIME = f"edgeq.converters.coreml_exec (NumPy {np.__version__})"
_STEP = re.compile(rf"layers_(\d+)_({'|'.join(LAYER_STEPS)})|embed|final_norm|logits")
"""Names in the program of the steps of `decoder`."""


def check(model: Model, options: Options) -> None:
    """Refuse what Core ML cannot hold.

    Raises:
        UnsupportedError: a scheme, or an option, that the system has nothing for.
        UsageError: an option outside what is allowed.
        MissingDependencyError: coremltools is not installed.
    """
    settings = _settings(model.config, options)
    matrices(model, settings.target, settings.narrow)
    protobuf("to write Core ML packages")


def write(
    model: Model,
    out: str | Path,
    options: Options,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a package.

    Args:
        model: quantized, or float.
        out: the folder to make, NAME.mlpackage.
        options: see the module.
        progress: called with each constant's name, how many are done, and of how many.

    Raises:
        EdgeqError: it cannot be written; nothing is left behind.
    """
    check(model, options)
    settings = _settings(model.config, options)
    held = matrices(model, settings.target, settings.narrow)
    about = {
        "format": _FORMAT,
        "config": model.config.to_dict(),
        "target_os": settings.target,
        "context": settings.context,
        "lengths": settings.lengths,
        "enumerated": settings.enumerated,
        "precision": _precision(model, settings),
        "arithmetic": next(
            k for k, v in PRECISIONS.items() if v == (settings.narrow, settings.wide)
        ),
        "edgeq": __version__,
    }
    schemes = sorted({str(getattr(model.tensors[name], "scheme", "float")) for name in held})
    write_package(
        Path(out),
        program(model, settings, held),
        VERSIONS[settings.target],
        {constant.name: constant for matrix in held.values() for constant in matrix.constants},
        {_ENTRY: json.dumps(about, separators=(",", ":"))},
        f"{model.config.family} decoder, {', '.join(schemes)}, by edgeq",
        progress,
    )


def sizes(model: Model, options: Options) -> Iterator[Size]:
    """Bits and bytes of each matrix in the package."""
    settings = _settings(model.config, options)
    for name, matrix in matrices(model, settings.target, settings.narrow).items():
        tensor = model.tensors[name]
        nbytes = sum(int(np.prod(c.shape)) * KINDS[c.kind].bits // 8 for c in matrix.constants)
        bits = KINDS[matrix.data.kind].bits
        if matrix.data.shape != (matrix.shape[0], matrix.padded):  # packed in bytes
            bits = int(np.prod(matrix.data.shape)) * 8 // int(np.prod(matrix.shape))
        yield Size(name, tensor, bits if isinstance(tensor, QuantTensor) else None, nbytes)


def memory(model: Model, options: Options) -> int:
    """Bytes that `write` takes at its peak, the model's mapped file not counted.

    coremltools itself, its objects for the graph of each function, and one block of weights.
    """
    settings = _settings(model.config, options)
    library = 0 if "coremltools" in sys.modules else _LIBRARY
    tensors = (model.tensors[name] for name, _ in model.config.linears())
    groups = max((t.scales.size for t in tensors if isinstance(t, QuantTensor)), default=0)
    graph = _PER_LAYER * model.config.layers * len(settings.functions)
    return library + _BLOCK + graph + 16 * groups


def _arithmetic(settings: Settings) -> str:
    """The option's name of what it computes in."""
    types = settings.narrow, settings.wide
    return next(name for name, pair in PRECISIONS.items() if pair == types)


def _precision(model: Model, settings: Settings) -> Precision:
    """What is lost even where the program is computed in float32."""
    floats = any(
        not isinstance(model.tensors[name], QuantTensor) for name, _ in model.config.linears()
    )
    rounded = settings.wide == "fp16" or (settings.narrow == "fp16" and floats)
    return "float16" if rounded else "float32"


def _settings(config: ModelConfig, options: Options) -> Settings:
    """Options as they were meant, or a refusal."""
    extra = dict(options.extra)
    target = _choice("target_os", extra.pop("target_os", TARGETS[0]), TARGETS)
    precision = _choice("precision", extra.pop("precision", "mixed"), tuple(PRECISIONS))
    default = "functions" if target == "ios18" else "enumerated"
    shapes = _choice("shapes", extra.pop("shapes", default), SHAPES)
    if extra:
        known = ("target_os", "precision", "shapes")
        raise UsageError(unknown("option of coreml", next(iter(extra)), known))
    if target == "ios16" and shapes == "functions":
        raise UsageError("iOS 16 knows one function a model; use shapes enumerated, or ios18")
    if options.kv not in (None, "float16"):
        raise UnsupportedError(
            f"--kv is {options.kv}, but Core ML keeps keys and values in float16; leave --kv out"
        )
    if options.compute not in (None, "float"):
        raise UnsupportedError(
            f"--compute is {options.compute}, but Core ML multiplies in floating point; "
            "leave --compute out, or use float"
        )
    context = options.context or min(config.context, DEFAULT_CONTEXT)
    if not 1 <= context <= config.context:
        raise UsageError(f"context is {context}; the model allows 1 to {config.context}")
    prefill = options.prefill or tuple(n for n in (DEFAULT_PREFILL,) if n <= context)
    if bad := [n for n in prefill if not 1 <= n <= context]:
        raise UsageError(f"prefill length {bad[0]} is outside 1 to the context, {context}")
    lengths = tuple(sorted({1, *prefill}))
    narrow, wide = PRECISIONS[precision]
    return Settings(target, narrow, wide, context, lengths, shapes == "enumerated")


def _choice(name: str, got: Any, allowed: Sequence[str]) -> str:
    if got not in allowed:
        raise UsageError(unknown(name, str(got), allowed))
    return str(got)


# --- reading back -----------------------------------------------------------------------------


class _Package:
    """A package of ours, opened."""

    def __init__(self, path: str | Path) -> None:
        self.file: File = open_file(path)
        entry = self.file.spec.description.metadata.userDefined.get(_ENTRY)
        if entry is None or self.file.spec.WhichOneof("Type") != "mlProgram":
            raise FormatError(f"{path} is not a language model that edgeq wrote")
        try:
            about = json.loads(entry)
            if about["format"] != _FORMAT:
                raise FormatError(
                    f"{path} was written by another version of edgeq: its format is "
                    f"{about['format']}, "
                    f"this edgeq reads {_FORMAT}"
                )
            self.config = ModelConfig.from_dict(about["config"])
            self.target, self.context = str(about["target_os"]), int(about["context"])
            self.lengths = [int(n) for n in about["lengths"]]
            self.enumerated = bool(about["enumerated"])
            self.precision: Precision = about["precision"]
            self.arithmetic = str(about.get("arithmetic", "mixed"))
            self.version = str(about.get("edgeq", ""))
        except (ValueError, KeyError, TypeError) as err:
            raise FormatError(f"{path}: its description is damaged ({err})") from err
        self.functions = functions(self.file)

    def function(self, tokens: int) -> Function:
        """The function for so many tokens."""
        name = "main" if self.enumerated else function_name(tokens)
        if name not in self.functions:
            raise FormatError(f"{self.file.path} has no function {name!r}")
        return self.functions[name]


def stored(path: str | Path) -> Iterator[Stored]:
    """The integers as the package holds them, tensor by tensor.

    Raises:
        FormatError: the package is damaged, or not ours.
    """
    package = _Package(path)
    ops: dict[str, Op] = {
        name: op for op in package.function(1).block.ops for name, _ in op.outputs
    }
    for name, shape in package.config.linears():
        if identifier(name) in ops:  # a float matrix is no result of an operator
            yield from read_matrix(name, shape, ops)


# --- running ----------------------------------------------------------------------------------


class CoreMLRunner:
    """A package executed by `coreml_exec`.

    ``call`` is all that touches the executor: with another in its place, the same feeding of
    tokens runs the package elsewhere.

    Args:
        path: of the package.
        arithmetic: what float16 is held as, the cache included.
    """

    def __init__(self, path: str | Path, arithmetic: Arithmetic = "float32") -> None:
        self._package = _Package(path)
        exact = self._package.precision == "float32" and arithmetic == "float32"
        self.precision: Precision = "float32" if exact else "float16"
        self.context = self._package.context
        self._machine = Machine(arithmetic)
        self.runtime = _RUNTIME
        self.reset()

    def call(
        self, function: str, inputs: Mapping[str, Any], watch: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Run a function of the package on the state that was kept."""
        return self._machine.run(self._package.functions[function], inputs, self._state, watch)

    @property
    def steps(self) -> tuple[str, ...]:
        """Names in the program of the decoder's steps."""
        block = self._package.function(1).block
        return tuple(name for op in block.ops for name, _ in op.outputs if _STEP.fullmatch(name))

    def reset(self) -> None:
        """Forget all tokens."""
        package = self._package
        first = package.function(1)
        self._state: State = self._machine.new_state(first)
        self._past: dict[str, NDArray[Any]] = {}
        if package.target == "ios16":
            c = package.config
            shape = (c.layers, c.kv_heads, package.context, c.head_dim)
            self._past = {
                name: np.zeros(shape, np.float32) for name in ("key_cache", "value_cache")
            }
        self.n_past = 0

    def close(self) -> None:
        """Give everything back."""
        self._state, self._past = {}, {}

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of what follows the last token: [1, V].

        Raises:
            UsageError: there are no tokens, or more than the cache holds.
        """
        logits: NDArray[np.float32] | None = None
        for results in self.passes(tokens):
            logits = results["logits"]
        if logits is None:
            raise UsageError("there are no tokens; give at least one")
        return logits

    def passes(
        self, tokens: Sequence[int] | NDArray[np.integer], watch: Sequence[str] = ()
    ) -> Iterator[dict[str, NDArray[Any]]]:
        """Feed tokens in pieces that the package has a length for.

        Yields:
            for each piece, logits and what was asked for by its name in the program; rows that
            are padding are cut off.
        """
        ids = np.asarray(tokens, np.int32).reshape(-1)
        room = self._package.context - self.n_past
        if ids.size > room:
            raise UsageError(
                f"{ids.size} tokens for the {room} places left of {self._package.context}; "
                "convert with a longer context"
            )
        at = 0
        while at < ids.size:
            length, n = self._length(ids.size - at)
            piece = np.zeros((1, length), np.int32)
            piece[0, :n] = ids[at : at + n]
            yield self._pass(piece, n, watch)
            at += n

    def _length(self, left: int) -> tuple[int, int]:
        """A length of the package for ``left`` more tokens, and how many of them it takes."""
        room = self._package.context - self.n_past
        usable = [n for n in self._package.lengths if n <= room]
        enough = [n for n in usable if n >= left]
        length = min(enough) if enough else max(usable)
        return length, min(length, left)

    def _pass(self, piece: NDArray[np.int32], n: int, watch: Sequence[str]) -> dict[str, Any]:
        function = self._package.function(piece.shape[1])
        position, last = np.array([self.n_past], np.int32), np.array([n - 1], np.int32)
        inputs = {"tokens": piece, "position": position, **self._past}
        if "last" in function.inputs:
            inputs["last"] = last
        found = self.call(function.name, inputs, watch)
        for cache, new in (("key_cache", "new_keys"), ("value_cache", "new_values")):
            if new in found:
                self._past[cache][:, :, self.n_past : self.n_past + n] = found.pop(new)[:, :, :n]
        self.n_past += n
        return {k: v if k == "logits" else v[:n] for k, v in found.items()}


def open(path: str | Path, *, threads: int | None = None) -> CoreMLRunner:
    """A package in our executor of Core ML programs.

    Args:
        path: the package.
        threads: NumPy's own are used, whatever this says.

    Raises:
        FormatError: the package is damaged, or not ours.
        MissingDependencyError: coremltools is not installed.
    """
    del threads
    return CoreMLRunner(path)


def trace(
    path: str | Path, tokens: Sequence[int], past: Past = ()
) -> dict[str, NDArray[np.float32]]:
    """Results of the pass over ``tokens`` once the cache holds ``past``, by names of `decoder`."""
    with tracer(path) as run:
        return run(tokens, past)


@contextmanager
def tracer(path: str | Path) -> Iterator[Trace]:
    """`trace` of one package, opened once."""
    runner = CoreMLRunner(path)
    try:
        yield partial(_traced, runner)
    finally:
        runner.close()


def _traced(
    runner: CoreMLRunner, tokens: Sequence[int], past: Past = ()
) -> dict[str, NDArray[np.float32]]:
    runner.reset()
    for piece in pieces(past):
        runner.forward(np.asarray(piece))
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for found in runner.passes(tokens, runner.steps):
        for label, value in found.items():
            rows = np.asarray(value, np.float32)
            # of logits there is one row, the last
            held = [] if label == "logits" else parts.setdefault(_STEP.sub(_dotted, label), [])
            held.append(rows)
            if label == "logits":
                parts["logits"] = held
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def made_with(path: str | Path) -> Made:
    """How the package was made."""
    package = _Package(path)
    extra = {
        "target_os": package.target,
        "precision": package.arithmetic,
        "shapes": "enumerated" if package.enumerated else "functions",
    }
    # a single token is always among the lengths
    lengths = tuple(package.lengths)
    return Made(Options(package.context, prefill=lengths, extra=extra), package.version)


def constants(path: str | Path) -> Iterator[Constant]:
    """Every constant of every function."""
    for name, function in _Package(path).functions.items():
        for op in function.block.walk():
            for parameter, values in op.inputs.items():
                for i, value in enumerate(values):
                    if isinstance(value, Tensor):
                        label = f"{name}/{op.name}.{parameter}" + (f".{i}" if i else "")
                        yield Constant(label, _stored_values(value))


def _stored_values(value: Tensor) -> NDArray[Any]:
    """A constant as it lies in the package; of less than 8 bits its bytes."""
    if value.blob is not None:
        blob = value.blob
        return blob.raw if blob.kind.bits < 8 else blob.read().reshape(value.shape)
    if isinstance(value.value, np.ndarray):
        return value.value
    return np.frombuffer(repr(value.value).encode(), np.uint8)


def kernels(path: str | Path, model: Model) -> Kernels:
    """What is executed here computes in float32 and rounds no inputs."""
    return Kernels()


def _dotted(match: re.Match[str]) -> str:
    return match[0] if match[1] is None else f"layers.{match[1]}.{match[2]}"


def execute(path: str | Path) -> Execution:
    """Run any Core ML file once, on random inputs; of an ML Program, its default function.

    Raises:
        FormatError: it is damaged or no Core ML file.
        UnsupportedError: an operator, layer or model that cannot be executed; names it.
        MissingDependencyError: coremltools is not installed.
    """
    model = open_model(path)
    functions_ = model.describe().functions
    name = model.default_function or next(iter(functions_))
    given = model.sample()
    found = model.predict(given)
    return Execution(
        _RUNTIME,
        functions_[name].ops,
        {key: np.shape(value) for key, value in given.items()},
        {key: _as_array(value) for key, value in found.items()},
    )


def _as_array(value: Any) -> NDArray[Any]:
    return np.array(list(value.values()) if isinstance(value, dict) else value)


def versions() -> dict[str, str]:
    """The libraries that took part.

    Raises:
        MissingDependencyError: coremltools is not installed.
    """
    protobuf("to write and read Core ML packages")
    import coremltools

    return {"coremltools": str(coremltools.__version__), "numpy": np.__version__}
