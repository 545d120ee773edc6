"""The first step of a converted decoder that computes something else.

A target's results of one pass are laid beside NumPy's, step by step in the decoder's order, each
step computed from the target's own inputs to it: rounding does not pile up from layer to layer,
and a fault shows where it is made, not everywhere after.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.converters import Past, Precision
from edgeq.converters.numpy_builder import NumpyBuilder
from edgeq.model import Model

_SMALL = 1 << 26
"""Weights of a small model."""
_SHORT = 7
"""Tokens of the first prefill."""

Trace = Callable[[Sequence[int], Past], Mapping[str, NDArray[np.float32]]]
"""(tokens, past) -> a target's results of the pass over the tokens, past being in its cache."""

_MATRIX = ("q", "k", "v", "o", "gate", "up", "down", "logits")
_ALLOWED: Mapping[Precision, tuple[float, float, float]] = {
    "float32": (1e-3, 1e-3, 1e-3),
    "float16": (1e-2, 1e-2, 1e-2),
    "int8": (5e-2, 5e-2, 2e-2),
}
"""Relative error (root mean square) of a matrix product, of attention, and of anything else."""
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
    "attn_out": "the sum after attention",
    "mlp_norm": "the norm before the feed-forward",
    "gate": "the gate projection",
    "up": "the up projection",
    "act": "the activation of the gate times up",
    "down": "the down projection",
    "mlp_post_norm": "the norm after the feed-forward",
    "out": "the sum after the feed-forward",
    "final_norm": "the last norm",
    "logits": "the head",
}


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


def first_divergence(
    model: Model, trace: Trace, prompt: Sequence[int], precision: Precision, *, long: bool = True
) -> Divergence | None:
    """Look for the first step that diverges, in prefill, in decoding, and in a second piece.

    Args:
        model: the source.
        trace: of the target.
        prompt: tokens; the first few are a prefill, two others are decoded after them.
        precision: how the target computes.
        long: look at the whole prompt too, in two pieces and in one.

    Returns:
        None if every step is near enough.
    """
    short, rest = list(prompt[:_SHORT]), list(prompt[_SHORT:])
    one, two = [int(prompt[-1])], [int(prompt[len(prompt) // 2])]
    passes: list[tuple[str, list[int], list[list[int]]]] = [
        (f"a prefill of {len(short)} tokens", short, []),
        (f"a decoding step after {len(short)} tokens", one, [short]),
        ("the decoding step after that", two, [short, one]),
    ]
    if long and len(rest) > 1:
        passes.append((f"a prefill of {len(rest)} tokens after {len(short)}", rest, [short]))
        passes.append((f"a prefill of {len(prompt)} tokens", list(prompt), []))
    seen: dict[tuple[int, ...], Mapping[str, NDArray[np.float32]]] = {}
    for when, tokens, past in passes:
        builder = NumpyBuilder(model, keep=is_small(model))
        fed: list[int] = []
        for piece in past:
            fed += piece
            # the cache holds the target's own keys and values
            builder.run(piece, seen[tuple(fed)])
        theirs = trace(tokens, past)
        ours = builder.run(tokens, theirs)
        seen[tuple(fed + tokens)] = theirs
        if found := _compare(ours, theirs, precision, when):
            return found
    return None


def is_small(model: Model) -> bool:
    """Whether its weights may be held as float32, and all its steps be looked at in passing."""
    return sum(int(np.prod(t.shape)) for t in model.tensors.values()) <= _SMALL


def _compare(
    ours: Mapping[str, NDArray[np.float32]],
    theirs: Mapping[str, NDArray[np.float32]],
    precision: Precision,
    when: str,
) -> Divergence | None:
    found: list[tuple[str, float, float]] = []
    for step, right in ours.items():
        if step not in theirs:
            continue
        kind = step.rsplit(".", 1)[-1]
        matrix, attention, other = _ALLOWED[precision]
        allowed = matrix if kind in _MATRIX else attention if kind == "mix" else other
        error = _error(right, theirs[step])
        if not error <= allowed:
            found.append((step, error, allowed))
    if not found:
        return None
    step, error, allowed = found[0]
    return Divergence(step, error, allowed, when, tuple(name for name, _, _ in found[1:]))


def _error(right: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Relative root mean square error; of the last rows, where only these were made."""
    if got.size < right.size and right.shape[-1] and got.size % right.shape[-1] == 0:
        right = right[-(got.size // int(np.prod(right.shape[1:]))) :]
    if got.size != right.size:
        return float("inf")
    difference = got.reshape(right.shape).astype(np.float64) - right
    size = float(np.sqrt(np.mean(right.astype(np.float64) ** 2)))
    return float(np.sqrt(np.mean(difference**2))) / max(size, 1e-9)
