"""Refusals of layers that a target's graphs do not compute."""

from __future__ import annotations

from typing import Any, NoReturn

from edgeq.core.errors import UnsupportedError
from edgeq.model.config import ModelConfig


class AttentionOnly:
    """Base of the builders of graphs that hold no mixer but attention."""

    def short_conv(self, name: str, layer: int, b: Any, c: Any, x: Any, weight: str) -> NoReturn:
        """Refuse a short convolution; `check_attention_only` does so before any work.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no gated short convolution ({name})")


def check_attention_only(config: ModelConfig, runtime: str) -> None:
    """Refuse a model with layers that mix positions otherwise than by attention.

    Args:
        config: of the model.
        runtime: what the target is written for, for the message.

    Raises:
        UnsupportedError: names the kind of layer, how many there are, and the first; or the
            attention sees what comes after a token.
    """
    check_causal(config, runtime)
    others = [i for i, block in enumerate(config.blocks) if block.mixer != "attention"]
    if others:
        raise UnsupportedError(
            f"{len(others)} of {config.layers} layers of the model, layer {others[0]} the first, "
            f"are gated short convolutions (mixer {config.blocks[others[0]].mixer!r}), which edgeq "
            f"does not write for {runtime}; run the model with edgeq's own engine"
        )


def check_causal(config: ModelConfig, runtime: str) -> None:
    """Refuse a model whose attention sees what comes after a token.

    Args:
        config: of the model.
        runtime: what the target is written for, for the message.

    Raises:
        UnsupportedError: the model is one.
    """
    if not config.causal:
        raise UnsupportedError(
            "this model's attention sees what comes after a token, as models of embeddings have "
            f"it, which edgeq does not write for {runtime}; make embeddings with edgeq's own "
            "engine (edgeq embed)"
        )
