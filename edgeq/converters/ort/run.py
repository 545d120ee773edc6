"""ONNX files that edgeq wrote, in onnxruntime: run, read back, and traced.

The cache is one buffer for each of a layer's inputs and outputs, given to onnxruntime as both, so
that a step writes its own position only; it is doubled when it is full.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.ort.file import steps, unpack_rows
from edgeq.converters.ort.session import TYPES, first_line, open_session, require
from edgeq.converters.runners import Past, Precision, Trace, pieces
from edgeq.converters.stored import StoredConstant, StoredWeight
from edgeq.converters.validate.constants import operator
from edgeq.converters.validate.kernels import Kernels, by_blocks, half
from edgeq.core.errors import EdgeqError, FormatError, UsageError
from edgeq.formats.tensor import Tensor
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import OUTER_STEPS
from edgeq.model.formulas import Array, dense
from edgeq.model.reference import CacheRounding, checked_tokens

_ROOM = 256
"""Positions a new cache has room for."""
CONFIG = "edgeq.config"
"""Entry of the metadata: the model's hyperparameters."""
CACHE_DIGEST = "edgeq.cache_sha256"
"""Entry of the metadata: the checksum of an int8 cache's scales."""
_PER_HEAD = ("q_norm", "k_norm", "q_rope", "k_rope")
"""Steps whose results are [T, heads, D]; without a norm over all heads at once."""


def versions() -> dict[str, str]:
    """Versions of onnx and onnxruntime.

    Raises:
        MissingDependencyError: one is not installed.
    """
    onnx, onnxruntime = require()
    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def graph_of(path: Path) -> Path:
    """The .onnx or .ort file of a folder, or the file itself."""
    return path / "model.onnx" if path.is_dir() else path


class OrtRunner:
    """A decoder in onnxruntime's CPU provider.

    Args:
        path: .onnx or .ort file.
        threads: onnxruntime's; all cores if None.
        graph: the model's bytes, to be run in place of the file, with the data of its folder.
        profile: prefix of the file that onnxruntime's profiler writes; None does not profile.

    Raises:
        FormatError: it is no decoder of ours, or onnxruntime refuses it.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        graph: bytes | None = None,
        profile: Path | None = None,
    ) -> None:
        _, onnxruntime = require()
        self._values = onnxruntime.OrtValue
        self._session = open_session(path, threads=threads, graph=graph, profile=profile)
        meta: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.config, self.context = config_of(path, meta), int(meta["edgeq.context"])
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.precision = precision_of(meta)
        self._past = {
            i.name: (TYPES[i.type], i.shape)
            for i in self._session.get_inputs()
            if i.name.startswith("past_key_values.")
        }
        self._columns = {
            i.name: i.shape for i in self._session.get_inputs() if i.name.startswith("past_conv.")
        }
        self._n_past = 0
        self._cache: dict[str, Any] = {}
        self._kept: dict[str, Any] = {}  # of short convolutions
        self._results = [
            o.name
            for o in self._session.get_outputs()
            if not o.name.startswith(("present.", "present_conv."))
        ]
        self.reset()

    def forward(self, tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """Logits of the tokens that follow.

        Args:
            tokens: int [T], placed after what the cache holds.

        Returns:
            float32 [T, V], or [1, V] where the graph makes only the last.

        Raises:
            UsageError: no tokens, one outside the vocabulary, or more than the context holds.
        """
        return cast("NDArray[np.float32]", self.results(tokens)["logits"][0])

    def results(self, tokens: Sequence[int] | NDArray[np.integer]) -> dict[str, NDArray[Any]]:
        """Every output but the cache, by name, after one pass that extends the cache."""
        ids = checked_tokens(self.config, tokens)
        n = self._n_past + ids.size
        if n > self.context:
            raise UsageError(
                f"{n} tokens are more than the {self.context} that this file was converted for; "
                "convert again with a larger context"
            )
        self._make_room(n)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, n), np.int64))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        kept = {name: self._new_columns(shape) for name, shape in self._columns.items()}
        for name, value in self._kept.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past", "present"), kept[name])
        for name in self._results:
            binding.bind_output(name)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as err:
            raise EdgeqError(f"onnxruntime failed: {first_line(err)}") from err
        self._n_past, self._kept = n, kept
        outputs = binding.get_outputs()[len(self._cache) + len(kept) :]
        return {name: out.numpy() for name, out in zip(self._results, outputs, strict=True)}

    def end_profiling(self) -> Path:
        """The profiler's file."""
        return Path(self._session.end_profiling())

    def cache(self) -> dict[str, NDArray[Any]]:
        """The cache of the tokens so far: input name -> [Hkv, positions, D]."""
        return {name: v.numpy()[0, :, : self._n_past] for name, v in self._cache.items()}

    def reset(self) -> None:
        """Empty the cache."""
        self._n_past = 0
        self._cache = {}
        self._kept = {name: self._new_columns(shape) for name, shape in self._columns.items()}

    def close(self) -> None:
        """Close the session and free its cache."""
        self._n_past, self._cache, self._kept = 0, {}, {}
        self._session = None

    def _new_columns(self, shape: Sequence[int]) -> Any:
        """What is kept of a short convolution before the first position."""
        return self._values.ortvalue_from_numpy(np.zeros(shape, np.float32))

    def _make_room(self, n: int) -> None:
        have = next((v.shape()[2] for v in self._cache.values()), 0)
        if n <= have:
            return
        room = min(max(n, 2 * have, _ROOM), self.context)
        for name, (kind, shape) in self._past.items():
            bigger = np.zeros((1, shape[1], room, shape[3]), kind)
            if have:
                bigger[:, :, : self._n_past] = self._cache[name].numpy()[:, :, : self._n_past]
            self._cache[name] = self._values.ortvalue_from_numpy(bigger)


