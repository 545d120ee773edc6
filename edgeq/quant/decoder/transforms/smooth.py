"""SmoothQuant: move outliers of the inputs partly into the weights, so that both fit 8 bits.

For each column ``s = max|x| ** alpha / max|w| ** (1 - alpha)``; the inputs are divided by s and the
columns multiplied by it.

Source: Xiao et al. 2022, "SmoothQuant" (arXiv:2211.10438), equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgeq.core.progress import Progress
from edgeq.formats.schemes import Scheme
from edgeq.model.model import Model
from edgeq.model.recording import LinearGroup
from edgeq.model.trigonometry import powers
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.decoder.transforms.fold import can_fold, folded, shared

ALPHA = 0.85
"""Fraction of the outliers that is moved into the weights, which have one scale per row. This value
had the smallest loss on small Llama models; the paper uses 0.5 for large ones."""


def smoothquant(
    model: Model,
    calibration: CalibrationText,
    schemes: Mapping[str, Scheme],
    progress: Progress | None = None,
) -> Model:
    """Fold the factors into a float model, for every group of matrices that `can_fold`.

    Args:
        model: the float model.
        calibration: windows of text.
        schemes: ignored, because the factors depend only on weights and inputs.
        progress: called with the group, groups done, and number of groups.
    """
    del schemes
    scales: dict[LinearGroup, NDArray[np.float64]] = {}
    for step in Replay(model, calibration.windows, progress=progress):
        if not can_fold(step.group):
            continue
        inputs = np.max([np.abs(x).max(axis=0) for x in step.inputs()], axis=0)
        weights = np.max([np.abs(w).max(axis=0) for w in step.weights.values()], axis=0)
        inputs = shared(model.config, step.group, inputs)
        weights = shared(model.config, step.group, weights)
        # a column whose inputs or weights are all zero keeps its scale
        live = (inputs > 0) & (weights > 0)
        s = np.ones_like(inputs)
        s[live] = powers(inputs[live], ALPHA) / powers(weights[live], 1 - ALPHA)
        scales[step.group] = s
    return folded(model, scales)
