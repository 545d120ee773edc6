"""Core ML: one .mlpackage that holds the artifact's own integers, packed.

`edgeq.converters.coreml.program` builds the program, `edgeq.converters.coreml.weights` stores the
weights. A package is executed by `edgeq.converters.coreml.exec`, in NumPy and float32: that shows
that the program means what it should. It says nothing of Apple's compiler, the Neural Engine, or
speed; ``examples/coreml_smoke_test.py`` runs a package on a Mac and compares.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters.coreml.exec import open_model
from edgeq.converters.coreml.exec.blob import KINDS
from edgeq.converters.coreml.exec.load import (
    MilTensor,
    Op,
    library,
    open_file,
    protobuf,
    versions,
)
from edgeq.converters.coreml.package import VERSIONS, write_package
from edgeq.converters.coreml.program import CoreMLSettings, program
from edgeq.converters.coreml.run import ENTRY, FORMAT, RUNTIME, STEP, CoreMLRunner, DecoderPackage
from edgeq.converters.coreml.weights import identifier, matrices, read_matrix
from edgeq.converters.mixers import check_attention_only
from edgeq.converters.options import Options, WrittenWith
from edgeq.converters.runners import DecoderRunner, Execution, Past, Precision, Trace, pieces
from edgeq.converters.size import Size
from edgeq.converters.stored import StoredConstant, StoredWeight
from edgeq.converters.target import DecoderTarget
from edgeq.converters.validate.constants import operator
from edgeq.converters.validate.kernels import Kernels
from edgeq.core.errors import UnsupportedError, UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.formats.tensor import QuantTensor
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import HEAD_STEPS
from edgeq.model.model import Model
from edgeq.model.rotary import default_context

TARGETS = ("ios18", "ios16")
PRECISIONS = {"mixed": ("fp16", "fp32"), "float16": ("fp16", "fp16"), "float32": ("fp32", "fp32")}
"""Name -> (type of products, type of all between them)."""
SHAPES = ("functions", "enumerated")
DEFAULT_PREFILL = 64
_LIBRARY, _BLOCK, _PER_LAYER = 320 << 20, 64 << 20, 2 << 20
"""Bytes: of coremltools with what it imports, of a block of weights, of a layer's graph."""


