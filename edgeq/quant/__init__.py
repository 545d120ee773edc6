"""Float weights to packed integers: schemes by name (`Recipe`), scales by method (`METHODS`)."""

from __future__ import annotations

from edgeq.quant.recipe import Recipe, Rule
from edgeq.quant.rounding import METHODS, quantize_tensor
from edgeq.quant.stream import Summary, TensorSummary, quantize

__all__ = [
    "METHODS",
    "Recipe",
    "Rule",
    "Summary",
    "TensorSummary",
    "quantize",
    "quantize_tensor",
]
