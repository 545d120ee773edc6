"""onnxruntime: a folder with model.onnx and model.onnx.data, for Android, iOS and everywhere.

``write`` to a name that ends in .onnx makes that file and NAME.onnx.data beside it, to any other
name a folder with model.onnx and model.onnx.data. `edgeq.converters.ort.builder` says which
operators are used. Every scheme of ours has a container: 2 to 4 and 8 bits with or without zero
points, in groups of 16 to 256; 3 bits travel as 4, palettes as 8 bits, one scale a row as the
scale of each of its blocks.

Options:
    compute      "int8" (the default) is MatMulNBits' accuracy_level 4, which rounds activations to
                 8 bits as it multiplies; "float" is accuracy_level 0
    kv           "float32" (the default), "float16" or "int8" (see `edgeq.converters.ort.cache`)
    context      length of the rotary tables; the cache itself grows as long as the caller lets it
    extra        "logits": "all" (the default) or "last", the positions that get logits;
                 "calibration": tokens that an int8 cache's scales are taken from;
                 "ort_format": True adds model.ort, in the format of minimal builds, and
                 model.required_operators.config for building one. It is made by onnxruntime's own
                 tool and is promised to load only in the version that made it, which it names

The metadata of model.onnx names edgeq's version, the recipe and sha256 the weights come from, and
under ``edgeq.needs`` the least onnxruntime of each feature used: ``edgeq.minimum_onnxruntime`` is
the highest of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeq._version import __version__
from edgeq.converters.mixers import check_attention_only
from edgeq.converters.options import Options, WrittenWith
from edgeq.converters.ort import run as ort_run
from edgeq.converters.ort.builder import OrtBuilder
from edgeq.converters.ort.cache import calibrate, with_int8_cache
from edgeq.converters.ort.file import STEP, OnnxGraphWriter, OrtSettings, encodings, features
from edgeq.converters.ort.ort_format import to_ort_format
from edgeq.converters.ort.run import (
    CACHE_DIGEST,
    CONFIG,
    OrtRunner,
    cache_digest,
    file_metadata,
    graph_of,
    read_constants,
    read_graph,
    read_kernels,
    read_weights,
    versions,
)
from edgeq.converters.ort.session import require
from edgeq.converters.runners import DecoderRunner, Trace
from edgeq.converters.size import Size
from edgeq.converters.stored import StoredConstant, StoredWeight
from edgeq.converters.target import DecoderTarget
from edgeq.converters.validate.kernels import Kernels
from edgeq.core.errors import UnsupportedError, UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.formats.packing import round_up
from edgeq.formats.tensor import QuantTensor
from edgeq.model.decoder import decoder
from edgeq.model.model import Model
from edgeq.model.reference import checked_tokens
from edgeq.model.rotary import default_context

_EXTRA = {"logits", "calibration", "ort_format"}
_FLATBUFFER = (1 << 31) - (1 << 20)
"""Bytes an .ort file may have."""


class OrtDecoderTarget(DecoderTarget):
    """Decoders in onnxruntime."""

    def check(self, model: Model, options: Options) -> None:
        """Refuse what onnxruntime cannot hold.

        Raises:
            UsageError: an unknown option, or a value outside what is allowed.
            UnsupportedError: layers that the graph does not hold, or an .ort file past 2 GB.
            MissingDependencyError: onnx or onnxruntime is not installed.
        """
        check_attention_only(model.config, "onnxruntime", but="short_conv")
        require()
        settings(model, options)
        encodings(model)
        if options.extra.get("ort_format") and (size := _ort_bytes(model)) > _FLATBUFFER:
            raise UnsupportedError(
                f"an .ort file holds at most 2 GB, this model takes {size / 1e9:.1f} GB in it; "
                "leave out ort_format: model.onnx with its data file has no such limit"
            )

    def memory(self, model: Model, options: Options) -> int:
        """Bytes that `write` takes at its peak.

        A piece of a tensor and the scales of the largest; where an int8 cache is calibrated or an
        .ort file made, onnxruntime loads the model too.
        """
        scales = max(
            (t.scales.size for t in model.tensors.values() if isinstance(t, QuantTensor)), default=0
        )
        tables = 4 * settings(model, options).context * sum(rope.dim for rope in model.config.ropes)
        need = 24 * STEP + 8 * scales + 4 * tables
        if options.kv == "int8":
            need += 2 * model.nbytes
        if options.extra.get("ort_format"):
            need += 4 * model.nbytes
        return need

    def sizes(self, model: Model, options: Options) -> Iterator[Size]:
        """Bits and bytes of each matrix in the data file."""
        encoding_of = encodings(model)
        for name, (n, k) in model.config.linears():
            tensor = model.tensors[name]
            if not isinstance(tensor, QuantTensor):
                yield Size(name, tensor, None, tensor.nbytes)
                continue
            bits, block = encoding_of[name].bits, encoding_of[name].group_size or k
            groups = tensor.scheme.n_groups(k)
            zeros = n * groups * bits // 8 if tensor.zero_points is not None else 0
            nbytes = n * round_up(k, block) * bits // 8 + n * groups * 2 + zeros
            yield Size(name, tensor, bits, nbytes)

    def write(
        self, model: Model, out: Path, options: Options, progress: Progress | None = None
    ) -> None:
        """Write the graph and its data, a piece of a tensor at a time."""
        import onnx

        chosen = settings(model, options)
        # an int8 cache is put into the finished float graph, which first says what its scales are
        first = replace(chosen, kv="float32") if chosen.kv == "int8" else chosen
        path = out if out.suffix == ".onnx" else out / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        with path.with_name(path.name + ".data").open("xb") as data:
            builder = OrtBuilder(OnnxGraphWriter(data, path.name + ".data"), model, first, progress)
            decoder(builder, model.config)
            data.flush()
            os.fsync(data.fileno())
        metadata = _metadata(model, chosen)
        if options.extra.get("ort_format"):
            metadata["edgeq.ort_format"] = versions()["onnxruntime"]
        proto = builder.proto(metadata)
        onnx.save_model(proto, path)
        if chosen.kv == "int8":
            tokens = options.extra.get("calibration")
            scales = calibrate(path, model.config, tokens, progress)
            cached = with_int8_cache(proto, scales)
            cached.metadata_props.add(key=CACHE_DIGEST, value=cache_digest(cached.graph))
            onnx.save_model(cached, path)
        if options.extra.get("ort_format"):
            to_ort_format(path, metadata["edgeq.ort_format"])

    def wrote(self, path: Path) -> bool:
        """Whether the graph's metadata holds a language model's configuration."""
        return CONFIG in file_metadata(graph_of(path))

    def open_runner(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        """The model in onnxruntime, on the CPU.

        Args:
            path: what `write` made, or its .onnx or .ort file.
            threads: of onnxruntime; all cores if None.

        Raises:
            FormatError: it is not such a model, or onnxruntime refuses it.
        """
        return OrtRunner(graph_of(path), threads=threads)

    def read_weights(self, path: Path) -> Iterator[StoredWeight]:
        """The integers, read from the graph's nodes and the data file."""
        return read_weights(graph_of(path))

    def tracer(self, path: Path) -> AbstractContextManager[Trace]:
        """`trace` of one file, loaded once."""
        return ort_run.tracer(graph_of(path))

    def read_options(self, path: Path) -> WrittenWith:
        """How the file was written.

        The scales of an int8 cache were measured and are no constants of the source, so the file
        is written again with a float cache.
        """
        proto = read_graph(graph_of(path))
        properties = {p.key: p.value for p in proto.metadata_props}
        kv: Any = "float32" if properties["edgeq.kv"] == "int8" else properties["edgeq.kv"]
        logits = next(o for o in proto.graph.output if o.name == "logits").type.tensor_type.shape
        compute: Any = properties["edgeq.compute"]
        extra = {"logits": "last" if logits.dim[1].dim_value == 1 else "all"}
        options = Options(int(properties["edgeq.context"]), kv, compute, extra=extra)
        return WrittenWith(options, properties["edgeq.version"])

    def read_constants(self, path: Path) -> Iterator[StoredConstant]:
        """Every constant of the graph."""
        return read_constants(graph_of(path))

    def kernels(self, path: Path, model: Model) -> Kernels:
        """How onnxruntime rounds while it runs the graph."""
        return read_kernels(graph_of(path))

    def versions(self) -> dict[str, str]:
        """onnx and onnxruntime."""
        return versions()


