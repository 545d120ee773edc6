"""How long each step of the compiled decoder took, summed over tokens.

A label of a layer is one of "norm_in", "qkv", "attention", "o_proj", "norm_ffn", "gate_up" and
"down_proj", with "in_proj" and "short_conv" in place of "qkv" and "attention" where the layer is a
short convolution, "in_proj" and "delta_net" where it is a gated delta net, and "output_gate" after
"attention" where its output has a gate, and with "router" and "experts" in place of "gate_up" and
"down_proj" where it has experts, and with "norm_own", "input_gate", "own_input" and "input_proj" at
its end where it has an input of its own; of no layer, "embed", "layer_proj" and "layer_inputs"
(where layers have such inputs), "final_norm", "head" and "argmax". A norm
adds the branch before it and quantizes its result for the next linears; "attention" rotates,
appends to the cache and attends; "gate_up" ends with the activation; "o_proj" and "down_proj" begin
with quantizing their input; "argmax" is there only in greedy decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.runtime.kernels.abi import TIMES_SUMS

StepLabel = tuple[int | None, str]
"""A layer, or None for a step of no layer, and what the step is called. Steps of a program that
share a label are summed."""


@dataclass(frozen=True)
class StepTimes:
    """Sums that the decoder adds to while it runs.

    Wall time of the first thread, its waiting for the others at the end of a step included, so
    that the steps add up to the time of the whole.

    Args:
        labels: of the program's steps, in order, and of choosing a greedy token.
        raw: int64, what the decoder writes to; see `edgeq.runtime.kernels.abi`.
    """

    labels: tuple[StepLabel, ...]
    raw: NDArray[np.int64]

    @classmethod
    def new(cls, labels: tuple[StepLabel, ...]) -> StepTimes:
        """Sums of zero for a program with steps of these labels."""
        labels = (*labels, (None, "argmax"))
        return cls(labels, np.zeros(TIMES_SUMS + len(labels), np.int64))

    @property
    def ns(self) -> dict[StepLabel, int]:
        """Nanoseconds by label: of each layer in order, then of no layer."""
        order = sorted(self.labels, key=lambda label: (label[0] is None, label[0] or 0))
        sums = dict.fromkeys(order, 0)
        for label, ns in zip(self.labels, self.raw[TIMES_SUMS:], strict=True):
            sums[label] += int(ns)
        return sums
