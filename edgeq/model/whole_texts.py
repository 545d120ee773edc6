"""Refusals of models whose attention sees what comes after a token, which read texts as a whole."""

from __future__ import annotations

from edgeq.core.errors import UnsupportedError, UsageError
from edgeq.model.config import ModelConfig


def check_generates(config: ModelConfig) -> None:
    """Refuse to continue or to score a text with a model that sees what comes after a token.

    Raises:
        UnsupportedError: the model is one.
    """
    if not config.causal:
        raise UnsupportedError(
            "this model's attention sees what comes after a token: it makes embeddings of texts "
            "(edgeq embed), and cannot generate text or score it"
        )


def check_whole(config: ModelConfig, n_past: int) -> None:
    """Refuse tokens that follow others in a model that sees what comes after a token.

    Raises:
        UsageError: there are such others.
    """
    if n_past and not config.causal:
        raise UsageError(
            "this model's attention sees what comes after a token, so a text is run as a whole, in "
            "one pass; start anew and give all of its tokens at once"
        )
