"""The decoder in LiteRT's operators: one graph for each length of prompt, one for a single token.

All graphs share the weights' buffers. A matrix of integers is multiplied in one of two ways:

    int8    FULLY_CONNECTED on the integers: the kernels round activations to 8 bits
    float   CAST to float32, times the scales, then FULLY_CONNECTED: exact, to check by; slow, and
            in memory like a float model (DEQUANTIZE gives wrong numbers for groups, LiteRT 2.3)

The cache comes in and goes out, [1, Hkv, rows, D] for keys and for values of each layer, under the
names LiteRT-LM looks for. A prompt's last piece is filled up to the graph's length, and its filling
goes to the cache too, where it is never seen and soon overwritten; the cache has rows to spare for
it, because an update that reached past the end would be moved. Of 8 bits it holds
``round(x / scale)`` and, in a tensor of its own, a scale for each position and head: the largest
magnitude / 127.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.encoding import levels, spread
from edgeq.converters.mixers import AttentionOnly
from edgeq.converters.tflite.file import SharedTable, TfliteFile
from edgeq.converters.tflite.operators import SubgraphWriter, Value
from edgeq.converters.tflite.stored_matrix import (
    StoredMatrix,
    stored_matrix,
)
from edgeq.formats.mapped_file import release
from edgeq.formats.packing import TILE, round_up
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import decoder
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeSpec
from edgeq.model.rotary import rope_tables

BLOCK = 1 << 20
"""Weights repacked, or read back, at once."""
_CONV_CACHE = "kv_cache_conv_"
"""Before the number of a layer: the cache of a short convolution."""


@dataclass(frozen=True)
class LiteRTSettings:
    """How a file is made.

    Args:
        context: most tokens it can see.
        kv: type of its cache.
        compute: "int8" or "float".
        prefill: lengths of its prompts' graphs, ascending.
    """

    context: int
    kv: Literal["float32", "float16", "int8"]
    compute: Literal["int8", "float"]
    prefill: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Positions the cache has room for, a prompt's filling included."""
        return self.context + max(self.prefill)


def write_decoder(file: TfliteFile, model: Model, settings: LiteRTSettings) -> None:
    """Put all the graphs of a model into a file."""
    weights = _SharedMatrices(file, model, settings)
    for length in (*settings.prefill, None):
        _LiteRTBuilder(file, model.config, settings, weights, length).finish()


