"""Does a converted model's tokenizer cut texts into the ids that the model was trained with?

`hard_strings` and the text of every token are encoded by the model's own tokenizer and by that of
the target. A single difference refuses the conversion, because it would be right for most prompts
and silently wrong for the others. Texts that a runtime is known to cut otherwise, whatever the
file says, are counted by the reason instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgeq.converters.validate.hard_strings import composed, hard_strings
from edgeq.importers.huggingface.tokenizer import (
    HfTokenizer,
    added_tokens,
    end_ids,
    hf_tokenizer,
)
from edgeq.model.model import Model

_SHOWN = 24
"""Ids that a message shows at most."""


class TargetTokenizer(Protocol):
    """The tokenizer of a converted model, in the target's own runtime if that can be run."""

    by: str
    """What encodes, with its version."""
    adds_special: bool
    """Whether it puts BOS and EOS where the model's own tokenizer does; else it puts none."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens recognized."""

    def excuse(self, text: str) -> str | None:
        """Why the runtime is known to cut this text otherwise; None if it should not."""


@dataclass(frozen=True)
class TextsReport:
    """The result of comparing two tokenizers.

    Args:
        by: what encoded for the target.
        compared: texts.
        equal: texts of the same ids.
        excused: known limit of the runtime -> texts that differ because of it.
        complaint: the first other text that differs with both lists of ids; None if none does.
    """

    by: str
    compared: int
    equal: int
    excused: Mapping[str, int] = field(default_factory=dict)
    complaint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON."""
        return {
            "by": self.by,
            "compared": self.compared,
            "equal": self.equal,
            "known_limits": dict(self.excused),
        }


def added_texts(tokenizer: HfTokenizer) -> list[str]:
    """Texts of the added tokens, by rising id."""
    return [token["content"] for token in added_tokens(tokenizer).values()]


def compare_texts(
    source: HfTokenizer, target: TargetTokenizer, further: Iterable[str] = ()
) -> TextsReport:
    """Encode difficult strings with a model's tokenizer and with the converted one, and compare.

    Args:
        source: the model's own tokenizer.
        target: of the converted model.
        further: texts to compare beside the hard strings.
    """
    texts = [*hard_strings(added_texts(source)), *further]
    equal, complaint = 0, None
    excused: dict[str, int] = {}
    encoded = zip(texts, source.encode_all(texts), target.encode(texts), strict=True)
    for text, right, got in encoded:
        if target.adds_special:
            right = [*source.prefix, *right, *source.suffix]
        if got == right:
            equal += 1
        elif reason := target.excuse(text):
            excused[reason] = excused.get(reason, 0) + 1
        elif complaint is None:
            complaint = (
                f"the text {_short(text)} has the token ids {_ids(right)} in the model's own "
                f"tokenizer and {_ids(got)} in {target.by}"
            )
    return TextsReport(target.by, len(texts), equal, excused, complaint)


def model_ends(model: Model) -> tuple[int, ...]:
    """Every token that ends a text: of the configuration, generation_config.json, and EOS."""
    ends = list(model.config.eos)
    if "tokenizer.json" in model.files:
        ends += end_ids(model.files, hf_tokenizer(model.files))
    return tuple(dict.fromkeys(i for i in ends if i < model.config.vocab))


def composes(source: HfTokenizer) -> bool:
    """Whether a tokenizer brings texts to Unicode's composed form (NFC) before it cuts them."""
    return '"NFC"' in json.dumps(source.document.get("normalizer"))


def not_composed(text: str, runtime: str) -> str | None:
    """The excuse of a runtime that leaves composing to its caller."""
    if composed(text) == text:
        return None
    return f"{runtime} does not compose Unicode (NFC), as this model's tokenizer does"


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _ids(ids: Sequence[int]) -> str:
    listed = ", ".join(map(str, ids[:_SHOWN]))
    return f"[{listed}{', ...' if len(ids) > _SHOWN else ''}]"
