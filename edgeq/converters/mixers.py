"""Refusals of layers that a target's graphs do not compute."""

from __future__ import annotations

from typing import Any, NoReturn

from edgeq.core.errors import UnsupportedError
from edgeq.model.block import OTHER_MIXERS, Mixer
from edgeq.model.config import ModelConfig


class AttentionOnly:
    """Base of the builders of graphs that hold no mixer but attention, and no experts.

    `check_attention_only` refuses such models before any work.
    """

    def states(self, name: str) -> NoReturn:
        """Refuse a multi-token-prediction head, which no target is given.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no multi-token prediction ({name})")

    def short_conv(self, name: str, layer: int, b: Any, c: Any, x: Any, weight: str) -> Any:
        """Refuse a short convolution.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no gated short convolution ({name})")

    def delta_net(self, name: str, layer: int, qkv: Any, z: Any, beta: Any, decay: Any) -> NoReturn:
        """Refuse a gated delta net; `check_attention_only` does so before any work.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no gated delta net ({name})")

    def output_gate(self, name: str, x: Any, gate: Any) -> NoReturn:
        """Refuse a gate on the output of attention, as `check_attention_only` does.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no gate on attention's output ({name})")

    def route(self, name: str, layer: int, logits: Any) -> NoReturn:
        """Refuse experts.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no mixture of experts ({name})")

    def to_expert(self, name: str, x: Any, routing: Any, expert: int) -> NoReturn:
        """Refuse an expert, as `route` does."""
        self.route(name, 0, x)

    def combine(self, name: str, routing: Any, outputs: Any) -> NoReturn:
        """Refuse the sum of experts, as `route` does."""
        self.route(name, 0, routing)


def check_attention_only(config: ModelConfig, runtime: str, *, but: Mixer | None = None) -> None:
    """Refuse a model with layers that mix positions otherwise than by attention without a gate, or
    that have experts.

    Args:
        config: of the model.
        runtime: what the target is written for, for the message.
        but: a mixer that the target's graphs hold beside attention.

    Raises:
        UnsupportedError: names the kind of layer, how many there are, and the first; or the
            attention sees what comes after a token.
    """
    check_causal(config, runtime)
    held = {"attention", but}
    others = [i for i, block in enumerate(config.blocks) if block.mixer not in held]
    if others:
        raise UnsupportedError(
            f"{len(others)} of {config.layers} layers of the model, layer {others[0]} the first, "
            f"are {OTHER_MIXERS[config.blocks[others[0]].mixer]} (mixer "
            f"{config.blocks[others[0]].mixer!r}), which edgeq "
            f"does not write for {runtime}; run the model with edgeq's own engine"
        )
    gated = [i for i, block in enumerate(config.blocks) if block.output_gate]
    if gated:
        raise UnsupportedError(
            f"{len(gated)} of {config.layers} layers of the model, layer {gated[0]} the first, "
            f"have attention with an output gate, which edgeq does not write for {runtime}; run "
            "the model with edgeq's own engine"
        )
    mixtures = [i for i, block in enumerate(config.blocks) if block.experts is not None]
    if config.experts is not None:
        raise UnsupportedError(
            f"the feed-forwards of {len(mixtures)} of {config.layers} layers of the model, layer "
            f"{mixtures[0]} the first, are mixtures of {config.experts.count} "
            f"experts, which edgeq does not write for {runtime}; run the model with edgeq's own "
            "engine, or convert it to GGUF"
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
