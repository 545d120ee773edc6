"""The first step of a converted decoder that computes something else.

A target's results of one pass are laid beside NumPy's, step by step in the decoder's order, each
step computed from the target's own inputs to it: rounding does not pile up from layer to layer,
and a fault shows where it is made, not everywhere after.

Where the target's kernels round their inputs, NumPy repeats that rounding (`kernels`), so that the
same tight bound serves every target.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.runners import Precision, Trace
from edgeq.converters.validate.kernels import Kernels, sparing
from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.spill import Spill
from edgeq.formats.tensor import row_blocks
from edgeq.model.decoder import key_step
from edgeq.model.formulas import Array, Linear, dense
from edgeq.model.model import Model
from edgeq.model.trace import TracedReference

_SMALL = 1 << 24
"""Weights of a small model, of which 64 MiB are held as float32."""
_SHORT = 7
"""Tokens of the first prefill."""

ALLOWED: Mapping[Precision, float] = {"float32": 1e-3, "float16": 1e-2, "int8": 1e-3}
"""Relative error (root mean square) of a step. Rounding inputs to 8 bits is no part of it, as the
reference does the same; float16 covers what a program keeps in that type between its steps."""
_LONG = 32
"""Tokens of the piece that follows the first prefill, where the whole prompt is not looked at."""
_WORDS = {
    "embed": "the embedding",
    "attn_norm": "the norm before attention",
    "q": "the query projection",
    "k": "the key projection",
    "v": "the value projection",
    "q_norm": "the norm of the queries",
    "k_norm": "the norm of the keys",
    "q_rope": "the rotary positions of the queries",
    "k_rope": "the rotary positions of the keys",
    "mix": "attention (its scale, mask or cache of keys and values)",
    "o": "the projection after attention",
    "attn_post_norm": "the norm after attention",
    "attn_scaled": "the factor on what attention adds",
    "attn_out": "the sum after attention",
    "mlp_norm": "the norm before the feed-forward",
    "gate": "the gate projection",
    "up": "the up projection",
    "act": "the activation of the gate times up",
    "down": "the down projection",
    "mlp_post_norm": "the norm after the feed-forward",
    "mlp_scaled": "the factor on what the feed-forward adds",
    "out": "the sum after the feed-forward",
    "final_norm": "the last norm",
    "head": "the head",
    "head_scaled": "the factor on the logits",
    "logits": "the head",
}


_PIECE = 1 << 17
"""Numbers compared at once."""
_Results = Mapping[str, NDArray[np.float32]]
"""Results of a pass by the names of their steps."""


@dataclass(frozen=True)
class Divergence:
    """A step that computes something else.

    Args:
        step: its name in `decoder`, as "layers.3.k_rope".
        error: root mean square of the difference over that of the right result.
        allowed: what it may be.
        when: which pass it was seen in.
        also: further steps of the pass that diverge by themselves.
    """

    step: str
    error: float
    allowed: float
    when: str
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = ""
        if self.also:
            shown = ", ".join(self.also[:6]) + (" .." if len(self.also) > 6 else "")
            more = f"; by themselves, so do {shown}"
        return (
            f"{self.step}: {described(self.step)} differs by {self.error:.2g} of its size "
            f"(allowed {self.allowed:.2g}) in {self.when}{more}"
        )


def described(step: str) -> str:
    """A step in words: "the rotary positions of the keys in layer 3"."""
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", step)
    if match:
        return f"{_WORDS.get(match[2], match[2])} in layer {match[1]}"
    return _WORDS.get(step, step)


@dataclass(frozen=True)
class TracedPass:
    """A pass of a target and all its results.

    Args:
        when: what it is, in words.
        tokens: it reads.
        past: the pieces of what its cache held.
        results: by the names of their steps.
    """

    when: str
    tokens: list[int]
    past: list[list[int]]
    results: _Results


def traced_passes(
    trace: Trace, prompt: Sequence[int], spill: Spill, *, long: bool = True
) -> list[TracedPass]:
    """Let a target compute a prefill, two decoding steps after it, and a second piece.

    Args:
        trace: of the target.
        prompt: tokens; the first few are a prefill, two others are decoded after them.
        spill: keeps the results.
        long: the whole prompt too, in two pieces and in one.
    """
    short, rest = list(prompt[:_SHORT]), list(prompt[_SHORT:])
    one, two = [int(prompt[-1])], [int(prompt[len(prompt) // 2])]
    passes: list[tuple[str, list[int], list[list[int]]]] = [
        (f"a prefill of {len(short)} tokens", short, []),
        (f"a decoding step after {len(short)} tokens", one, [short]),
        ("the decoding step after that", two, [short, one]),
    ]
    if not long:
        rest = rest[:_LONG]
    if len(rest) > 1:
        passes.append((f"a prefill of {len(rest)} tokens after {len(short)}", rest, [short]))
    if long and len(rest) > 1:
        passes.append((f"a prefill of {len(prompt)} tokens", list(prompt), []))
    traced = []
    for when, tokens, past in passes:
        results = trace(tokens, past)
        kept = dict(zip(results, spill.arrays(list(results.values())), strict=True))
        traced.append(TracedPass(when, tokens, past, kept))
    return traced


def first_divergence(
    model: Model,
    passes: Sequence[TracedPass],
    precision: Precision,
    kernels: Kernels | None = None,
    *,
    progress: Progress | None = None,
) -> Divergence | None:
    """Look for the first step that diverges.

    Args:
        model: the source.
        passes: of the target, by `traced_passes`.
        precision: how the target computes.
        kernels: how its kernels round, not at all if None; a step must agree with one of the ways
            they may multiply.
        progress: called with what is done, how far, and of how much.

    Returns:
        None if every step is near enough.
    """
    kernels = kernels or Kernels()
    seen: dict[tuple[int, ...], _Results] = {}
    for done, each in enumerate(passes):
        # where one way of multiplying does not explain the results, another may
        errors: list[dict[str, float]] = []
        for product in kernels.products:
            errors.append(_differing(model, product, kernels, each, precision, seen))
            if not errors[-1]:
                break
        unexplained = {s: e for s, e in errors[0].items() if all(s in each for each in errors)}
        if unexplained:
            first, *also = unexplained
            allowed = ALLOWED[precision]
            return Divergence(first, unexplained[first], allowed, each.when, tuple(also))
        fed = tuple(t for piece in each.past for t in piece)
        seen[fed + tuple(each.tokens)] = _recalled(model, each.results)
        for value in each.results.values():
            release(value)
        if progress:
            progress("steps", done + 1, len(passes))
    return None


def _recalled(model: Model, theirs: _Results) -> _Results:
    """Keys and values of a pass, which later passes need, if the target gives all of them."""
    blocks = enumerate(model.config.blocks)
    wanted = [f"layers.{i}.{step}" for i, block in blocks for step in (key_step(block), "v")]
    return {n: theirs[n] for n in wanted} if all(n in theirs for n in wanted) else theirs


def is_small(model: Model) -> bool:
    """Whether a model is small enough to keep its weights as float32 and examine all steps."""
    return sum(int(np.prod(t.shape)) for t in model.tensors.values()) <= _SMALL


class _Judge(TracedReference):
    """A reference whose results are compared as they are made, and not kept.

    Args:
        errors: gets the relative errors that are past the bound, in the decoder's order.
        theirs: the target's results.
        allowed: the bound.
    """

    def judge(self, errors: dict[str, float], theirs: _Results, allowed: float) -> None:
        """Compare the results of the pass that follows."""
        self._errors, self._theirs, self._allowed = errors, theirs, allowed

    def _take(self, name: str, value: Array) -> None:
        if name not in getattr(self, "_theirs", {}):
            return
        error = _error(value, self._theirs[name])
        # written so that NaN is past it too
        if not error <= self._allowed:
            self._errors[name] = error


def _differing(
    model: Model,
    product: Linear,
    kernels: Kernels,
    each: TracedPass,
    precision: Precision,
    seen: Mapping[tuple[int, ...], _Results],
) -> dict[str, float]:
    """Errors of the steps that are past the bound, in the decoder's order.

    Each step is computed from the target's own inputs to it.
    """
    keep = is_small(model) and product is dense
    linear = None if keep else sparing(product)
    builder = _Judge(model, linear=linear, kv=kernels.cache, keep=keep)
    fed: list[int] = []
    for piece in each.past:
        fed += piece
        # the cache holds the target's own keys and values
        builder.append_past(piece, seen[tuple(fed)])
    errors: dict[str, float] = {}
    builder.judge(errors, each.results, ALLOWED[precision])
    builder.trace(each.tokens, each.results)
    return errors


def _error(right: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Relative root mean square error; of the last rows, where only these were made."""
    if got.size < right.size and right.shape[-1] and got.size % right.shape[-1] == 0:
        right = right[-(got.size // int(np.prod(right.shape[1:]))) :]
    if got.size != right.size:
        return float("inf")
    got = got.reshape(right.shape)
    squares = [0.0, 0.0]
    for rows in row_blocks(right.shape, _PIECE):
        ours = right[rows].astype(np.float64)
        squares[0] += float(np.sum((got[rows] - ours) ** 2))
        squares[1] += float(np.sum(ours**2))
    size = np.sqrt(squares[1] / right.size)
    return float(np.sqrt(squares[0] / right.size)) / max(float(size), 1e-9)
