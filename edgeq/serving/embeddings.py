"""Request bodies of ``/v1/embeddings``."""

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
"""Most texts of one request, as in the OpenAI API."""
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
    """A checked request for embeddings.

    Args:
        served: the model that the request names.
        texts: token ids of each text.
        pooling: how hidden states become one vector: "last" or "mean".
        base64: whether vectors are sent as base64 instead of lists of numbers.
    """

    served: ServedModel
    texts: tuple[tuple[int, ...], ...]
    pooling: str
    base64: bool

    def answer(self, vectors: NDArray[np.float32]) -> dict[str, Any]:
        """The response of the OpenAI API for vectors [n, hidden]."""
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
    """Check a request body of ``/v1/embeddings``.

    Args:
        body: the JSON object of the request.
        models: the models of the server, by name.

    Raises:
        ApiError: a field is invalid or asks for something that the server does not offer.
    """
    values = read(body, EMBEDDINGS)
    served = chosen_model(models, values["model"])
    try:
        pooling = served.pooling
    except EdgeqError as err:
        raise of_request(err, "model") from err
    hidden = served.model.config.hidden
    if values["dimensions"] not in (None, hidden):
        raise wrong(
            "dimensions",
            f"dimensions is {values['dimensions']}, and the vectors of this model have {hidden}; "
            "leave it out",
        )
    given = values["input"]
    if isinstance(given, str) or (given and all(type(one) is int for one in given)):
        given = [given]
    if not 1 <= len(given) <= MAX_INPUTS:
        raise wrong("input", f"input holds {len(given)} texts; use 1 to {MAX_INPUTS}")
    texts = tuple(_tokens(one, served) for one in given)
    return EmbeddingCall(served, texts, pooling, values["encoding_format"] == "base64")


def _tokens(one: Any, served: ServedModel) -> tuple[int, ...]:
    """Token ids of one text.

    Raises:
        ApiError: the value is neither a text nor a list of token ids, is empty, or is too long.
    """
    vocab = served.model.config.vocab
    if one == "":
        raise ApiError(400, "empty_prompt", "input holds an empty text; leave it out", "input")
    if isinstance(one, str):
        ids = encoded(lambda: served.tokenizer.encode(one, add_eos=True), "input")
    elif isinstance(one, list) and all(type(t) is int and 0 <= t < vocab for t in one):
        ids = one
    else:
        raise wrong(
            "input",
            f"input holds {shown(one)}; use texts, or lists of token ids of 0 to {vocab - 1}",
        )
    check_prompt(ids, served.context, "input")
    return tuple(ids)
