"""Prompts that conversions are validated with: real text by the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgeq.errors import FormatError, MissingDependencyError
from edgeq.model import Model

TEXTS = (
    "Once upon a time",
    "What is the capital of France? Answer in one word.",
    "The old lighthouse keeper climbed the 207 steps every evening, lit the lamp, and wrote the "
    "date, the weather and the names of the ships into a thick grey book. In winter, when no ship "
    "came for weeks, he wrote about the birds instead: gulls, terns, and once, on 3 March 1962, a "
    "snowy owl that sat on the railing until dawn and looked at him as if he owed it something.",
)
"""Short, of medium length with what the tokenizer has for turns of a chat, and long."""
_LENGTHS = (6, 21, 150)
"""Tokens at most: below, between and past the usual lengths of prefill signatures."""


def prompts(model: Model, room: int) -> list[list[int]]:
    """Token ids of three prompts of different lengths.

    Args:
        model: whose tokenizer is used; without one, ids are drawn at random.
        room: tokens a prompt may have at most.

    Raises:
        FormatError: the tokenizer is damaged.
    """
    found = []
    for i, (text, length) in enumerate(zip(TEXTS, _LENGTHS, strict=True)):
        ids = _encode(model, text, turns=i == 1) or _random(model, length, i)
        if i == len(TEXTS) - 1:
            ids = ids * -(-length // len(ids))
        found.append(ids[: max(1, min(length, room))])
    return list({tuple(ids): ids for ids in found}.values())


def _random(model: Model, length: int, seed: int) -> list[int]:
    ids = np.random.default_rng(seed).integers(0, model.config.vocab, length)
    return [int(i) for i in ids]


def _encode(model: Model, text: str, *, turns: bool) -> list[int]:
    if "tokenizer.json" not in model.files:
        return []
    try:
        import tokenizers
    except ImportError as err:
        raise MissingDependencyError("tokenizers", "dev", "to make prompts of text") from err
    try:
        tokenizer = tokenizers.Tokenizer.from_str(model.files["tokenizer.json"].decode())
    except Exception as err:  # the library raises bare Exception
        raise FormatError(f"tokenizer.json is not readable: {err}") from err
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = tokenizer.encode(text).ids
    if turns:
        special = _special(tokenizer.get_added_tokens_decoder(), ids)
        ids = [*ids[:1], *special, *ids[1:], *special[::-1]]
    return [i for i in ids if i < model.config.vocab]


def _special(added: Mapping[int, object], ids: Sequence[int]) -> list[int]:
    """Two or three special tokens that the text has not by itself, as a chat template would add."""
    return [i for i in sorted(added) if i not in ids][:3]
