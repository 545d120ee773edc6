"""A published instruct model in every target: its first layers, and as a whole.

Two channels of SmolLM2's norms are 20 times the others, which random weights never show: kernels
that round a token's inputs over one range lose far more there, and the file is right nonetheless.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.cli import main
from edgeq.converters import Options, target_named
from edgeq.converters.validate import bisect, validate
from edgeq.converters.validate import decoder as validation
from edgeq.converters.validate.bisect import first_divergence, traced_passes
from edgeq.converters.validate.kernels import Kernels, one_range, with_bfloat16_scales
from edgeq.converters.validate.logits import Cost
from edgeq.converters.validate.prompts import passage
from edgeq.formats.spill import Spill
from edgeq.formats.tensor import QuantTensor
from edgeq.importers import load
from edgeq.model import artifact
from edgeq.model.model import Model
from tests.families import quantized, random_model, rounded, tiny_config
from tests.real_models import SMOLLM2, real_model

LAYERS = 3
PACKAGES = {"ort": "onnxruntime", "genai": "onnxruntime_genai", "tflite": "ai_edge_litert",
            "litertlm": "litert_lm_builder", "coreml": "coremltools", "gguf": "gguf"}  # fmt: skip
ENDINGS = {"ort": ".onnx", "genai": "", "tflite": ".tflite", "litertlm": ".litertlm",
           "coreml": ".mlpackage", "gguf": ".gguf"}  # fmt: skip


def cut(model: Model, layers: int) -> Model:
    """The first layers of a model."""
    config = replace(model.config, blocks=model.config.blocks[:layers])
    wanted = {name for name, _ in (*config.linears(), *config.norms(), *config.biases())}
    tensors = {name: model.tensors[name] for name in model.tensors if name in wanted}
    return Model(config, tensors, model.files, model.provenance)


@pytest.fixture(scope="module")
def real() -> Model:
    return quantized(cut(load(real_model(SMOLLM2)), LAYERS), "w4-g32")


def made(model: Model, target: str, folder: Path, options: Options) -> Path:
    pytest.importorskip(PACKAGES[target])
    module = target_named(target).decoder_target()
    module.check(model, options)
    out = folder / f"m{ENDINGS[target]}"
    module.write(model, out, options)
    return out


CASES = [
    ("tflite", Options(context=400)),
    ("tflite", Options(context=400, kv="int8")),
    ("tflite", Options(context=400, compute="float", kv="float16")),
    ("ort", Options()),
    ("ort", Options(compute="float")),
    ("genai", Options()),
    ("coreml", Options(context=256)),
    ("gguf", Options()),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "options"), CASES, ids=lambda case: case if isinstance(case, str) else ""
)
def test_its_layers_are_right_in_every_target(
    target: str, options: Options, real: Model, tmp_path: Path
) -> None:
    out = made(real, target, tmp_path, options)
    report = validate(out, real, target, steps=4, threads=1)
    assert report.passed, report.explain()
    assert report.decoder.constants > 20
    if report.decoder.rounding:
        assert report.decoder.kl_rows > 100
        assert report.decoder.kl_expected is not None
        assert report.decoder.rounding in report.decoder.cost()


@pytest.mark.slow
def test_one_range_for_all_inputs_of_a_token_costs_much_and_is_no_fault(
    real: Model, tmp_path: Path
) -> None:
    """LiteRT's steps differ from exact arithmetic by far more than the bound."""
    out = made(real, "tflite", tmp_path, Options(context=400))
    report = validate(out, real, "tflite", steps=3, threads=1)
    assert report.passed, report.explain()
    assert "over one range" in report.decoder.cost()
    assert "--compute float" in report.decoder.cost()
    exact = Kernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_named("tflite").decoder_target(), "kernels", lambda path, model: exact)
        blamed = validate(out, real, "tflite", steps=2, threads=1)
    assert blamed.decoder.divergence is not None
    # the first of them, the queries of layer 0, is among the least: 0.8 %; others are up to 4 %
    assert blamed.decoder.divergence.step == "layers.0.q"
    assert blamed.decoder.divergence.error > 5 * blamed.decoder.divergence.allowed
    assert len(blamed.decoder.divergence.also) > 20


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tflite", "ort", "gguf"])
def test_a_fault_far_smaller_than_the_rounding_is_found(
    target: str, real: Model, tmp_path: Path
) -> None:
    """One matrix 0.3 % too large, where the kernels' own rounding makes an error of 1 to 5 %."""
    name = "model.layers.1.self_attn.v_proj.weight"
    right = real.tensors[name]
    assert isinstance(right, QuantTensor)
    wrong = replace(right, scales=(right.scales * np.float16(1.003)).astype(np.float16))
    out = made(replace(real, tensors={**real.tensors, name: wrong}), target, tmp_path, Options())
    with pytest.MonkeyPatch.context() as patch:
        # only running the file is to find it
        patch.setattr(validation, "compare_integers", lambda *args: ({}, []))
        patch.setattr(validation, "compare_constants", lambda *args: (0, []))
        report = validate(out, real, target, steps=2, threads=1)
    assert report.decoder.divergence is not None
    assert report.decoder.divergence.step == "layers.1.v"
    assert report.decoder.divergence.error < 1e-2


