"""Request bodies of ``/tokenize`` and ``/detokenize``: text to token ids and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeq.serving.failures import wrong
from edgeq.serving.fields import Field, shown
from edgeq.serving.requests import MODEL
from edgeq.serving.served import ServedModel
from edgeq.serving.worker import encoded

TOKENIZE = (
    Field("content", ("string",), "The text.", required=True),
    MODEL,
    Field(
        "add_special", ("boolean",), "Add the special tokens that the tokenizer puts before a text."
    ),
    Field("with_pieces", ("boolean",), "Also return the text of each token."),
)
DETOKENIZE = (
    Field("tokens", ("array",), "Token ids.", required=True,
          schema={"items": {"type": "integer", "minimum": 0}}),
    MODEL,
)  # fmt: skip


def tokenized(values: Mapping[str, Any], served: ServedModel) -> dict[str, Any]:
    """The response of ``/tokenize``."""
    tokenizer = served.tokenizer
    ids = encoded(
        lambda: tokenizer.encode(
            values["content"], add_bos=bool(values["add_special"]), add_eos=False
        ),
        "content",
    )
    if not values["with_pieces"]:
        return {"tokens": ids}
    pieces = [
        (tokenizer.token_bytes(i) or tokenizer.token_name(i).encode()).decode("utf-8", "replace")
        for i in ids
    ]
    listed = [{"id": i, "piece": piece} for i, piece in zip(ids, pieces, strict=True)]
    return {"tokens": listed}


def detokenized(values: Mapping[str, Any], served: ServedModel) -> dict[str, Any]:
    """The response of ``/detokenize``.

    Raises:
        ApiError: an entry is not a token id of the model.
    """
    vocab = served.model.config.vocab
    for token in values["tokens"]:
        if type(token) is not int or not 0 <= token < vocab:
            raise wrong("tokens", f"tokens holds {shown(token)}; use ids of 0 to {vocab - 1}")
    return {"content": served.tokenizer.decode(values["tokens"])}