def cache_inputs(
    config: ModelConfig, settings: LiteRTSettings
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and types of the cache's tensors."""
    inputs: dict[str, tuple[tuple[int, ...], str]] = {}
    for layer, block in enumerate(config.blocks):
        if block.mixer == "short_conv":
            assert block.window is not None  # checked by the block
            rows = settings.rows + block.window - 1  # zeros before the first position
            inputs[f"{_CONV_CACHE}{layer}"] = (1, 1, rows, config.hidden), "float32"
    for kind in "kv":
        for layer, block in enumerate(config.blocks):
            if block.mixer != "attention":
                continue
            name = f"kv_cache_{kind}_{layer}"
            inputs[name] = (1, config.kv_heads, settings.rows, config.head_dim), settings.kv
            if settings.kv == "int8":
                inputs[f"{name}_scale"] = (1, config.kv_heads, settings.rows, 1), "float32"
    return inputs


class _SharedMatrices:
    """The matrices of a model as values of a graph; their buffers are shared by all graphs."""

    def __init__(self, file: TfliteFile, model: Model, settings: LiteRTSettings) -> None:
        self._file = file
        self._model = model
        self._compute = settings.compute
        self._rows: dict[str, SharedTable] = {}

    def stored(self, name: str) -> StoredMatrix:
        """How the file holds a matrix."""
        return stored_matrix(self._model, name, self._compute)

    def vector(self, name: str) -> NDArray[np.float32] | None:
        """A norm or bias, if the model has it."""
        tensor = self._model.tensors.get(name)
        return None if tensor is None else tensor.numpy()

    def scales(self, name: str) -> NDArray[np.float32]:
        """Scales of rows, [N, 1]."""
        return _quant(self._model, name).row_params()[0][:, :1]

    def value(self, name: str) -> Value:
        """The matrix [N, width]."""
        how, tensor = self.stored(name), self._model.tensors[name]
        shape = (how.shape[0], how.width)
        if how.encoding is None:
            half = isinstance(tensor, FloatTensor) and tensor.dtype == "float16"
            kind = "float16" if half else "float32"
            nbytes = shape[0] * shape[1] * np.dtype(kind).itemsize
            buffer = self._file.streamed(name, nbytes, partial(self._floats, how, kind))
            return Value(name, shape, kind, buffer)
        nbytes = shape[0] * shape[1] * how.bits // 8
        buffer = self._file.streamed(name, nbytes, partial(self._integers, how))
        kind = f"int{how.bits}"
        if how.groups:
            return Value(name, shape, kind, buffer, group_scales=self._group_scales(how))
        if name not in self._rows:
            self._rows[name] = self._file.per_row(self.scales(name)[:, 0])
        return Value(name, shape, kind, buffer, self._rows[name])

    def _group_scales(self, how: StoredMatrix) -> Value:
        shape, label = (how.shape[0], how.groups), f"{how.name}.scales"
        nbytes = shape[0] * shape[1] * 2
        buffer = self._file.streamed(label, nbytes, partial(self._halves, how))
        return Value(label, shape, "float16", buffer)

    def _floats(self, how: StoredMatrix, kind: str) -> Iterator[NDArray[np.generic]]:
        tensor = self._model.tensors[how.name]
        for a, b in row_blocks(*how.shape):
            yield tensor.rows(a, b).astype(kind)
        release(tensor)

    def _integers(self, how: StoredMatrix) -> Iterator[NDArray[np.generic]]:
        tensor = _quant(self._model, how.name)
        for a, b in row_blocks(*how.shape):
            rows = np.zeros((b - a, how.width), np.int8)
            rows[:, : how.shape[1]] = levels(tensor, a, b, fold=True)[0]
            if how.bits == 4:
                codes = rows.view(np.uint8)
                yield (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
            else:
                yield rows
        release(tensor)

    def _halves(self, how: StoredMatrix) -> Iterator[NDArray[np.generic]]:
        tensor = _quant(self._model, how.name)
        assert how.encoding is not None
        have, want = tensor.scheme.group_size, how.encoding.group_size
        for a, b in row_blocks(*how.shape):
            scales = tensor.row_params(a, b)[0]
            yield spread(scales, how.shape[1], have, want).astype(np.float16)


def _quant(model: Model, name: str) -> QuantTensor:
    return cast(QuantTensor, model.tensors[name])


def row_blocks(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Cut the rows of a matrix into blocks of whole tiles."""
    step = round_up(max(1, BLOCK // k), TILE)
    for a in range(0, n, step):
        yield a, min(a + step, n)


class _LiteRTBuilder(AttentionOnly):
    """A graph for prompts of some length, or (None) for a single token with logits."""

    def __init__(
        self,
        file: TfliteFile,
        config: ModelConfig,
        settings: LiteRTSettings,
        weights: _SharedMatrices,
        length: int | None,
    ) -> None:
        self._config, self._settings, self._weights = config, settings, weights
        self._decode = length is None
        self._n = n = length or 1
        key = "decode" if length is None else f"prefill_{length}"
        self._g = g = SubgraphWriter(file, key, prefix=f"{key}/")
        self._inputs = {
            "tokens": g.input("tokens", (1, n), "int32"),
            "input_pos": g.input("input_pos", (n,), "int32"),
        }
        self._outputs: dict[str, Value] = {}
        for name, (shape, kind) in cache_inputs(config, settings).items():
            self._inputs[name] = g.input(name, shape, kind)
        self._tokens = g.reshape(self._inputs["tokens"], (n,))
        self._position = self._inputs["input_pos"]
        start = g.first(self._position)
        self._start = g.concat([g.constant([0, 0]), start, g.constant([0])], 0)
        self._matrices: dict[str, Value] = {}
        self._rotations: dict[RopeSpec, tuple[Value, Value]] = {}
        self._masks: dict[int | None, Value] = {}

    def finish(self) -> None:
        """Build the graph and put it into its file."""
        logits = decoder(self, self._config)
        if self._decode:
            shape = (1, 1, self._config.vocab)
            self._outputs["logits"] = self._g.reshape(logits, shape, "logits")
        self._g.finish(self._inputs, self._outputs)

    # --- the steps of `edgeq.model.decoder` ---

    def embed(self, name: str) -> Value:
        g, scale = self._g, self._config.embed_scale
        weight = "model.embed_tokens.weight"
        how, table = self._weights.stored(weight), self._matrix(weight)
        if table.dtype == "float16":
            rows = g.cast(g.gather(table, self._tokens), "float32")
        elif table.dtype == "int8" and table.group_scales is not None:
            levels_ = g.cast(g.gather(table, self._tokens), "float32")
            scales = g.cast(g.gather(table.group_scales, self._tokens), "float32")
            rows = self._scaled(levels_, scales)
        else:
            rows = g.embedding_lookup(self._tokens, table)
        rows = g.last(rows, 0, how.shape[1])
        if scale != 1.0:
            return g.mul(rows, g.constant(float(scale)), name)
        return g.reshape(rows, rows.shape, name)

    def norm(self, name: str, x: Value, weight: str) -> Value:
        g, config = self._g, self._config
        vector = self._weights.vector(weight)
        assert vector is not None
        vector = vector + np.float32(config.norm_offset)
        square = g.mean(g.mul(x, x))
        scale = g.rsqrt(g.add(square, g.constant(float(config.norm_eps))))
        return g.mul(g.mul(x, scale), g.constant(vector, weight), name)

    def linear(self, name: str, x: Value, weight: str) -> Value:
        g = self._g
        how, w = self._weights.stored(weight), self._matrix(weight)
        bias_name = weight.removesuffix("weight") + "bias"
        values = self._weights.vector(bias_name)
        bias = None if values is None else g.constant(values, bias_name)
        x = g.pad_last(x, how.width)
        if how.encoding is None:
            w = g.widened(w) if w.dtype == "float16" else w
        elif how.in_float and w.group_scales is not None:
            scales = g.cast(w.group_scales, "float32")
            w = self._scaled(g.cast(w, "float32"), scales)
        elif how.in_float:
            # a row's scale can as well be put on its sum, which is one number and not K
            out = g.fully_connected(x, g.cast(w, "float32"), None)
            scales = g.constant(self._weights.scales(weight)[:, 0], f"{weight}.scales")
            if bias is None:
                return g.mul(out, scales, name)
            return g.add(g.mul(out, scales), bias, name)
        return g.fully_connected(x, w, bias, name)

    def _matrix(self, name: str) -> Value:
        """A matrix of the model, one tensor of the graph however often it is used."""
        if name not in self._matrices:
            self._matrices[name] = self._weights.value(name)
        return self._matrices[name]

    def _scaled(self, levels_: Value, scales: Value) -> Value:
        """Levels [R, K] times the scales [R, G] of their groups."""
        g, (rows, width), groups = self._g, levels_.shape, scales.shape[1]
        product = g.mul(
            g.reshape(levels_, (rows, groups, width // groups)),
            g.reshape(scales, (rows, groups, 1)),
        )
        return g.reshape(product, (rows, width))

    def heads(self, name: str, x: Value, n: int) -> Value:
        return self._g.reshape(x, (x.shape[0], n, self._config.head_dim))

    def rope(self, name: str, x: Value, rope: RopeSpec) -> Value:
        g, dim = self._g, rope.dim
        cos, sin = self._rotation(rope)
        turned = g.last(x, 0, dim)
        swapped = g.concat([g.last(x, dim // 2, dim), g.last(x, 0, dim // 2)], -1)
        whole = dim == x.shape[-1]
        out = g.add(g.mul(turned, cos), g.mul(swapped, sin), name if whole else "")
        return out if whole else g.concat([out, g.last(x, dim, x.shape[-1])], -1, name)

    def _rotation(self, rope: RopeSpec) -> tuple[Value, Value]:
        """Cosines, and sines with the sign of what they are multiplied by: [T, 1, rope.dim]."""
        if rope not in self._rotations:
            g, shape = self._g, (self._n, 1, rope.dim)
            kind = self._config.rope_names[rope]
            cos, sin = (
                g.gather(g.constant(table, f"rope.{kind}.{word}"), self._position)
                for word, table in zip(
                    ("cos", "sin"),
                    rope_tables(rope, self._settings.rows, self._settings.context),
                    strict=True,
                )
            )
            self._rotations[rope] = (
                g.reshape(g.concat([cos, cos], -1), shape),
                g.reshape(g.concat([g.negative(sin), sin], -1), shape),
            )
        return self._rotations[rope]

    def attend(self, name: str, layer: int, q: Value, k: Value, v: Value) -> Value:
        g, c, n = self._g, self._config, self._n
        keys, key_scales = self._cached("k", layer, k)
        values, value_scales = self._cached("v", layer, v)
        rows = self._settings.rows
        q = g.mul(g.transpose(q, (1, 0, 2)), g.constant(float(c.attn_scale)))
        q = g.reshape(q, (1, c.kv_heads, c.group * n, c.head_dim))
        scores = g.batch_matmul(q, keys, transposed=True)
        if key_scales is not None:
            scores = g.mul(scores, key_scales)
        scores = g.reshape(scores, (1, c.heads, n, rows))
        if c.attn_softcap is not None:
            scores = self.capped("", scores, c.attn_softcap)
        weights = g.softmax(g.add(scores, self._mask(layer)))
        weights = g.reshape(weights, (1, c.kv_heads, c.group * n, rows))
        if value_scales is not None:
            weights = g.mul(weights, value_scales)
        mixed = g.reshape(g.batch_matmul(weights, values), (c.heads, n, c.head_dim))
        return g.reshape(g.transpose(mixed, (1, 0, 2)), (n, c.heads * c.head_dim), name)

    def short_conv(self, name: str, layer: int, b: Value, c: Value, x: Value, weight: str) -> Value:
        """c times the causal convolution of b * x, which the cache keeps for each position.

        So that what fills up a prompt is never seen: it is overwritten as keys and values are.
        """
        g, n, hidden = self._g, self._n, self._config.hidden
        kernel = self._weights.vector(weight)
        assert kernel is not None
        before, cache = kernel.shape[2] - 1, f"{_CONV_CACHE}{layer}"
        product = g.reshape(g.mul(b, x), (1, 1, n, hidden))
        start = g.add(self._start, g.constant([0, 0, before, 0])) if before else self._start
        whole = g.update(self._inputs[cache], product, start, f"{cache}_out")
        self._outputs[cache] = whole
        seen = g.part(whole, self._start, (1, 1, n + before, hidden))
        total: Value | None = None
        for tap in range(before + 1):
            rows = g.part(seen, g.constant([0, 0, tap, 0]), (1, 1, n, hidden))
            values = np.ascontiguousarray(kernel[:, 0, tap])
            one = g.mul(g.reshape(rows, (n, hidden)), g.constant(values, f"{weight}.{tap}"))
            total = one if total is None else g.add(total, one)
        assert total is not None  # there is a tap
        return g.mul(c, total, name)

    def _cached(self, kind: str, layer: int, new: Value) -> tuple[Value, Value | None]:
        """The layer's keys or values, the new ones put in, and scales [1, Hkv, 1, rows] if any."""
        g, c = self._g, self._config
        name = f"kv_cache_{kind}_{layer}"
        new = g.reshape(g.transpose(new, (1, 0, 2)), (1, c.kv_heads, self._n, c.head_dim))
        scales = None
        if self._settings.kv == "int8":
            tiny = g.constant(float(np.finfo(np.float32).tiny))
            scale = g.maximum(g.mul(g.largest(g.absolute(new)), g.constant(1 / 127)), tiny)
            new = g.round(g.div(new, scale))
            cached_scales = self._updated(f"{name}_scale", scale)
            scales = g.reshape(cached_scales, (1, c.kv_heads, 1, self._settings.rows))
        if self._settings.kv != "float32":
            new = g.cast(new, self._settings.kv)
        cache = self._updated(name, new)
        return (cache if cache.dtype == "float32" else g.cast(cache, "float32")), scales

    def _updated(self, name: str, new: Value) -> Value:
        """A part of the cache with new rows in it, which is what goes out under its name."""
        out = self._g.update(self._inputs[name], new, self._start, f"{name}_out")
        self._outputs[name] = out
        return out

    def _mask(self, layer: int) -> Value:
        """The mask that is added to scores [T, rows]: 0 where a position may be seen."""
        window = self._config.blocks[layer].window
        if window not in self._masks:
            g = self._g
            where = g.constant(np.arange(self._settings.rows, dtype=np.int32)[None])
            query = g.reshape(self._position, (self._n, 1))
            visible = g.less_equal(where, query)
            if window is not None:
                oldest = g.sub(query, g.constant([window]))
                visible = g.both(visible, g.greater(where, oldest))
            self._masks[window] = g.hidden(visible)
        return self._masks[window]

    def gated(self, name: str, gate: Value, up: Value) -> Value:
        g = self._g
        if self._config.activation == "silu":
            return g.mul(g.mul(gate, g.logistic(gate)), up, name)
        return g.mul(g.gelu_tanh(gate), up, name)

    def add(self, name: str, a: Value, b: Value) -> Value:
        return self._g.add(a, b, name)

    def scaled(self, name: str, x: Value, factor: float) -> Value:
        return self._g.mul(x, self._g.constant(float(factor)), _inner(name))

    def capped(self, name: str, x: Value, cap: float) -> Value:
        g, number = self._g, self._g.constant(float(cap))
        return g.mul(g.tanh(g.div(x, number)), number, _inner(name))

    def logits(self, name: str, x: Value, weight: str) -> Value:
        return self.linear(_inner(name), x, weight)


def _inner(name: str) -> str:
    """The name of a result before it is given its last shape, whose name "logits" is."""
    return "" if name == "logits" else name
