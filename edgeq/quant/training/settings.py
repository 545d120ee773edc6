"""How long and how boldly to train."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgeq.core.errors import UsageError, unknown

TRAINING_METHODS = ("distill", "qat", "adaround")


@dataclass(frozen=True)
class TrainingSettings:
    """The numbers of a training run.

    Args:
        method: "distill", "qat" or "adaround".
        steps: times the weights are changed; for "adaround", in each layer.
        batch: windows a step.
        learning_rate: of the weights, in steps between levels; that of everything else follows
            from it.
        hidden: for "distill": weight of the hidden states' squared error after each layer.
        seed: of the order of the windows.

    Raises:
        UsageError: one is out of range.
    """

    method: str = "distill"
    steps: int = 500
    batch: int = 8
    learning_rate: float = 0.01
    hidden: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in TRAINING_METHODS:
            raise UsageError(unknown("training method", self.method, TRAINING_METHODS))
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}; use a whole number of at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UsageError(f"learning_rate is {self.learning_rate}; use 0.003 to 0.1")
        if not (math.isfinite(self.hidden) and self.hidden >= 0):
            raise UsageError(f"hidden is {self.hidden}; use 0, or a positive weight such as 1")
        if self.hidden and self.method != "distill":
            raise UsageError(f"hidden is for the method distill; leave it out for {self.method}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed is {self.seed!r}; use 0 or a positive whole number")
