"""Refusals of layers that a target's graphs do not compute."""

from __future__ import annotations

from typing import Any, NoReturn

from edgeq.core.errors import UnsupportedError
from edgeq.model.block import OTHER_MIXERS
from edgeq.model.config import ModelConfig


class AttentionOnly:
    """Base of the builders of graphs that hold no mixer but attention."""

    def short_conv(self, name: str, layer: int, b: Any, c: Any, x: Any, weight: str) -> NoReturn:
        """Refuse a short convolution; `check_attention_only` does so before any work.

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


def check_attention_only(config: ModelConfig, runtime: str) -> None:
    """Refuse a model with layers that mix positions otherwise than by attention without a gate.

    Args:
        config: of the model.
        runtime: what the target is written for, for the message.

    Raises:
        UnsupportedError: names the kind of layer, how many there are, and the first.
    """
    others = [i for i, block in enumerate(config.blocks) if block.mixer != "attention"]
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
