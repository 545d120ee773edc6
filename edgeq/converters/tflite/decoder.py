"""LiteRT (TensorFlow Lite): one .tflite with prefill and decode signatures.

    prefill_{T}   tokens [1, T], input_pos [T], cache -> cache
    decode        tokens [1, 1], input_pos [1], cache -> cache, logits [1, 1, V]

The cache, ``kv_cache_{k,v}_{i}``, goes in and comes out of each call, which is LiteRT-LM's
convention. A short convolution has ``kv_cache_conv_{i}``, its inputs in float32. `Options` heeded:
context, kv (float32, the default, float16 or int8), compute (int8, the default, or float) and
prefill (16 and 128).

Weights lie behind the flatbuffer, so that the file is written a block at a time and has no limit of
2 GB; that needs a runtime that knows ``Buffer.offset`` (TensorFlow Lite 2.15 and later).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.converters.mixers import check_attention_only
from edgeq.converters.options import Options, WrittenWith
from edgeq.converters.runners import DecoderRunner, Past, Precision, Trace, pieces
from edgeq.converters.size import Size
from edgeq.converters.stored import StoredConstant, StoredWeight
from edgeq.converters.target import DecoderTarget
from edgeq.converters.tflite import read as reading
from edgeq.converters.tflite.builder import BLOCK, LiteRTSettings, write_decoder
from edgeq.converters.tflite.file import TfliteFile
from edgeq.converters.tflite.interpreter import interpreter
from edgeq.converters.tflite.stored_matrix import multiplies_scales, only_in_float, stored_matrix
from edgeq.converters.validate.kernels import (
    Kernels,
    half,
    head_magnitude,
    on_rounded,
    one_magnitude,
    one_range,
)
from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.core.memory import trim
from edgeq.core.progress import Progress
from edgeq.formats.tensor import QuantTensor
from edgeq.graph.tflite.schema import schema
from edgeq.model.config import ModelConfig
from edgeq.model.formulas import dense
from edgeq.model.model import Model
from edgeq.model.reference import CacheRounding
from edgeq.model.rotary import default_context

PREFILL = (16, 128)
"""Lengths of prompts' graphs if none are given."""
MAX_CONTEXT = 1280
"""Tokens at most, if none are given. The cache goes in and out of each call, so that a token takes
longer the longer it is: SmolLM2-135M decodes 131 tokens a second with 512 and 44 with 4096."""
_LAYER = 400_000
"""Bytes of the objects that a layer of a graph is made of."""


