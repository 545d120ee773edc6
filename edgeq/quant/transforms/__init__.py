"""Mathematically equal models that round better.

Each transform is ``(model, calibration, schemes, progress) -> Model``; the float logits stay what
they were, to rounding. Tensors of the result are lazy: rows are computed when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgeq.model import Model
from edgeq.quant.calibrate import Calibration
from edgeq.quant.transforms.awq import awq
from edgeq.quant.transforms.rotate import rotate, rotate_values
from edgeq.quant.transforms.smooth import smoothquant
from edgeq.schemes import Scheme

Progress = Callable[[str, int, int], None]
Transform = Callable[[Model, Calibration, Mapping[str, Scheme], Progress | None], Model]

TRANSFORMS: dict[str, Transform] = {
    "awq": awq,
    "smoothquant": smoothquant,
    "rotate-values": rotate_values,
    "rotate": rotate,
}
"""Name -> transform, as recipes name them."""

__all__ = ["TRANSFORMS", "Transform"]
