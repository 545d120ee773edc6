"""INT8 inputs of a decoder's matrices: static, with ranges from calibration, or dynamic.

    static    one range for all inputs of a matrix, the same for every token, rounded by
              `edgeq.formats.qparams.QuantParams`
    dynamic   each token's inputs have a scale of their own, symmetric
              (`edgeq.formats.dynamic_quant`)

Both are given as a `Linear` for `edgeq.model.reference.Reference`, which rounds and then
multiplies in float32. The sums are those of an INT8 kernel, but for the last bits of their float32
result, so `edgeq.evaluation.text.perplexity` measures what INT8 activations cost.

An artifact holds its static ranges in its provenance, under "activations":

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
"""Where an artifact's provenance holds static ranges."""


@dataclass(frozen=True)
class StaticActivations:
    """Ranges of the inputs of every matrix.

    Args:
        observer: what chose them.
        ranges: matrix name -> (low, high), low <= 0 <= high.
    """

    observer: str
    ranges: Mapping[str, Range]

    @classmethod
    def from_stats(cls, stats: CalibrationStats) -> StaticActivations:
        """The ranges that a calibration found."""
        ranges = {name: (seen.low, seen.high) for name, seen in stats.inputs.items()}
        return cls(stats.observer, ranges)

    @classmethod
    def of(cls, model: Model) -> StaticActivations | None:
        """The ranges an artifact holds; None if it holds none.

        Raises:
            FormatError: they are damaged, or do not belong to the model's matrices.
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
        """What an artifact's provenance holds under `KEY`."""
        return {
            "mode": "static",
            "observer": self.observer,
            "symmetric": False,
            "inputs": {name: list(ends) for name, ends in self.ranges.items()},
        }

    def params(self, name: str) -> QuantParams:
        """How the inputs of one matrix are rounded.

        Raises:
            UsageError: there is no range for it.
        """
        try:
            low, high = self.ranges[name]
        except KeyError:
            raise UsageError(
                f"there is no static range for the inputs of {name}; calibrate this model"
            ) from None
        return QuantParams.from_range(low, high)

    def linear(self, product: Linear = dense) -> Linear:
        """A `Linear` that rounds its input by its matrix's range.

        Args:
            product: what multiplies the rounded input.
        """
        params_of = {name: self.params(name) for name in self.ranges}

        def rounded(name: str, x: Array, weight: Tensor) -> Array:
            params = params_of.get(name) or self.params(name)
            return product(name, params.dequantize(params.quantize(x)), weight)

        return rounded


def dynamic_linear(product: Linear = dense) -> Linear:
    """A `Linear` that rounds each token's input to INT8 with a scale of its own.

    Args:
        product: what multiplies the rounded input.
    """

    def rounded(name: str, x: Array, weight: Tensor) -> Array:
        codes, scales = quantize_vectors(x)
        return product(name, codes.astype(np.float32) * scales[:, None], weight)

    return rounded