def test_the_rounding_of_one_range() -> None:
    """255 steps from min(x, 0) to max(x, 0), zero exactly held."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 64)).astype(np.float32)
    x[:, 3] *= 20
    x[3] = np.abs(x[3])
    x[4] = 0
    got = one_range(x)
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    step = (high - low) / 255
    assert (np.abs(got - x).max(axis=1) <= 0.51 * step + 1e-6).all()
    assert (got[x == 0] == 0).all()
    assert max(len(np.unique(row)) for row in got) <= 256


@pytest.mark.parametrize("scheme", ["w4-g32", "w4-g64", "w4-channel", "w8-channel"])
def test_the_rounding_of_litert_is_repeated_to_the_last_digits(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row or several, and with scales in bfloat16, as XNNPACK reads those of groups."""
    config = tiny_config("llama", hidden=128, ffn=256, head_dim=32, tied=False)
    model = quantized(random_model(config), scheme, embed=scheme)
    out = made(model, "tflite", tmp_path, Options(prefill=(4, 16)))
    target = target_named("tflite").decoder_target()
    monkeypatch.setattr(bisect, "ALLOWED", {"int8": 1e-5})
    prompt = [int(t) for t in np.random.default_rng(0).integers(3, config.vocab, size=40)]
    with target.tracer(out) as run, Spill() as spill:
        passes = traced_passes(run, prompt, spill)
    found = first_divergence(model, passes, "int8", target.kernels(out, model))
    assert found is None, str(found)


def test_scales_in_bfloat16() -> None:
    """8 significant bits, ties to even; every one of them is a float16 too."""
    rng = np.random.default_rng(0)
    weight = rounded(rng.normal(size=(16, 64)).astype(np.float32), "w4-g32")
    given = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7, 5 * 2**-24, 257 * 2**-24, 0.1]
    right = [1, 1 + 2**-6, 1 + 2**-7, 5 * 2**-24, 256 * 2**-24, 0.10009765625]
    scales = weight.scales.copy()
    scales[0, 0, : len(given)] = given
    got = with_bfloat16_scales(replace(weight, scales=scales))
    assert got.scales.dtype == np.float16
    assert got.scales[0, 0, : len(given)].tolist() == right
    assert np.array_equal(got.packed, weight.packed)


def test_a_cost_is_allowed_what_its_rounding_costs() -> None:
    rows = np.full(300, 0.02)
    assert Cost(rows, rows).mean <= Cost(rows, rows).allowed
    assert Cost(2 * rows, rows).mean > Cost(2 * rows, rows).allowed
    # what is too little to matter is no fault, whatever the rounding costs
    assert Cost(np.full(300, 1e-4), np.zeros(300)).mean <= Cost(rows, np.zeros(300)).allowed


def test_the_text_is_long_enough(real: Model) -> None:
    ids = passage(real, 288)
    assert len(ids) == 288
    assert len(set(ids)) > 120


@pytest.mark.slow
def test_sizes_are_said_before_the_work(
    real: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A palette's entries are 8-bit integers where there are no palettes."""
    model = quantized(cut(load(real_model(SMOLLM2)), LAYERS), "w4-g32-palette")
    source = tmp_path / "p.edgeq"
    artifact.save(model, source)
    for target, options in CASES[:1] + CASES[3:4] + CASES[6:]:
        pytest.importorskip(PACKAGES[target])
        module = target_named(target).decoder_target()
        scheme = real if target == "tflite" else model
        sizes = list(module.sizes(scheme, options))
        assert {size.name for size in sizes} == {name for name, _ in scheme.config.linears()}
        # a folder of its own, as a target may write other files beside the one it is named by
        folder = tmp_path / target
        folder.mkdir()
        out = made(scheme, target, folder, options)
        files = [out, *folder.glob("m.onnx.data")] if out.is_file() else out.rglob("weight.bin")
        nbytes = sum(file.stat().st_size for file in files)
        assert sum(size.nbytes for size in sizes) == pytest.approx(nbytes, rel=0.1)
    capsys.readouterr()
    args = ["convert", str(source), "--to", "gguf", "-o", str(tmp_path / "q.gguf")]
    assert main([*args, "--no-validate"]) == 0
    errors = capsys.readouterr().err
    assert "The output will take about" in errors
    assert "has no palettes, so" in errors
    assert "matrices are held as 8-bit integers" in errors


@pytest.mark.heavy
@pytest.mark.parametrize("target", ["ort", "tflite", "litertlm", "gguf"])
def test_all_of_it_is_converted_by_the_defaults(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(PACKAGES[target])
    source = tmp_path / "model.edgeq"
    artifact.save(quantized(load(real_model(SMOLLM2)), "w4-g32"), source)
    out = tmp_path / f"m{ENDINGS[target]}"
    args = ["convert", str(source), "--to", target, "-o", str(out), "--format", "json"]
    assert main(args) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert found["integers_equal"] == "211 of 211"
    assert found["constants_equal"] > 60
    assert main(["validate", str(out), "--against", str(source), "--target", target]) == 0
