"""The experts of one layer in a layer replay: which tokens each sees, and the sum of their outputs.

A group of an expert's matrices has the tokens that go through the expert as its inputs, so each
expert is rounded by what it sees. One that fewer than `LEAST_TOKENS` tokens go through is rounded
by all tokens of the layer, as though each went through it: so few say too little about its inputs.

Memory in bytes, with n tokens in all windows: n * experts * 4 for weights, n * hidden * 4 for the
sum of outputs, and as much for the layer's inputs, which are kept if they take at most
`KEEP_BYTES`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.model import decoder
from edgeq.model.formulas import Array
from edgeq.model.reference import Reference

LEAST_TOKENS = 128
"""An expert that fewer tokens go through is rounded by all of them."""
KEEP_BYTES = 512 << 20
"""Most bytes of the inputs of a layer's experts that are kept."""


class ReplayedExperts:
    """The experts of a layer, from the router's group to the last expert's.

    Args:
        reference: computes the parts of the decoder.
        layer: the layer's number.
        hidden: the residual stream before the feed-forward, of each window.
        chooser: the same layer of another model, whose choice of tokens the inputs follow.
    """

    def __init__(
        self,
        reference: Reference,
        layer: int,
        hidden: Sequence[Array],
        chooser: ReplayedExperts | None = None,
    ) -> None:
        self.layer = layer
        self._reference, self._hidden = reference, hidden
        self._kept: list[Array] | None = None
        if 4 * sum(x.size for x in hidden) <= KEEP_BYTES:
            self._kept = [self._normed(x) for x in hidden]
        self._weights = [
            decoder.routing(reference, reference.config, layer, self._input(window))
            for window in range(len(hidden))
        ]
        self._tokens = sum((weights != 0).sum(axis=0) for weights in self._weights)
        self._sums = [np.zeros_like(x) for x in hidden]
        self._chooser = chooser or self

    def inputs(self, expert: int, window: int) -> Array:
        """What an expert's gate and up are multiplied with: float32 [tokens, hidden]."""
        h = self._input(window)
        seen = self._chooser.seen(expert, window)
        return h if seen is None else h[seen]

    def activated(self, expert: int, window: int) -> Array:
        """What an expert's down is multiplied with: float32 [tokens, ffn of an expert]."""
        return decoder.expert_act(self._reference, self.layer, expert, self.inputs(expert, window))

    def seen(self, expert: int, window: int) -> NDArray[np.bool_] | None:
        """Which tokens of a window the inputs of an expert have, bool [T]; None for all."""
        if self._tokens[expert] < LEAST_TOKENS:
            return None
        tokens: NDArray[np.bool_] = self._weights[window][:, expert] != 0
        return tokens

    def add(self, expert: int) -> None:
        """Add the outputs of an expert, with the current weights, to the sums."""
        reference = self._reference
        for window, weights in enumerate(self._weights):
            share = weights[:, expert]
            rows = share != 0
            if rows.any():
                x = self._input(window)[rows]
                act = decoder.expert_act(reference, self.layer, expert, x)
                out = decoder.expert_out(reference, self.layer, expert, act)
                self._sums[window][rows] += share[rows, None] * out

    def outputs(self) -> list[Array]:
        """What the experts add to the residual stream of each window, when all are added."""
        reference = self._reference
        return [decoder.fed(reference, reference.config, self.layer, x) for x in self._sums]

    def _input(self, window: int) -> Array:
        return self._normed(self._hidden[window]) if self._kept is None else self._kept[window]

    def _normed(self, x: Array) -> Array:
        reference = self._reference
        return decoder.feed_forward_in(reference, reference.config, self.layer, x)