def settings(model: Model, options: Options) -> OrtSettings:
    """The options with their defaults.

    Raises:
        UsageError: as `check`.
    """
    for key in options.extra:
        if key not in _EXTRA:
            raise UsageError(unknown("option of ort", key, _EXTRA))
    if options.prefill:
        raise UsageError("ort takes prompts of any length; leave out prefill")
    logits = options.extra.get("logits", "all")
    if logits not in ("all", "last"):
        raise UsageError(unknown("value of logits", str(logits), ("all", "last")))
    longest = model.config.context
    context = default_context(model.config) if options.context is None else options.context
    if not 1 <= context <= longest:
        raise UsageError(f"context is {context}; the model's own is {longest}, give 1 to {longest}")
    if "calibration" in options.extra:
        _check_calibration(model, options)
    return OrtSettings(
        context, options.kv or "float32", options.compute or "int8", logits == "last"
    )


def _check_calibration(model: Model, options: Options) -> None:
    tokens = options.extra["calibration"]
    if options.kv != "int8":
        raise UsageError("calibration is for kv int8; leave it out")
    if not isinstance(tokens, Sequence | np.ndarray) or isinstance(tokens, str | bytes):
        raise UsageError(f"calibration is {tokens!r}; give the tokens of a text")
    checked_tokens(model.config, tokens)


def _metadata(model: Model, chosen: OrtSettings) -> dict[str, str]:
    needs = features(model, chosen)
    provenance = {k: v for k, v in model.provenance.items() if k != "tensors"}
    least = max(needs.values(), key=lambda text: tuple(map(int, text.split("."))))
    return {
        "edgeq.version": __version__,
        CONFIG: json.dumps(model.config.to_dict()),
        "edgeq.provenance": json.dumps(provenance, default=str),
        "edgeq.context": str(chosen.context),
        "edgeq.kv": chosen.kv,
        "edgeq.compute": chosen.compute if encodings(model) else "float",
        "edgeq.needs": json.dumps(needs),
        "edgeq.minimum_onnxruntime": least,
    }


def _ort_bytes(model: Model) -> int:
    """About what the .ort file takes: scales widened, a tied matrix twice."""
    c = model.config
    again = model.tensors[c.head_name].nbytes if c.tied else 0
    return int(1.15 * (model.nbytes + again))
