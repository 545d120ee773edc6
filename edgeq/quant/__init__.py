"""Float weights to packed integers: schemes by name (`Recipe`), scales by method (`METHODS`)."""

from __future__ import annotations

from edgeq.quant.decoder.quantize import Summary, TensorSummary, quantize
from edgeq.quant.recipe import Recipe, Rule
from edgeq.quant.rounders.rounding import METHODS, quantize_tensor

__all__ = [
    "METHODS",
    "Recipe",
    "Rule",
    "Summary",
    "TensorSummary",
    "quantize",
    "quantize_tensor",
]
