"""Does a converted model's tokenizer cut texts into the ids that the model was trained with?

`hard_strings` and the text of every token are encoded by the model's own tokenizer and by that of
the target. A single difference refuses the conversion: it would be right for most prompts and
silently wrong for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgeq.converters.hard_strings import composed, hard_strings
from edgeq.importers.hf_tokenizer import HfTokenizer

Encode = Callable[[str], Sequence[int]]
_SHOWN = 24
"""Ids that a message shows at most."""


class TargetTokenizer(Protocol):
    """The tokenizer of a converted model."""

    by: str
    """What encodes, with its version."""
    adds_special: bool
    """Whether it puts BOS and EOS where the model's own tokenizer does; else it puts none."""
    composes: bool
    """Whether it is given texts in Unicode's composed form, which it leaves to the caller."""

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text, special tokens recognized."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True)
class TextsReport:
    """What the comparison of two tokenizers found.

    Args:
        by: what encoded for the target.
        compared: texts.
        equal: texts of the same ids.
        complaint: the first text that differs with both lists of ids; None if none does.
    """

    by: str
    compared: int
    equal: int
    complaint: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The counts, ready for JSON."""
        return {"by": self.by, "compared": self.compared, "equal": self.equal}


def added_texts(tokenizer: HfTokenizer) -> list[str]:
    """Texts of the added tokens, by rising id."""
    added = tokenizer.library.get_added_tokens_decoder()
    return [added[i].content for i in sorted(added)]


def compare_texts(source: HfTokenizer, target: TargetTokenizer) -> TextsReport:
    """Encode the hard strings by both tokenizers.

    Args:
        source: the model's own tokenizer.
        target: of the converted model.
    """
    texts = hard_strings(added_texts(source))
    return compare(source, target.encode, texts, target.by, target.adds_special, target.composes)


def compare(
    source: HfTokenizer,
    encode: Encode,
    texts: Sequence[str],
    by: str,
    adds_special: bool = True,
    composes: bool = False,
) -> TextsReport:
    """Encode texts by the model's own tokenizer and by another one.

    Args:
        source: the model's own tokenizer.
        encode: the other one.
        texts: what to encode.
        by: whose the other one is.
        adds_special: whether it puts BOS and EOS too.
        composes: whether it is to be given texts in composed form.
    """
    equal, complaint = 0, None
    for text in texts:
        right = source.encode(text)
        if adds_special:
            right = [*source.prefix, *right, *source.suffix]
        got = [int(i) for i in encode(composed(text) if composes else text)]
        if got == right:
            equal += 1
        elif complaint is None:
            complaint = (
                f"the text {_short(text)} has the token ids {_ids(right)} in the model's own "
                f"tokenizer and {_ids(got)} in {by}"
            )
    return TextsReport(by, len(texts), equal, complaint)


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _ids(ids: Sequence[int]) -> str:
    listed = ", ".join(map(str, ids[:_SHOWN]))
    return f"[{listed}{', ...' if len(ids) > _SHOWN else ''}]"
