"""Quantization: float weights to packed integers, by a `Recipe`.

presets       recipes with a name
recipe_file   recipes as JSON or TOML
rules         the rules of a recipe, and how it rounds activations
observers     ranges of activations
rounders      the arithmetic of one matrix: rtn, mse, palette, gptq
decoder       language models
graph         graphs of operators
training      weights trained through their rounding
"""

from __future__ import annotations

from edgeq.quant.decoder.quantize import Summary, TensorSummary, quantize_model
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounders.rounding import METHODS, quantize_tensor
from edgeq.quant.rules import Rule

__all__ = [
    "METHODS",
    "Recipe",
    "Rule",
    "Summary",
    "TensorSummary",
    "quantize_model",
    "quantize_tensor",
]
