"""Layers in which rounding ``down_proj`` costs the model far more than in the others.

In a few layers of most language models, the feed-forward part gives a few tokens, the first one
above all, activations that are hundreds of times larger than those of other tokens, and attention
relies on them. The matrix that makes them has to be nearly exact. In SmolLM2-135M, six of the 30
layers cause five sixths of the loss that rounding ``down_proj`` to 4 bits causes.

The loss of a layer is how far the model's predictions move when only its ``down_proj`` is rounded:
the triangular discrimination ``sum (p - q)^2 / (p + q)`` of the probabilities of the next token,
which for small changes equals the KL divergence in nats, and takes no logarithms, so that it is the
same on every machine. All layers are measured in one pass over the model: after each layer, the
hidden states of one more variant of the model, in which that layer is rounded, join those that are
computed.

Sources: Sun et al. 2024, "Massive Activations in Large Language Models" (arXiv:2402.17762); Topsøe
2000, "Some inequalities for information divergence", for the triangular discrimination.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from edgeq.core.progress import Progress
from edgeq.formats.schemes import QuantScheme, Scheme, parse_scheme
from edgeq.formats.tensor import Tensor
from edgeq.model.formulas import Array
from edgeq.model.model import Model
from edgeq.model.recording import linear_groups
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.replay import Replay, ReplayState, ReplayStep
from edgeq.quant.kernels.products import row_products, softmax, total
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.rounding import FALLBACK, quantize_tensor
from edgeq.quant.rules import BUILT_IN, KINDS, Rule

OPTION = "sensitive_layers"
"""The option of a recipe that names the scheme of these matrices."""
WINDOWS, CONTEXT = 2, 128
"""Number of windows of the calibration text for measuring losses, and most tokens of each."""
EVERY = 4
"""The loss is computed at every `EVERY`-th position."""
RATIO = 3.0
"""A layer counts as sensitive if its loss is more than this many times the median loss."""
TINY = np.float32(1e-30)
SHARE = 5
"""At most one layer in `SHARE` counts as sensitive."""


@dataclass(frozen=True)
class SensitiveLayers:
    """The layers whose ``down_proj`` keeps more bits.

    Args:
        scheme: scheme of these matrices.
        losses: name of each matrix that was measured -> its loss.
        chosen: names of the matrices that get the scheme.
    """

    scheme: QuantScheme
    losses: Mapping[str, float]
    chosen: tuple[str, ...]

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with a rule for these matrices instead of the option."""
        options = {name: value for name, value in recipe.options.items() if name != OPTION}
        rules = recipe.rules
        if self.chosen:
            layers = "|".join(name.split(".")[2] for name in self.chosen)
            pattern = rf"^model\.layers\.({layers})\.mlp{KINDS['down']}"
            rules = (Rule(pattern, self.scheme), *rules)
        return replace(recipe, rules=rules, options=options)

    def to_dict(self) -> dict[str, object]:
        """The choice as an artifact records it."""
        return {
            "scheme": str(self.scheme),
            "chosen": list(self.chosen),
            "losses": {name: float(f"{loss:.3g}") for name, loss in self.losses.items()},
        }


def find_sensitive_layers(
    model: Model,
    recipe: Recipe,
    schemes: Mapping[str, Scheme],
    calibration: CalibrationText,
    progress: Progress | None = None,
) -> SensitiveLayers:
    """Measure the loss of rounding ``down_proj`` in each layer, and choose the largest.

    Matrices for which the user gave a rule, or which have as many bits already, are not considered,
    and neither are those of experts, of which each has a part in few tokens.

    Args:
        model: the float model.
        recipe: a recipe with the option `OPTION`.
        schemes: schemes of all tensors that are stored.
        calibration: a text, of which the first tokens of `WINDOWS` windows are used.
        progress: called with ("finding sensitive layers", layers done, number of layers).
    """
    scheme = parse_scheme(recipe.options[OPTION])
    assert isinstance(scheme, QuantScheme)  # the recipe was checked
    rules = [rule for rule in recipe.rules if rule.pattern not in BUILT_IN]
    wanted: dict[int, tuple[str, QuantScheme]] = {}
    for group in linear_groups(model.config):
        for name in group.linears if group.kind == "mlp_out" and group.expert is None else ():
            own = schemes[name]
            has_rule = any(rule.matches(name) for rule in rules)
            if isinstance(own, QuantScheme) and own.bits < scheme.bits and not has_rule:
                wanted[group.layer] = name, own
    most = len(wanted) // SHARE
    losses = _losses(model, wanted, calibration, progress) if most else {}
    worst = sorted(losses, key=lambda name: -losses[name])[:most]
    least = RATIO * float(np.median(list(losses.values()))) if losses else 0.0
    chosen = {name for name in worst if losses[name] > least}
    return SensitiveLayers(scheme, losses, tuple(name for name in losses if name in chosen))


def _losses(
    model: Model,
    wanted: Mapping[int, tuple[str, QuantScheme]],
    calibration: CalibrationText,
    progress: Progress | None,
) -> dict[str, float]:
    """The loss of each of the matrices, in the order of the layers."""
    windows = calibration.windows[:: -(-len(calibration.windows) // WINDOWS)]
    windows = tuple(window[:CONTEXT] for window in windows)
    count, layers = len(windows), model.config.layers
    state: ReplayState | None = None
    measured: list[str] = []
    for layer in range(layers):
        if progress:
            progress("finding sensitive layers", layer, layers)
        states: list[ReplayState] = []
        if layer in wanted:
            name, scheme = wanted[layer]
            measured.append(name)
            rounded = None if state is None else replace(state, hidden=state.hidden[:count])
            states.append(_after(Replay(model, windows, state=rounded), name, scheme))
        variants = len(state.hidden) // count if state else 1
        states.insert(0, _after(Replay(model, windows * variants, state=state)))
        state = replace(states[0], hidden=sum((part.hidden for part in states), ()))
    assert state is not None  # a model has layers
    replay = Replay(model, windows * (1 + len(measured)), state=state).run()
    logits = replay.logits(EVERY)
    base = [softmax(next(logits)) for _ in windows]
    return {
        name: sum(_discrimination(p, softmax(next(logits))) for p in base) / sum(map(len, base))
        for name in measured
    }


def _after(
    replay: Replay, name: str | None = None, scheme: QuantScheme | None = None
) -> ReplayState:
    """The state after one layer, in which one matrix may be rounded."""
    first: ReplayStep | None = None
    for step in replay:
        first = first or step
        if step.group.layer != first.group.layer or step.group.kind == "head":
            break
        if name in step.group.linears and scheme is not None:
            rounded: Tensor = quantize_tensor(step.weights[name], scheme, FALLBACK, name=name)
            step.replace(name, rounded.numpy())
    return replay.state()


def _discrimination(p: Array, q: Array) -> float:
    """Sum of the triangular discriminations of rows of probabilities, float32 [T, V] each."""
    apart = p - q
    return total(row_products(apart, apart / np.maximum(p + q, TINY)))
