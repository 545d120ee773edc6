"""The formulas of a decoder in NumPy, float32: each a pure function and the only copy.

Source: Touvron et al. 2023 (arXiv 2307.09288); Su et al. 2021 (arXiv 2104.09864) for rotary
positions, in the half-split order of the Hugging Face checkpoints; Zhang & Sennrich 2019 (arXiv
1910.07467) for the RMS norm; Shazeer 2020 (arXiv 2002.05202) for the gated feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.tensor import Tensor
from edgeq.model.block import BlockSpec, ExpertsSpec
from edgeq.model.config import Activation

Array = NDArray[np.float32]
Linear = Callable[[str, Array, Tensor], Array]
"""(tensor name, x [T, K], weight [N, K]) -> x @ weight.T [T, N]"""

BLOCK_ELEMENTS = 1 << 22
"""Weights turned to float32 at once (16 MiB): a large head is multiplied block of rows by block."""
QUERY_BLOCK = 128
"""Query positions attended at once, so that scores take [H, 128, S] rather than [H, T, S]."""
SIGMOID_SUM_EPS = np.float32(1e-6)
"""Added to the sum that weights of experts are divided by, where they are sigmoids (LFM2)."""
SWIGLU_ALPHA, SWIGLU_LIMIT = np.float32(1.702), np.float32(7)
"""Of "clamped_swiglu": what the gate is multiplied by in the sigmoid, and how far both go."""


def rms_norm(x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
    """Divide by the root mean square along the last axis, times ``weight + offset``.

    Args:
        x: float32 [..., n].
        weight: float32 [n].
        eps: added to the mean square.
        offset: 1.0 for Gemma, whose checkpoints hold the weight less one.
    """
    return cast(Array, divided_by_rms(x, eps) * (weight + np.float32(offset)))


def divided_by_rms(x: Array, eps: float) -> Array:
    """Divide by the root mean square along the last axis, to whose square ``eps`` is added."""
    square: Array = np.mean(x * x, axis=-1, keepdims=True)
    return cast(Array, x / np.sqrt(square + np.float32(eps)))


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each head by its position.

    Dimension i is paired with i + dim/2 (half-split order); dimensions past dim pass
    unchanged (partial rotary).

    Args:
        x: float32 [T, H, D].
        cos, sin: float32 [T, dim / 2], rows of `rope_tables` for the T positions.
    """
    half = cos.shape[1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = x.copy()
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    return out


def convolution(x: Array, weight: Array) -> Array:
    """Causal convolution of each column of x [T, K], the oldest tap added first: [T, K].

    Args:
        x: float32, a row for each position; before the first all are zero.
        weight: float32 [K, 1, taps]; the last tap is that of the current position.
    """
    taps = weight.shape[2]
    out = np.zeros_like(x)
    for tap in range(taps):
        back = taps - 1 - tap
        out[back:] += x[: max(0, len(x) - back)] * weight[:, 0, tap]
    return out


def activation(kind: Activation, x: Array) -> Array:
    """The gate's nonlinearity: "silu" is x * sigmoid(x), "gelu_tanh" GELU's tanh form."""
    if kind == "silu":
        with np.errstate(over="ignore"):  # exp(-x) = inf makes the quotient the right -0
            return cast(Array, x / (np.float32(1) + np.exp(-x)))
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return cast(Array, np.float32(0.5) * x * (np.float32(1) + np.tanh(inner)))


def gated(
    kind: Activation,
    gate: Array,
    up: Array,
    act: Callable[[Activation, Array], Array] = activation,
) -> Array:
    """What the last matrix of a feed-forward is multiplied with, from the results of the others.

    Args:
        kind: "clamped_swiglu", with ``gate`` at most 7 and ``up`` from -7 to 7: gate *
            sigmoid(1.702 gate) * (up + 1). Of the others: `activation` of gate, times up.
        gate, up: float32 of one shape.
        act: computes `activation`.
    """
    if kind != "clamped_swiglu":
        return act(kind, gate) * up
    gate = np.minimum(gate, SWIGLU_LIMIT)
    glu = act("silu", gate * SWIGLU_ALPHA) / SWIGLU_ALPHA
    return cast(Array, glu * (np.clip(up, -SWIGLU_LIMIT, SWIGLU_LIMIT) + np.float32(1)))


def softcap(x: Array, cap: float) -> Array:
    """``cap * tanh(x / cap)``, which is near x where x is small and never beyond cap."""
    return cast(Array, np.tanh(x / np.float32(cap)) * np.float32(cap))


def softmax(scores: Array) -> Array:
    """Softmax along the last axis; -inf marks what may not be seen."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return cast(Array, weights / weights.sum(axis=-1, keepdims=True))


def attention_shares(
    scores: Array, sinks: Array | None, shares: Callable[[Array], Array] = softmax
) -> Array:
    """What each position has of a head's attention: the softmax of its scores.

    Args:
        scores: float32 [..., S]; -inf marks what may not be seen.
        sinks: float32 that broadcasts to [..., 1], a further score whose share is dropped, or None.
        shares: computes the softmax.
    """
    if sinks is None:
        return shares(scores)
    sunk = np.broadcast_to(sinks, (*scores.shape[:-1], 1))
    return shares(np.concatenate([scores, sunk], axis=-1))[..., :-1]


def expert_weights(
    logits: Array,
    experts: ExpertsSpec,
    bias: Array | None,
    shares: Callable[[Array], Array] = softmax,
) -> Array:
    """The weight of each expert for each token, 0 for those that are not chosen.

    Args:
        logits: of the router, float32 [T, E].
        experts: how they are scored and weighted.
        bias: float32 [E], added to scores to choose, or None.
        shares: computes the softmax.

    Returns:
        float32 [T, E].
    """
    scores = logits
    if experts.score == "sigmoid":
        scores = shares(np.stack([logits, np.zeros_like(logits)], axis=-1))[..., 0]
    # softmax keeps the order of logits, and rounds neighbors to one value
    order = scores if bias is None else scores + bias
    chosen = np.argsort(-order, axis=1, kind="stable")[:, : experts.chosen]
    chosen.sort(axis=1)
    if experts.score == "softmax" and not experts.normalize:
        scores = shares(logits)
    weights = np.take_along_axis(scores, chosen, axis=1)
    if experts.normalize and experts.score == "softmax":
        weights = shares(weights)  # of the chosen alone, which is that of all divided by its sum
    elif experts.normalize:
        # added one by one, so that the order is that of the kernels
        sums: Array = np.add.accumulate(weights, axis=1, dtype=np.float32)[:, -1:]
        weights = weights / (sums + SIGMOID_SUM_EPS)
    out = np.zeros_like(logits)
    np.put_along_axis(out, chosen, weights * np.float32(experts.scale), axis=1)
    return out


def attend_blocks(
    block: BlockSpec, first: int, n: int
) -> list[tuple[slice, slice, NDArray[np.bool_]]]:
    """Cut attention of ``n`` new positions into blocks of queries.

    Args:
        block: decides the window, and whether what comes after a position is seen.
        first: position of the first new token.
        n: how many there are.

    Returns:
        For each block: the queries' rows (of n), the cached positions any of them sees, and
        bool [rows, positions] of what each sees.
    """
    blocks = []
    for a in range(0, n, QUERY_BLOCK):
        b = min(a + QUERY_BLOCK, n)
        seen = slice(block.first_seen(first + a), block.end_seen(first + b - 1, first + n))
        where = np.arange(seen.start, seen.stop)
        query = np.arange(first + a, first + b)
        starts = np.array([block.first_seen(int(pos)) for pos in query])
        ends = np.array([block.end_seen(int(pos), first + n) for pos in query])
        visible = (where[None, :] < ends[:, None]) & (where[None, :] >= starts[:, None])
        blocks.append((slice(a, b), seen, visible))
    return blocks


def dense(name: str, x: Array, weight: Tensor) -> Array:
    """The default `Linear`: x [T, K] @ weight.T in float32, a block of rows at a time."""
    n, k = weight.shape
    step = max(1, BLOCK_ELEMENTS // k)
    if step >= n:
        return x @ weight.numpy().T
    out = np.empty((x.shape[0], n), np.float32)
    for a in range(0, n, step):
        out[:, a : a + step] = x @ weight.rows(a, min(a + step, n)).T
    return out
