"""The packed decoder without compiled code: the kernels' arithmetic in NumPy.

It is `Reference` with another matrix product and another cache, so it differs from the compiled
backend only in the order of float additions:

    linear   x is rounded to INT8 in blocks of 32 along K; every block's integer sum is exact and
             is added in float32, block after block:
                 y[n] += float(sum_k q[k] * (code[n, k] - zero_point[n, g])) * (s[b] * scale[n, g])
             (groups of 16: each half block with its own weight scale). Float tensors are
             multiplied in float32.
    cache    8 or 4 bits: rounded as `edgeq.runtime.activations` says; queries, and attention
             weights times the values' scales, are rounded too, so that both products are integer
             sums.
             Positions go in chunks of 256, merged in ascending order.
             16 bits: k and v are float16, all else float32.

Integer sums go through float32 BLAS, which is exact while they stay below 2**24: a block's is at
most 32 * 127 * 255.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.dynamic_quant import Rounded, quantize_vectors
from edgeq.formats.packing import round_up
from edgeq.formats.schemes import K_BLOCK
from edgeq.formats.tensor import QuantTensor, Tensor
from edgeq.model.config import ModelConfig
from edgeq.model.formulas import Array, attend_blocks, dense, softcap
from edgeq.model.kv_bits import KvBits
from edgeq.model.memory_layout import CHUNK, KEPT_STATES, center_span
from edgeq.model.model import Model
from edgeq.model.mtp import PREFIX, mtp_model
from edgeq.model.reference import Reference
from edgeq.model.reference_cache import KV
from edgeq.runtime.activations import (
    VALUE_ZERO,
    hadamard,
    quantize_blocks,
    quantize_keys,
    quantize_twice,
    quantize_values,
)
from edgeq.runtime.kept_states import cut_states, kept_states
from edgeq.runtime.kv_state import Parts, paired, positions_in, unpaired

KEEP_WEIGHTS = 1 << 24
"""A model of at most this many weights is unpacked once, to float32 (64 MiB); a larger one is
unpacked at every product, as float32 would take several times the memory of its packed weights."""
UNPACK_WEIGHTS = 1 << 22
"""Weights unpacked at once where they are not stored unpacked (16 MiB as float32)."""


class NumpyBackend:
    """A model with a cache, run by NumPy alone; an `edgeq.runtime.backend.Backend`.

    Args:
        model: validated; quantized, float, or a mixture.
        context: positions the cache holds.
        kv_bits: 4, 8 or 16.

    Attributes:
        kv_bytes: of the cache.
        scratch_bytes: of stored unpacked weights.
    """

    def __init__(self, model: Model, context: int, kv_bits: KvBits = 8) -> None:
        c = model.config
        keep = sum(n * k for _, (n, k) in c.linears()) <= KEEP_WEIGHTS
        self.scratch_bytes = 0
        if keep:
            self.scratch_bytes = sum(
                4 * t.shape[0] * t.scheme.padded_k(t.shape[1])
                for name, t in model.tensors.items()
                if isinstance(t, QuantTensor)
                and name not in c.tables
                and not name.startswith(PREFIX)
            )
        self._product = PackedLinear(keep=keep)
        self._model, self._context = model, context
        self._reference = _KeepsNorm(model, linear=self._product, context=context)
        self._cache: KV = (
            KV(c, np.float16, context) if kv_bits == 16 else IntegerKV(c, context, kv_bits)
        )
        self.kv_bytes, self._kv_bits = self._cache.nbytes, kv_bits
        self._config = c
        self._starts = [0] * c.layers
        self._kept = np.zeros((KEPT_STATES if c.mtp else 0, c.hidden), np.float32)
        self.kv_bytes += self._kept.nbytes
        self._states = range(0)
        self._finite = True

    def forward(self, tokens: NDArray[np.int64], position: int, outputs: int) -> Array:
        """Run tokens at ``position``; logits [outputs, V] of the last ``outputs`` of them."""
        return self._run(tokens, position, outputs, None)

    def _run(
        self, tokens: NDArray[np.int64], position: int, outputs: int, states: Array | None
    ) -> Array:
        self._cache.truncate(position)
        # the engine notices an overflowing cache and damaged weights by the logits
        with np.errstate(over="ignore", invalid="ignore"):
            whole = outputs != 1
            logits = self._reference.forward(tokens, self._cache, whole, states)
        if self._kept.size:
            self._states = kept_states(self._states, position, len(tokens))
            where = np.arange(position, position + len(tokens))[-KEPT_STATES:]
            self._kept[where % KEPT_STATES] = self._reference.final_norm[-KEPT_STATES:]
        return logits[len(tokens) - outputs :] if whole else logits[None]

    def states(self) -> range:
        """The positions whose states are kept."""
        return self._states

    def state_rows(self, start: int, stop: int) -> Array:
        """The final norms of positions ``start:stop``, [T, hidden]."""
        return self._kept[np.arange(start, stop) % KEPT_STATES]

    def mtp(self, context: int, kv_bits: KvBits) -> tuple[NumpyBackend, ModelConfig]:
        """The model's multi-token-prediction head, and its hyperparameters."""
        head = mtp_model(self._model)
        return NumpyBackend(head, context, kv_bits), head.config

    def ahead(self, tokens: NDArray[np.int64], position: int, states: Array) -> tuple[Array, Array]:
        """Run a head on tokens and states; logits [V] and state [hidden] of the last."""
        logits = self._run(tokens, position, 1, states)
        return logits[0], self._reference.final_norm[-1]

    def hidden(self, tokens: NDArray[np.int64], position: int) -> Array:
        """Run tokens at ``position``; the final norm of each, [T, hidden]."""
        self.forward(tokens, position, len(tokens))
        return self._reference.final_norm

    def greedy(self, token: int, position: int, steps: int) -> list[int]:
        """``steps`` greedy tokens after ``token``; the last one is not in the cache."""
        chosen: list[int] = []
        for i in range(steps):
            logits = self.forward(np.array([token], np.int64), position + i, 1)
            self._finite = bool(np.isfinite(logits.max()))
            token = int(logits[0].argmax())
            chosen.append(token)
        return chosen

    def is_finite(self) -> bool:
        """Whether the last logits of `greedy` were numbers."""
        return self._finite

    def truncate(self, position: int) -> None:
        """Forget everything at and past ``position``."""
        self._cache.truncate(position)
        self._states = cut_states(self._states, position)
        if position == 0:
            self._starts = [0] * len(self._starts)

    def first(self, layer: int) -> int:
        """The first position of the sequence that the layer holds: 0 but for a loaded one."""
        if self._config.blocks[layer].delta:
            return max(
                self._starts[layer], self._config.blocks[layer].first_seen(self._cache.n_past)
            )
        return self._starts[layer]

    def resumes(self, position: int) -> bool:
        """Whether gated delta nets can go on at a position: not before a loaded state."""
        return position == 0 or self._cache.resumes(position)

    def settle(self, position: int) -> bool:
        """All states are computed when they are read."""
        return True

    def read(self, layer: int, start: int, stop: int) -> Parts:
        """A layer's cache of positions ``start:stop``, whole center spans."""
        span = center_span(self._kv_bits)
        spans = slice(start // span, -(-stop // span))
        parts = {
            name: array[spans if name == "centers" else slice(start, stop)]
            for name, array in self._cache.arrays(layer).items()
        }
        if self._kv_bits == 4 and "keys" in parts:
            parts |= {name: paired(parts[name]) for name in ("keys", "values")}
        if self._config.blocks[layer].delta:
            weights = self._reference.delta_weights(layer)
            parts["state"] = self._cache.state_at_end(layer, weights)
        return parts

    def write(self, layer: int, start: int, parts: Parts) -> None:
        """Put a saved sequence's last positions, from ``start`` to its end, into a layer."""
        for name, array in self._cache.arrays(layer).items():
            part = parts[name]
            if self._kv_bits == 4 and name in ("keys", "values"):
                part = unpaired(part, array.shape[-1])
            at = start // center_span(self._kv_bits) if name == "centers" else start
            array[:at] = 0  # masked, but part of a chunk that is read: they must be numbers
            array[at : at + len(part)] = part
        if not parts:
            return  # of a layer that reads the cache of another
        self._starts[layer] = start
        self._cache.n_past = start + positions_in(parts)
        if "state" in parts:
            self._cache.set_state(layer, self._cache.n_past, parts["state"])

    def close(self) -> None:
        """Nothing to release but memory, which goes with the object."""


class _KeepsNorm(Reference):
    """The reference, which keeps the final norm of each token of its last pass."""

    final_norm = np.empty((0, 0), np.float32)

    def _result(self, name: str, value: Array) -> Array:
        if name == "final_norm":
            self.final_norm = value
        return value


class PackedLinear:
    """x @ weight.T by integer sums of packed weights; a `reference.Linear`.

    Args:
        keep: unpack each tensor once and store it.
    """

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._unpacked: dict[str, Array] = {}

    def __call__(self, name: str, x: Array, weight: Tensor) -> Array:
        """The product, float32 [T, N]; floats are multiplied as floats."""
        if not isinstance(weight, QuantTensor):
            return dense(name, x, weight)
        n, k = weight.shape
        kp = weight.scheme.padded_k(k)
        codes, scales = quantize_blocks(x, kp)
        q = codes.astype(np.float32)
        if self._keep:
            if name not in self._unpacked:
                self._unpacked[name] = centered(weight, 0, n)
            return block_sums(
                q, scales, self._unpacked[name], weight.row_params()[0], weight.row_minimums()
            )
        out = np.empty((x.shape[0], n), np.float32)
        step = max(1, UNPACK_WEIGHTS // kp)
        for a in range(0, n, step):
            b = min(a + step, n)
            params = weight.row_params(a, b)[0], weight.row_minimums(a, b)
            out[:, a:b] = block_sums(q, scales, centered(weight, a, b), *params)
        return out


def centered(weight: QuantTensor, start: int, stop: int) -> Array:
    """Codes less their zero points (palette codes looked up) of rows ``start:stop``.

    Returns:
        float32 [padded K / w, w, rows], w = 16 for groups of 16 and 32 otherwise: each slice is
        a run of columns that shares one activation scale and one weight scale.
    """
    scheme, k = weight.scheme, weight.shape[1]
    codes = weight.codes(start, stop)
    if weight.palette is not None:
        values = weight.palette[codes].astype(np.float32)
    else:
        zeros = weight.row_params(start, stop)[1]
        values = codes.astype(np.float32)
        values -= np.repeat(zeros, scheme.group_size or k, axis=1)[:, :k]
    width = min(scheme.group_size or K_BLOCK, K_BLOCK)
    padded = np.zeros((stop - start, scheme.padded_k(k)), np.float32)
    padded[:, :k] = values
    runs = padded.reshape(stop - start, -1, width)
    return np.ascontiguousarray(runs.transpose(1, 2, 0))


def block_sums(
    q: Array, scales: Array, weights: Array, weight_scales: Array, minimums: Array | None = None
) -> Array:
    """Exact integer sums of runs of columns, scaled and added in float32, run after run.

    Args:
        q: activation codes as float32 [T, Kp].
        scales: float32 [T, Kp/32], of the activations.
        weights: float32 [Kp/w, w, N] from `centered`.
        weight_scales: float32 [N, G].
        minimums: float32 [N, G], of a scheme that has them.

    Returns:
        float32 [T, N].
    """
    runs, width, n = weights.shape
    per_group = -(-runs // weight_scales.shape[1])
    out = np.zeros((q.shape[0], n), np.float32)
    for run in range(runs):
        column = run * width
        sums = q[:, column : column + width] @ weights[run]
        scale = scales[:, column // K_BLOCK, None] * weight_scales[None, :, run // per_group]
        out += sums * scale
        if minimums is not None:
            totals = q[:, column : column + width].sum(axis=1, keepdims=True)
            out += totals * scales[:, column // K_BLOCK, None] * minimums[None, :, run // per_group]
    return out


class IntegerKV(KV):
    """Keys and values as integers, rounded as `edgeq.runtime.activations` says.

    Args:
        config: of the model.
        capacity: positions to make room for.
        bits: of a code, 4 or 8. Each takes a byte here.
    """

    def __init__(self, config: ModelConfig, capacity: int, bits: int = 8) -> None:
        super().__init__(config, np.uint8, capacity)
        self._bits, self._span = bits, center_span(bits)
        if bits == 8:
            self._v = [v.view(np.int8) for v in self._v]
        shapes = self.shapes(capacity)
        self._k_scales = [np.empty(shape[:2], np.float16) for shape in shapes]
        self._k_zeros = [np.empty(shape[:2], np.uint8) for shape in shapes]
        self._v_scales = [np.empty(shape[:2], np.float32) for shape in shapes]
        self._centers = [
            np.empty((round_up(room, self._span) // self._span, *head), np.float16)
            for room, *head in shapes
        ]

    def arrays(self, layer: int) -> dict[str, NDArray[Any]]:
        """What is stored of a layer, by position; centers by `center_span` positions."""
        arrays = super().arrays(layer)
        if "keys" not in arrays:
            return arrays
        return arrays | {
            "key_scales": self._k_scales[layer],
            "key_zeros": self._k_zeros[layer],
            "centers": self._centers[layer],
            "value_scales": self._v_scales[layer],
        }

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and centers."""
        layers = (self._k_scales, self._k_zeros, self._v_scales, self._centers)
        return super().nbytes + sum(part.nbytes for parts in layers for part in parts)

    def append(self, layer: int, k: Array, v: Array) -> None:
        """Round k and v [T, Hkv, D] and store them."""
        new = slice(self.n_past, self.n_past + k.shape[0])
        if self._bits == 4:
            k, v = hadamard(k), hadamard(v)
        span, place = np.divmod(np.arange(new.start, new.stop), self._span)
        self._centers[layer][span[place == 0]] = k[place == 0]
        k_codes, self._k_scales[layer][new], self._k_zeros[layer][new] = quantize_keys(
            k - self._centers[layer][span].astype(np.float32), self._bits
        )
        v_codes: NDArray[np.integer]
        v_codes, self._v_scales[layer][new] = (
            quantize_vectors(v) if self._bits == 8 else quantize_values(v)
        )
        self._store(layer, k_codes, v_codes)

    def attend(self, layer: int, q: Array, sinks: Array | None = None) -> Array:
        """Attention of q [T, H, D] at positions n_past ..: float32 [T, H, D]."""
        c = self.config
        n, source = q.shape[0], c.kv_layer(layer)
        out = np.empty((n, c.kv_heads, c.group, q.shape[2]), np.float32)
        if self._bits == 4:
            q = hadamard(q)
        # [group, Hkv, T, D]: the query heads of one key/value head along the first axis
        heads = q.reshape(out.shape).transpose(2, 1, 0, 3)
        for rows, seen, visible in attend_blocks(c.blocks[layer], self.n_past, n):
            total = None
            for start in range(seen.start // CHUNK * CHUNK, seen.stop, CHUNK):
                stop = min(start + CHUNK, seen.stop)
                first = max(start, seen.start)
                sees = np.zeros((visible.shape[0], stop - start), np.bool_)
                sees[:, first - start :] = visible[:, first - seen.start : stop - seen.start]
                part = self._chunk(source, slice(start, stop), heads[:, :, rows], sees)
                total = part if total is None else merge(total, part)
            assert total is not None  # a position sees itself
            if sinks is not None:
                own = sinks.reshape(c.kv_heads, c.group).T[:, :, None, None]
                total = merge(total, (own, np.ones_like(own), np.zeros_like(own)))
            out[rows] = (total[2] / total[1]).transpose(2, 1, 0, 3)
        if self._bits == 4:
            out = hadamard(out)
        return out.reshape(q.shape)

    def _chunk(self, layer: int, where: slice, q: Array, sees: NDArray[np.bool_]) -> Part:
        """Attention of q [group, Hkv, rows, D] over one chunk; ``sees`` is [rows, positions]."""
        scores = self._scores(layer, where, q) * np.float32(self.config.attn_scale)
        if self.config.attn_softcap is not None:
            scores = softcap(scores, self.config.attn_softcap)
        peak = np.where(sees, scores, UNSEEN).max(axis=-1, keepdims=True)
        weights = np.exp(np.where(sees, scores - peak, np.float32(-np.inf)))
        total = weights.sum(axis=-1, keepdims=True)
        v = self._v[layer][where].transpose(1, 0, 2).astype(np.int16)  # [Hkv, S, D]
        if self._bits == 4:
            v -= VALUE_ZERO
        weights *= self._v_scales[layer][where].T[:, None, :]
        return peak, total, integer_product(quantize_blocks(weights), v)

    def _scores(self, layer: int, where: slice, q: Array) -> Array:
        """q . k of one chunk's keys, float32 [group, Hkv, rows, S]."""
        n = where.stop - where.start
        spans = slice(where.start // self._span, -(-where.stop // self._span))
        centers = self._centers[layer][spans].astype(np.float32)
        shared = q @ centers.transpose(1, 2, 0)  # [group, Hkv, rows, spans]
        codes = self._k[layer][where].astype(np.int16) - self._k_zeros[layer][where, :, None]
        k = codes.transpose(1, 2, 0)  # [Hkv, D, S]
        scales = self._k_scales[layer][where].T[:, None, :].astype(np.float32)
        roundings = quantize_twice(q) if self._bits == 8 else (quantize_blocks(q),)
        scores = sum(integer_product(part, k) * scales for part in roundings)
        return cast(Array, scores + np.repeat(shared, self._span, axis=-1)[..., :n])


Part = tuple[Array, Array, Array]
"""Attention over some positions: (largest score, sum of exp, sum of exp * value), the first two
[..., rows, 1] and the last [..., rows, D]."""
UNSEEN = np.float32(-1e30)
"""The largest score where no position is seen."""


def merge(a: Part, b: Part) -> Part:
    """Attention over the positions of both."""
    peak = np.maximum(a[0], b[0])
    wa, wb = np.exp(a[0] - peak), np.exp(b[0] - peak)
    return peak, a[1] * wa + b[1] * wb, a[2] * wa + b[2] * wb


def integer_product(left: Rounded, right: NDArray[np.integer]) -> Array:
    """Rounded vectors times integers: exact sums of blocks of 32, added in float32.

    Args:
        left: codes [..., rows, Kp] and scales [..., rows, Kp/32] of `quantize_blocks`.
        right: integers of at most 9 bits [..., K, N], K at most Kp.

    Returns:
        float32 [..., rows, N].
    """
    codes, scales = left
    k, n = right.shape[-2:]
    out = np.zeros((*codes.shape[:-1], n), np.float32)
    for block, start in enumerate(range(0, k, K_BLOCK)):
        run = slice(start, min(start + K_BLOCK, k))
        sums = codes[..., run].astype(np.float32) @ right[..., run, :].astype(np.float32)
        out += sums * scales[..., block, None]
    return out
