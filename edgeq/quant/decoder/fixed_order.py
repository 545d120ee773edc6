"""A decoder with a fixed order of summation, so that replays give the same bits on all machines.

The kernels of `edgeq.quant.kernels` compute what `edgeq.model.reference` computes with NumPy and
BLAS. Elementwise additions, multiplications and square roots are still NumPy's, because IEEE 754
defines their results.
"""

from __future__ import annotations

import numpy as np

from edgeq.formats.tensor import Tensor
from edgeq.model.block import ExpertsSpec
from edgeq.model.formulas import (
    BLOCK_ELEMENTS,
    Array,
    attend_blocks,
    attention_shares,
    expert_weights,
    gated,
)
from edgeq.model.reference import Reference
from edgeq.model.reference_cache import KV
from edgeq.quant.kernels.products import activation, product, row_products, softcap, softmax


class FixedOrderReference(Reference):
    """`Reference` with a fixed order of summation in norms, gates and attention.

    Its ``linear`` must be given; `fixed_order_dense` has a fixed order of summation too.
    """

    def new_cache(self) -> KV:
        """An empty cache for `forward`."""
        return FixedOrderKV(self.config)

    def norm(self, name: str, x: Array, weight: str) -> Array:
        """RMS norm: divide by the root mean square of the last axis, and multiply by the weight."""
        scale = self._vector(weight) + np.float32(self.config.norm_offset)
        return self._result(name, self._divided(x) * scale)

    def plain_norm(self, name: str, x: Array) -> Array:
        """RMS norm without a weight."""
        return self._result(name, self._divided(x))

    def _divided(self, x: Array) -> Array:
        square = row_products(x, x)[..., None] / np.float32(x.shape[-1])
        return np.asarray(x / np.sqrt(square + np.float32(self.config.norm_eps)))

    def gated(self, name: str, gate: Array, up: Array) -> Array:
        """Compute `edgeq.model.formulas.gated`."""
        if not gate.size:  # an expert that no token goes through
            return self._result(name, gate)
        return self._result(name, gated(self.config.activation, gate, up, activation))

    def _expert_weights(self, logits: Array, experts: ExpertsSpec, bias: Array | None) -> Array:
        return expert_weights(logits, experts, bias, softmax)

    def capped(self, name: str, x: Array, cap: float) -> Array:
        """Compute cap * tanh(x / cap)."""
        return self._result(name, softcap(x, cap))


class FixedOrderKV(KV):
    """Keys and values, with attention in a fixed order of summation."""

    def attend(self, layer: int, q: Array, sinks: Array | None = None) -> Array:
        """Attention of q [T, H, D] at positions n_past .. n_past+T-1, after `append`."""
        c = self.config
        n, head_dim = q.shape[0], q.shape[2]
        out = np.empty((n, c.kv_heads, c.group, head_dim), np.float32)
        grouped = q.reshape(out.shape)
        keys, values = self._k[c.kv_layer(layer)], self._v[c.kv_layer(layer)]
        for rows, seen, visible in attend_blocks(c.blocks[layer], self.n_past, n):
            count = rows.stop - rows.start
            hidden = np.repeat(~visible, c.group, axis=0)
            for head in range(c.kv_heads):
                own = None
                if sinks is not None:
                    own = np.tile(sinks.reshape(c.kv_heads, c.group)[head], count)[:, None]
                queries = grouped[rows, head].reshape(count * c.group, head_dim)
                scores = product(queries, keys[seen, head])
                scores *= np.float32(c.attn_scale)
                if c.attn_softcap is not None:
                    scores = softcap(scores, c.attn_softcap)
                scores[hidden] = -np.inf
                mixed = product(attention_shares(scores, own, softmax), values[seen, head].T)
                out[rows, head] = mixed.reshape(count, c.group, head_dim)
        return out.reshape(q.shape)


def fixed_order_dense(name: str, x: Array, weight: Tensor) -> Array:
    """Compute x [T, K] @ weight.T in blocks of rows of the weight."""
    n, k = weight.shape
    step = max(1, BLOCK_ELEMENTS // k)
    out = np.empty((x.shape[0], n), np.float32)
    for a in range(0, n, step):
        rows = weight.rows(a, min(a + step, n))
        product(x, rows, out[:, a : a + step])
    return out
