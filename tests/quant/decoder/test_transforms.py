"""Transforms leave the float model what it was, and make it round better."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeq.core.errors import UnsupportedError
from edgeq.formats.schemes import FloatScheme, Scheme, parse_scheme
from edgeq.formats.tensor import FloatTensor
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.decoder.transforms import TRANSFORMS
from edgeq.quant.decoder.transforms.rotate import orthogonal
from edgeq.quant.rounders.gptq import Hessian, weighted_error
from edgeq.quant.rounders.rounding import quantize_tensor
from tests.families import CALIBRATED, random_model, tiny_config


def text(vocab: int = 101) -> CalibrationText:
    rng = np.random.default_rng(5)
    windows = tuple(rng.integers(0, vocab, 40) for _ in range(3))
    return CalibrationText(windows, "", 40, None)


def schemes(model: Model, scheme: str = "w4-g32") -> dict[str, Scheme]:
    return {name: parse_scheme(scheme) for name, _ in model.config.linears()}


def with_outliers(model: Model) -> Model:
    """Some channels of every norm's output made large, and their columns small: as trained."""
    tensors = dict(model.tensors)
    rng = np.random.default_rng(2)
    for name, _ in model.config.norms():
        w = tensors[name].numpy()
        w[rng.integers(0, w.size, 3)] *= 12
        tensors[name] = FloatTensor("float32", w)
    return replace(model, tensors=tensors)


def logits(model: Model) -> np.ndarray:
    return Reference(model).forward(text().windows[0])


@pytest.mark.parametrize("family", CALIBRATED)
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "rotate"])
def test_float_logits_are_unchanged(family: str, name: str) -> None:
    model = with_outliers(random_model(tiny_config(family)))
    if name == "rotate-values" and any(block.output_gate for block in model.config.blocks):
        with pytest.raises(UnsupportedError, match="a gate stands between its values and their"):
            TRANSFORMS[name](model, text(), schemes(model), None)
        return
    moved = TRANSFORMS[name](model, text(), schemes(model), None)
    moved.validate()
    want = logits(model)
    np.testing.assert_allclose(logits(moved), want, atol=1e-4 * np.abs(want).max())
    changed = [n for n in model.tensors if moved.tensors[n] is not model.tensors[n]]
    assert changed, "nothing was transformed"


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "qwen3_5"]
)
def test_rotating_the_residual_stream_is_exact(family: str) -> None:
    model = with_outliers(random_model(tiny_config(family, tied=False)))
    want = logits(model)
    moved = TRANSFORMS["rotate"](model, text(), {}, None)
    np.testing.assert_allclose(logits(moved), want, atol=1e-4 * np.abs(want).max())
    x = next(iter(next(iter(Replay(moved, text().windows))).inputs()))
    before = next(iter(next(iter(Replay(model, text().windows))).inputs()))
    # the few large channels are spread over all
    assert np.abs(x).max() / np.abs(x).mean() < 0.6 * np.abs(before).max() / np.abs(before).mean()


def test_rotation_of_a_tied_model_needs_a_last_norm_without_weights() -> None:
    model = random_model(tiny_config("llama"))
    with pytest.raises(UnsupportedError, match="use rotate-values"):
        TRANSFORMS["rotate"](model, text(), {}, None)
    flat = FloatTensor("float32", np.full(44, 1.5, np.float32))
    even = replace(model, tensors={**model.tensors, "model.norm.weight": flat})
    want = logits(even)
    moved = TRANSFORMS["rotate"](even, text(), {}, None)
    np.testing.assert_allclose(logits(moved), want, atol=1e-4 * np.abs(want).max())
    for family in ("gemma3", "olmo2"):
        with pytest.raises(UnsupportedError, match="norms after attention"):
            TRANSFORMS["rotate"](random_model(tiny_config(family)), text(), {}, None)


@pytest.mark.parametrize("size", [1, 2, 12, 32, 44])
def test_rotations_are_orthogonal_and_fixed(size: int) -> None:
    r = orthogonal(size)
    np.testing.assert_allclose(r.T @ r, np.eye(size), atol=3e-9)  # rounded to 9 digits
    np.testing.assert_array_equal(r, orthogonal(size))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_awq_lowers_the_error_of_what_the_matrices_put_out(family: str) -> None:
    model = with_outliers(random_model(tiny_config(family)))
    moved = TRANSFORMS["awq"](model, text(), schemes(model), None)
    before, after = (output_errors(m) for m in (model, moved))
    assert set(before) == set(after)
    # alpha = 0 is among those tried, so no group gets worse by more than float noise
    for group, error in after.items():
        assert error <= before[group] * 1.001, group
    assert sum(after.values()) < 0.9 * sum(before.values())


def output_errors(model: Model) -> dict[str, float]:
    """Squared error of the outputs of each group with its matrices rounded to 4 bits."""
    found = {}
    for step in Replay(model, text().windows):
        if step.group.kind == "head":
            continue
        hessian: Hessian | None = None
        for x in step.inputs():
            hessian = hessian or Hessian(x.shape[1])
            hessian.add(x)
        assert hessian is not None
        # rows of v and up carry factors of the groups after them; their error counts there
        found[str(step.group)] = sum(
            weighted_error(w, quantize_tensor(w, parse_scheme("w4-g32"), "mse").numpy(), hessian)
            / weighted_error(w, np.zeros_like(w), hessian)
            for name, w in step.weights.items()
            if "v_proj" not in name and "up_proj" not in name
        )
    return found


def test_inputs_without_a_norm_before_them_keep_their_scale() -> None:
    model = with_outliers(random_model(tiny_config("olmo2")))
    for name in ("awq", "smoothquant"):
        moved = TRANSFORMS[name](model, text(), schemes(model), None)
        changed = {
            n.split(".")[-2] for n in model.tensors if moved.tensors[n] is not model.tensors[n]
        }
        assert changed == {"v_proj", "o_proj", "up_proj", "down_proj"}


def test_awq_leaves_floating_point_alone() -> None:
    model = random_model(tiny_config("llama"))
    chosen: dict[str, Scheme] = {name: FloatScheme("float32") for name, _ in model.config.linears()}
    moved = TRANSFORMS["awq"](model, text(), chosen, None)
    assert all(moved.tensors[name] is tensor for name, tensor in model.tensors.items())


def test_smoothquant_evens_out_the_inputs() -> None:
    model = with_outliers(random_model(tiny_config("llama")))
    moved = TRANSFORMS["smoothquant"](model, text(), {}, None)

    def spread(m: Model) -> float:
        x = np.concatenate(list(next(iter(Replay(m, text().windows))).inputs()))
        peaks = np.abs(x).max(axis=0)
        return float(peaks.max() / np.median(peaks))

    assert spread(moved) < 0.5 * spread(model)
