"""Prompts that conversions are validated with: real text by the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgeq.core.errors import FormatError
from edgeq.model.model import Model

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


PASSAGE = """\
The harbor froze for the first time in forty years. Boats that had never spent a winter on land \
were hauled up the beach by anyone with a free hand, and children walked out to the lighthouse \
where, the summer before, they had rowed. "It will hold until March," said the old pilot, who had \
measured the ice each morning with a brass rule: 11 cm on Monday, 14 on Wednesday, 19 by the end \
of the week.

Question: A train leaves at 9:40 and arrives at 13:05. How long does the journey take?
Answer: From 9:40 to 13:00 is 3 hours and 20 minutes. Five minutes more make 3 hours and 25 minutes.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. It takes place in the \
chloroplasts of plants, in two stages: the first splits water and stores energy in ATP and NADPH, \
and the second uses both to build sugar in the Calvin cycle.

Dear Ms. Okafor, thank you for your letter of 12 May. We are sorry that the lamp arrived broken. A \
new one was sent today; please keep the old one until the driver collects it. If you would rather \
have your money back, call us on weekdays between 8 a.m. and 6 p.m.

The committee met on Thursday to discuss the bridge. Two engineers spoke for the cheaper design, \
one against it, and the mayor asked what either would cost in twenty years rather than in two. \
Nobody knew. The vote was put off until the figures are there.
"""
"""Prose, dialogue, numbers, code and letters, in which the cost of a target's rounding is measured:
about 400 tokens of usual vocabularies."""


def passage(model: Model, length: int) -> list[int]:
    """Token ids of a mixed text, begun again where it is shorter.

    Args:
        model: whose tokenizer is used; without one, ids are drawn at random.
        length: how many.

    Raises:
        FormatError: the tokenizer is damaged.
    """
    ids = _encode(model, PASSAGE, turns=False) or _random(model, length, len(TEXTS))
    return (ids * -(-length // len(ids)))[:length]


def prompts(model: Model, room: int) -> list[list[int]]:
    """Token ids of three prompts of different lengths.

    Args:
        model: whose tokenizer is used; without one, ids are drawn at random.
        room: tokens a prompt may have at most.

    Raises:
        FormatError: the tokenizer is damaged.
    """
    cut = []
    for i, (text, length) in enumerate(zip(TEXTS, _LENGTHS, strict=True)):
        ids = _encode(model, text, turns=i == 1) or _random(model, length, i)
        if i == len(TEXTS) - 1:
            ids = ids * -(-length // len(ids))
        cut.append(ids[: max(1, min(length, room))])
    return list({tuple(ids): ids for ids in cut}.values())


def _random(model: Model, length: int, seed: int) -> list[int]:
    ids = np.random.default_rng(seed).integers(0, model.config.vocab, length)
    return [int(i) for i in ids]


def _encode(model: Model, text: str, *, turns: bool) -> list[int]:
    if "tokenizer.json" not in model.files:
        return []
    import tokenizers

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
