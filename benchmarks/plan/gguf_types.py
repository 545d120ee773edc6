"""Bytes of a GGUF file that llama.cpp's quantizer would write of a shape.

Source: llama_tensor_get_type in llama.cpp's src/llama-quant.cpp; block sizes are the importer's.
"""

from __future__ import annotations

import math

from edgeq.devices.model_header import ModelFacts, TensorFacts
from edgeq.importers.gguf.file import TENSOR_TYPES
from edgeq.model.config import ModelConfig

_BLOCKS = {name: (weights, nbytes) for name, weights, nbytes in TENSOR_TYPES.values()}
_MIXED = {"Q4_K_M": "Q4_K"}
_FALLBACKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What is taken where a row is no whole number of blocks of 256."""


def gguf_facts(name: str, config: ModelConfig, quant: str, output: str | None = None) -> ModelFacts:
    """Facts of a file that another runtime reads as it is.

    Args:
        name: of the model.
        config: its shape.
        quant: "Q4_0", "Q4_K_M", "Q8_0" or "F16".
        output: type of the head, where it is not the quantizer's choice.
    """
    tensors = {}
    for tensor, shape in config.linears():
        kind = _kind(tensor, config, quant, output)
        if shape[1] % _BLOCKS[kind][0]:
            kind = _FALLBACKS[kind]
        weights, nbytes = _BLOCKS[kind]
        held = math.prod(shape) // weights * nbytes
        tensors[tensor] = TensorFacts(shape, kind.replace("F16", "f16"), held, held)
    for tensor, size in config.norms():
        tensors[tensor] = TensorFacts(size, "f32", 4 * size[0], 4 * size[0])
    return ModelFacts(f"{name} {quant}", config, tensors)


def _kind(tensor: str, config: ModelConfig, quant: str, output: str | None) -> str:
    base = _MIXED.get(quant, quant)
    if tensor == config.head_name:
        return output or (base if base in ("Q8_0", "F16") else "Q6_K")
    if quant in _MIXED and tensor.split(".")[-2] in ("v_proj", "down_proj"):
        layer, n = int(tensor.split(".")[2]), config.layers
        # the first and last eighth of the layers, and every third between
        if layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2:
            return "Q6_K"
    return base