class LiteRTDecoderTarget(DecoderTarget):
    """Decoders in LiteRT."""

    def check(self, model: Model, options: Options) -> None:
        """Refuse what the target cannot hold, before any work.

        Raises:
            FormatError: the model lacks a tensor.
            MissingDependencyError: LiteRT is not installed.
            UnsupportedError: layers that the graphs do not hold, or a scheme that LiteRT cannot
                multiply by.
            UsageError: an option out of range.
        """
        check_attention_only(model.config, "LiteRT", but="short_conv")
        schema()
        model.validate()
        how = settings(model.config, options)
        for name, _ in model.config.linears():
            try:
                stored = stored_matrix(model, name, how.compute)
            except UnsupportedError as err:
                if how.compute == "float":
                    raise
                try:
                    stored_matrix(model, name, "float")
                except UnsupportedError:
                    raise err from None
                raise UnsupportedError(f"{err}, or compute in float") from err
            tensor = model.tensors[name]
            if not isinstance(tensor, QuantTensor) or multiplies_scales(stored):
                continue
            if not (tensor.row_params()[0] > 0).all():
                raise UnsupportedError(
                    f"{name} has scales that are not positive, which LiteRT refuses to run in "
                    "integers; quantize it again from its floating-point source without negative "
                    "scales, as --preset w4-g32-gptq does, or compute in float"
                )

    def sizes(self, model: Model, options: Options) -> Iterator[Size]:
        """Bits and bytes of each matrix in the file."""
        compute = settings(model.config, options).compute
        for name, (n, _) in model.config.linears():
            how, tensor = stored_matrix(model, name, compute), model.tensors[name]
            if how.encoding is None:
                yield Size(name, tensor, None, tensor.nbytes)
            else:
                yield Size(
                    name, tensor, how.bits, n * how.width * how.bits // 8 + n * 2 * how.groups
                )

    def remarks(self, model: Model, options: Options) -> list[str]:
        """The defaults that were chosen, and what they cost."""
        config, how = model.config, settings(model.config, options)
        sentences = []
        if options.context is None and how.context < config.context:
            sentences.append(
                f"The context is {how.context} tokens (the model allows {config.context}): LiteRT "
                "copies the whole cache at each token, so that a longer context decodes slower. "
                "--ctx-size changes it."
            )
        floats = {
            name: str(tensor.scheme)
            for name, _ in config.linears()
            if isinstance(tensor := model.tensors[name], QuantTensor)
            and only_in_float(name, tensor)
        }
        for name, scheme in floats.items() if how.compute == "int8" else ():
            sentences.append(
                f"{name} is computed in float: exact, but slower than in integers, as LiteRT has "
                f"no integer kernel for {scheme}. It has one for w8-channel and w4-g32 "
                f"(edgeq quantize --tensor-type '{name}=w8-channel')."
            )
        return sentences

    def write(
        self, model: Model, out: Path, options: Options, progress: Progress | None = None
    ) -> None:
        """Write the file.

        Args:
            model: what `check` has passed.
            out: the file, which does not exist.
            options: context, kv, compute and prefill are heeded.
            progress: called with what is written, bytes done, and of how many.
        """
        how = settings(model.config, options)
        file = TfliteFile()
        write_decoder(file, model, how)
        file.metadata(reading.METADATA, json.dumps(_described(model, how)).encode())
        file.save(Path(out), progress)

    def memory(self, model: Model, options: Options) -> int:
        """Bytes that `write` takes at its peak: a block of weights, and the flatbuffer."""
        c, how = model.config, settings(model.config, options)
        graphs = len(how.prefill) + 1
        rows = sum(n for _, (n, _) in c.linears())
        tables = 4 * how.rows * sum(rope.dim for rope in c.ropes)
        return 32 * BLOCK + graphs * (c.layers + 1) * _LAYER + 48 * rows + 4 * tables

    def versions(self) -> dict[str, str]:
        """The libraries that take part."""
        schema()
        return {name: metadata.version(name) for name in ("ai-edge-litert", "flatbuffers")}

    def header(self, path: Path) -> reading.Header:
        """The header of the .tflite file that holds the decoder.

        Raises:
            FormatError: edgeq did not write it.
        """
        return reading.read(path)

    def read_weights(self, path: Path) -> Iterator[StoredWeight]:
        """The integers of every matrix, read back from the file.

        Raises:
            FormatError: edgeq did not write it.
        """
        return reading.stored(self.header(path))

    def wrote(self, path: Path) -> bool:
        """Whether the file's metadata describes a language model that edgeq converted."""
        return reading.has_metadata(path, reading.METADATA)

    def open_runner(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        """Open the file in LiteRT.

        Raises:
            FormatError: edgeq did not write it, or LiteRT cannot load it.
            MissingDependencyError: LiteRT is not installed.
        """
        return LiteRTRunner(path, threads=threads)

    def open_frugal(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        """The same with one signature in memory at a time."""
        return LiteRTRunner(path, threads=threads, frugal=True)

    @contextmanager
    def tracer(self, path: Path) -> Iterator[Trace]:
        """Passes whose results are all outputs, of a copy of the file that is loaded once.

        All tokens but the last go through the prefill signatures. Those need no more than the
        cache, so what comes after the last layer's keys and values has one row: the last token's.

        Raises:
            EdgeqError: there is no room for a copy of the file whose results are all outputs.
            FormatError: edgeq did not write it.
        """
        with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
            copy = Path(folder) / "traced.tflite"
            reading.with_results(self.header(path), copy)
            runner = LiteRTRunner(copy, frugal=True)
            try:
                yield runner.traced
            finally:
                runner.close()

    def read_options(self, path: Path) -> WrittenWith:
        """How the file was written."""
        recorded = self.header(path).settings
        options = Options(
            recorded["context"], recorded["kv"], recorded["compute"], tuple(recorded["prefill"])
        )
        return WrittenWith(options, recorded["edgeq_version"])

    def read_constants(self, path: Path) -> Iterator[StoredConstant]:
        """Every constant of the file."""
        return reading.constants(self.header(path))

    def kernels(self, path: Path, model: Model) -> Kernels:
        """How LiteRT rounds while it runs the file."""
        return _kernels(self.header(path).settings)


def settings(config: ModelConfig, options: Options) -> LiteRTSettings:
    """The options with their defaults for a model.

    Raises:
        UsageError: an option out of range.
    """
    if options.extra:
        raise UsageError(f"the target tflite has no option {', '.join(sorted(options.extra))}")
    context = (
        min(default_context(config), MAX_CONTEXT) if options.context is None else options.context
    )
    if not 2 <= context <= config.context:
        raise UsageError(f"context is {context}; this model supports 2 to {config.context} tokens")
    lengths = sorted(set(options.prefill)) or [n for n in PREFILL if n < context] or [context - 1]
    if lengths[0] < 1 or lengths[-1] >= context:
        raise UsageError(
            f"prefill lengths are {', '.join(map(str, lengths))}; "
            f"with a context of {context} they can be 1 to {context - 1}"
        )
    return LiteRTSettings(
        context, options.kv or "float32", options.compute or "int8", tuple(lengths)
    )


def _described(model: Model, how: LiteRTSettings) -> dict[str, Any]:
    quantized = [
        name for name, _ in model.config.linears() if isinstance(model.tensors[name], QuantTensor)
    ]
    return {
        "format_version": reading.VERSION,
        "edgeq_version": __version__,
        "config": model.config.to_dict(),
        "context": how.context,
        "kv": how.kv,
        "compute": how.compute,
        "prefill": list(how.prefill),
        "columns": {name: model.tensors[name].shape[1] for name in quantized},
    }


def _kernels(recorded: Mapping[str, Any]) -> Kernels:
    caches: dict[str, CacheRounding] = {"float16": half, "int8": head_magnitude}
    cache = caches.get(recorded["kv"])
    if recorded["compute"] != "int8" or not recorded["columns"]:
        return Kernels(cache=cache)
    return Kernels(
        # XNNPACK first, whose kernels for 4-bit groups read scales as bfloat16 (LiteRT 2.3; the
        # second is a build whose kernels read them as float16); then LiteRT's own kernel, which
        # runs where XNNPACK has none
        (
            on_rounded(one_range, bfloat16_group_scales=True, exact=only_in_float),
            on_rounded(one_range, exact=only_in_float),
            on_rounded(one_magnitude, exact=only_in_float),
            dense,
        ),
        cache,
        "LiteRT's fast kernels round the inputs of each token to 8 bits over one range for all "
        "of them, which costs most where a few channels are far larger than the rest, and the "
        "scales of groups of weights, if there are groups, to bfloat16, which costs little",
        "convert with --compute float (exact, but slower), to ort, coreml or gguf, whose kernels "
        "round less, or quantize with a preset that folds large channels into the weights before "
        "they are rounded, such as w4-awq-gptq",
    )


class LiteRTRunner:
    """A language model that edgeq converted, in LiteRT's interpreter.

    Args:
        path: the file.
        threads: it may use; all cores if None.
        frugal: keep one signature at a time. LiteRT holds the weights packed and the cache for
            each signature that was run; a change of signature then opens the file anew.
    """

    def __init__(
        self, path: str | Path, *, threads: int | None = None, frugal: bool = False
    ) -> None:
        header = reading.read(path)
        recorded = header.settings
        self.config = ModelConfig.from_dict(recorded["config"])
        self.runtime = f"ai-edge-litert {metadata.version('ai-edge-litert')}"
        rounded = "int8" in (recorded["compute"], recorded["kv"])
        self.precision: Precision = "int8" if rounded else recorded["kv"]
        self.results: dict[str, list[NDArray[np.float32]]] | None = None
        """Every output of every call that is not the cache's, once this is a dictionary."""
        self.context: int = recorded["context"]
        self._lengths: list[int] = recorded["prefill"]
        self._signatures: dict[str, Any] = {}
        self._path, self._threads, self._frugal = Path(path), threads, frugal
        self._interpreter = interpreter(self._path, threads=threads)
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self._past = 0
        self._cache: dict[str, NDArray[Any]] = {}

    def close(self) -> None:
        """Release everything."""
        self._signatures.clear()
        self._cache = {}
        self._interpreter = None

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of the last of the tokens that follow: [1, V].

        Raises:
            UsageError: no tokens, or more than the file's context has room for.
        """
        ids = np.asarray(tokens, np.int32).reshape(-1)
        if not ids.size:
            raise UsageError("there are no tokens; give at least one")
        if self._past + ids.size > self.context:
            raise UsageError(
                f"{self._past + ids.size} tokens, but the file was converted for {self.context}; "
                "convert with a longer context"
            )
        rest = ids[:-1]
        while rest.size:
            # the longest graph that the rest fills, or the shortest there is
            fitting = [n for n in self._lengths if n <= rest.size]
            length = max(fitting, default=self._lengths[0])
            self._call(f"prefill_{length}", rest[:length], length)
            rest = rest[length:]
        logits: NDArray[np.float32] = self._call("decode", ids[-1:], 1)["logits"]
        return logits.reshape(1, -1)

    def traced(self, tokens: Sequence[int], past: Past = ()) -> dict[str, NDArray[np.float32]]:
        """Every output of the pass over ``tokens`` once the cache holds those of ``past``."""
        self.reset()
        self.results = None
        for piece in pieces(past):
            self.forward(np.asarray(piece))
        self.results = {}
        self.forward(np.asarray(tokens))
        joined = {name: np.concatenate(parts) for name, parts in self.results.items()}
        self.results = None
        return {
            name: part.reshape(1, -1) if name == "logits" else part for name, part in joined.items()
        }

    def _call(self, signature: str, ids: NDArray[np.int32], length: int) -> dict[str, Any]:
        if signature not in self._signatures:
            if self._frugal and self._signatures:
                self._signatures.clear()
                self._interpreter = None
                trim()
                self._interpreter = interpreter(self._path, threads=self._threads)
            self._signatures[signature] = self._interpreter.get_signature_runner(signature)
        run = self._signatures[signature]
        if not self._cache:
            self._cache = {
                name: np.zeros(entry["shape"], entry["dtype"])
                for name, entry in run.get_input_details().items()
                if name.startswith("kv_cache_")
            }
        filled = np.zeros((1, length), np.int32)
        filled[0, : ids.size] = ids
        where = np.arange(self._past, self._past + length, dtype=np.int32)
        try:
            out: dict[str, Any] = run(tokens=filled, input_pos=where, **self._cache)
        except (ValueError, RuntimeError) as err:
            raise FormatError(f"LiteRT cannot run the signature {signature}: {err}") from err
        self._past += ids.size
        self._cache = {name: out[name] for name in self._cache}
        if self.results is not None:
            for name, result in out.items():
                if name not in self._cache:
                    self.results.setdefault(name, []).append(result[: ids.size])
        return out
