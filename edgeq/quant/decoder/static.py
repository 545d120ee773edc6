"""INT8 inputs of a decoder's matrices: static, with ranges from calibration, or dynamic.

    static    one range for all inputs of a matrix, the same for every token, rounded by
              `edgeq.formats.qparams.QuantParams`
    dynamic   one symmetric scale for the inputs of each token (`edgeq.formats.dynamic_quant`)

Both are given as a `Linear` for `edgeq.model.reference.Reference`, which rounds the inputs and then
multiplies in float32. The results are those of an INT8 kernel up to the last bits of float32, so
`edgeq.evaluation.text.perplexity` measures the loss that INT8 activations cause.

An artifact stores its static ranges in its provenance, under "activations":

    {"mode": "static", "observer": NAME, "symmetric": false, "inputs": {MATRIX: [low, high]}}

"symmetric" is always false: inputs are rounded with a zero point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeq.core.errors import FormatError, UsageError
from edgeq.formats.dynamic_quant import quantize_vectors
from edgeq.formats.qparams import QuantParams
from edgeq.formats.tensor import Tensor
from edgeq.model.formulas import Array, Linear, dense
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationStats
from edgeq.quant.histogram import Range

KEY = "activations"
"""Key of the static ranges in an artifact's provenance."""


@dataclass(frozen=True)
class StaticActivations:
    """Ranges of the inputs of every matrix.

    Args:
        observer: name of the observer that chose the ranges.
        ranges: matrix name -> (low, high), low <= 0 <= high.
    """

    observer: str
    ranges: Mapping[str, Range]

    @classmethod
    def from_stats(cls, stats: CalibrationStats) -> StaticActivations:
        """The ranges that a calibration measured."""
        ranges = {name: (seen.low, seen.high) for name, seen in stats.inputs.items()}
        return cls(stats.observer, ranges)

    @classmethod
    def of(cls, model: Model) -> StaticActivations | None:
        """The static ranges of an artifact; None if it has none.

        Raises:
            FormatError: the ranges are damaged, or do not belong to the model's matrices.
        """
        data = model.provenance.get(KEY)
        if not isinstance(data, Mapping) or data.get("mode") != "static":
            return None
        try:
            ranges = {str(name): (float(a), float(b)) for name, (a, b) in data["inputs"].items()}
            static = cls(str(data["observer"]), ranges)
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatError(
                f"the static ranges of activations are not readable: {err!r}"
            ) from err
        if data.get("symmetric", False) is not False:
            raise FormatError(
                "the static ranges of activations are symmetric, which is not supported; "
                "quantize the checkpoint again"
            )
        wanted = {name for name, _ in model.config.linears()}
        for name, (low, high) in ranges.items():
            if name not in wanted or not -math.inf < low <= 0 <= high < math.inf:
                raise FormatError(
                    f"the static range [{low}, {high}] of {name} is damaged; "
                    "quantize the checkpoint again"
                )
        return static

    def to_dict(self) -> dict[str, Any]:
        """The entry `KEY` of an artifact's provenance."""
        return {
            "mode": "static",
            "observer": self.observer,
            "symmetric": False,
            "inputs": {name: list(ends) for name, ends in self.ranges.items()},
        }

    def params(self, name: str) -> QuantParams:
        """Scale and zero point of the inputs of one matrix.

        Raises:
            UsageError: the matrix has no range.
        """
        try:
            low, high = self.ranges[name]
        except KeyError:
            raise UsageError(
                f"there is no static range for the inputs of {name}; calibrate this model"
            ) from None
        return QuantParams.from_range(low, high)

    def linear(self, product: Linear = dense) -> Linear:
        """A `Linear` that rounds its input by the range of its matrix.

        Args:
            product: the `Linear` that multiplies the rounded input.
        """
        params_of = {name: self.params(name) for name in self.ranges}

        def rounded(name: str, x: Array, weight: Tensor) -> Array:
            params = params_of.get(name) or self.params(name)
            return product(name, params.dequantize(params.quantize(x)), weight)

        return rounded


def dynamic_linear(product: Linear = dense) -> Linear:
    """A `Linear` that rounds each token's input to INT8 with one scale per token.

    Args:
        product: the `Linear` that multiplies the rounded input.
    """

    def rounded(name: str, x: Array, weight: Tensor) -> Array:
        codes, scales = quantize_vectors(x)
        return product(name, codes.astype(np.float32) * scales[:, None], weight)

    return rounded
