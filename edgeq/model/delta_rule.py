"""The gated delta rule in NumPy, float32: the only copy of its formula.

Of each value head a state S [key_dim, value_dim] is kept. At each position, with the head's query
q, key k and value v (after a causal convolution and SiLU, q and k divided by their norms), its
decay a and its strength b, both from 0 to 1:

    S = a S;   S = S + k (b (v - S' k))';   out = S' q / sqrt(key_dim)

and the mixer's output is the RMS norm of out times SiLU of z.

All sums are over the first axis of an array and every function is made of operations that IEEE 754
defines, so that the bits do not depend on the machine.

Source: Yang et al. 2024, "Gated Delta Networks" (arXiv:2412.06464); modeling_qwen3_5.py of
Transformers 5.24.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgeq.model.block import DeltaSpec

Array = NDArray[np.float32]
NORM_EPS = 1e-6
"""Added to the sum of squares of a query or key."""
_ONE = np.float32(1)
_LOG2_E, _LN_2 = 1.4426950408889634, 0.6931471805599453


@dataclass(frozen=True)
class DeltaWeights:
    """What a gated delta net has beside its matrices, float32.

    Args:
        taps: [channels, 1, taps]; the last tap is that of the current position.
        a_log, dt_bias: [value_heads].
        norm: [value_dim].
        eps: epsilon of the norm.
    """

    taps: Array
    a_log: Array
    dt_bias: Array
    norm: Array
    eps: float


@dataclass(frozen=True)
class DeltaInputs:
    """What the rule takes at some positions, float32.

    Args:
        q, k: [..., value_heads, key_dim], normalized; q divided by the root of key_dim.
        v: [..., value_heads, value_dim].
        strength, decay: [..., value_heads].
    """

    q: Array
    k: Array
    v: Array
    strength: Array
    decay: Array


def delta_inputs(
    spec: DeltaSpec, weights: DeltaWeights, qkv: Array, beta: Array, decay: Array
) -> DeltaInputs:
    """What the rule takes, from the convolution of qkv and the other projections.

    Args:
        spec: sizes.
        weights: of the layer.
        qkv: [..., channels], convolved.
        beta, decay: [..., value_heads].
    """
    mixed = qkv * sigmoid(qkv)
    q, k, v = np.split(mixed, [spec.keys, 2 * spec.keys], axis=-1)
    q, k = (
        np.repeat(
            _normalized(x.reshape(*x.shape[:-1], spec.key_heads, spec.key_dim)), spec.group, axis=-2
        )
        for x in (q, k)
    )
    rate = exp(weights.a_log.astype(np.float64))
    return DeltaInputs(
        q * np.float32(spec.key_dim**-0.5),
        k,
        v.reshape(*v.shape[:-1], spec.value_heads, spec.value_dim),
        sigmoid(beta),
        exp(-rate * _softplus(decay + weights.dt_bias)).astype(np.float32),
    )


def delta_step(state: Array, inputs: DeltaInputs) -> tuple[Array, Array]:
    """The rule at one position.

    Args:
        state: [..., value_heads, key_dim, value_dim].
        inputs: of the position.

    Returns:
        The new state, and what is read of it, [..., value_heads, value_dim].
    """
    k = inputs.k[..., None]
    state = state * inputs.decay[..., None, None]
    recalled = (state * k).sum(axis=-2)
    change = (inputs.v - recalled) * inputs.strength[..., None]
    state = state + k * change[..., None, :]
    return state, (state * inputs.q[..., None]).sum(axis=-2)


def delta_output(spec: DeltaSpec, weights: DeltaWeights, read: Array, z: Array) -> Array:
    """The mixer's output [..., values], from what was read [..., value_heads, value_dim]."""
    square = _sum_of_squares(read) / np.float32(read.shape[-1])
    normed = read / np.sqrt(square + np.float32(weights.eps)) * weights.norm
    gate = z.reshape(read.shape)
    out: Array = normed * (gate * sigmoid(gate))
    if spec.tiled_out:
        by_key = out.reshape(*out.shape[:-2], spec.key_heads, spec.group, spec.value_dim)
        out = by_key.swapaxes(-3, -2)
    return out.reshape(z.shape)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e ** -x), float32."""
    return cast(Array, (1 / (1 + exp(-x.astype(np.float64)))).astype(np.float32))


def exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """e ** x within a few units in the last place, x clamped to -700 .. 700; NaN stays NaN."""
    x = np.clip(x, -700, 700)
    n = np.rint(np.where(np.isnan(x), 0, x) * _LOG2_E)
    r = x - n * _LN_2
    p = np.ones_like(x)
    for term in range(13, 0, -1):
        p = p * r / term + 1
    return cast("NDArray[np.float64]", np.ldexp(p, n.astype(np.int32)))


def _softplus(x: Array) -> NDArray[np.float64]:
    """log(1 + e ** x), by log(1 + u) = 2 artanh(u / (2 + u))."""
    wide = x.astype(np.float64)
    u = exp(-np.abs(wide))
    s = u / (2 + u)
    total = np.zeros_like(s)
    for power in range(31, 0, -2):
        total = total * (s * s) + 1 / power
    return cast("NDArray[np.float64]", np.maximum(wide, 0) + 2 * s * total)


def _sum_of_squares(x: Array) -> Array:
    """Sums along the last axis [..., 1], added in order."""
    first = np.ascontiguousarray(np.moveaxis(x * x, -1, 0))
    return cast(Array, first.sum(axis=0)[..., None])


def _normalized(x: Array) -> Array:
    return cast(Array, x * (_ONE / np.sqrt(_sum_of_squares(x) + np.float32(NORM_EPS))))
