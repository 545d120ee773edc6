"""``/v1/embeddings``: texts to vectors."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError
from edgeq.serving.failures import ApiError, of_request, wrong
from edgeq.serving.fields import Field, read, shown
from edgeq.serving.requests import MODEL, chosen_model
from edgeq.serving.served import ServedModel
from edgeq.serving.worker import check_prompt, encoded

MAX_INPUTS = 2048
"""Texts of one request; OpenAI's limit."""
EMBEDDINGS = (
    Field("input", ("string", "array"), "A text, token ids, or a list of either.", required=True,
          schema={"items": {}, "maxItems": MAX_INPUTS}),
    MODEL,
    Field("encoding_format", ("string",), "Vectors as lists of numbers, or as float32 in base64.",
          only=("float", "base64")),
    Field("dimensions", ("integer",), "Numbers of a vector: as many as the model gives, which "
          "/props lists.", 1, 1 << 20),
)  # fmt: skip


@dataclass(frozen=True)
class EmbeddingCall:
    """A checked request.

    Args:
        served: the model it asks for.
        texts: tokens of each text.
        pooling: how each is pooled.
        base64: whether vectors are sent as bytes.
    """

    served: ServedModel
    texts: tuple[tuple[int, ...], ...]
    pooling: str
    base64: bool

    def answer(self, vectors: NDArray[np.float32]) -> dict[str, Any]:
        """OpenAI's list of embeddings [n, hidden]."""
        tokens = sum(map(len, self.texts))
        return {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": number,
                    "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
                    if self.base64
                    else vector.tolist(),
                }
                for number, vector in enumerate(vectors)
            ],
            "model": self.served.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def embedding_call(body: Mapping[str, Any], models: Mapping[str, ServedModel]) -> EmbeddingCall:
    """A body of ``/v1/embeddings``.

    Raises:
        ApiError: something in it cannot be done.
    """
    values = read(body, EMBEDDINGS)
    served = chosen_model(models, values["model"])
    try:
        pooling = served.pooling
    except EdgeqError as err:
        raise of_request(err, "model") from err
    hidden = served.model.config.hidden
    if values["dimensions"] not in (None, hidden):
        raise wrong("dimensions", f"dimensions is {values['dimensions']}; this model's vectors "
                    f"have {hidden}, so leave it out")  # fmt: skip
    given = values["input"]
    if isinstance(given, str) or (given and all(type(one) is int for one in given)):
        given = [given]
    if not 1 <= len(given) <= MAX_INPUTS:
        raise wrong("input", f"input holds {len(given)} texts; use 1 to {MAX_INPUTS}")
    texts = tuple(_tokens(one, served) for one in given)
    return EmbeddingCall(served, texts, pooling, values["encoding_format"] == "base64")


def _tokens(one: Any, served: ServedModel) -> tuple[int, ...]:
    """Tokens of one text.

    Raises:
        ApiError: it is neither a text nor token ids, or too long.
    """
    vocab = served.model.config.vocab
    if one == "":
        raise ApiError(400, "empty_prompt", "input holds an empty text; leave it out", "input")
    if isinstance(one, str):
        ids = encoded(lambda: served.tokenizer.encode(one, add_eos=True), "input")
    elif isinstance(one, list) and all(type(t) is int and 0 <= t < vocab for t in one):
        ids = one
    else:
        raise wrong("input", f"input holds {shown(one)}; use texts, or lists of token ids of 0 to "
                    f"{vocab - 1}")  # fmt: skip
    check_prompt(ids, served.context, "input")
    return tuple(ids)
