"""What is settled before the first weight is rounded: the model, its schemes, what is known of it.

Data       what was learned from texts before, or the text to learn it from
Prepared   transforms carried out, bits chosen for a target, ranges of activations found
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.container import Held, file_order, overhead
from edgeq.errors import SchemeError, UsageError, unknown
from edgeq.model import Model
from edgeq.quant.calibrate import Calibration, CalibrationStats, calibrate
from edgeq.quant.quality import FLOAT, HeldOut, Inputs
from edgeq.quant.recipe import OUTER, Recipe
from edgeq.quant.rounding import NEEDS
from edgeq.quant.static import StaticActivations, dynamic_linear
from edgeq.quant.stream import Importance, weights_in
from edgeq.schemes import QuantScheme, Scheme

if TYPE_CHECKING:
    from edgeq.quant.allocate import Allocation
    from edgeq.quant.sensitivity import Sensitivity

Progress = Callable[[str, int, int], None]

TARGET_WINDOWS = 8
"""Windows that sensitivities are measured on: every matrix takes the model through them again."""
EXACT_WORK = 10**13
"""Multiplications up to which it is measured what a tensor does to the whole model, and whether
one scheme for all does better: minutes."""
ROOM = 4096
"""Bytes of a quality card and of what else a file says of itself, generously."""
MIXED = "mixed"
"""What bits of each tensor's own are called beside the one scheme for all."""
SLACK = 256
"""Bytes by which a budget is lowered where a choice does not fit."""


@dataclass(frozen=True)
class Data:
    """What is there to learn from.

    Args:
        calibration: windows of a text.
        stats: statistics of the source's inputs.
        sensitivity: losses of the source's matrices.
    """

    calibration: Calibration | None = None
    stats: CalibrationStats | None = None
    sensitivity: Sensitivity | None = None

    @property
    def text(self) -> Calibration:
        """The windows, where a recipe needs them: `check` has seen to it."""
        assert self.calibration is not None
        return self.calibration

    def check(self, recipe: Recipe, card: HeldOut | str) -> None:
        """Refuse a recipe that needs more, and a card on the text that was calibrated with.

        Raises:
            UsageError: says what to give.
        """
        if self.calibration is None:
            given: set[str] = set()
            if self.stats is not None and not recipe.transforms:
                given |= {"importance", "ranges"}
            if self.sensitivity is not None:
                given.add("target")
            if lacking := sorted(recipe.needs - given):
                raise UsageError(_lacking(recipe, lacking[0], self.stats is not None))
        elif (
            not isinstance(card, str) and card.cut.text_sha256 == self.calibration.text_sha256 != ""
        ):
            raise UsageError(
                f"quality cannot be measured on {card.name}, which is also the calibration text; "
                "give another --eval-text, or --no-card"
            )


def _lacking(recipe: Recipe, need: str, have_stats: bool) -> str:
    what = {
        "importance": f"the method {recipe.method}",
        "hessian": f"the method {recipe.method}",
        "ranges": "static activations",
        "transforms": f"the transform {(*recipe.transforms, '')[0]}",
        "target": "the choice of bits for a target",
        "training": "training",
    }[need]
    why = " itself, not only its statistics" if have_stats else ""
    return (
        f"{what} needs a calibration text{why}; give one like what the model is for: --calib TEXT"
    )


@dataclass(frozen=True)
class Prepared:
    """A model ready to be rounded.

    Args:
        model: the source, or one equal to it.
        recipe: with the rules that a target was solved by.
        schemes: of each tensor to be written, in file order.
        importance: of inputs of matrices, from statistics.
        by_site: whether matrices are rounded site by site, on a walk over the text.
        inputs: how those of matrices are rounded when the model runs.
        provenance: what was learned from, and what came of it that belongs to the artifact.
    """

    model: Model
    recipe: Recipe
    schemes: Mapping[str, Scheme]
    importance: Importance
    by_site: bool
    inputs: Inputs
    provenance: Mapping[str, Any]


