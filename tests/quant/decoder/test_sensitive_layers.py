"""Layers in which rounding down_proj costs the most: how they are found, and what they get."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeq.core.errors import SchemeError
from edgeq.formats.tensor import FloatTensor
from edgeq.model.model import Model
from edgeq.quant import Recipe
from edgeq.quant.decoder.bit_search import assigned
from edgeq.quant.decoder.calibrate import CalibrationText, cut_windows
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.decoder.sensitive_layers import (
    CONTEXT,
    EVERY,
    OPTION,
    RATIO,
    SHARE,
    WINDOWS,
    SensitiveLayers,
    find_sensitive_layers,
)
from edgeq.quant.rounders.rounding import quantize_tensor
from edgeq.quant.rules import Rule
from tests.families import random_model, scheme_of, tiny_config

RUNG = Recipe.named("4.75bpw")
WORST = "model.layers.9.mlp.down_proj.weight"


def found(model: Model, recipe: Recipe = RUNG) -> SensitiveLayers:
    return find_sensitive_layers(model, recipe, assigned(model, recipe), text(model))


def text(model: Model) -> CalibrationText:
    tokens = np.random.default_rng(1).integers(3, model.config.vocab, 400)
    return cut_windows(tokens, context=64)


def with_down(factors: list[float]) -> Model:
    """Ten layers, their ``down_proj`` times a factor each."""
    model = random_model(tiny_config("llama", layers=10), seed=3)
    tensors = dict(model.tensors)
    for layer, factor in enumerate(factors):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        tensors[name] = FloatTensor("float32", tensors[name].numpy() * np.float32(factor))
    return replace(model, tensors=tensors)


@pytest.fixture(scope="module")
def model() -> Model:
    """Nine layers that add little, and one that adds much."""
    return with_down([0.1] * 9 + [1.5])


def test_the_layer_that_outweighs_the_others_is_chosen(model: Model) -> None:
    layers = found(model)
    assert len(layers.losses) == 10
    assert WORST in layers.chosen
    recipe = layers.applied(RUNG)
    assert OPTION not in recipe.options
    schemes = {name: str(scheme) for name, scheme in assigned(model, recipe).items()}
    assert schemes.pop(WORST) == "w6-g32"
    chosen = {name for name, text in schemes.items() if "down_proj" in name and text == "w6-g32"}
    assert chosen == {*layers.chosen} - {WORST}
    # the recipe that an artifact records does the same without measuring again
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_losses_are_those_of_each_layer_rounded_alone(model: Model) -> None:
    windows = text(model).windows
    windows = windows[:: -(-len(windows) // WINDOWS)]
    windows = tuple(window[:CONTEXT] for window in windows)

    def probabilities(tensors: dict[str, FloatTensor]) -> np.ndarray:
        replay = Replay(model, windows, replaced=tensors).run()
        logits = np.concatenate(list(replay.logits(EVERY))).astype(np.float64)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return shares / shares.sum(axis=1, keepdims=True)

    p = probabilities({})
    for name, loss in found(model).losses.items():
        rounded = quantize_tensor(model.tensors[name].numpy(), scheme_of("w5-g32"), "mse")
        q = probabilities({name: FloatTensor("float32", rounded.numpy())})
        expected = (np.square(p - q) / (p + q)).sum(axis=1).mean()
        assert loss == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("factors", [[1.0] * 10, [0.1] * 9 + [1.5], [0.0] * 10])
def test_few_layers_are_chosen_and_only_those_far_above_the_median(factors: list[float]) -> None:
    layers = found(with_down(factors))
    least = RATIO * float(np.median(list(layers.losses.values())))
    above = [name for name, loss in layers.losses.items() if loss > least]
    worst = sorted(above, key=lambda name: -layers.losses[name])[: 10 // SHARE]
    assert sorted(layers.chosen) == sorted(worst)
    assert bool(layers.chosen) == any(factors)
    if not layers.chosen:
        assert layers.applied(RUNG).rules == RUNG.rules


def test_a_rule_of_the_user_is_left_alone(model: Model) -> None:
    own = Rule.parse("layers.9.mlp.down_proj=w3-g32")
    layers = found(model, replace(RUNG, rules=(own, *RUNG.rules)))
    assert WORST not in layers.losses


def test_a_model_of_few_layers_is_not_measured() -> None:
    assert found(random_model(tiny_config("llama", layers=2), seed=3)).losses == {}


@pytest.mark.parametrize("scheme", ["f16", "bf16"])
def test_the_scheme_is_a_quantized_one(scheme: str) -> None:
    with pytest.raises(SchemeError, match="use a quantized scheme"):
        replace(RUNG, options={OPTION: scheme})
