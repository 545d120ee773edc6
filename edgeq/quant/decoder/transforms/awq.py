"""Columns that meet large inputs are scaled up before rounding, and the inputs down.

For each site the factors are ``s = a ** alpha``, a the mean absolute input of each column, with
the alpha of a grid that leaves the least error in what the site's matrices put out.

Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization" (arXiv:2306.00978),
equations 4 and 5. The error is taken over all calibration tokens by their second moments.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgeq.core.progress import Progress
from edgeq.formats.schemes import QuantScheme, Scheme
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import Calibration
from edgeq.quant.decoder.replay import Site, Stage, Walk
from edgeq.quant.decoder.transforms.fold import folded, shared
from edgeq.quant.rounders.gptq import Hessian, weighted_error
from edgeq.quant.rounders.rounding import quantize_tensor

GRID = tuple(alpha / 10 for alpha in range(11))
"""Powers tried; 0 leaves the site as it is."""


def awq(
    model: Model,
    calibration: Calibration,
    schemes: Mapping[str, Scheme],
    progress: Progress | None = None,
) -> Model:
    """Fold the best factors into a float model.

    Args:
        model: float.
        calibration: windows of text.
        schemes: what each matrix will be held in; sites that stay floating point are left alone.
        progress: called with the site, sites done, and of how many.
    """
    found: dict[Site, NDArray[np.float64]] = {}
    for stage in Walk(model, calibration.windows, progress=progress):
        if stage.site.kind != "head" and any(
            isinstance(schemes.get(name), QuantScheme) for name in stage.site.linears
        ):
            s = _best(model, stage, schemes)
            if s is not None:
                found[stage.site] = s
    return folded(model, found)


def _best(model: Model, stage: Stage, schemes: Mapping[str, Scheme]) -> NDArray[np.float64] | None:
    """The site's factors, or None if none is better than ones."""
    hessian: Hessian | None = None
    total, n = 0.0, 0
    for x in stage.inputs():
        hessian = hessian or Hessian(x.shape[1])
        hessian.add(x)
        total = total + np.abs(x).sum(axis=0, dtype=np.float64)
        n += x.shape[0]
    assert hessian is not None  # a walk has windows
    mean = shared(model.config, stage.site, np.asarray(total / n))
    if not mean.max() > 0:
        return None
    mean = np.maximum(mean, 1e-4 * mean.max())
    least, best = np.inf, None
    for alpha in GRID:
        s = mean**alpha
        s /= np.sqrt(s.max() * s.min())
        error = sum(
            _error(stage.weights[name], schemes[name], s, hessian, name)
            for name in stage.site.linears
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
