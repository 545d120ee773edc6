"""How long each step of the compiled decoder took, summed over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.runtime.kernels import plan as st

LAYER_STEPS = ("norm_in", "qkv", "attention", "o_proj", "norm_ffn", "gate_up", "down_proj")
"""A layer's steps in order. A norm adds the branch before it and rounds its result for the next
linears; "attention" rotates, appends to the cache and attends; "gate_up" ends with the activation;
"o_proj" and "down_proj" begin with rounding their input."""
OTHER_STEPS = ("embed", "final_norm", "head", "argmax")
"""Steps of no layer; "argmax" is there only in greedy decoding."""


@dataclass(frozen=True)
class StepTimes:
    """Sums that the decoder adds to while it runs.

    Wall time of the first thread, its waiting for the others at the end of a step included, so
    that the steps add up to the time of the whole.

    Args:
        layers: of the model.
        raw: int64, what the decoder writes to; see `edgeq.runtime.kernels.plan`.
    """

    layers: int
    raw: NDArray[np.int64]

    @classmethod
    def new(cls, layers: int) -> StepTimes:
        """Sums of zero for a model with so many layers."""
        count = layers * st.S_PER_LAYER + st.S_OTHERS
        return cls(layers, np.zeros(st.T_STEPS + count, np.int64))

    @property
    def layer_ns(self) -> NDArray[np.int64]:
        """Nanoseconds [layers, LAYER_STEPS]."""
        ns = self.raw[st.T_STEPS : st.T_STEPS + self.layers * st.S_PER_LAYER]
        return ns.reshape(self.layers, st.S_PER_LAYER).copy()

    @property
    def other_ns(self) -> NDArray[np.int64]:
        """Nanoseconds [OTHER_STEPS]."""
        return self.raw[st.T_STEPS + self.layers * st.S_PER_LAYER :][: len(OTHER_STEPS)].copy()

    @property
    def total_ns(self) -> int:
        """All steps together."""
        return int(self.layer_ns.sum() + self.other_ns.sum())
