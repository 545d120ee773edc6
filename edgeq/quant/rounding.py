"""One matrix, or some rows of one: float weights in, a `QuantTensor` and its error out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import SchemeError, UsageError, unknown
from edgeq.quant.mse import fit_mse
from edgeq.quant.qparams import (
    Groups,
    QParams,
    Scratch,
    check_finite,
    group_view,
    squared_error,
    to_codes,
    to_levels,
)
from edgeq.quant.rtn import fit_rtn
from edgeq.schemes import QuantScheme
from edgeq.tensor import QuantTensor

Fit = Callable[[Iterable[Groups], QuantScheme, str, Scratch], QParams]

METHODS: dict[str, Fit] = {"rtn": fit_rtn, "mse": fit_mse}
"""How scales are chosen; codes are always the nearest for them."""


def method_named(name: str) -> Fit:
    """The method of a name.

    Raises:
        UsageError: there is none; lists the known ones.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(unknown("method", name, METHODS)) from None


@dataclass(frozen=True)
class Rounded:
    """Some rows, quantized.

    Args:
        tensor: the rows as a tensor of their own.
        noise: sum of squared errors.
        signal: sum of squared weights.
    """

    tensor: QuantTensor
    noise: float
    signal: float


def sqnr_db(signal: float, noise: float) -> float | None:
    """Signal to quantization noise ratio in dB; None where nothing was lost."""
    if noise <= 0 or signal <= 0:
        return None
    return 10 * math.log10(signal / noise)


def round_rows(
    w: NDArray[np.float32],
    scheme: QuantScheme,
    method: str,
    *,
    name: str = "weights",
    params: QParams | None = None,
    scratch: Scratch | None = None,
) -> Rounded:
    """Quantize some rows of finite numbers.

    Args:
        w: float32 [R, K].
        scheme: the scheme.
        method: a name of `METHODS`.
        name: the tensor, for messages.
        params: parameters found before, as they must be for part of a tensor of granularity
            "tensor"; None to find them here.
        scratch: working memory.

    Raises:
        SchemeError: a scale is beyond float16, or the scheme has a codebook.
        UsageError: an unknown method.
    """
    scratch = scratch or Scratch()
    k = w.shape[1]
    groups = group_view(w, scheme)
    if params is None:
        params = method_named(method)([groups], scheme, name, scratch)
    steps, rounded = to_levels(groups, params, scheme, scratch)
    noise = float(squared_error(steps, rounded, params).sum())
    signal = float(np.einsum("rk,rk->r", w, w).sum(dtype=np.float64))
    codes = to_codes(rounded, params, scheme)[:, :k]
    tensor = QuantTensor.from_codes(scheme, codes, params.scales, params.zero_points)
    return Rounded(tensor, noise, signal)


def quantize_tensor(
    w: NDArray[np.float32], scheme: QuantScheme, method: str = "rtn", *, name: str = "weights"
) -> QuantTensor:
    """Quantize one matrix.

    Args:
        w: float32 [N, K].
        scheme: the scheme; K need not divide by the group, N not by anything.
        method: "rtn" or "mse".
        name: the tensor, for messages.

    Raises:
        FormatError: a weight is NaN or infinite.
        SchemeError: not a matrix; a scale is beyond float16; or the scheme has a codebook.
        UsageError: an unknown method.
    """
    if w.ndim != 2 or not w.size:
        raise SchemeError(f"tensor {name} has shape {list(w.shape)}; only matrices are quantized")
    w = np.ascontiguousarray(w, np.float32)
    check_finite(w, name)
    return round_rows(w, scheme, method, name=name).tensor
