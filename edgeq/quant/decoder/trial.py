"""A recipe carried out before anything is written, to see what it does to the model.

Bits are chosen by losses that add up only nearly (`edgeq.quant.decoder.sensitivity`). What a
choice is really worth shows when the whole model is rounded with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgeq.core.progress import Progress
from edgeq.formats.safetensors_file import release
from edgeq.formats.schemes import FloatScheme, Scheme
from edgeq.formats.tensor import Tensor
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import Calibration
from edgeq.quant.decoder.calibrated import at_sites, round_sites
from edgeq.quant.decoder.data_free import narrowed, round_alone
from edgeq.quant.decoder.spill import Spill
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.rounding import METHOD_INPUTS


def rounded(
    model: Model,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    calibration: Calibration,
    spill: Spill,
    progress: Progress | None = None,
) -> Model:
    """The model as an artifact made by a recipe would hold it, but for training.

    Args:
        model: float.
        recipe: says how its weights are rounded; what it trains is left out.
        schemes: what it gives each tensor that is stored.
        calibration: what is rounded by.
        spill: where the rounded tensors are kept.
        progress: called with a matrix, weights rounded, and of how many.
    """
    sited = at_sites(schemes) if recipe.method in METHOD_INPUTS else {}
    found: dict[str, Tensor] = {}
    for name, scheme in schemes.items():
        if name in sited:
            continue
        if progress and not sited:
            progress(name, len(found), len(schemes))
        tensor = model.tensors[name]
        found[name] = spill.put(
            narrowed(tensor.numpy(), scheme, name)
            if isinstance(scheme, FloatScheme)
            else round_alone(tensor, scheme, recipe.method, name)
        )
        release(tensor)
    if sited:

        def keep(name: str, tensor: Tensor) -> None:
            found[name] = spill.put(tensor)

        round_sites(
            model, sited, recipe.method, calibration, keep, dict(found),
            options=recipe.options, progress=progress,
        )  # fmt: skip
    return replace(model, tensors={name: found[name] for name in schemes})
