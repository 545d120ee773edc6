"""The OpenAPI 3.1 document of the server, derived from the descriptions of the fields."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edgeq._version import __version__
from edgeq.serving.embeddings import EMBEDDINGS
from edgeq.serving.fields import Field, object_schema
from edgeq.serving.requests import CHAT, COMPLETION
from edgeq.serving.reranking import RERANK
from edgeq.serving.responses import RESPONSE
from edgeq.serving.token_requests import DETOKENIZE, TOKENIZE

_OBJECT: dict[str, Any] = {"type": "object"}
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_REFUSALS = {
    "400": "The request is invalid; `param` names the field that is wrong.",
    "403": "The Host header names another server.",
    "404": "There is no such model.",
    "408": "The body arrived too late.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "All slots are in use and the queue is full; Retry-After says when to try again.",
    "500": "The model failed.",
    "503": "The server is shutting down, or the texts were not embedded in its time limit.",
}
_MODEL_PATH = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}


def _posted(about: str, fields: Iterable[Field], *, streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    body = {"application/json": {"schema": object_schema(fields)}}
    return {
        "post": {
            "summary": about,
            "requestBody": {"required": True, "content": body},
            "responses": {"200": {"description": "The answer.", "content": content}},
        }
    }


def _got(about: str, kind: str = "application/json", *, model: bool = False) -> dict[str, Any]:
    schema = _OBJECT if kind == "application/json" else {"type": "string"}
    made: dict[str, Any] = {
        "summary": about,
        "responses": {"200": {"description": "Done.", "content": {kind: {"schema": schema}}}},
    }
    if model:
        made["parameters"] = [_MODEL_PATH]
    return {"get": made}


PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _posted("Answer a conversation.", CHAT, streams=True),
    "/v1/completions": _posted("Continue a text.", COMPLETION, streams=True),
    "/v1/responses": _posted(
        "Answer a conversation with the Responses API of OpenAI.", RESPONSE, streams=True
    ),
    "/v1/embeddings": _posted("Embeddings of texts.", EMBEDDINGS),
    "/v1/rerank": _posted("How relevant documents are to a query.", RERANK),
    "/v1/models": _got("The models that are served."),
    "/v1/models/{model}": _got("One of the models.", model=True),
    "/v1/models/{model}/card": _got("The quality report of a model as Markdown.", model=True),
    "/tokenize": _posted("Token ids of a text.", TOKENIZE),
    "/detokenize": _posted("The text of token ids.", DETOKENIZE),
    "/health": _got("Whether the server answers."),
    "/props": _got("Models, defaults, memory and sensors."),
    "/phone": _got("Addresses of the page for a phone, with QR codes."),
    "/metrics": _got("Counters for Prometheus.", "text/plain"),
    "/openapi.json": _got("This document."),
}
"""Path -> its operations, without the error responses."""


def document(needs_key: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        needs_key: whether requests need the API key.
    """
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    refusals = {
        status: {"description": about, "content": error} for status, about in _REFUSALS.items()
    }
    if needs_key:
        refusals["401"] = {"description": "The API key is missing or wrong.", "content": error}
    paths = {
        path: {
            method: {**operation, "responses": {**operation["responses"], **refusals}}
            for method, operation in operations.items()
        }
        for path, operations in PATHS.items()
    }
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "edgeq serve",
            "version": __version__,
            "description": "Language models on this machine, with the OpenAI API.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }
    if needs_key:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made
