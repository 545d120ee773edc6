"""`edgeq.perplexity` against a base: a float model runs by the engine, any other in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.evaluation import text as text_evaluation
from edgeq.model.reference import Reference
from tests.conftest import small_checkpoint, story_text
from tests.families import quantized

KEYS = ("kl_mean", "kl_p99", "base_nll_per_token", "nll_per_token")


def by_reference(model: Any, base: Any, text: str) -> text_evaluation.Evaluation:
    """The same figures with NumPy's float32 base."""
    tokenizer = edgeq.Tokenizer(model)
    with edgeq.Engine(model, context=64) as engine:

        def logits(tokens: Any) -> Any:
            engine.reset()
            return engine.forward(tokens, all_logits=True)

        return text_evaluation.perplexity(
            logits, tokenizer.encode(text, add_bos=False), context=64, bos=tokenizer.text_bos,
            base=Reference(base).forward,
        )  # fmt: skip


@pytest.mark.parametrize("float_base", [True, False])
def test_kl_is_that_from_the_base_in_float32(float_base: bool) -> None:
    model = edgeq.load(small_checkpoint())
    packed = quantized(model, "w4-g32")
    assert model.is_float
    assert not packed.is_float
    text = story_text().read_text("utf-8")[:1500]
    pair = (packed, model) if float_base else (model, packed)
    got = edgeq.perplexity(pair[0], text, context=64, base=pair[1])
    want = by_reference(*pair, text)
    for key in KEYS:
        # the engine keeps a float base's keys and values in float16
        tolerance = 2e-3 if float_base else 1e-6
        np.testing.assert_allclose(getattr(got, key), getattr(want, key), rtol=tolerance)