def prepare(base: Model, recipe: Recipe, data: Data, progress: Progress | None) -> Prepared:
    """Carry out all that comes before rounding.

    Args:
        base: the float source.
        recipe: what is wanted.
        data: enough for the recipe, see `Data.check`.
        progress: called with what is done, how far, and of how much.

    Raises:
        SchemeError: the recipe does not suit the model.
        UsageError: data of another model.
        DoesNotFitError: a target that cannot be reached.
    """
    schemes = _assign(base, recipe)
    if data.stats is not None:
        data.stats.check(base)
    model = base
    if recipe.transforms:
        model = _transform(base, recipe, schemes, data, progress)
    provenance: dict[str, Any] = {}
    inputs = FLOAT
    if recipe.target:
        recipe, provenance["target"] = _solve(model, recipe, data, progress)
        schemes = _assign(model, recipe)
    if data.calibration is not None:
        provenance["calibration"] = {
            "text_sha256": data.calibration.text_sha256,
            "windows": len(data.calibration.windows),
            "context": data.calibration.context,
            "tokens": data.calibration.n_tokens,
        }
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
    if data.stats is not None and not recipe.transforms and _weighs(recipe):
        importance = {name: seen.mean_square for name, seen in data.stats.inputs.items()}
    by_site = recipe.method in NEEDS and not importance
    return Prepared(model, recipe, schemes, importance, by_site, inputs, provenance)


def stored(model: Model) -> Iterator[str]:
    """Names to be written: a tied head is the embedding, and stored once."""
    return (name for name in model.tensors if not (model.config.tied and name == "lm_head.weight"))


def _weighs(recipe: Recipe) -> bool:
    return NEEDS.get(recipe.method) == "importance"


def _assign(model: Model, recipe: Recipe) -> dict[str, Scheme]:
    return recipe.assign({name: model.tensors[name].shape for name in file_order(stored(model))})


def _transform(
    model: Model,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    data: Data,
    progress: Progress | None,
) -> Model:
    from edgeq.quant.transforms import TRANSFORMS

    for name in recipe.transforms:
        if name not in TRANSFORMS:
            raise SchemeError(unknown("transform", name, TRANSFORMS))
        model = TRANSFORMS[name](model, data.text, schemes, progress)
    return model