def config_of(path: Path, metadata: Mapping[str, str]) -> ModelConfig:
    """The model's hyperparameters, from a graph's metadata.

    Raises:
        FormatError: it has none.
    """
    try:
        return ModelConfig.from_dict(json.loads(metadata[CONFIG]))
    except (KeyError, ValueError) as err:
        raise FormatError(
            f"{path} is not a decoder that edgeq wrote: its metadata has no {CONFIG}"
        ) from err


def file_metadata(path: Path) -> dict[str, str]:
    """The metadata of an .onnx or .ort file.

    Raises:
        FormatError: it cannot be read, or is of neither format.
        MissingDependencyError: onnx or onnxruntime is not installed.
    """
    if path.suffix.lower() == ".ort":  # onnxruntime checks the file before it reads it
        return dict(open_session(path).get_modelmeta().custom_metadata_map)
    return {entry.key: entry.value for entry in read_graph(path).metadata_props}


def precision_of(metadata: Mapping[str, str]) -> Precision:
    """The least exact type a graph computes with."""
    types = (metadata["edgeq.kv"], metadata["edgeq.compute"])
    if "int8" in types:
        return "int8"
    return "float16" if "float16" in types else "float32"


def read_graph(path: Path) -> Any:
    """The graph of an .onnx file, without its external data.

    Raises:
        FormatError: it cannot be read, or is no ONNX.
    """
    onnx, _ = require()
    if path.suffix != ".onnx":
        raise FormatError(
            f"{path} is not an .onnx file; only .onnx files can be read back and traced"
        )
    try:
        return onnx.load_model(path, load_external_data=False)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    # protobuf's own exception has another home in each of its versions
    except Exception as err:
        raise FormatError(f"{path} is not an ONNX file, or is damaged: {first_line(err)}") from err


