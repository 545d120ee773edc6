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

    def attend_shared(self, name: str, layer: int, q: Any) -> NoReturn:
        """Refuse attention over another layer's keys; `check_attention_only` does so before any
        work.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no keys of another layer ({name})")

    def plain_norm(self, name: str, x: Any) -> NoReturn:
        """Refuse a norm of values, as `check_attention_only` does.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no norm without a weight ({name})")

    def layer_embed(self, name: str) -> NoReturn:
        """Refuse inputs of layers, as `check_attention_only` does.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no inputs of layers ({name})")

    def layer_input(self, name: str, x: Any, layer: int) -> NoReturn:
        """Refuse a layer's own input, as `layer_embed` does."""
        self.layer_embed(name)

    def weighted(self, name: str, x: Any, weight: str) -> NoReturn:
        """Refuse the scale of a layer, as `check_attention_only` does.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"this target's graphs hold no scales of layers ({name})")

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
    """Refuse a model with layers that mix positions otherwise than by attention without a gate or
    sinks, or that have experts, a clamped feed-forward, inputs or sizes of their own, or keys and
    values of another layer.

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
    sunk = [i for i, block in enumerate(config.blocks) if block.sinks]
    if sunk:
        raise UnsupportedError(
            f"{len(sunk)} of {config.layers} layers of the model, layer {sunk[0]} the first, have "
            f"attention with sinks, which edgeq does not write for {runtime}; run the model with "
            "edgeq's own engine, or convert it to GGUF"
        )
    if config.activation == "clamped_swiglu":
        raise UnsupportedError(
            "the feed-forwards of the model clamp gate and up (activation clamped_swiglu), which "
            f"edgeq does not write for {runtime}; run the model with edgeq's own engine, or "
            "convert it to GGUF"
        )
    gated = [i for i, block in enumerate(config.blocks) if block.output_gate]
    if gated:
        raise UnsupportedError(
            f"{len(gated)} of {config.layers} layers of the model, layer {gated[0]} the first, "
            f"have attention with an output gate, which edgeq does not write for {runtime}; run "
            "the model with edgeq's own engine"
        )
    check_uniform(config, runtime)
    mixtures = [i for i, block in enumerate(config.blocks) if block.experts is not None]
    if config.experts is not None:
        raise UnsupportedError(
            f"the feed-forwards of {len(mixtures)} of {config.layers} layers of the model, layer "
            f"{mixtures[0]} the first, are mixtures of {config.experts.count} "
            f"experts, which edgeq does not write for {runtime}; run the model with edgeq's own "
            "engine, or convert it to GGUF"
        )


_OWN = {
    "kv_from": "read the keys and values of another layer (kv_from)",
    "v_norm": "norm the values of attention (v_norm)",
    "head_dim": "have a head_dim of their own",
    "ffn": "have a feed-forward of a width of their own (ffn)",
    "layer_scale": "multiply the residual stream by a number (layer_scale)",
}
"""Fields of a block that no target but edgeq's engine computes -> what such layers do."""


def check_uniform(config: ModelConfig, runtime: str) -> None:
    """Refuse a model with inputs of layers, or whose layers differ in what `_OWN` names.

    Args:
        config: of the model.
        runtime: what the target is written for, for the message.

    Raises:
        UnsupportedError: names the field of the blocks, how many layers have it, and the first.
    """
    if config.layer_input:
        raise UnsupportedError(
            f"each of {config.layers} layers of the model has an input of {config.layer_input} "
            f"values of its own (layer_input), which edgeq does not write for {runtime}; run the "
            "model with edgeq's own engine"
        )
    for field, what in _OWN.items():
        values = [getattr(block, field) for block in config.blocks]
        # a layer number of 0 equals false and is none
        layers = [i for i, value in enumerate(values) if value is not None and value is not False]
        if layers:
            raise UnsupportedError(
                f"{len(layers)} of {config.layers} layers of the model, layer {layers[0]} the "
                f"first, {what}, which edgeq does not write for {runtime}; run the model with "
                "edgeq's own engine"
            )
    still = [i for i, block in enumerate(config.blocks) if block.rope and block.rope.still]
    if still:
        raise UnsupportedError(
            f"rotary pairs of {len(still)} of {config.layers} layers of the model, layer "
            f"{still[0]} the first, keep still (rope.still), which edgeq does not write for "
            f"{runtime}; run the model with edgeq's own engine"
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
