"""The summary of a quantization, of a language model or a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from edgeq.quant.recipe import Recipe


class QuantizationSummary(ABC):
    """What `edgeq.quantize` did with a source of either kind.

    Of a language model it is a `Summary`, of a graph a `GraphSummary`; ``isinstance`` says which.

    Args:
        recipe: as it was applied.
        seconds: wall-clock time.
    """

    recipe: Recipe
    seconds: float

    @property
    @abstractmethod
    def bpw(self) -> float:
        """Bits per weight, from stored bytes; all constants of a graph count as weights."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON holds them."""
