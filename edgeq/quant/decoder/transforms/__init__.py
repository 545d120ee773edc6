"""Transforms: mathematically equivalent models that can be rounded with less error.

Each transform is ``(model, calibration, schemes, progress) -> Model``. The float logits of the
result are the same up to rounding. Its tensors are lazy: rows are computed when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgeq.core.progress import Progress
from edgeq.formats.schemes import Scheme
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.transforms.awq import awq
from edgeq.quant.decoder.transforms.rotate import rotate, rotate_values
from edgeq.quant.decoder.transforms.smooth import smoothquant

Transform = Callable[[Model, CalibrationText, Mapping[str, Scheme], Progress | None], Model]

TRANSFORMS: dict[str, Transform] = {
    "awq": awq,
    "smoothquant": smoothquant,
    "rotate-values": rotate_values,
    "rotate": rotate,
}
"""Name in recipes -> transform."""

__all__ = ["TRANSFORMS", "Transform"]