class CoreMLDecoderTarget(DecoderTarget):
    """Decoders in Core ML packages."""

    def check(self, model: Model, options: Options) -> None:
        """Refuse what Core ML cannot hold.

        Raises:
            UnsupportedError: layers without attention, or a scheme or an option that the system has
                nothing for.
            UsageError: an option outside what is allowed.
            MissingDependencyError: coremltools is not installed.
        """
        check_attention_only(model.config, "Core ML")
        settings = _settings(model.config, options)
        matrices(model, settings.target, settings.narrow)
        protobuf("to write Core ML packages")

    def write(
        self,
        model: Model,
        out: str | Path,
        options: Options,
        progress: Progress | None = None,
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
        self.check(model, options)
        library()
        settings = _settings(model.config, options)
        stored = matrices(model, settings.target, settings.narrow)
        about = {
            "format": FORMAT,
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
        schemes = sorted({str(getattr(model.tensors[name], "scheme", "float")) for name in stored})
        write_package(
            Path(out),
            program(model, settings, stored),
            VERSIONS[settings.target],
            {
                constant.name: constant
                for matrix in stored.values()
                for constant in matrix.constants
            },
            {ENTRY: json.dumps(about, separators=(",", ":"))},
            f"{model.config.family} decoder, {', '.join(schemes)}, by edgeq",
            progress,
        )

    def sizes(self, model: Model, options: Options) -> Iterator[Size]:
        """Bits and bytes of each matrix in the package."""
        settings = _settings(model.config, options)
        for name, matrix in matrices(model, settings.target, settings.narrow).items():
            tensor = model.tensors[name]
            nbytes = sum(int(np.prod(c.shape)) * KINDS[c.kind].bits // 8 for c in matrix.constants)
            bits = KINDS[matrix.data.kind].bits
            if matrix.data.shape != (matrix.shape[0], matrix.padded):  # packed in bytes
                bits = int(np.prod(matrix.data.shape)) * 8 // int(np.prod(matrix.shape))
            yield Size(name, tensor, bits if isinstance(tensor, QuantTensor) else None, nbytes)

    def memory(self, model: Model, options: Options) -> int:
        """Bytes that `write` takes at its peak, the model's mapped file not counted.

        coremltools itself, its objects for the graph of each function, and one block of weights.
        """
        settings = _settings(model.config, options)
        library = 0 if "coremltools" in sys.modules else _LIBRARY
        tensors = (model.tensors[name] for name, _ in model.config.linears())
        groups = max((t.scales.size for t in tensors if isinstance(t, QuantTensor)), default=0)
        graph = _PER_LAYER * model.config.layers * len(settings.functions)
        return library + _BLOCK + graph + 16 * groups

    def read_weights(self, path: str | Path) -> Iterator[StoredWeight]:
        """The integers as the package holds them, tensor by tensor.

        Raises:
            FormatError: the package is damaged, or edgeq did not write it.
        """
        package = DecoderPackage(path)
        ops: dict[str, Op] = {
            name: op for op in package.function(1).block.ops for name, _ in op.outputs
        }
        for name, shape in package.config.linears():
            if identifier(name) in ops:  # a float matrix is no result of an operator
                yield from read_matrix(name, shape, ops)

    def wrote(self, path: str | Path) -> bool:
        """Whether the package's metadata describes a language model that edgeq converted."""
        return ENTRY in open_file(path).metadata

    def open_runner(self, path: str | Path, *, threads: int | None = None) -> DecoderRunner:
        """Open a package in edgeq's executor of Core ML programs.

        Args:
            path: the package.
            threads: not used; NumPy chooses its own.

        Raises:
            FormatError: the package is damaged, or edgeq did not write it.
            MissingDependencyError: coremltools is not installed.
        """
        del threads
        return CoreMLRunner(path)

    @contextmanager
    def tracer(self, path: str | Path) -> Iterator[Trace]:
        """`trace` of one package, opened once."""
        runner = CoreMLRunner(path)
        try:
            yield partial(_traced, runner)
        finally:
            runner.close()

    def read_options(self, path: str | Path) -> WrittenWith:
        """How the package was made."""
        package = DecoderPackage(path)
        extra = {
            "target_os": package.target,
            "precision": package.arithmetic,
            "shapes": "enumerated" if package.enumerated else "functions",
        }
        # a single token is always among the lengths
        lengths = tuple(package.lengths)
        return WrittenWith(Options(package.context, prefill=lengths, extra=extra), package.version)

    def read_constants(self, path: str | Path) -> Iterator[StoredConstant]:
        """Every constant of every function."""
        for name, function in DecoderPackage(path).functions.items():
            for op in function.block.walk():
                for parameter, values in op.inputs.items():
                    for i, value in enumerate(values):
                        if isinstance(value, MilTensor):
                            label = f"{name}/{op.name}.{parameter}" + (f".{i}" if i else "")
                            yield StoredConstant(label, _stored_values(value))
                read = {k: [v for v in vs if isinstance(v, str)] for k, vs in op.inputs.items()}
                if op.type != "const":
                    yield operator(f"{name}/{op.name}", (op.type, sorted(read.items()), op.outputs))

    def kernels(self, path: str | Path, model: Model) -> Kernels:
        """The executor computes in float32 and rounds no inputs."""
        return Kernels()

    def execute(self, path: str | Path) -> Execution:
        """Run any Core ML file once, on random inputs; of an ML Program, its default function.

        Raises:
            FormatError: it is damaged or no Core ML file.
            UnsupportedError: an operator, layer or model that cannot be executed; names it.
            MissingDependencyError: coremltools is not installed.
        """
        model = open_model(path)
        functions = model.describe().functions
        name = model.default_function or next(iter(functions))
        inputs = model.sample()
        outputs = model.predict(inputs)
        return Execution(
            RUNTIME,
            functions[name].ops,
            {key: np.shape(value) for key, value in inputs.items()},
            {key: _as_array(value) for key, value in outputs.items()},
        )

    def versions(self) -> dict[str, str]:
        """The libraries that took part.

        Raises:
            MissingDependencyError: coremltools is not installed.
        """
        return versions()


def _precision(model: Model, settings: CoreMLSettings) -> Precision:
    """The precision that is lost even where the program is computed in float32."""
    floats = any(
        not isinstance(model.tensors[name], QuantTensor) for name, _ in model.config.linears()
    )
    rounded = settings.wide == "fp16" or (settings.narrow == "fp16" and floats)
    return "float16" if rounded else "float32"


def _settings(config: ModelConfig, options: Options) -> CoreMLSettings:
    """The options, parsed and checked."""
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
    context = options.context or default_context(config)
    if not 1 <= context <= config.context:
        raise UsageError(f"context is {context}; the model allows 1 to {config.context}")
    prefill = options.prefill or tuple(n for n in (DEFAULT_PREFILL,) if n <= context)
    if bad := [n for n in prefill if not 1 <= n <= context]:
        raise UsageError(f"prefill length {bad[0]} is outside 1 to the context, {context}")
    lengths = tuple(sorted({1, *prefill}))
    narrow, wide = PRECISIONS[precision]
    return CoreMLSettings(target, narrow, wide, context, lengths, shapes == "enumerated")


def _choice(name: str, got: Any, allowed: Sequence[str]) -> str:
    if got not in allowed:
        raise UsageError(unknown(name, str(got), allowed))
    return str(got)


# --- reading back and running ---------------------------------------------------------------


def _traced(
    runner: CoreMLRunner, tokens: Sequence[int], past: Past = ()
) -> dict[str, NDArray[np.float32]]:
    runner.reset()
    for piece in pieces(past):
        runner.forward(np.asarray(piece))
    parts: dict[str, list[NDArray[np.float32]]] = {}
    for results in runner.passes(tokens, runner.steps):
        for label, value in results.items():
            rows = np.asarray(value, np.float32)
            name = STEP.sub(_dotted, label)
            if name in HEAD_STEPS:  # there is one row, the last
                parts[name] = [rows]
            else:
                parts.setdefault(name, []).append(rows)
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def _stored_values(value: MilTensor) -> NDArray[Any]:
    """A constant as the package stores it; its bytes if it has less than 8 bits."""
    if value.blob is not None:
        blob = value.blob
        return blob.raw if blob.kind.bits < 8 else blob.read().reshape(value.shape)
    if isinstance(value.value, np.ndarray):
        return value.value
    return np.frombuffer(repr(value.value).encode(), np.uint8)


def _dotted(match: re.Match[str]) -> str:
    return match[0] if match[1] is None else f"layers.{match[1]}.{match[2]}"


def _as_array(value: Any) -> NDArray[Any]:
    return np.array(list(value.values()) if isinstance(value, dict) else value)
