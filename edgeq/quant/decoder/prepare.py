"""The steps before rounding: transforms, the choice of bits, and ranges of activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.core.errors import SchemeError, UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.formats.schemes import Scheme
from edgeq.formats.tensor import Tensor
from edgeq.model.model import Model
from edgeq.quant.decoder.bit_search import assigned, search_bits
from edgeq.quant.decoder.calibrate import calibrate
from edgeq.quant.decoder.calibration_data import CalibrationData
from edgeq.quant.decoder.data_free import Importance
from edgeq.quant.decoder.quality_report import FLOAT, Inputs
from edgeq.quant.decoder.sensitive_layers import OPTION, find_sensitive_layers
from edgeq.quant.decoder.static import StaticActivations, dynamic_linear
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.rounding import METHOD_INPUTS

if TYPE_CHECKING:
    from edgeq.quant.decoder.sensitivity import Sensitivity


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be rounded.

    Args:
        model: the source, or the equivalent model that the transforms made of it.
        recipe: the recipe with the rules that were chosen for a target.
        schemes: name of each tensor to write -> its scheme, in file order.
        importance: mean squares of the inputs of matrices, from statistics.
        calibrated: whether matrices are rounded group by group, in a replay of the text.
        inputs: how the inputs of matrices are rounded when the model runs.
        provenance: entries of the artifact's provenance about calibration and its results.
        tensors: the rounded tensors, if the choice of bits has rounded them already for its
            measurement; else None.
    """

    model: Model
    recipe: Recipe
    schemes: Mapping[str, Scheme]
    importance: Importance
    calibrated: bool
    inputs: Inputs
    provenance: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None = None


def prepare(
    base: Model,
    recipe: Recipe,
    data: CalibrationData,
    progress: Progress | None,
    scratch: Path | None = None,
) -> Prepared:
    """Do all steps that come before rounding.

    Args:
        base: the float source.
        recipe: the recipe.
        data: the data that the recipe needs, see `CalibrationData.check`.
        progress: called with what is done, how far, and of how much.
        scratch: folder for temporary files; None for that of the system.

    Raises:
        SchemeError: the recipe does not fit the model.
        UsageError: the data was measured on another model.
        DoesNotFitError: the target cannot be reached.
    """
    schemes = assigned(base, recipe)
    if data.stats is not None:
        data.stats.check(base)
    model = base
    if recipe.transforms:
        model = _transform(base, recipe, schemes, data, progress)
    provenance: dict[str, Any] = {}
    inputs = FLOAT
    tensors = None
    if recipe.target:
        chosen = search_bits(
            model, recipe, data.text, _sensitivity(model, recipe, data),
            scratch=scratch, progress=progress,
        )  # fmt: skip
        recipe, provenance["target"], tensors = chosen.recipe, chosen.about, chosen.tensors
        if chosen.sensitive is not None:
            provenance[OPTION] = chosen.sensitive.to_dict()
        schemes = assigned(model, recipe)
    if OPTION in recipe.options and data.text is not None and tensors is None:
        found = find_sensitive_layers(model, recipe, schemes, data.text, progress)
        recipe, provenance[OPTION] = found.applied(recipe), found.to_dict()
        schemes = assigned(model, recipe)
    if data.text is not None:
        provenance["calibration"] = {
            "text_sha256": data.text.text_sha256,
            "windows": len(data.text.windows),
            "context": data.text.context,
            "tokens": data.text.n_tokens,
        }
        if data.text.sampled:
            provenance["calibration"]["sampled"] = data.text.sampled
    elif data.stats is not None:
        provenance["calibration"] = {
            "text_sha256": data.stats.text_sha256, "tokens": data.stats.n_tokens,
        }  # fmt: skip
    if "ranges" in recipe.needs:
        static = _ranges(model, recipe, data, progress)
        provenance["activations"] = static.to_dict()
        inputs = Inputs(f"inputs in int8, static ranges by {static.observer}", static.linear)
    elif recipe.activations is not None:
        inputs = Inputs("inputs in int8 with a scale for each token", dynamic_linear)
    importance: Importance = {}
    if (
        data.stats is not None
        and not recipe.transforms
        and _uses_importance(recipe)
        and tensors is None
    ):
        importance = {name: seen.mean_square for name, seen in data.stats.inputs.items()}
    calibrated = recipe.method in METHOD_INPUTS and not importance
    return Prepared(model, recipe, schemes, importance, calibrated, inputs, provenance, tensors)


def _sensitivity(model: Model, recipe: Recipe, data: CalibrationData) -> Sensitivity | None:
    """The given sensitivities. They are checked to be of this model, unless it was transformed."""
    if data.sensitivity is not None and not recipe.transforms:
        data.sensitivity.check_model(model)
    return data.sensitivity


def _uses_importance(recipe: Recipe) -> bool:
    return METHOD_INPUTS.get(recipe.method) == "importance"


def _transform(
    model: Model,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    data: CalibrationData,
    progress: Progress | None,
) -> Model:
    from edgeq.quant.decoder.transforms import TRANSFORMS

    for name in recipe.transforms:
        if name not in TRANSFORMS:
            raise SchemeError(unknown("transform", name, TRANSFORMS))
        model = TRANSFORMS[name](model, data.needed_text, schemes, progress)
    return model


def _ranges(
    model: Model, recipe: Recipe, data: CalibrationData, progress: Progress | None
) -> StaticActivations:
    """Ranges of the inputs of each matrix, from the statistics or measured."""
    assert recipe.activations is not None
    stats, observer = data.stats, recipe.activations.observer
    if stats is None or recipe.transforms or stats.observer != observer:
        if data.text is None:
            assert stats is not None
            raise UsageError(
                f"the statistics have ranges of the observer {stats.observer}, and the recipe asks "
                f"for {observer}; calibrate with --observer {observer}, or give --calib TEXT"
            )
        stats = calibrate(model, data.text, observer=observer, progress=progress)
    return StaticActivations.from_stats(stats)
