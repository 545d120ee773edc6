"""INT8 activations: parameters, what an artifact holds of them, and what they cost a real model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.core.errors import FormatError, UsageError
from edgeq.evaluation.text import Evaluation, perplexity
from edgeq.formats.qparams import QuantParams
from edgeq.importers import load
from edgeq.model import artifact
from edgeq.model.formulas import Linear
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant.decoder.calibrate import CalibrationStats, calibrate, cut_windows
from edgeq.quant.decoder.static import (
    KEY,
    StaticActivations,
    dynamic_linear,
)
from tests.families import dequantized, quantized, random_model, tiny_config
from tests.paths import DEMO

TOKENS = np.random.default_rng(7).integers(3, 101, 120)


def small(family: str = "llama") -> tuple[Model, CalibrationStats]:
    model = random_model(tiny_config(family))
    return model, calibrate(model, cut_windows(TOKENS, context=40))


# Parameters


def test_a_range_takes_all_codes_and_keeps_zero() -> None:
    params = QuantParams.from_range(-1.0, 4.1)
    assert params.scale == pytest.approx(5.1 / 255)
    assert params.zero_point == 50 - 128
    x = np.linspace(-1, 4.1, 1000, dtype=np.float32)
    codes = params.quantize(x)
    assert codes.dtype == np.int8
    assert (codes.min(), codes.max(), len(np.unique(codes))) == (-128, 127, 256)
    assert np.abs(params.dequantize(codes) - x).max() <= params.scale * 0.51
    assert params.dequantize(params.quantize(np.zeros(1, np.float32)))[0] == 0
    assert params.quantize(np.array([-9, 9], np.float32)).tolist() == [-128, 127]


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(0.0, 2.0, -128), (-2.0, 0.0, 127), (0.0, 0.0, 0)]
)
def test_ranges_on_one_side(low: float, high: float, zero: int) -> None:
    params = QuantParams.from_range(low, high)
    assert params.zero_point == zero
    assert params.scale > 0
    x = np.linspace(low, high, 9, dtype=np.float32)
    assert np.abs(params.dequantize(params.quantize(x)) - x).max() <= params.scale * 0.51


def test_rounding_is_onnxruntime_s() -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    params = QuantParams.from_range(-1.3, 4.7)
    helper = onnx.helper
    node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.INT8, ["n"])],
        [
            helper.make_tensor("scale", onnx.TensorProto.FLOAT, [], [params.scale]),
            helper.make_tensor("zero", onnx.TensorProto.INT8, [], [params.zero_point]),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32) * 2
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], params.quantize(x))


# In a model


def test_static_rounds_each_input_by_its_range() -> None:
    model, stats = small()
    static = StaticActivations.from_stats(stats)
    seen: dict[str, int] = {}

    def product(name: str, x: np.ndarray, weight: Any) -> np.ndarray:
        params = static.params(name)
        steps = x / np.float32(params.scale)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
        seen[name] = len(np.unique(np.rint(steps)))
        return x @ weight.numpy().T

    got = Reference(model, linear=static.linear(product)).forward(TOKENS[:40])
    assert set(seen) == set(stats.inputs)
    assert max(seen.values()) > 100
    want = Reference(model).forward(TOKENS[:40])
    assert 0 < np.abs(got - want).max() < 0.2 * want.std() + 0.2


def test_dynamic_gives_each_token_its_scale() -> None:
    model, _ = small()
    spiked = {"position": 3, "times": np.float32(1000)}

    def product(name: str, x: np.ndarray, weight: Any) -> np.ndarray:
        largest = np.abs(x).max(axis=1, keepdims=True)
        steps = x / np.where(largest > 0, largest, 1) * 127
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
        return x @ weight.numpy().T

    got = Reference(model, linear=dynamic_linear(product)).forward(TOKENS[:40])
    want = Reference(model).forward(TOKENS[:40])
    assert 0 < np.abs(got - want).max() < 0.2 * want.std() + 0.2
    name = "model.layers.0.mlp.down_proj.weight"
    x = np.random.default_rng(0).normal(size=(5, 76)).astype(np.float32)
    plain = dynamic_linear()(name, x, model.tensors[name])
    x[spiked["position"]] *= spiked["times"]
    spoiled = dynamic_linear()(name, x, model.tensors[name])
    others = [i for i in range(5) if i != spiked["position"]]
    np.testing.assert_array_equal(spoiled[others], plain[others])  # no token harms another
    assert not dynamic_linear()(name, np.zeros_like(x), model.tensors[name]).any()


def test_an_artifact_holds_its_ranges(tmp_path: Path) -> None:
    model, stats = small("mistral")
    static = StaticActivations.from_stats(stats)
    assert StaticActivations.of(model) is None
    path = tmp_path / "m.edgeq"
    artifact.save(replace(model, provenance={KEY: static.to_dict()}), path)
    loaded = artifact.load(path)
    restored = StaticActivations.of(loaded)
    assert restored == static
    assert restored is not None
    np.testing.assert_array_equal(
        Reference(loaded, linear=restored.linear()).forward(TOKENS[:9]),
        Reference(model, linear=static.linear()).forward(TOKENS[:9]),
    )


NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        [1],
        {NAME: 3},
        {NAME: [1.0]},
        {NAME: ["a", 1.0]},
        {NAME: [0.5, 1.0]},
        {NAME: [-1.0, float("inf")]},
        {NAME: [-1.0, float("nan")]},
        {"nothing": [-1.0, 1.0]},
    ],
)
def test_damaged_ranges_are_refused(inputs: Any) -> None:
    model, _ = small()
    data: Mapping[str, Any] = {"mode": "static", "observer": "mse", "inputs": inputs}
    with pytest.raises(FormatError, match=r"not readable|damaged"):
        StaticActivations.of(replace(model, provenance={KEY: data}))


def test_symmetric_ranges_are_refused() -> None:
    model, _ = small()
    data = {"mode": "static", "observer": "mse", "symmetric": True, "inputs": {NAME: [-1.0, 1.0]}}
    with pytest.raises(FormatError, match="symmetric, which is not supported"):
        StaticActivations.of(replace(model, provenance={KEY: data}))


def test_a_matrix_without_a_range_is_named() -> None:
    model, _ = small()
    static = StaticActivations("minmax", {NAME: (-1.0, 1.0)})
    with pytest.raises(UsageError, match=r"no static range for the inputs of .*q_proj"):
        Reference(model, linear=static.linear()).forward([3])


# What it costs


def scored(model: Model, linear: Linear | None, base: Model, tokens: list[int]) -> Evaluation:
    rounded, plain = Reference(model, linear=linear), Reference(base, keep=True)
    return perplexity(rounded.forward, tokens, context=128, bos=0, base=plain.forward)


@pytest.fixture(scope="module")
def demo() -> tuple[Model, Model, list[int], list[int]]:
    """The demo model, with INT8 weights, tokens to calibrate on and others to score."""
    from edgeq.runtime.tokenizer import Tokenizer

    model = load(DEMO)
    ids = Tokenizer(model.files).encode((DEMO / "heldout.txt").read_text("utf-8"), add_bos=False)
    return model, dequantized(quantized(model, "w8-channel")), ids[2000:], ids[:1000]


def test_int8_activations_of_the_demo_model(demo: Any) -> None:
    model, packed, ids, held = demo
    calibration = cut_windows(ids, context=128, n_windows=8, bos=0)
    weights = scored(packed, None, model, held)
    dynamic = scored(packed, dynamic_linear(), model, held)
    static = {}
    for observer in ("minmax", "mse", "percentile"):
        stats = calibrate(model, calibration, observer=observer)
        linear = StaticActivations.from_stats(stats).linear()
        static[observer] = scored(packed, linear, model, held)
    found = {"weights": weights, "dynamic": dynamic, **static}
    kl = {name: result.kl_mean for name, result in found.items()}
    top = {name: result.top1_agreement for name, result in found.items()}
    # a scale for each token costs less than one for all, and least squares less than min-max
    assert kl["weights"] < kl["dynamic"] < kl["mse"] < kl["minmax"] < 0.006
    assert top["weights"] > 0.985
    assert top["dynamic"] > 0.975
    assert top["mse"] > 0.955
    assert max(abs(r.nll_per_token - weights.nll_per_token) for r in found.values()) < 0.02
