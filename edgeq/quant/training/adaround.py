"""Learned rounding: each weight goes up or down, whichever keeps its layer's output.

Layer by layer, the hidden states that the already rounded layers give go through the layer, and
what comes out is compared with the float layer's output of the float model's states. Between its
two nearest levels a weight's place is a rectified sigmoid of a variable, trained by the output's
squared error; a regularizer, whose exponent falls, drives it to one end or the other. Scales stay.

Sources: Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization"
(arXiv:2004.10568), equations 21 to 24; layers, not matrices, are reconstructed as in Li et al.
2021, "BRECQ" (arXiv:2102.05426).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.progress import Progress
from edgeq.quant.decoder.layerwise import check_layerwise
from edgeq.quant.training.decoder import TorchDecoder, Weights
from edgeq.quant.training.fake import FakeQuant
from edgeq.quant.training.loop import PAD, Teacher, batches, padded
from edgeq.quant.training.settings import TrainingSettings
from edgeq.quant.training.student import Student

STRETCH = 1.1, -0.1
"""The sigmoid is stretched to these ends and cut off at 0 and 1 (zeta, gamma)."""
EXPONENTS = 20.0, 2.0
"""Of the regularizer, from first to last."""
FREE = 0.2
"""Share of the steps before the regularizer sets in."""
WEIGHT = 1.0
"""Of the regularizer's mean, over the reconstruction error relative to the one at the start."""


class SoftRounding:
    """The weights of a matrix between their two nearest levels.

    Args:
        matrix: what is rounded; its latents decide the two levels and where to begin.
    """

    def __init__(self, matrix: FakeQuant) -> None:
        import torch

        self.matrix = matrix
        with torch.no_grad():
            self._scales, self._below, above = matrix.neighbors()
            self._gap = above - self._below
            share = (matrix.steps() - self._below) / self._gap.clamp(min=1e-9)
            high, low = STRETCH
            self.variables = torch.logit((share.clamp(0, 1) - low) / (high - low))
        self.variables.requires_grad_()

    def share(self) -> Any:
        """How far up each weight is, 0 to 1: float32 [N, G, S]."""
        high, low = STRETCH
        return (self.variables.sigmoid() * (high - low) + low).clamp(0, 1)

    def weight(self) -> Any:
        """The weights float32 [N, K], differentiable."""
        level = self._below + self.share() * self._gap
        return self.matrix.flat(level * self._scales)

    def regularizer(self, exponent: float) -> Any:
        """Mean of ``1 - |2 share - 1| ** exponent``: 0 where all are at an end."""
        return (1 - (2 * self.share() - 1).abs() ** exponent).mean()

    def settle(self) -> None:
        """Make the nearer end the matrix's latents."""
        import torch

        with torch.no_grad():
            up = (self.share() >= 0.5).float()
            self.matrix.settle(self._below + up * self._gap)


def reconstruct(
    student: Student,
    decoder: TorchDecoder,
    windows: Sequence[NDArray[np.int64]],
    teacher: Teacher,
    settings: TrainingSettings,
    progress: Progress | None,
) -> None:
    """Round every layer's matrices in turn; embedding and head stay as they are.

    Args:
        student: changed in place.
        decoder: of the model.
        windows: tokens int64 [T] each; their hidden states are held, twice.
        teacher: the float model.
        settings: steps for each layer; the learning rate is that of the sigmoid's variables.
        progress: called with ("rounding", steps done, of all).
    """
    import torch

    check_layerwise(decoder.config, "adaround")
    ids = torch.from_numpy(padded(windows))
    real, tokens = ids != PAD, ids.clamp(min=0)
    rows = [np.array([i]) for i in range(len(windows))]
    layers, steps, batch = decoder.config.layers, settings.steps, settings.batch
    with torch.no_grad():
        ours = decoder.embed(student.weights(), tokens)
        theirs = teacher.decoder.embed(teacher.weights, tokens)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        soft = {n: SoftRounding(m) for n, m in student.matrices.items() if n.startswith(prefix)}
        with torch.no_grad():
            start = student.weights()
            theirs = _through_layer(teacher.decoder, teacher.weights, layer, theirs, batch)
            after = _through_layer(decoder, start, layer, ours, batch)
            unit = (after[real] - theirs[real]).square().mean().clamp(min=1e-12)
        if not soft:  # a layer that stays floating point
            ours = after
            continue
        variables = [s.variables for s in soft.values()]
        optimizer = torch.optim.Adam(variables, lr=settings.learning_rate)
        for done, chosen in enumerate(batches(rows, batch, steps, settings.seed + layer)):
            index = torch.from_numpy(chosen[:, 0])
            weights = start | {name: s.weight() for name, s in soft.items()}
            out = decoder.layer(weights, layer, ours[index])
            where = real[index]
            loss = (out[where] - theirs[index][where]).square().mean() / unit
            progressed = (done / steps - FREE) / (1 - FREE)
            if progressed > 0:
                exponent = EXPONENTS[0] + (EXPONENTS[1] - EXPONENTS[0]) * progressed
                loss = loss + WEIGHT * sum(s.regularizer(exponent) for s in soft.values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if progress:
                progress("rounding", layer * steps + done + 1, layers * steps)
        for s in soft.values():
            s.settle()
        with torch.no_grad():
            ours = _through_layer(decoder, student.weights(), layer, ours, batch)


def _through_layer(decoder: TorchDecoder, weights: Weights, layer: int, x: Any, batch: int) -> Any:
    """The hidden states of all windows after a layer, float32 [B, T, hidden], a few at a time."""
    import torch

    return torch.cat([decoder.layer(weights, layer, part) for part in x.split(batch)])