def _solve(
    model: Model, recipe: Recipe, data: Data, progress: Progress | None
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with rules for every matrix, and the bargain they were chosen from."""
    from edgeq.quant.allocate import allocate, uniform
    from edgeq.quant.sensitivity import measure_sensitivity
    from edgeq.quant.trial import divergence

    shapes = {name: model.tensors[name].shape for name in file_order(stored(model))}
    own = [rule for rule in recipe.rules if rule.pattern != OUTER]
    fixed = {
        name: recipe.scheme_for(name, shape)
        for name, shape in shapes.items()
        if len(shape) != 2 or any(rule.matches(name) for rule in own)
    }
    if not isinstance(recipe.default, QuantScheme):
        raise UsageError(
            f"a target needs quantized matrices, but the recipe keeps them in {recipe.default}; "
            "give it a quantized default such as w4-g32"
        )
    free = [name for name in shapes if name not in fixed]
    few: tuple[NDArray[np.int64], ...] = ()
    exact = False
    if data.calibration is not None:
        few = data.text.windows[:: -(-len(data.text.windows) // TARGET_WINDOWS)]
        tokens = sum(window.size for window in few)
        # each tensor at some four numbers of bits takes the model from its layer on
        work = 2 * len(free) * tokens * weights_in(model.tensors[name] for name in shapes)
        exact = work <= EXACT_WORK
    sensitivity = data.sensitivity
    if sensitivity is None:
        sensitivity = measure_sensitivity(
            model,
            replace(data.text, windows=few),
            recipe.default,
            method=recipe.method,
            options=recipe.options,
            mode="kl" if exact else "output",
            names=free,
            progress=progress,
        )
    elif not recipe.transforms:
        sensitivity.check_model(model)
    sensitivity = sensitivity.suited(recipe.default)
    mixed = _fitting(
        model, recipe, lambda nbytes: allocate(sensitivity, shapes, fixed, nbytes=nbytes)
    )
    assert mixed is not None  # or it was said that nothing fits
    if not exact:
        return mixed.recipe, _bargain(mixed.found)
    outer = {name: recipe.scheme_for(name, shapes[name]) for name in free if re.match(OUTER, name)}
    front = mixed.found.front
    one = _fitting(
        model,
        recipe,
        lambda nbytes: uniform(sensitivity, shapes, {**outer, **fixed}, nbytes=nbytes, front=front),
    )
    if one is None:
        return mixed.recipe, _bargain(mixed.found)
    (scheme,) = set(one.found.schemes.values())
    rivals = {MIXED: mixed, str(scheme): one}
    tried = {
        label: divergence(
            model, rival.recipe, _assign(model, rival.recipe), data.text, few, progress
        )
        for label, rival in rivals.items()
    }
    kept = min(tried, key=lambda label: tried[label])
    about = {"tried": {label: _short(nats) for label, nats in tried.items()}, "kept": kept}
    return rivals[kept].recipe, _bargain(rivals[kept].found) | about


@dataclass(frozen=True)
class _Solved:
    """An allocation, and the recipe with its rules."""

    recipe: Recipe
    found: Allocation


def _fitting(
    model: Model, recipe: Recipe, choose: Callable[[int], Allocation | None]
) -> _Solved | None:
    """What is chosen within the recipe's target; None where the choice is among nothing.

    Args:
        model: whose tensors they are.
        recipe: with its target.
        choose: given bytes for all tensors.
    """
    target = recipe.target or {}
    weights = weights_in(model.tensors[name] for name in stored(model))
    budget = room = int(target["bpw"] * weights / 8 if "bpw" in target else target["bytes"])
    while found := choose(room):
        solved = _Solved(_ruled(recipe, found), found)
        if "bpw" in target:
            return solved
        # the file is what must fit: what it holds beside tensors depends a little on the choice
        beside = _beside(model, solved.recipe, _bargain(found))
        if found.chosen.nbytes + beside <= budget:
            return solved
        room = min(budget - beside, room - SLACK)
    return None


def _ruled(recipe: Recipe, found: Allocation) -> Recipe:
    """The recipe with the rules found."""
    own = [rule for rule in recipe.rules if rule.pattern != OUTER]
    outer = [rule for rule in recipe.rules if rule.pattern == OUTER]
    return replace(recipe, rules=(*own, *found.rules(), *outer))


def _bargain(found: Allocation) -> dict[str, Any]:
    """The choice and the front it was made from: bytes, bits per weight and loss of each."""
    chosen, *front = (
        [at.nbytes, round(at.bpw, 4), _short(at.loss)] for at in (found.chosen, *found.front)
    )
    return {"chosen": chosen, "front": front}


def _short(value: float) -> float:
    """As much of a number as is kept in the file."""
    return float(f"{value:.6g}")


def _beside(model: Model, recipe: Recipe, target: Mapping[str, Any]) -> int:
    """Bytes that the file will hold beside its tensors."""
    schemes = _assign(model, recipe)
    held = {
        name: Held(scheme, tuple(model.tensors[name].shape)) for name, scheme in schemes.items()
    }
    numbers = dict.fromkeys(held, -9999.99)
    ranges = {name: [-1 / 3, 1 / 3] for name in held} if recipe.activations else {}
    known = {"recipe": recipe.to_dict(), "target": target, "a": numbers, "b": ranges}
    room = " " * (ROOM + 25 * model.config.layers)
    return overhead(model.config, held, model.files, known | {"card": room})


def _ranges(
    model: Model, recipe: Recipe, data: Data, progress: Progress | None
) -> StaticActivations:
    """Ranges of the inputs of each matrix, measured or known from statistics."""
    assert recipe.activations is not None
    stats, observer = data.stats, recipe.activations.observer
    if stats is None or recipe.transforms or stats.observer != observer:
        if data.calibration is None:
            assert stats is not None
            raise UsageError(
                f"the statistics have ranges of the observer {stats.observer}, and the recipe asks "
                f"for {observer}; calibrate with --observer {observer}, or give --calib TEXT"
            )
        stats = calibrate(model, data.calibration, observer=observer, progress=progress)
    return StaticActivations.from_stats(stats)
