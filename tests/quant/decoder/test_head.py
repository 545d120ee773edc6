"""The rungs' own ways: errors in parts of the residual stream, and a head rounded by its inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeq.formats.tensor import QuantTensor
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.quant import Recipe
from edgeq.quant.decoder import calibrated
from edgeq.quant.decoder.bit_search import assigned
from edgeq.quant.decoder.calibrate import CalibrationText, cut_windows
from edgeq.quant.decoder.calibrated import (
    HEAD_ROWS,
    head_by_gptq,
    head_importance,
    head_name,
    round_head,
)
from edgeq.quant.decoder.data_free import round_matrix
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.rounders.hessian import TARGET_DAMPING
from edgeq.quant.rounders.rounding import quantize_tensor
from tests.families import random_model, scheme_of, tiny_config
from tests.paths import ROOT

RUNG = Recipe.named("4.75bpw")


@pytest.fixture(scope="module")
def demo() -> Model:
    return load(ROOT / "edgeq" / "demo_model")


def text(model: Model) -> CalibrationText:
    tokens = np.random.default_rng(1).integers(3, model.config.vocab, 1200)
    return cut_windows(tokens, context=64)


def test_a_head_by_gptq_gives_better_logits_than_one_by_importance(demo: Model) -> None:
    name, scheme, windows = head_name(demo), scheme_of("w4-g32"), text(demo)
    made: dict[str, QuantTensor] = {}
    ratio = round_head(demo, name, scheme, windows, made.__setitem__, options=RUNG.options)
    importance = head_importance(demo, {name: scheme}, "gptq", windows)[name]
    weighted = round_matrix(demo.tensors[name], scheme, "imatrix", name, importance)
    w = demo.tensors[name].numpy()
    x = np.concatenate(list(calibrated._head_inputs(demo, windows)))
    lost = [np.square(x @ (w - held.numpy()).T).sum() for held in (made[name], weighted)]
    assert lost[0] < 0.8 * lost[1]
    assert ratio is not None
    assert 10 < ratio < 25


def test_a_palette_of_the_head_is_better_than_even_steps(demo: Model) -> None:
    name, windows = head_name(demo), text(demo)
    w = demo.tensors[name].numpy()
    x = np.concatenate(list(calibrated._head_inputs(demo, windows)))
    lost = []
    # scales of palettes are positive; even steps gain about as much by negative ones
    options = {**RUNG.options, "signed_scales": False}
    for scheme in ("w3-g32-palette", "w3-g32"):
        made: dict[str, QuantTensor] = {}
        round_head(demo, name, scheme_of(scheme), windows, made.__setitem__, options=options)
        lost.append(np.square(x @ (w - made[name].numpy()).T).sum())
    assert lost[0] < 0.95 * lost[1]


def test_negative_scales_lower_the_error_of_the_logits(demo: Model) -> None:
    name, windows = head_name(demo), text(demo)
    w = demo.tensors[name].numpy()
    x = np.concatenate(list(calibrated._head_inputs(demo, windows)))
    lost = []
    for signed in (True, False):
        made: dict[str, QuantTensor] = {}
        options = {**RUNG.options, "signed_scales": signed}
        round_head(demo, name, scheme_of("w3-g32"), windows, made.__setitem__, options=options)
        lost.append(np.square(x @ (w - made[name].numpy()).T).sum())
    assert lost[0] < 0.9 * lost[1]


@pytest.mark.parametrize("text_form", ["w6-g32", "w3-g32-palette"])
def test_a_head_in_pieces_is_the_head(
    text_form: str, demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, scheme, windows = head_name(demo), scheme_of(text_form), text(demo)
    assert len(demo.tensors[name].numpy()) <= HEAD_ROWS
    whole: dict[str, QuantTensor] = {}
    parts: dict[str, QuantTensor] = {}
    ratios = [round_head(demo, name, scheme, windows, whole.__setitem__, options={})]
    monkeypatch.setattr(calibrated, "HEAD_ROWS", 48)
    ratios.append(round_head(demo, name, scheme, windows, parts.__setitem__, options={}))
    np.testing.assert_array_equal(whole[name].packed, parts[name].packed)
    np.testing.assert_array_equal(whole[name].scales, parts[name].scales)
    np.testing.assert_array_equal(whole[name].numpy(), parts[name].numpy())
    assert (whole[name].palette is not None) == bool(scheme.codebook)
    assert ratios[0] == pytest.approx(ratios[1])


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_only_a_head_of_few_bits_is_rounded_so(family: str) -> None:
    model = random_model(tiny_config(family))
    schemes = assigned(model, RUNG)
    assert head_by_gptq(model, schemes, RUNG) == head_name(model)
    assert head_by_gptq(model, {**schemes, head_name(model): scheme_of("w4-g32-palette")}, RUNG)
    for scheme in ("w8-channel", "w4-tensor"):
        other = {**schemes, head_name(model): scheme_of(scheme)}
        assert head_by_gptq(model, other, RUNG) is None
    assert head_by_gptq(model, schemes, replace(RUNG, options={})) is None
    assert head_by_gptq(model, schemes, RUNG.with_method("mse")) is None


def test_errors_count_in_parts_of_the_residual_stream() -> None:
    """Moments and targets against float64, from the replay's own numbers."""
    model = random_model(tiny_config("llama"))
    windows = text(model)
    replay = Replay(model, windows.windows, float_inputs=True)
    for step in replay:
        names = step.group.linears
        if step.group.kind == "mlp_out" and step.group.adds_to_residual:
            w = step.weights[names[0]].astype(np.float64)
            found = calibrated._residual_moments(step)
            x, exact, error, after = (
                np.concatenate(list(part)).astype(np.float64)
                for part in (
                    step.inputs(), step.float_inputs(), step.residual_errors(),
                    step.float_outputs(),
                )
            )  # fmt: skip
            count = 1 / np.mean(np.square(after), axis=1)
            moments = (x * count[:, None]).T @ x / len(x)
            np.testing.assert_allclose(found.matrix, moments, rtol=1e-3, atol=1e-4 * moments.max())
            missed = (exact - x) @ w.T + error
            shift = (missed * count[:, None]).T @ x / len(x)
            damping = TARGET_DAMPING * len(moments) / len(x)
            ridge = damping * np.trace(moments) / len(moments) * np.eye(len(moments))
            target = w + shift @ np.linalg.inv(moments + ridge)
            got = found.target(step.weights[names[0]])
            assert np.abs(got - target).max() < 1e-3 * np.abs(w).max()
        # what is rounded before makes a difference after
        for name in names:
            if step.group.kind != "head":
                step.replace(name, quantize_tensor(step.weights[name], scheme_of("w4-g32")).numpy())
