"""Request bodies of ``/v1/rerank``, as Jina's API and llama-server have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgeq.core.errors import EdgeqError
from edgeq.runtime.reranking import RerankPrompts
from edgeq.serving.embeddings import MAX_INPUTS
from edgeq.serving.failures import of_request, wrong
from edgeq.serving.fields import Field, read, shown
from edgeq.serving.requests import MODEL, chosen_model
from edgeq.serving.served import ServedModel
from edgeq.serving.worker import check_prompt, encoded

RERANK = (
    Field("query", ("string",), "What is looked for.", required=True),
    Field("documents", ("array",), "Texts, or objects with a text.", required=True,
          schema={"items": {}, "maxItems": MAX_INPUTS}),
    MODEL,
    Field("top_n", ("integer",), "How many of the most relevant documents are listed; all if left "
          "out.", 1, MAX_INPUTS),
    Field("return_documents", ("boolean",), "Also return the texts."),
    Field("instruction", ("string",), "How documents are judged; a web search if left out."),
)  # fmt: skip


@dataclass(frozen=True)
class RerankCall:
    """A checked request for the relevance of documents.

    Args:
        served: the model that the request names.
        by: the prompts of the model.
        documents: the texts.
        prompts: token ids of the prompt of each document.
        top_n: most documents that are listed.
        return_documents: whether their texts are listed.
    """

    served: ServedModel
    by: RerankPrompts
    documents: tuple[str, ...]
    prompts: tuple[list[int], ...]
    top_n: int
    return_documents: bool

    def answer(self, scores: Sequence[float]) -> dict[str, Any]:
        """The response: the most relevant document first."""
        tokens = sum(map(len, self.prompts))
        order = sorted(range(len(scores)), key=lambda number: -scores[number])
        results: list[dict[str, Any]] = [
            {"index": number, "relevance_score": scores[number]} for number in order[: self.top_n]
        ]
        if self.return_documents:
            for result in results:
                result["document"] = {"text": self.documents[result["index"]]}
        return {
            "object": "list",
            "model": self.served.name,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def rerank_call(body: Mapping[str, Any], models: Mapping[str, ServedModel]) -> RerankCall:
    """Check a request body of ``/v1/rerank``.

    Args:
        body: the JSON object of the request.
        models: the models of the server, by name.

    Raises:
        ApiError: a field is invalid, or the model is none that reranks.
    """
    values = read(body, RERANK)
    served = chosen_model(models, values["model"])
    try:
        by = served.rerank_prompts
    except EdgeqError as err:
        raise of_request(err, "model") from err
    given = values["documents"]
    if not 1 <= len(given) <= MAX_INPUTS:
        raise wrong("documents", f"documents holds {len(given)} texts; use 1 to {MAX_INPUTS}")
    documents = tuple(_text(one) for one in given)
    prompts = []
    for text in documents:
        prompt = encoded(
            partial(by.tokens, values["query"], text, values["instruction"]), "documents"
        )
        check_prompt(prompt, served.context, "documents")
        prompts.append(prompt)
    return RerankCall(
        served, by, documents, tuple(prompts), values["top_n"] or len(documents),
        bool(values["return_documents"]),
    )  # fmt: skip


def _text(one: Any) -> str:
    text = one.get("text") if isinstance(one, dict) else one
    if not isinstance(text, str):
        raise wrong("documents", f"documents holds {shown(one)}; use texts, or objects with a text")
    return text
