"""Greedy tokens of another runtime against the reference, on any processor."""

from __future__ import annotations

from collections.abc import Sequence

from edgeq.model.model import Model
from edgeq.model.reference import Reference

NEAR = {"float32": 1e-3, "float16": 1e-2, "int8": 0.1}
"""How far the logits of a runtime may be from the reference's, by the type of its cache. Two
processors sum in different orders and round differently, so that either of two tokens whose logits
are as near as this may come first. The logits of the tests' models have a deviation of about 1."""


def assert_reference_choices(
    model: Model, prompt: Sequence[int], chosen: Sequence[int], near: float = NEAR["float32"]
) -> None:
    """Check that each token is the one the reference would choose after those before it.

    Args:
        model: what was converted.
        prompt: token ids before the first chosen one.
        chosen: what the other runtime generated.
        near: how much less than the best logit that of a chosen token may be.
    """
    assert chosen
    reference = Reference(model, keep=True)
    cache = reference.new_cache()
    tokens = list(prompt)
    for place, token in enumerate(chosen):
        logits = reference.forward(tokens, cache, all_logits=False)
        assert logits[token] >= logits.max() - near, (
            f"token {place} is {token} and the reference's is {int(logits.argmax())}, "
            f"better by {float(logits.max() - logits[token]):.4g}"
        )
        tokens = [token]
