"""Bits chosen for a real model: its tied embedding, which is the head too, is not starved."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeq import quantize
from edgeq.cli import main
from edgeq.formats.schemes import FloatScheme, QuantScheme
from edgeq.formats.tensor import FloatTensor
from edgeq.importers import load
from edgeq.model.artifact import load as load_artifact
from edgeq.model.model import Model
from edgeq.quant import Recipe
from edgeq.quant.decoder import quality_report, sensitivity
from edgeq.quant.decoder.calibrate import CalibrationText, cut_windows
from edgeq.quant.decoder.losses import EMBEDDING, EVERY, mean_divergence
from edgeq.quant.decoder.replay import Replay
from edgeq.quant.decoder.sensitivity import measure_sensitivity
from edgeq.quant.presets import LADDER
from edgeq.quant.rounders.rounding import quantize_tensor
from edgeq.runtime.tokenizer import Tokenizer
from tests.real_models import SMOLLM2, real_model

LAYERS, VOCAB = 3, 8192
"""Of the model as it is cut: its first layers, and its most frequent tokens."""
TEXT = Path(quality_report.__file__).parent / quality_report.TEXT


@pytest.fixture(scope="module")
def cut_model() -> tuple[Model, np.ndarray]:
    """The head and the first layers of a published model, and a text in the tokens it knows."""
    whole = load(real_model(SMOLLM2))
    config = replace(whole.config, vocab=VOCAB, blocks=whole.config.blocks[:LAYERS])
    tensors = {
        name: FloatTensor("float32", whole.tensors[name].rows(0, shape[0]))
        for name, shape in (*config.linears(), *config.norms())
    }
    tokens = np.array(Tokenizer(whole.files).encode(TEXT.read_text("utf-8"), add_bos=False))
    return Model(config, tensors), tokens[tokens < VOCAB]


def windows(tokens: np.ndarray, start: int, count: int) -> CalibrationText:
    part = tokens[start : start + count * 48]
    return cut_windows(part, context=48, text_sha256=f"from {start}")


def kl(model: Model, base: Model, text: CalibrationText) -> float:
    replays = (Replay(one, text.windows).run() for one in (base, model))
    return mean_divergence(*replays)


@pytest.mark.slow
def test_a_tied_embedding_is_priced_in_nats_at_both_its_uses(
    cut_model: tuple[Model, np.ndarray],
) -> None:
    model, tokens = cut_model
    text = windows(tokens, 0, 3)
    q = "model.layers.1.self_attn.q_proj.weight"
    found = measure_sensitivity(model, text, QuantScheme(4), mode="scaled", names=[EMBEDDING, q])
    for name in (EMBEDDING, q):
        tensor = quantize_tensor(model.tensors[name].numpy(), QuantScheme(4), "mse")
        other = replace(model, tensors={**model.tensors, name: tensor})
        replays = (Replay(one, text.windows).run() for one in (model, other))
        want = mean_divergence(*replays, every=EVERY)
        assert found.losses[name]["w4-g32"] == pytest.approx(want, rel=0.02), name
    # they differ by more than any sum of relative errors would have it
    for scheme in ("w3-g32", "w4-g32"):
        assert found.losses[EMBEDDING][scheme] > 20 * found.losses[q][scheme]


@pytest.mark.slow
def test_mixed_bits_of_a_large_head_are_never_worse_than_uniform_ones(
    cut_model: tuple[Model, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "EXACT_WORK", 0)  # as it is for the whole model
    model, tokens = cut_model
    learned, other = windows(tokens, 0, 4), windows(tokens, 200, 12)
    seen = []
    recipe = replace(Recipe.from_options("w4-g32-mse"), target={"bpw": 4.5})
    summary = quantize(
        model, tmp_path / "m.edgeq", recipe, calibration=learned,
        progress=lambda label, done, total: seen.append(label),
    )  # fmt: skip
    assert summary.bpw <= 4.5
    assert summary.target is not None
    tried, kept = summary.target["tried"], summary.target["kept"]
    assert tried[kept] == min(tried.values())
    assert len(tried) == 2
    mixed = load_artifact(tmp_path / "m.edgeq")
    # the head has as many bits as the layers' matrices have on average, or more
    inner = [t for t in summary.tensors if "proj" in t.name]
    outer = next(t for t in summary.tensors if t.name == EMBEDDING)
    bits = [8 * t.nbytes / np.prod(t.shape) for t in (*inner, outer)]
    weights = [np.prod(t.shape) for t in inner]
    assert bits[-1] >= np.average(bits[:-1], weights=weights) - 0.3
    # and on a text that nothing was learned from it is better than plain 4-bit groups of 128,
    # which take as much, with a head of 4 bits
    plain = Recipe.from_options("w4-g64", tensor_types=["embed_tokens=w4-g64"], method="mse")
    rival = quantize(model, tmp_path / "r.edgeq", plain)
    assert rival.bpw <= 4.5
    assert kl(mixed, model, other) <= kl(load_artifact(tmp_path / "r.edgeq"), model, other)
    assert any("measuring the KL of" in label for label in seen)
    assert any(label.startswith("rounding mixed") for label in seen)
    assert not isinstance(outer.scheme, FloatScheme)


@pytest.mark.heavy
@pytest.mark.parametrize("bpw", [3.5, 5.5])
def test_bits_for_a_size_are_never_worse_than_one_scheme_for_all(
    bpw: float, tmp_path: Path
) -> None:
    """The whole model, by the command, with a text that is shorter than the default's."""
    out, text = tmp_path / "m.edgeq", tmp_path / "text.txt"
    text.write_text(TEXT.read_text("utf-8"), "utf-8")
    args = ["quantize", str(real_model(SMOLLM2)), "-o", str(out), "--requantize", "--target-bpw",
            str(bpw), "--calib", str(text), "--calib-windows", "8", "--calib-context", "128",
            "--no-card"]  # fmt: skip
    assert main(args) == 0
    found = load_artifact(out)
    weights = [tensor for name, tensor in found.tensors.items() if name != "lm_head.weight"]
    numbers = sum(math.prod(tensor.shape) for tensor in weights)
    bits = 8 * sum(tensor.nbytes for tensor in weights) / numbers
    target = found.provenance["target"]
    tried, kept = target["tried"], target["kept"]
    assert bits <= bpw
    assert bits > 0.99 * bpw or kept in LADDER
    assert len(tried) == 3
    assert tried[kept] == min(tried.values())
    # there is a scheme for layers near the target, and it is among those that are tried
    (rival,) = set(tried) - {"mixed", *LADDER}
    assert rival.startswith({3.5: "w3-", 5.5: "w5-"}[bpw])
    # and so is the largest preset that fits
    assert set(tried) & {*LADDER} == {{3.5: "2.75bpw", 5.5: "4.75bpw"}[bpw]}
