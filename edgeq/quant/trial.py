"""A recipe carried out in memory, to see what it does before anything is written.

Bits are chosen by losses that add up only nearly (`edgeq.quant.sensitivity`). What a choice is
really worth shows when the whole model is rounded with it, which takes little for a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeq.model import Model
from edgeq.quant.calibrate import Calibration
from edgeq.quant.layerwise import at_sites, round_sites
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounding import NEEDS, alone, quantize_tensor
from edgeq.quant.sensitivity import mean_divergence, walked
from edgeq.quant.stream import narrowed
from edgeq.quant.walk import Walk
from edgeq.schemes import FloatScheme, Scheme
from edgeq.tensor import Tensor

Progress = Callable[[str, int, int], None]


def divergence(
    model: Model,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    calibration: Calibration,
    windows: Sequence[NDArray[np.int64]],
    progress: Progress | None = None,
) -> float:
    """Mean KL in nats a token of the float model to the one rounded by a recipe.

    Args:
        model: float; the rounded one is held whole, packed.
        recipe: says how; what it trains is left out.
        schemes: what it gives each tensor that is stored.
        calibration: what is rounded by.
        windows: what is measured on.
        progress: called with a matrix, weights rounded, and of how many.
    """
    other = rounded(model, recipe, schemes, calibration, progress)
    return mean_divergence(walked(Walk(model, windows)), walked(Walk(other, windows)))


def rounded(
    model: Model,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    calibration: Calibration,
    progress: Progress | None = None,
) -> Model:
    """The model as an artifact made by a recipe would hold it, but for training."""
    sited = at_sites(schemes) if recipe.method in NEEDS else {}
    found: dict[str, Tensor] = {}
    for name, scheme in schemes.items():
        if name in sited:
            continue
        w = model.tensors[name].numpy()
        found[name] = (
            narrowed(w, scheme, name)
            if isinstance(scheme, FloatScheme)
            else quantize_tensor(w, scheme, alone(recipe.method), name=name)
        )
    if sited:
        round_sites(
            model, sited, recipe.method, calibration, found.__setitem__, dict(found),
            options=recipe.options, progress=progress,
        )  # fmt: skip
    return replace(model, tensors=found)
