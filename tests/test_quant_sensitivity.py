"""Sensitivities: measured as said, of use to the allocation, kept in a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeq.artifact import load as load_artifact
from edgeq.cli import main
from edgeq.errors import FormatError, UsageError
from edgeq.evaluate import kl_divergence, log_softmax
from edgeq.model import Model
from edgeq.quant import Recipe, quantize
from edgeq.quant.allocate import allocate
from edgeq.quant.calibrate import Calibration
from edgeq.quant.rounding import quantize_tensor
from edgeq.quant.sensitivity import Sensitivity, candidates, measure_sensitivity
from edgeq.reference import Reference
from edgeq.schemes import FloatScheme, QuantScheme, parse_scheme
from tests.families import quantized, random_model, tiny_config

DEMO = Path(__file__).resolve().parent.parent / "edgeq" / "demo_model"
BASE = QuantScheme(4)


def text(vocab: int = 101, tokens: int = 40) -> Calibration:
    rng = np.random.default_rng(5)
    return Calibration(tuple(rng.integers(0, vocab, tokens) for _ in range(2)), "", tokens, None)


def divergence(model: Model, base: Model) -> float:
    parts = [
        kl_divergence(
            log_softmax(Reference(base).forward(window)),
            log_softmax(Reference(model).forward(window)),
        )
        for window in text().windows
    ]
    return float(np.concatenate(parts).mean())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_a_loss_is_the_divergence_with_that_tensor_alone_rounded(family: str) -> None:
    model = random_model(tiny_config(family))
    names = [name for name, _ in model.config.linears()]
    found = measure_sensitivity(model, text(), BASE)
    assert list(found.losses) == names
    assert found.n_tokens == 80
    for name in (names[0], names[3], names[-1]):
        w = model.tensors[name].numpy()
        for scheme in ("w4-g32", "w2-g32", "w8-channel"):
            tensor = quantize_tensor(w, parse_scheme(scheme), "mse")  # type: ignore[arg-type]
            other = replace(model, tensors={**model.tensors, name: tensor})
            want = divergence(other, model)
            assert found.losses[name][scheme] == pytest.approx(want, rel=2e-3, abs=1e-9), name
        losses = found.losses[name]
        assert losses["w2-g32"] > losses["w3-g32"] > losses["w4-g32"] > losses["w8-channel"]


def test_output_errors_are_relative_to_the_output() -> None:
    model = random_model(tiny_config("llama"))
    name = "model.layers.1.mlp.down_proj.weight"
    found = measure_sensitivity(model, text(), BASE, mode="output", names=[name])
    assert list(found.losses) == [name]
    inputs: list[np.ndarray] = []

    def watch(at: str, x: np.ndarray, weight: object) -> np.ndarray:
        if at == name:
            inputs.append(x)
        return x @ weight.numpy().T  # type: ignore[attr-defined,no-any-return]

    for window in text().windows:
        Reference(model, linear=watch).forward(window)
    x, w = np.concatenate(inputs).astype(np.float64), model.tensors[name].numpy()
    rounded = quantize_tensor(w, BASE, "mse").numpy()
    want = np.square(x @ (w - rounded).T).sum() / np.square(x @ w.T).sum()
    assert found.losses[name]["w4-g32"] == pytest.approx(want, rel=1e-4)


def test_candidates_suit_the_row_and_the_base() -> None:
    names = [str(scheme) for scheme in candidates(BASE, 100)]
    assert names == [
        "w2-g32",
        "w2-g64",
        "w3-g32",
        "w3-g64",
        "w4-g32",
        "w4-g64",
        "w8-channel",
        "f16",
    ]
    assert str(candidates(QuantScheme(4, False, "group", 64), 300)[0]) == "w2-g64-asym"
    assert FloatScheme("f16") in candidates(QuantScheme(4, group_size=128), 44)


def test_a_target_is_met_and_beats_uniform_bits(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama", hidden=64, ffn=128, layers=3))
    # a model where tensors differ much in what they mind, as trained ones do
    tensors = dict(model.tensors)
    for i, (name, _) in enumerate(model.config.linears()):
        if "down_proj" in name or "v_proj" in name:
            w = tensors[name].numpy()
            w[:, :: 7 + i] *= 6
            tensors[name] = replace(tensors[name], data=w)  # type: ignore[type-var]
    model = replace(model, tensors=tensors)
    uniform = quantized(model, "w3-g32", "w8-channel")
    total = sum(int(np.prod(t.shape)) for t in model.tensors.values())
    bpw = 8 * uniform.nbytes / total
    out = tmp_path / "m.edgeq"
    calibration = replace(text(), text_sha256="1")
    recipe = replace(Recipe.from_options("w3-g32-mse"), target={"bpw": bpw})
    summary = quantize(model, out, recipe, calibration=calibration)
    assert 0.99 * bpw <= summary.bpw <= bpw
    plain = quantize(model, tmp_path / "u.edgeq", Recipe.from_options("w3-g32-mse"))
    assert summary.bpw <= plain.bpw
    mixed, same = load_artifact(out), load_artifact(tmp_path / "u.edgeq")
    assert divergence(mixed, model) < divergence(same, model)


def test_what_was_measured_is_kept_and_read_back(tmp_path: Path) -> None:
    model = random_model(tiny_config("qwen2"))
    found = measure_sensitivity(model, text(), BASE, mode="output")
    path = tmp_path / "s.json"
    path.write_text(found.to_json(), "utf-8")
    again = Sensitivity.load(path)
    assert again == found
    again.check_model(model)
    with pytest.raises(UsageError, match="another model"):
        again.check_model(random_model(tiny_config("qwen2"), seed=1))
    path.write_text(found.to_json().replace('"format_version": 1', '"format_version": 9'), "utf-8")
    with pytest.raises(FormatError, match="make it anew"):
        Sensitivity.load(path)
    path.write_text("[]", "utf-8")
    with pytest.raises(FormatError, match="holds no sensitivities"):
        Sensitivity.load(path)


def test_a_quantized_model_is_refused() -> None:
    model = quantized(random_model(tiny_config("llama")), "w4-g32")
    with pytest.raises(UsageError, match="quantized already"):
        measure_sensitivity(model, text(), BASE)


def test_the_command_writes_what_quantize_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = tmp_path / "text.txt"
    story.write_text((DEMO / "heldout.txt").read_text("utf-8")[:2500], "utf-8")
    kept = tmp_path / "s.json"
    args = ["sensitivity", str(DEMO), "--calib", str(story), "--mode", "output",
            "--calib-windows", "2", "-o", str(kept)]  # fmt: skip
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "relative squared error of the output" in out
    assert "model.layers." in out
    assert main(args) == 1
    assert "--force" in capsys.readouterr().err
    artifact = tmp_path / "m.edgeq"
    again = ["quantize", str(DEMO), "-o", str(artifact), "--preset", "w4-g32",
             "--target-bpw", "4.7", "--sensitivity", str(kept), "--no-card",
             "--format", "json"]  # fmt: skip
    assert main(again) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.99 * 4.7 <= found["bpw"] <= 4.7
    sensitivity = Sensitivity.load(kept)
    shapes = {t["name"]: tuple(t["shape"]) for t in found["tensors"]}
    fixed = {n: FloatScheme("f32") for n, s in shapes.items() if len(s) != 2}
    want = allocate(sensitivity, shapes, fixed, bpw=4.7)  # type: ignore[arg-type]
    got = {t["name"]: t["scheme"] for t in found["tensors"] if len(t["shape"]) == 2}
    assert got == {name: str(scheme) for name, scheme in want.schemes.items()}
