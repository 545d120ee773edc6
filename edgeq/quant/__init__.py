"""Quantization: float weights to packed integers, by a `Recipe`.

presets       recipes with a name
recipe_file   recipes as JSON or TOML
rules         the rules of a recipe, and how it rounds activations
observers     ranges of activations
rounders      the arithmetic of one matrix: rtn, mse, palette, gptq
decoder       language models
graph         graphs of operators
training      weights trained through their rounding

Names are loaded when they are first used: a plan needs recipes, and nothing that rounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeq.core.exports import lazy_exports

if TYPE_CHECKING:
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

__getattr__ = lazy_exports(
    __name__,
    {
        "edgeq.quant.decoder.quantize": ("Summary", "TensorSummary", "quantize_model"),
        "edgeq.quant.recipe": ("Recipe",),
        "edgeq.quant.rounders.rounding": ("METHODS", "quantize_tensor"),
        "edgeq.quant.rules": ("Rule",),
    },
)
