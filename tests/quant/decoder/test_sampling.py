"""Texts sampled from a model: what is computed, what is drawn, and that it is always the same."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from edgeq.core.errors import FormatError, UsageError
from edgeq.formats.tensor import FloatTensor
from edgeq.model.reference import Reference
from edgeq.quant.decoder.sampling import LEAST_LIKELY, sample_texts
from edgeq.quant.kernels.parallel import thread_limit
from tests.families import CALIBRATED, random_model, tiny_config
from tests.paths import ROOT

BEGINNINGS = ((1,), (5, 9, 3), (1, 7), (2, 2, 2, 2))
SCRIPT = """
from edgeq.quant.decoder.sampling import sample_texts
from tests.families import random_model, tiny_config
for family in ("llama", "gemma3", "olmo2"):
    print(sample_texts(random_model(tiny_config(family)), [[1], [5, 9], [3]], 24, seed=3).tolist())
"""


@pytest.mark.parametrize("family", CALIBRATED)
def test_every_token_is_likely_after_those_before_it(family: str) -> None:
    model = random_model(tiny_config(family))
    texts = sample_texts(model, BEGINNINGS, 20)
    assert texts.shape == (len(BEGINNINGS), 20)
    reference = Reference(model, keep=True)
    for beginning, text in zip(BEGINNINGS, texts, strict=True):
        assert tuple(text[: len(beginning)]) == beginning
        logits = reference.forward(text[:-1]).astype(np.float64)
        chances = np.exp(logits - logits.max(axis=1, keepdims=True))
        drawn = chances[np.arange(len(text) - 1), text[1:]]
        # all were at least so likely, but for what rounding makes of a chance
        assert (drawn[len(beginning) - 1 :] >= 0.99 * LEAST_LIKELY).all()


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    model = random_model(tiny_config("llama"))
    texts = sample_texts(model, [[1]] * 4000, 2, seed=5)
    logits = Reference(model).forward([1], all_logits=False).astype(np.float64)
    chances = np.exp(logits - logits.max())
    chances[chances < LEAST_LIKELY] = 0
    chances /= chances.sum()
    found = np.bincount(texts[:, 1], minlength=len(chances)) / len(texts)
    assert np.abs(found - chances).max() < 5 * np.sqrt(chances.max() / len(texts))


def test_threads_and_other_texts_change_nothing() -> None:
    model = random_model(tiny_config("llama"))
    with thread_limit(1):
        texts = sample_texts(model, BEGINNINGS, 30, seed=1)
    with thread_limit(3):
        np.testing.assert_array_equal(sample_texts(model, BEGINNINGS, 30, seed=1), texts)
    assert (sample_texts(model, BEGINNINGS, 30, seed=2) != texts).any()
    # another text beside it draws its own numbers
    longer = sample_texts(model, [BEGINNINGS[0], [4] * 30, *BEGINNINGS[2:]], 30, seed=1)
    np.testing.assert_array_equal(longer[0], texts[0])
    np.testing.assert_array_equal(longer[2:], texts[2:])


@pytest.mark.slow
def test_instruction_sets_change_nothing() -> None:
    found = set()
    for kernel, core in (("", "Haswell"), ("generic", "SkylakeX")):
        environment = {k: v for k, v in os.environ.items() if k != "EDGEQ_KERNEL"}
        environment |= {"PYTHONPATH": str(ROOT), "OPENBLAS_CORETYPE": core}
        environment |= {"EDGEQ_KERNEL": kernel} if kernel else {}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, cwd=ROOT, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
        found.add(done.stdout)
    assert len(found) == 1


def test_what_cannot_be_sampled_is_refused() -> None:
    model = random_model(tiny_config("llama"))
    with pytest.raises(UsageError, match="no beginning"):
        sample_texts(model, [], 8)
    with pytest.raises(UsageError, match="no beginning"):
        sample_texts(model, [[1], []], 8)
    with pytest.raises(UsageError, match=f"use 1 to {model.config.context}, the model's context"):
        sample_texts(model, [[1]], model.config.context + 1)
    name = "model.layers.0.mlp.down_proj.weight"
    broken = FloatTensor("float32", np.full(model.tensors[name].shape, np.nan, np.float32))
    with pytest.raises(FormatError, match=f"{name} holds nan"):
        sample_texts(replace(model, tensors={**model.tensors, name: broken}), [[1]], 4)
