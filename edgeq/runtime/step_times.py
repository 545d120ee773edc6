"""How long each step of the compiled decoder took, summed over tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.runtime.kernels.abi import TIMES_SLOTS

LAYER_STEPS = ("norm_in", "qkv", "attention", "o_proj", "norm_ffn", "gate_up", "down_proj")
"""A layer's steps in order. A norm adds the branch before it and rounds its result for the next
linears; "attention" rotates, appends to the cache and attends; "gate_up" ends with the activation;
"o_proj" and "down_proj" begin with rounding their input."""
OTHER_STEPS = ("embed", "final_norm", "head", "argmax")
"""Steps of no layer; "argmax" is there only in greedy decoding."""


def slot(layers: int, step: str, layer: int = -1) -> int:
    """Which sum the time of a step is added to; ``layer`` is -1 for a step of no layer."""
    if layer < 0:
        return layers * len(LAYER_STEPS) + OTHER_STEPS.index(step)
    return layer * len(LAYER_STEPS) + LAYER_STEPS.index(step)


@dataclass(frozen=True)
class StepTimes:
    """Sums that the decoder adds to while it runs.

    Wall time of the first thread, its waiting for the others at the end of a step included, so
    that the steps add up to the time of the whole.

    Args:
        layers: of the model.
        raw: int64, what the decoder writes to; see `edgeq.runtime.kernels.abi`.
    """

    layers: int
    raw: NDArray[np.int64]

    @classmethod
    def new(cls, layers: int) -> StepTimes:
        """Sums of zero for a model with so many layers."""
        count = layers * len(LAYER_STEPS) + len(OTHER_STEPS)
        return cls(layers, np.zeros(TIMES_SLOTS + count, np.int64))

    @property
    def layer_ns(self) -> NDArray[np.int64]:
        """Nanoseconds [layers, LAYER_STEPS]."""
        ns = self.raw[TIMES_SLOTS : TIMES_SLOTS + self.layers * len(LAYER_STEPS)]
        return ns.reshape(self.layers, len(LAYER_STEPS)).copy()

    @property
    def other_ns(self) -> NDArray[np.int64]:
        """Nanoseconds [OTHER_STEPS]."""
        return self.raw[TIMES_SLOTS + self.layers * len(LAYER_STEPS) :][: len(OTHER_STEPS)].copy()

    @property
    def total_ns(self) -> int:
        """All steps together."""
        return int(self.layer_ns.sum() + self.other_ns.sum())
