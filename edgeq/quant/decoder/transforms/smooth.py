"""Outliers of the inputs moved half-way into the weights, so that both round to 8 bits.

``s = max|x| ** alpha / max|w| ** (1 - alpha)`` for each column, the inputs divided and the
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
"""How much of the difficulty goes into the weights, which have a scale a row. It lost least on
small Llama models; the paper takes 0.5 for large ones."""


def smoothquant(
    model: Model,
    calibration: CalibrationText,
    schemes: Mapping[str, Scheme],
    progress: Progress | None = None,
) -> Model:
    """Fold the factors into a float model, for every group of matrices that `can_fold`.

    Args:
        model: float.
        calibration: windows of text.
        schemes: not looked at: the factors depend on weights and inputs alone.
        progress: called with the group, groups done, and of how many.
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
        # a column that is never used, or weighs nothing, keeps its scale
        live = (inputs > 0) & (weights > 0)
        s = np.ones_like(inputs)
        s[live] = powers(inputs[live], ALPHA) / powers(weights[live], 1 - ALPHA)
        scales[step.group] = s
    return folded(model, scales)
