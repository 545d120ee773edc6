"""Models whose layers cannot be run one after the other, each on the outputs of the one before it.

A layer that reads the keys and values of another, or has an input of its own beside the residual
stream, needs more than the hidden states that `edgeq.quant.decoder.replay` hands on.
"""

from __future__ import annotations

from edgeq.core.errors import UnsupportedError
from edgeq.model.config import ModelConfig


def beside_stream(config: ModelConfig) -> str | None:
    """What layers of a model read beside the residual stream; None for most models.

    Example:
        >>> from edgeq.importers.shapes import shape
        >>> beside_stream(shape("gemma4-e2b"))
        'its layers have inputs of their own, and 20 read the keys and values of other layers'
    """
    reads = []
    if config.layer_input:
        reads.append("its layers have inputs of their own")
    if shared := sum(block.kv_from is not None for block in config.blocks):
        reads.append(f"{shared} read the keys and values of other layers")
    return ", and ".join(reads) or None


def check_layerwise(config: ModelConfig, what: str) -> None:
    """Refuse a model whose layers cannot be run one by one.

    Args:
        config: of the model.
        what: what would do that, for the message.

    Raises:
        UnsupportedError: the model is one.
    """
    if reads := beside_stream(config):
        raise UnsupportedError(
            f"{what} runs a {config.family} model layer by layer, and edgeq does not do that yet "
            f"for a model like this: {reads}; quantize it without a calibration text (--fast)"
        )
