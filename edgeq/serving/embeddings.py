"""Request bodies of ``/v1/embeddings``."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError
from edgeq.runtime.embedding import Embedding
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
    Field("dimensions", ("integer",), "Numbers of a vector: its first ones, made of length one "
          "again; all if left out.", 1, 1 << 20),
    Field("prompt_name", ("string",), "One of the prompts of the model's files, such as query, "
          "that is put before each text; their default if left out."),
)  # fmt: skip


@dataclass(frozen=True)
class EmbeddingCall:
    """A checked request for embeddings.

    Args:
        served: the model that the request names.
        texts: token ids of each text.
        skipped: how many of the first tokens of each text are not pooled.
        how: how hidden states become one vector.
        base64: whether vectors are sent as base64 instead of lists of numbers.
    """

    served: ServedModel
    texts: tuple[tuple[int, ...], ...]
    skipped: tuple[int, ...]
    how: Embedding
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
    wanted, name = values["dimensions"], values["prompt_name"]
    tried = {"model": (None, None), "dimensions": (wanted, None), "prompt_name": (wanted, name)}
    for key, asked in tried.items():  # so that an error names the field that is wrong
        try:
            how = served.embedding(*asked)
        except EdgeqError as err:
            raise of_request(err, key) from err
    given = values["input"]
    if isinstance(given, str) or (given and all(type(one) is int for one in given)):
        given = [given]
    if not 1 <= len(given) <= MAX_INPUTS:
        raise wrong("input", f"input holds {len(given)} texts; use 1 to {MAX_INPUTS}")
    texts, skipped = zip(*(_tokens(one, served, how) for one in given), strict=True)
    return EmbeddingCall(served, texts, skipped, how, values["encoding_format"] == "base64")


def _tokens(one: Any, served: ServedModel, how: Embedding) -> tuple[tuple[int, ...], int]:
    """Token ids of one text, and how many of them are not pooled.

    Raises:
        ApiError: the value is neither a text nor a list of token ids, is empty, or is too long.
    """
    vocab, skipped = served.model.config.vocab, 0
    if one == "":
        raise ApiError(400, "empty_prompt", "input holds an empty text; leave it out", "input")
    if isinstance(one, str):
        ids, skipped = encoded(lambda: how.tokens(served.tokenizer, one), "input")
    elif isinstance(one, list) and all(type(t) is int and 0 <= t < vocab for t in one):
        ids = one
    else:
        raise wrong(
            "input",
            f"input holds {shown(one)}; use texts, or lists of token ids of 0 to {vocab - 1}",
        )
    check_prompt(ids, served.context, "input")
    try:
        how.check_length(len(ids))
    except EdgeqError as err:
        raise ApiError(400, "context_length_exceeded", str(err), "input") from err
    return tuple(ids), skipped
