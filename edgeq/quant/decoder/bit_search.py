"""Choose the bits of each matrix for a target size, and keep the choice only if it measures better.

    sensitivities   loss of each matrix in each scheme, in nats, measured or estimated
    uniform         the best recipe with one scheme for all layers. The model is rounded by it, and
                    its KL divergence is measured.
    mixed           a scheme for each matrix, chosen as a knapsack problem after the estimates of
                    the layers were scaled to the measured loss of the uniform recipe. The model is
                    rounded by it and measured too.
    preset          the largest preset that is named by its size and fits, for recipes of GPTQ,
                    which is how these presets round. It is measured too, whatever its schemes.
    kept            the recipe with the lowest KL divergence

If the text has enough windows, rounding and measuring use different windows. A preset that is kept
is rounded anew on all windows, so that its artifact has the integers of the preset itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import SchemeError, UsageError
from edgeq.core.progress import Progress
from edgeq.formats.schemes import QuantScheme, Scheme
from edgeq.formats.spill import Spill
from edgeq.formats.tensor import Tensor
from edgeq.model.artifact_layout import TensorLayout, file_order, overhead
from edgeq.model.model import Model
from edgeq.quant.decoder.allocate import (
    Allocation,
    ParetoPoint,
    Uniform,
    allocate,
    total_bytes,
    uniform,
)
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.losses import mean_divergence
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.decoder.round_model import rounded_model
from edgeq.quant.decoder.sensitive_layers import OPTION, SensitiveLayers, find_sensitive_layers
from edgeq.quant.decoder.sensitivity import Sensitivity, measure_sensitivity, mode_for
from edgeq.quant.presets import LADDER
from edgeq.quant.recipe import Recipe
from edgeq.quant.rules import BUILT_IN, OUTER, Rule

TARGET_WINDOWS = 8
"""Number of windows on which recipes are measured."""
SCALED_WINDOWS = 4
"""Number of windows on which sensitivities are estimated in the mode "scaled"."""
HELD_OUT_SHARE = 4
"""If the text has at least this many times `TARGET_WINDOWS` windows, rounding does not use the
windows of the measurement."""
FACTOR_RANGE = (0.1, 4.0)
"""Limits on the factor that scales the layers' estimates to a measured recipe."""
ROOM = 4096
"""Upper bound on the bytes of a quality report and of other metadata in a file."""
METHOD_OF_PRESETS = "gptq"
"""The method of the presets of `LADDER`."""
MIXED = "mixed"
"""Label of the recipe with a scheme for each matrix."""
SLACK = 256
"""Bytes by which a budget is lowered if the whole file does not fit."""


@dataclass(frozen=True)
class SearchResult:
    """The recipe that reaches a target.

    Args:
        recipe: the recipe with a rule for every matrix, or with the two schemes of the uniform
            recipe.
        about: entries for the artifact's provenance: "chosen" and "front" as [bytes, bits per
            weight, estimated KL divergence]; "tried", the measured KL divergence of each recipe in
            nats per token, and "kept", the label of the chosen one; or "not_tried", the reason why
            nothing was measured.
        tensors: the tensors as rounded by the chosen recipe; None if none was measured, or if a
            preset was chosen, which is to be rounded on the whole text.
        sensitive: the sensitive layers of a preset that was chosen; None if it has no such option.
    """

    recipe: Recipe
    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor] | None
    sensitive: SensitiveLayers | None = None


def stored(model: Model) -> Iterator[str]:
    """Names of the tensors to write. A tied head is the embedding, which is stored once."""
    return (name for name in model.tensors if not (model.config.tied and name == "lm_head.weight"))


def assigned(model: Model, recipe: Recipe) -> dict[str, Scheme]:
    """The scheme of each tensor to be written, in file order.

    Raises:
        SchemeError: the recipe does not fit the model.
    """
    return recipe.assign({name: model.tensors[name].shape for name in file_order(stored(model))})


