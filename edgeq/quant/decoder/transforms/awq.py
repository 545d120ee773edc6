"""AWQ: scale up the columns of matrices with large inputs before rounding, and their inputs down.

For each group of matrices with the same input the factors are ``s = a ** alpha``, where a is the
mean absolute input of each column and alpha is the value of `GRID` with the smallest error in the
outputs of the matrices.

Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization" (arXiv:2306.00978),
equations 4 and 5. The error is computed for all calibration tokens from their second moments.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgeq.core.progress import Progress
from edgeq.formats.schemes import QuantScheme, Scheme
from edgeq.model.model import Model
from edgeq.model.recording import LinearGroup
from edgeq.model.trigonometry import powers
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.replay import Replay, ReplayStep
from edgeq.quant.decoder.transforms.fold import can_fold, folded, shared
from edgeq.quant.kernels.products import column_sums
from edgeq.quant.rounders.gptq import Hessian, weighted_error
from edgeq.quant.rounders.rounding import quantize_tensor

GRID = tuple(alpha / 10 for alpha in range(11))
"""Candidate exponents; 0 leaves the group unchanged."""


def awq(
    model: Model,
    calibration: CalibrationText,
    schemes: Mapping[str, Scheme],
    progress: Progress | None = None,
) -> Model:
    """Fold the best factors into a float model.

    Args:
        model: the float model.
        calibration: windows of text.
        schemes: name of each matrix -> its scheme; groups that stay float are left unchanged.
        progress: called with the group, groups done, and number of groups.
    """
    scales: dict[LinearGroup, NDArray[np.float64]] = {}
    for step in Replay(model, calibration.windows, progress=progress):
        if can_fold(step.group) and any(
            isinstance(schemes.get(name), QuantScheme) for name in step.group.linears
        ):
            s = _best(model, step, schemes)
            if s is not None:
                scales[step.group] = s
    return folded(model, scales)


def _best(
    model: Model, step: ReplayStep, schemes: Mapping[str, Scheme]
) -> NDArray[np.float64] | None:
    """The factors of a group, [K]; None if no factors are better than ones."""
    hessian: Hessian | None = None
    total, n = np.zeros(1), 0
    for x in step.inputs():
        hessian = hessian or Hessian(x.shape[1])
        hessian.add(x)
        total = total + column_sums(np.abs(x))
        n += x.shape[0]
    assert hessian is not None  # a replay has windows
    mean = shared(model.config, step.group, np.asarray(total / n))
    if not mean.max() > 0:
        return None
    mean = np.maximum(mean, 1e-4 * mean.max())
    least, best = np.inf, None
    for alpha in GRID:
        s = powers(mean, alpha)
        s /= np.sqrt(s.max() * s.min())
        error = sum(
            _error(step.weights[name], schemes[name], s, hessian, name)
            for name in step.group.linears
        )
        if error < least:
            least, best = error, s if alpha else None
    return best


def _error(
    w: NDArray[np.float32],
    scheme: Scheme,
    s: NDArray[np.float64],
    hessian: Hessian,
    name: str,
) -> float:
    if not isinstance(scheme, QuantScheme):
        return 0.0
    factors = s.astype(np.float32)
    rounded = quantize_tensor(w * factors, scheme, "mse", name=name).numpy()
    return weighted_error(w, rounded / factors, hessian)
