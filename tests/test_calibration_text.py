"""The calibration text where none is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq import calibration_text as texts
from edgeq.core.errors import DoesNotFitError, UsageError
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.quant.decoder import sampling
from edgeq.runtime.tokenizer import Tokenizer
from tests.families import random_model, tiny_config
from tests.paths import ROOT

INCLUDED = Path(sampling.__file__).parent / texts.TEXT


@pytest.fixture(scope="module")
def demo() -> Model:
    return load(ROOT / "edgeq" / "demo_model")


def test_the_included_text_comes_first_and_then_what_was_sampled(demo: Model) -> None:
    made = texts.own_calibration(demo)
    length, count = texts._to_sample(demo, made.context)
    assert made.sampled == length * count > 0
    included, sampled = made.windows[:-count], made.windows[-count:]
    assert len(included) == texts.WINDOWS
    tokenizer = Tokenizer(demo.files)
    whole = INCLUDED.read_text("utf-8")
    assert tokenizer.decode(included[0].tolist()).strip()[:200] == whole[:200]
    heads = {tuple(window[:2]) for window in sampled}
    assert all(head[0] == tokenizer.text_bos for head in heads)
    assert len(heads) > 2  # not all begin with BOS alone
    assert made.sha256 == texts.own_calibration(demo).sha256


def test_paragraphs_without_words_are_left_out(demo: Model) -> None:
    tokenizer = Tokenizer(demo.files)
    kept = texts._covered(
        tokenizer, ["The cat sat on the mat and slept.", "猫はマットの上に座った。"]
    )
    assert kept == ["The cat sat on the mat and slept."]
    foreign = ["猫はマットの上に座った。"]
    assert texts._covered(tokenizer, foreign) == foreign  # rather than nothing


def test_a_chat_model_is_asked_questions(demo: Model) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    chat = replace(demo, files={**demo.files, "chat_template.jinja": template.encode()})
    tokenizer = Tokenizer(chat.files)
    assert tokenizer.has_chat_template
    beginnings = texts._beginnings(tokenizer, ["One day a dog ran away."], 9, 128)
    said = [tokenizer.decode(tokens) for tokens in beginnings]
    assert sum(text.endswith("<assistant>") for text in said) == 3
    assert sum(tokens == [tokenizer.text_bos] for tokens in beginnings) == 3


def test_a_model_without_a_tokenizer_is_sampled_alone() -> None:
    model = random_model(tiny_config("llama"))
    made = texts.own_calibration(model)
    assert made.sampled == made.n_tokens > 0
    assert len({int(window[0]) for window in made.windows}) > 8


def test_a_large_model_is_not_sampled(demo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "SAMPLED_WEIGHTS", 1 << 20)
    made = texts.own_calibration(demo)
    assert (made.sampled, len(made.windows)) == (0, texts.WINDOWS)
    with pytest.raises(UsageError, match="no tokenizer"):
        texts.own_calibration(replace(demo, files={}))


def test_memory_is_limited(demo: Model) -> None:
    with pytest.raises(DoesNotFitError, match=r"--calib, or use\s+--fast"):
        texts.own_calibration(demo, max_ram=1 << 20)


def test_the_default_learns_without_data(demo: Model, tmp_path: Path) -> None:
    out = tmp_path / "m.edgeq"
    summary = edgeq.quantize(demo, out, card=texts.held_out(demo, None))
    fast = edgeq.quantize(demo, tmp_path / "f.edgeq", fast=True, card=texts.held_out(demo, None))
    assert (summary.recipe.method, fast.recipe.method) == ("gptq", "rtn")
    assert summary.quality.evaluation is not None
    assert fast.quality.evaluation is not None
    assert summary.bpw < fast.bpw
    assert summary.quality.evaluation.kl_mean is not None
    assert fast.quality.evaluation.kl_mean is not None
    assert summary.quality.evaluation.kl_mean < fast.quality.evaluation.kl_mean / 2
    known = edgeq.load(out).provenance["calibration"]
    assert 0 < known["sampled"] < known["tokens"]
    with pytest.raises(UsageError, match="give either fast or a recipe"):
        edgeq.quantize(demo, out, "w4-g64", fast=True)


def test_sampled_tokens_are_tokens(demo: Model) -> None:
    made = texts.own_calibration(demo)
    assert all(window.min() >= 0 and window.max() < demo.config.vocab for window in made.windows)
    assert all(window.dtype == np.int64 for window in made.windows)
