"""INT8 inputs of matrices: static, with ranges found beforehand, or dynamic, with those of now.

    static    one range for all inputs of a matrix, the same for every token:
                asymmetric  codes 0 .. 255     scale = (high - low) / 255, zero_point = -low / scale
                symmetric   codes -127 .. 127  scale = max(-low, high) / 127, zero_point = 0
              x is about scale * (code - zero_point)
    dynamic   each token's inputs have a scale of their own, symmetric
    (`edgeq.formats.dynamic_quant`)

Both are given as a `Linear` for `edgeq.model.reference.Reference`, which rounds and then
multiplies in
float32: sums of integers as an INT8 kernel makes them, but for the last bits of their float32
result. So `edgeq.evaluation.text.perplexity` measures what INT8 activations cost.

An artifact holds its static ranges in its provenance, under "activations":

    {"mode": "static", "observer": NAME, "symmetric": false, "inputs": {MATRIX: [low, high]}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError
from edgeq.formats.dynamic_quant import quantize_vectors
from edgeq.formats.tensor import Tensor
from edgeq.model.model import Model
from edgeq.model.reference import Array, Linear, dense
from edgeq.quant.decoder.calibrate import CalibrationStats
from edgeq.quant.histogram import Range

Codes = NDArray[np.int8] | NDArray[np.uint8]

KEY = "activations"
"""Where an artifact's provenance holds static ranges."""


@dataclass(frozen=True)
class InputParams:
    """How all inputs of one matrix are rounded.

    Args:
        scale: positive, exact in float32.
        zero_point: the code of 0.0.
        symmetric: codes are int8 in -127 .. 127 and zero_point is 0; else uint8 in 0 .. 255.
    """

    scale: float
    zero_point: int
    symmetric: bool

    @classmethod
    def from_range(cls, low: float, high: float, *, symmetric: bool = False) -> InputParams:
        """The scale with which a range that includes zero takes all codes.

        Args:
            low, high: low <= 0 <= high; of a range of nothing the scale is 1.
            symmetric: see `InputParams`.
        """
        whole = 127 if symmetric else 255
        width = max(-low, high) if symmetric else high - low
        scale = np.float32(width) / np.float32(whole)
        if not scale:
            return cls(1.0, 0, symmetric)
        zero = 0 if symmetric else round(min(max(-low / float(scale), 0), whole))
        return cls(float(scale), zero, symmetric)

    def codes(self, x: Array) -> Codes:
        """Round, ties to even, and clip to the codes there are."""
        steps: Array = np.rint(x / np.float32(self.scale))
        if self.symmetric:
            return cast(Codes, np.clip(steps, -127, 127).astype(np.int8))
        return cast(Codes, np.clip(steps + self.zero_point, 0, 255).astype(np.uint8))

    def values(self, codes: Codes) -> Array:
        """What codes stand for, float32."""
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


@dataclass(frozen=True)
class StaticActivations:
    """Ranges of the inputs of every matrix.

    Args:
        observer: what chose them.
        ranges: matrix name -> (low, high), low <= 0 <= high.
        symmetric: whether inputs are rounded symmetrically, see `InputParams`.
    """

    observer: str
    ranges: Mapping[str, Range]
    symmetric: bool = False

    @classmethod
    def from_stats(cls, stats: CalibrationStats, *, symmetric: bool = False) -> StaticActivations:
        """The ranges that a calibration found."""
        ranges = {name: (seen.low, seen.high) for name, seen in stats.inputs.items()}
        return cls(stats.observer, ranges, symmetric)

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
            found = cls(str(data["observer"]), ranges, bool(data.get("symmetric", False)))
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatError(
                f"the static ranges of activations are not readable: {err!r}"
            ) from err
        wanted = {name for name, _ in model.config.linears()}
        for name, (low, high) in ranges.items():
            if name not in wanted or not -math.inf < low <= 0 <= high < math.inf:
                raise FormatError(
                    f"the static range [{low}, {high}] of {name} is damaged; "
                    "quantize the checkpoint again"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """What an artifact's provenance holds under `KEY`."""
        return {
            "mode": "static",
            "observer": self.observer,
            "symmetric": self.symmetric,
            "inputs": {name: list(ends) for name, ends in self.ranges.items()},
        }

    def params(self, name: str) -> InputParams:
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
        return InputParams.from_range(low, high, symmetric=self.symmetric)

    def linear(self, product: Linear = dense) -> Linear:
        """A `Linear` that rounds its input by its matrix's range.

        Args:
            product: what multiplies the rounded input.
        """
        held = {name: self.params(name) for name in self.ranges}

        def rounded(name: str, x: Array, weight: Tensor) -> Array:
            params = held.get(name) or self.params(name)
            return product(name, params.values(params.codes(x)), weight)

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


def linear_of(model: Model) -> Linear | None:
    """The `Linear` of the activations an artifact was made for; None if it leaves them float.

    Raises:
        FormatError: its provenance is damaged.
    """
    static = StaticActivations.of(model)
    if static is not None:
        return static.linear()
    recipe = model.provenance.get("recipe")
    chosen = recipe.get(KEY) if isinstance(recipe, Mapping) else None
    dynamic = isinstance(chosen, Mapping) and chosen.get("mode") == "dynamic"
    return dynamic_linear() if dynamic else None