def search_bits(
    model: Model,
    recipe: Recipe,
    calibration: CalibrationText | None,
    sensitivity: Sensitivity | None,
    *,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Choose a scheme for every matrix that the recipe leaves free.

    Args:
        model: the float model.
        recipe: a recipe with a target.
        calibration: the calibration text. Without a text nothing is measured, and ``sensitivity``
            must be given.
        sensitivity: losses of the matrices; measured if None.
        scratch: folder for temporary files; None for that of the system.
        progress: called with what is done, how far, and of how much.

    Raises:
        DoesNotFitError: the target cannot be reached.
        UsageError: the recipe's default is not a quantized scheme, or the sensitivities are not
            in nats or lack palettes that the recipe asks for.
    """
    if not isinstance(recipe.default, QuantScheme):
        raise UsageError(
            f"bits are chosen for a target, and the recipe keeps matrices in {recipe.default}; "
            "give it a quantized default such as w4-g32"
        )
    search = _Search(model, recipe, progress or (lambda label, done, total: None))
    few: tuple[NDArray[np.int64], ...] = ()
    whole = calibration
    if calibration is not None:
        calibration, few = _split(calibration)
    if sensitivity is None:
        assert calibration is not None  # `CalibrationData.check` refuses that
        sensitivity = search.measured(calibration, few, scratch)
    sensitivity = sensitivity.suited(recipe.default)
    mixed = search.solve(sensitivity, MIXED)
    assert mixed is not None  # otherwise `solve` has raised DoesNotFitError
    if calibration is None:
        why = "no calibration text was given"
        return SearchResult(
            mixed.recipe, _pareto_summary(mixed.allocation) | {"not_tried": why}, None
        )
    with Spill(scratch) as spill:
        trials = _Trials(search, calibration, few, spill)
        one = search.solve(sensitivity, "uniform", mixed.allocation.front)
        if one is not None:
            trials.measure(one)
            factor = search.factor(sensitivity, one, trials.nats[one.label])
            corrected = search.solve(_scaled(sensitivity, factor), MIXED)
            mixed = corrected or mixed
            one = replace(one, allocation=replace(one.allocation, front=mixed.allocation.front))
        trials.measure(mixed)
        assert whole is not None
        preset = search.preset(whole)
        if preset is not None:
            trials.measure(preset)
        kept = min(trials.nats, key=lambda label: trials.nats[label])
        best = next(s for s in (mixed, one, preset) if s is not None and s.label == kept)
        tried = {label: _short(nats) for label, nats in trials.nats.items()}
        allocation = best.allocation
        if best is preset:
            point = replace(allocation.chosen, loss=trials.nats[kept])
            allocation = replace(allocation, chosen=point, front=mixed.allocation.front)
        about = _pareto_summary(allocation) | {"tried": tried, "kept": kept}
        tensors = None if best is preset else trials.tensors[kept]
        return SearchResult(best.recipe, about, tensors, best.sensitive)


def _split(calibration: CalibrationText) -> tuple[CalibrationText, tuple[NDArray[np.int64], ...]]:
    """The windows for rounding and those for measuring, which differ if there are enough."""
    windows = calibration.windows
    step = -(-len(windows) // TARGET_WINDOWS)
    few = windows[::step]
    if len(windows) < HELD_OUT_SHARE * TARGET_WINDOWS:
        return calibration, few
    others = tuple(window for at, window in enumerate(windows) if at % step)
    return replace(calibration, windows=others), few


def _scaled(sensitivity: Sensitivity, factor: float) -> Sensitivity:
    """The sensitivities with the losses of the layers' matrices multiplied by a factor."""
    losses = {
        name: nats if re.match(OUTER, name) else {text: factor * x for text, x in nats.items()}
        for name, nats in sensitivity.losses.items()
    }
    return replace(sensitivity, losses=losses)


@dataclass(frozen=True)
class _Solved:
    """An allocation, and the recipe with the rules that it gives; of a preset also its layers."""

    label: str
    recipe: Recipe
    allocation: Allocation
    sensitive: SensitiveLayers | None = None


class _Search:
    """A model, a recipe with a target, and the matrices whose schemes are free."""

    def __init__(self, model: Model, recipe: Recipe, progress: Progress) -> None:
        # a preset's own rules for kinds of matrices are among what is to be chosen
        options = {key: value for key, value in recipe.options.items() if key != OPTION}
        self.model, self.recipe, self.progress = model, replace(recipe, options=options), progress
        self.shapes = {name: model.tensors[name].shape for name in file_order(stored(model))}
        self.own = [rule for rule in recipe.rules if rule.pattern not in BUILT_IN]
        if model.config.mtp is not None:  # on which no output depends
            self.own.append(Rule(r"^mtp\..*(_proj|fc_\w+)\.weight$", recipe.default))
        self.fixed = {
            name: recipe.scheme_for(name, shape)
            for name, shape in self.shapes.items()
            if len(shape) != 2 or any(rule.matches(name) for rule in self.own)
        }
        self.free = [name for name in self.shapes if name not in self.fixed]
        target = recipe.target or {}
        weights = sum(math.prod(shape) for shape in self.shapes.values())
        self.budget = int(target["bpw"] * weights / 8 if "bpw" in target else target["bytes"])

    def measured(
        self, calibration: CalibrationText, few: Sequence[NDArray[np.int64]], scratch: Path | None
    ) -> Sensitivity:
        """Measure sensitivities: of each tensor for small models, else by kinds of tensors."""
        assert isinstance(self.recipe.default, QuantScheme)
        mode = mode_for(self.model, sum(window.size for window in few))
        if mode == "scaled":
            few = few[:: -(-len(few) // SCALED_WINDOWS)]
        return measure_sensitivity(
            self.model,
            replace(calibration, windows=tuple(few)),
            self.recipe.default,
            method=self.recipe.method,
            options=self.recipe.options,
            mode=mode,
            names=self.free,
            scratch=scratch,
            progress=self.progress,
        )

    def solve(
        self, sensitivity: Sensitivity, label: str, front: tuple[Any, ...] = ()
    ) -> _Solved | None:
        """The best allocation within the recipe's target; None if no uniform recipe fits."""
        room = self.budget
        while True:
            if label == MIXED:
                allocation = allocate(sensitivity, self.shapes, self.fixed, nbytes=room)
                recipe = self._with_rules(allocation)
            else:
                one = uniform(sensitivity, self.shapes, self.fixed, nbytes=room, front=front)
                if one is None:
                    return None
                label, allocation, recipe = str(one), one.allocation, self._uniform(one)
            solved = _Solved(label, recipe, allocation)
            overhead_bytes = self._overhead(solved)
            if allocation.chosen.nbytes + overhead_bytes <= self.budget:
                return solved
            room = min(self.budget - overhead_bytes, room - SLACK)

    def preset(self, calibration: CalibrationText) -> _Solved | None:
        """The largest preset of `LADDER` within the target; None if there is none that rounds so.

        The user's rules come before those of the preset. Sensitive layers get their own scheme as
        far as the target allows for them.

        Args:
            calibration: the whole calibration text, on which sensitive layers are found.
        """
        if self.recipe.method != METHOD_OF_PRESETS:
            return None
        for name in reversed([*LADDER]):
            rung = Recipe.named(name)
            asked = replace(
                self.recipe, default=rung.default, rules=(*self.own, *rung.rules),
                options=rung.options,
            )  # fmt: skip
            options = {key: value for key, value in rung.options.items() if key != OPTION}
            recipe = replace(asked, options=options)
            try:
                plain = self._solved_by(name, recipe)
            except SchemeError:  # its groups are longer than the model's rows
                continue
            if not self._fits(plain):
                continue
            if OPTION not in rung.options:
                return plain
            schemes = assigned(self.model, asked)
            found = find_sensitive_layers(self.model, asked, schemes, calibration, self.progress)
            full = replace(self._solved_by(name, found.applied(asked)), sensitive=found)
            return full if self._fits(full) else plain
        return None

    def _solved_by(self, label: str, recipe: Recipe) -> _Solved:
        """What a recipe without a target gives to each matrix; its loss is not known yet."""
        schemes = assigned(self.model, recipe)
        weights = sum(math.prod(shape) for shape in self.shapes.values())
        nbytes = total_bytes(schemes, self.shapes)
        point = ParetoPoint(nbytes, 8 * nbytes / weights, 0.0)
        free = {name: schemes[name] for name in self.free}
        return _Solved(label, recipe, Allocation(free, point, ()))

    def _fits(self, solved: _Solved) -> bool:
        return solved.allocation.chosen.nbytes + self._overhead(solved) <= self.budget

    def factor(self, sensitivity: Sensitivity, one: _Solved, nats: float) -> float:
        """The factor that scales the estimates of the layers to the measured loss of a recipe.

        It is 1 if the user gave matrices a scheme, because their share of the loss is unknown.
        """
        if any(isinstance(scheme, QuantScheme) for scheme in self.fixed.values()):
            return 1.0
        parts = {True: 0.0, False: 0.0}
        for name, scheme in one.allocation.schemes.items():
            parts[bool(re.match(OUTER, name))] += sensitivity.losses[name][str(scheme)]
        outer, inner = parts[True], parts[False]
        if inner <= 0:
            return 1.0
        low, high = FACTOR_RANGE
        return min(max((nats - outer) / inner, low), high)

    def _with_rules(self, allocation: Allocation) -> Recipe:
        """The recipe with a rule for each matrix."""
        outer = [rule for rule in self.recipe.rules if rule.pattern == OUTER]
        return replace(self.recipe, rules=(*self.own, *allocation.rules(), *outer))

    def _uniform(self, one: Uniform) -> Recipe:
        """The recipe with one scheme as its default and one for embedding and head."""
        outer = [rule for rule in self.recipe.rules if rule.pattern == OUTER]
        if one.outer is not None:
            outer = [Rule(OUTER, one.outer)]
        return replace(self.recipe, default=one.inner, rules=(*self.own, *outer))

    def _overhead(self, solved: _Solved) -> int:
        """Bytes besides the tensors that count: those of the file, if the target is its size.

        They depend a little on the choice.
        """
        model, recipe = self.model, solved.recipe
        if "bytes" not in (recipe.target or {}):
            return 0
        tensors = {
            name: TensorLayout(scheme, tuple(model.tensors[name].shape))
            for name, scheme in assigned(model, recipe).items()
        }
        numbers = dict.fromkeys(tensors, -9999.99)
        ranges = {name: [-1 / 3, 1 / 3] for name in tensors} if recipe.activations else {}
        target = _pareto_summary(solved.allocation)
        known = {"recipe": recipe.to_dict(), "target": target, "a": numbers, "b": ranges}
        room = " " * (ROOM + 25 * model.config.layers)
        return overhead(model.config, tensors, model.files, known | {"card": room})


class _Trials:
    """Recipes applied to the model, and their KL divergence from the float model."""

    def __init__(
        self,
        search: _Search,
        calibration: CalibrationText,
        few: Sequence[NDArray[np.int64]],
        spill: Spill,
    ) -> None:
        self._search, self._calibration, self._few, self._spill = search, calibration, few, spill
        self._float: Replay | None = None
        self.nats: dict[str, float] = {}
        self.tensors: dict[str, Mapping[str, Tensor]] = {}

    def measure(self, solved: _Solved) -> None:
        """Round the model by a recipe and measure it."""
        search, label = self._search, solved.label

        def progress(name: str, done: int, total: int) -> None:
            search.progress(f"rounding {label}: {name}", done, total)

        other = rounded_model(
            search.model, solved.recipe, assigned(search.model, solved.recipe), self._calibration,
            self._spill, progress,
        )  # fmt: skip
        search.progress(f"measuring {label}", 0, 1)
        self._float = self._float or Replay(search.model, self._few).run()
        self.nats[label] = mean_divergence(self._float, Replay(other, self._few).run())
        self.tensors[label] = other.tensors
        search.progress(f"measuring {label}", 1, 1)


def _pareto_summary(allocation: Allocation) -> dict[str, Any]:
    """The chosen point and the Pareto front: bytes, bits per weight and loss of each."""
    chosen, *front = (
        [at.nbytes, round(at.bpw, 4), _short(at.loss)]
        for at in (allocation.chosen, *allocation.front)
    )
    return {"chosen": chosen, "front": front}


def _short(value: float) -> float:
    """Round a number to the six digits that the file stores."""
    return float(f"{value:.6g}")
