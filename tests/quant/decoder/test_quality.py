"""The quality card: against an evaluation by other means, in the file, and where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeq import quantize
from edgeq.core.errors import FormatError, UsageError
from edgeq.evaluation import text as evaluate
from edgeq.formats.tensor import FloatTensor
from edgeq.importers import load as load_any
from edgeq.model.artifact import load
from edgeq.model.decoder import layer
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant import Recipe
from edgeq.quant.decoder.calibrate import cut_windows
from edgeq.quant.decoder.model_card import model_card
from edgeq.quant.decoder.quality_report import (
    HeldOut,
    QualityReport,
    card_bytes,
    card_tokens,
    measure,
)
from tests.families import CALIBRATED, quantized, random_model, tiny_config
from tests.paths import DEMO


def held_out(vocab: int = 101, n: int = 90, context: int = 31, bos: int | None = 1) -> HeldOut:
    tokens = np.random.default_rng(5).integers(3, vocab, n)
    cut = cut_windows(tokens, context=context, bos=bos, text_sha256="5" * 64)
    return HeldOut("a text", cut)


@pytest.mark.parametrize("family", CALIBRATED)
def test_the_card_is_what_evaluation_by_the_reference_finds(family: str) -> None:
    base = random_model(tiny_config(family))
    model = quantized(base, "w4-g32")
    text = held_out()
    got = measure(model, base, text)
    tokens = np.concatenate([window[1:] for window in text.cut.windows])
    want = evaluate.perplexity(
        Reference(model).forward, tokens, context=31, bos=1, base=Reference(base).forward
    )
    assert got.evaluation is not None
    found, wanted = got.evaluation.to_dict(), want.to_dict()
    for key in ("protocol", "bits_per_byte"):
        del found[key], wanted[key]
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert "3 windows spread over the text" in got.evaluation.protocol
    assert want.flips


def test_hidden_states_layer_by_layer() -> None:
    base = random_model(tiny_config("llama", layers=3))
    model = quantized(base, "w4-g32")
    text = held_out()
    got = measure(model, base, text).hidden_sqnr_db
    states = []
    for one in (base, model):
        reference = Reference(one)
        windows = []
        for window in text.cut.windows:
            reference.begin(window)
            x = reference.embed("embed")
            rows = [x]
            for i in range(3):
                x = layer(reference, one.config, i, x)
                rows.append(x)
            windows.append(rows)
        states.append([np.concatenate(rows) for rows in zip(*windows, strict=True)])
    want = [
        10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()) for a, b in zip(*states, strict=True)
    ]
    assert got == pytest.approx(want, rel=1e-4)
    assert len(got) == 4


def test_equal_models_have_nothing_to_tell_apart() -> None:
    base = random_model(tiny_config("qwen3"))
    got = measure(base, base, held_out())
    assert got.evaluation is not None
    assert (got.evaluation.kl_max, got.evaluation.flips) == (0.0, 0)
    assert got.hidden_sqnr_db == (None, None, None)


def test_what_cannot_be_measured_says_why() -> None:
    base = random_model(tiny_config("llama"))
    short = measure(base, base, held_out(n=1, bos=None))
    assert short.evaluation is None
    assert "too short" in str(short.reason)
    name = "model.norm.weight"
    huge = FloatTensor("float32", np.full(base.tensors[name].shape, 3e38, np.float32))
    with np.errstate(all="ignore"):
        broken = measure(base, replace(base, tensors={**base.tensors, name: huge}), held_out())
    assert "not finite" in str(broken.reason)
    assert broken.to_dict() == {"not_measured": broken.reason}
    assert QualityReport.from_dict(broken.to_dict()) == broken


def test_there_and_back() -> None:
    base = random_model(tiny_config("llama"))
    got = measure(quantized(base, "w2-g16"), base, held_out())
    data = json.loads(json.dumps(got.to_dict()))
    again = QualityReport.from_dict(data)
    assert again.to_dict() == data
    assert again.evaluation is not None
    assert got.evaluation is not None
    assert again.evaluation.kl_mean == pytest.approx(got.evaluation.kl_mean, rel=1e-6)
    widest = QualityReport.widest(base.config, held_out())
    assert len(json.dumps(widest.to_dict())) > len(json.dumps(data))
    for damaged in ({}, {"text": "a"}, {**data, "surprise": 1}):
        with pytest.raises(FormatError, match="quality report of the artifact is damaged"):
            QualityReport.from_dict(damaged)


def test_larger_models_are_tried_on_fewer_tokens() -> None:
    assert card_tokens(1_235_000_000) == 256
    assert card_tokens(7_000_000_000) == 256
    assert card_tokens(260_000) == 2048
    assert card_tokens(300_000_000) == 768


def test_the_artifact_carries_its_card(tmp_path: Path) -> None:
    base = random_model(tiny_config("gemma3"))
    seen: list[str] = []
    summary = quantize(
        base, tmp_path / "m.edgeq", Recipe.from_options("w3-g32"), card=held_out(),
        progress=lambda label, done, total: seen.append(label),
    )  # fmt: skip
    assert seen[-1] == "quality card"
    model = load(tmp_path / "m.edgeq")
    held = QualityReport.from_dict(model.provenance["quality"])
    assert held.to_dict() == summary.quality.to_dict() == model.provenance["quality"]
    # it is of what is in the file
    again = measure(model, base, held_out())
    assert again.to_dict() == held.to_dict()
    assert (held.text, held.text_sha256) == ("a text", "5" * 64)


def test_a_reason_instead_of_a_card(tmp_path: Path) -> None:
    base = random_model(tiny_config("llama"))
    quantize(base, tmp_path / "m.edgeq", fast=True)
    held = load(tmp_path / "m.edgeq").provenance["quality"]
    assert held == {"not_measured": "no text was given to measure on"}
    quantize(base, tmp_path / "m.edgeq", card="no tokenizer, " + "so " * 500, fast=True)
    held = load(tmp_path / "m.edgeq").provenance["quality"]
    assert held["not_measured"].startswith("no tokenizer, so so")


def test_no_card_where_memory_does_not_allow_it(tmp_path: Path) -> None:
    base = random_model(tiny_config("llama"))
    text = held_out(n=4000)
    need = card_bytes(base.config, text)
    from edgeq.core.memory import rss_bytes

    rss = rss_bytes()
    if rss is None:
        pytest.skip("resident memory cannot be read here")
    limit = rss + max(need // 2, 120 << 20)
    summary = quantize(base, tmp_path / "m.edgeq", card=text, max_ram=limit, fast=True)
    assert summary.quality.evaluation is None
    assert "MB were allowed (--max-ram)" in str(summary.quality.reason)
    summary = quantize(base, tmp_path / "m.edgeq", card=text, max_ram=rss + 2 * need, fast=True)
    assert summary.quality.evaluation is not None


def test_not_on_the_text_that_was_calibrated_with(tmp_path: Path) -> None:
    base = random_model(tiny_config("llama"))
    text = held_out()
    with pytest.raises(UsageError, match="cannot be measured on a text, which is also the calib"):
        quantize(base, tmp_path / "m.edgeq", calibration=text.cut, card=text)
    assert not list(tmp_path.iterdir())


def demo_card(tmp_path: Path, model: Model) -> str:
    text = held_out(vocab=model.config.vocab, n=600, context=128)
    path = tmp_path / "tale.edgeq"
    quantize(model, path, Recipe.from_options("w4-g32"), card=text)
    return model_card(load(path), path.name)


def test_the_model_card(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    card = demo_card(tmp_path, load_any(DEMO))
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "edgeq"
    assert fields["pipeline_tag"] == "text-generation"
    assert {"edgeq", "llama", "w4-g32"} <= set(fields["tags"])
    assert body.lstrip().startswith("# tale.edgeq")
    quality = load(tmp_path / "tale.edgeq").provenance["quality"]
    assert f"{quality['kl_mean']:.5f}" in body
    assert f"{100 * quality['top1_agreement']:.2f} %" in body
    assert quality["protocol"] in body
    for line in body.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_the_card_of_a_model_that_knows_nothing_of_itself() -> None:
    card = model_card(random_model(tiny_config("phi3")), "m")
    assert "Not measured." in card
    assert "| f32 | 21 | 44660 | 178640 | 32.00 |" in card
    assert "How it was made" not in card