def read_weights(path: Path) -> Iterator[StoredWeight]:
    """The quantized matrices of a graph, as its nodes read them, a piece of rows at a time.

    A matrix that several nodes read from the same bytes comes once.

    Raises:
        FormatError: a file is damaged.
    """
    proto = read_graph(path)
    config = config_of(path, {p.key: p.value for p in proto.metadata_props})
    shapes = dict(config.linears())
    weights = _Initializers(path, proto.graph)
    seen: set[tuple[str, ...]] = set()
    for node in proto.graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        attributes = {a.name: a.i for a in node.attribute}
        gather = node.op_type == "GatherBlockQuantized"
        codes_at, scales_at = (0, 2) if gather else (1, 2)
        zeros_name = node.input[3] if len(node.input) > 3 else ""
        name = node.input[codes_at].rpartition(".")[0]
        if name not in shapes:
            raise FormatError(f"{path}: node {node.name} multiplies by the unknown {name!r}")
        n, k = shapes[name]
        parts = (node.input[codes_at], weights.source(node.input[scales_at]), zeros_name)
        key = tuple(weights.region(part) for part in parts)
        if key in seen:
            continue
        seen.add(key)
        bits, size = attributes["bits"], attributes["block_size"]
        codes = weights.array(parts[0]).reshape(n, -1)
        scales = weights.array(parts[1])
        zeros = weights.array(zeros_name).reshape(n, -1) if zeros_name else None
        for start, stop in steps((n, k)):
            rows = slice(start, stop)
            levels = unpack_rows(codes[rows], bits, k).astype(np.int16)
            scale = scales[rows].astype(np.float32)
            if zeros is None:
                levels -= np.int16(1 << (bits - 1))
                yield StoredWeight(name, levels, scale, None, start)
                continue
            zero = unpack_rows(zeros[rows], bits, -(-k // size)).astype(np.int16)
            yield StoredWeight(name, levels, scale, zero, start)


@contextmanager
def tracer(path: Path) -> Iterator[Trace]:
    """Every named result of `edgeq.model.decoder` of passes of one .onnx file.

    Yields:
        (tokens of the pass, what the cache holds before) -> name -> float32, in the decoder's
        order.
    """
    proto = read_graph(path)
    onnx, _ = require()
    config = config_of(path, {p.key: p.value for p in proto.metadata_props})
    names = [
        out
        for node in proto.graph.node
        for out in node.output
        if (out in OUTER_STEPS and out != "logits") or _is_step(out)
    ]
    kind = onnx.TensorProto.FLOAT
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    runner = OrtRunner(path, threads=1, graph=proto.SerializeToString())
    del proto

    def run(tokens: Sequence[int], past: Past = ()) -> dict[str, NDArray[np.float32]]:
        runner.reset()
        for piece in pieces(past):
            runner.results(piece)
        results = runner.results(tokens)
        heads = (len(tokens), -1, config.head_dim)
        over_all = any(block.qk_norm == "all" for block in config.blocks)
        per_head = _PER_HEAD[2:] if over_all else _PER_HEAD
        return {
            name: results[name][0].reshape(heads) if name.endswith(per_head) else results[name][0]
            for name in (*names, "logits")
        }

    try:
        yield run
    finally:
        runner.close()


def read_constants(path: Path) -> Iterator[StoredConstant]:
    """Every node and initializer of a graph and its data file, without an int8 cache's scales.

    Raises:
        FormatError: an int8 cache's scales, which the source does not give, were changed.
    """
    proto = read_graph(path)
    wanted = {p.key: p.value for p in proto.metadata_props}.get(CACHE_DIGEST)
    if wanted is not None and wanted != cache_digest(proto.graph):
        raise FormatError(
            f"{path}: the scales of the int8 cache are not those it was made with; convert again"
        )
    weights = _Initializers(path, proto.graph)
    for tensor in proto.graph.initializer:
        if not tensor.name.startswith("past_key_values."):
            yield StoredConstant(tensor.name, np.asarray(weights.array(tensor.name)))
    if {p.key: p.value for p in proto.metadata_props}.get("edgeq.kv") == "int8":
        return  # its nodes are those of a float cache, changed by scales that were measured
    for node in proto.graph.node:
        yield operator(node.output[0], node.SerializeToString(deterministic=True))
    for value in (*proto.graph.input, *proto.graph.output):
        yield operator(f"{value.name}, given", value.SerializeToString(deterministic=True))


def cache_digest(graph: Any) -> str:
    """SHA-256 of the scales of an int8 cache, which were measured."""
    digest = hashlib.sha256()
    for tensor in graph.initializer:
        if tensor.name.startswith("past_key_values."):
            digest.update(tensor.name.encode() + tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()


def read_kernels(path: Path) -> Kernels:
    """How MatMulNBits and the cache round, as a graph's nodes say."""
    proto = read_graph(path)
    meta = {p.key: p.value for p in proto.metadata_props}
    weights = _Initializers(path, proto.graph)
    blocks: dict[str, int] = {}
    for node in proto.graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {a.name: a.i for a in node.attribute}
            if attributes.get("accuracy_level") == 4:
                blocks[node.input[1].rpartition(".")[0]] = attributes["block_size"]
    caches: dict[str, CacheRounding] = {"float16": half, "int8": _static_cache(weights)}
    cache = caches.get(meta.get("edgeq.kv", ""))
    if not blocks:
        return Kernels(cache=cache)

    def product(name: str, x: Array, weight: Tensor) -> Array:
        return dense(name, by_blocks(x, blocks[name]) if name in blocks else x, weight)

    return Kernels(
        # some processors and shapes have no kernel for 8-bit inputs, and are exact
        (product, dense),
        cache,
        "onnxruntime's MatMulNBits rounds the inputs of each group of weights to 8 bits "
        "(accuracy_level 4)",
        "convert with --compute float, which is exact and slower",
    )


def _static_cache(weights: _Initializers) -> CacheRounding:
    """An int8 cache with a scale a channel, of which keys have their middle taken off first."""

    def rounded(kind: Literal["k", "v"], layer: int, values: Array) -> Array:
        past = f"past_key_values.{layer}.{'key' if kind == 'k' else 'value'}"
        heads, dim = values.shape[1:]
        scale = weights.array(f"{past}.scale").reshape(heads, -1)[:, :dim]
        middle = np.zeros_like(scale)
        if kind == "k":
            middle = weights.array(f"{past}.middle").reshape(heads, -1)[:, :dim]
        codes = np.clip(np.rint((values - middle) / scale), -128, 127)
        return cast("Array", (codes * scale + middle).astype(np.float32))

    return rounded


def _is_step(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "layers" and parts[1].isdigit()


class _Initializers:
    """Tensors of a graph, inside it or in external data files."""

    def __init__(self, path: Path, graph: Any) -> None:
        self._path = path
        self._tensors = {t.name: t for t in graph.initializer}
        self._nodes = {out: node for node in graph.node for out in node.output}

    def source(self, name: str) -> str:
        """The tensor that a value is a Cast or an Expand of."""
        while name in self._nodes:
            name = self._nodes[name].input[0]
        return name

    def region(self, name: str) -> str:
        """Where a tensor's bytes lie: the same for two names of the same bytes."""
        if name not in self._tensors:
            return name
        where = {e.key: e.value for e in self._tensors[name].external_data}
        return "{location}:{offset}".format(**where) if where else name

    def array(self, name: str) -> NDArray[Any]:
        """A tensor, mapped from its file."""
        onnx, _ = require()
        if name not in self._tensors:
            raise FormatError(f"{self._path} holds no tensor {name!r}")
        tensor = self._tensors[name]
        where = {e.key: e.value for e in tensor.external_data}
        if not where:
            return cast("NDArray[Any]", onnx.numpy_helper.to_array(tensor))
        kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        file = self._path.parent / Path(where["location"]).name
        try:
            return np.memmap(file, kind, "r", int(where["offset"]), tuple(tensor.dims))
        except (OSError, ValueError) as err:
            raise FormatError(f"{file} does not hold {name}: {err}; convert again") from err
