"""Round one matrix, or some of its rows: float weights in, codes, scales and errors out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import SchemeError, UsageError, unknown
from edgeq.formats.schemes import QuantScheme
from edgeq.formats.tensor import QuantTensor
from edgeq.quant.kernels.products import squares, total
from edgeq.quant.rounders.gptq import round_gptq
from edgeq.quant.rounders.hessian import Hessian
from edgeq.quant.rounders.mse import fit_mse
from edgeq.quant.rounders.palette import find_palette
from edgeq.quant.rounders.qparams import (
    Groups,
    QuantRows,
    Scratch,
    WeightParams,
    check_finite,
    from_range,
    group_view,
    ranges,
    squared_error,
    to_codes,
    to_levels,
)

METHODS: dict[str, str] = {
    "rtn": "round to nearest: a scale spans its weights' whole range",
    "mse": "clip where it lowers the squared error of the weights",
    "imatrix": "the same, each weight counting as much as its input's mean square",
    "gptq": "lowest error of the outputs: each weight makes up for the rounding of the others",
}
"""How scales and codes are chosen. A scheme with a codebook gets one whatever the method."""

METHOD_INPUTS: dict[str, str] = {"imatrix": "importance", "gptq": "hessian"}
"""What a method must know of a matrix's inputs."""
FALLBACK = "mse"
"""The method that stands in where inputs are unknown for one that depends on them."""


def data_free_method(method: str) -> str:
    """The method for tensors whose inputs are not measured, such as embedding and head."""
    return FALLBACK if method in METHOD_INPUTS else method


def check_method(name: str, given: Iterable[str] = (), tensor: str = "weights") -> None:
    """Refuse a method that does not exist or lacks what it needs.

    Args:
        name: of the method.
        given: what is known of the inputs: values of `METHOD_INPUTS`.
        tensor: for the message.

    Raises:
        UsageError: lists the known ones, or says what is lacking.
    """
    if name not in METHODS:
        raise UsageError(unknown("method", name, METHODS))
    if name in METHOD_INPUTS and METHOD_INPUTS[name] not in given:
        raise UsageError(
            f"the method {name} needs the {METHOD_INPUTS[name]} of {tensor}'s inputs, which is "
            "measured on a text; give one with --calib TEXT, or use rtn or mse"
        )


@dataclass(frozen=True)
class Shared:
    """What all rows of a tensor share; it is chosen over all of them before any is rounded.

    Args:
        params: scale and zero point, if the granularity is "tensor".
        palette: int8 [2**bits], if the scheme has a codebook.
    """

    params: WeightParams | None = None
    palette: NDArray[np.int8] | None = None


@dataclass(frozen=True)
class RoundedRows(QuantRows):
    """Rows of a matrix, and what rounding them lost.

    Args:
        codes, params: see `QuantRows`.
        noise: sum of squared errors.
        signal: sum of squared weights.
    """

    noise: float
    signal: float


def sqnr_db(signal: float, noise: float) -> float | None:
    """Signal to quantization noise ratio in dB; None where nothing was lost."""
    if noise <= 0 or signal <= 0:
        return None
    return 10 * math.log10(signal / noise)


def find_shared(
    chunks: Iterable[Groups],
    scheme: QuantScheme,
    method: str,
    k: int,
    *,
    name: str = "weights",
    importance: NDArray[np.float32] | None = None,
    scratch: Scratch | None = None,
) -> Shared:
    """What all rows of a tensor share; nothing for most schemes.

    Args:
        chunks: float32 [R, G, S], all the tensor's; may be gone through several times.
        scheme: the scheme.
        method: "rtn", "mse" or "imatrix".
        k: weights in a row, without padding.
        name: the tensor, for messages.
        importance: mean square of each input, float32 [K]; for "imatrix".
        scratch: working memory.

    Raises:
        SchemeError: a scale is beyond float16.
        UsageError: an unknown method, or one that needs what is not given.
    """
    weights = _importance(scheme, method, k, importance, name)
    palette = None
    if scheme.codebook:
        palette = find_palette(chunks, scheme, name, weights)
    if scheme.granularity != "tensor":
        return Shared(None, palette)
    return Shared(_fit(chunks, scheme, method, name, scratch or Scratch(), weights, palette))


def round_rows(
    w: NDArray[np.float32],
    scheme: QuantScheme,
    method: str,
    *,
    name: str = "weights",
    shared: Shared | None = None,
    importance: NDArray[np.float32] | None = None,
    scratch: Scratch | None = None,
) -> RoundedRows:
    """Quantize some rows of finite numbers to the nearest codes.

    Args:
        w: float32 [R, K].
        scheme: the scheme.
        method: "rtn", "mse" or "imatrix".
        name: the tensor, for messages.
        shared: what was found over all rows of the tensor; None if these are all.
        importance: mean square of each input, float32 [K]; for "imatrix".
        scratch: working memory.

    Raises:
        SchemeError: a scale is beyond float16.
        UsageError: an unknown method, or one that needs what is not given.
    """
    scratch = scratch or Scratch()
    k = w.shape[1]
    groups = group_view(w, scheme)
    if shared is None:
        shared = find_shared(
            [groups], scheme, method, k, name=name, importance=importance, scratch=scratch
        )
    params = shared.params
    if params is None:
        weights = _importance(scheme, method, k, importance, name)
        params = _fit([groups], scheme, method, name, scratch, weights, shared.palette)
    steps, rounded = to_levels(groups, params, scheme, scratch)
    if scheme.codebook:  # which may hold no zero: what stands in for padding is no error
        steps.reshape(len(w), -1)[:, k:] = rounded.reshape(len(w), -1)[:, k:]
    noise = total(squared_error(steps, rounded, params))
    signal = squares(w)
    return RoundedRows(to_codes(rounded, params, scheme)[:, :k], params, noise, signal)


def quantize_tensor(
    w: NDArray[np.float32],
    scheme: QuantScheme,
    method: str | None = None,
    *,
    name: str = "weights",
    importance: NDArray[np.float32] | None = None,
    hessian: Hessian | None = None,
    **options: Any,
) -> QuantTensor:
    """Quantize one matrix.

    Args:
        w: float32 [N, K].
        scheme: the scheme; K need not divide by the group, N not by anything.
        method: a name of `METHODS`; if None the scheme's own, else "rtn".
        name: the tensor, for messages.
        importance: mean square of each input, float32 [K]; "imatrix" needs it.
        hessian: second moments of the inputs; "gptq" needs it.
        options: of `round_gptq`.

    Raises:
        FormatError: a weight is NaN or infinite.
        SchemeError: not a matrix; or a scale is beyond float16.
        UsageError: an unknown method, one that needs what is not given, or an option out of
            range.

    Example:
        >>> from edgeq.formats.schemes import QuantScheme
        >>> tensor = quantize_tensor(np.eye(4, 32, dtype=np.float32), QuantScheme(4))
        >>> tensor.shape, round(tensor.bpw, 2)
        ((4, 32), 18.0)
    """
    if w.ndim != 2 or not w.size:
        raise SchemeError(f"tensor {name} has shape {list(w.shape)}; only matrices are quantized")
    w = np.ascontiguousarray(w, np.float32)
    check_finite(w, name)
    method = method or scheme.method or "rtn"
    if method == "gptq" and hessian is not None:
        return round_gptq(w, scheme, hessian, name=name, **options).packed(scheme)
    return round_rows(w, scheme, method, name=name, importance=importance).packed(scheme)


def _importance(
    scheme: QuantScheme,
    method: str,
    k: int,
    importance: NDArray[np.float32] | None,
    name: str,
) -> Groups | None:
    """Weights of squared errors as groups [1, G, S], 0 for padding; None if all are alike."""
    check_method(method, () if importance is None else ("importance",), name)
    if method == "imatrix" and importance is not None:
        if importance.shape != (k,):
            raise UsageError(
                f"the importance of {name}'s inputs has shape {list(importance.shape)} and its "
                f"rows have {k} weights; was it measured on another model?"
            )
        # inputs that never differ from zero leave all weights alike
        weights = importance if importance.any() else np.ones_like(importance)
        return group_view(weights[None], scheme)
    if scheme.codebook and k != scheme.padded_k(k):
        # padding must not draw a palette's numbers to zero
        return group_view(np.ones((1, k), np.float32), scheme)
    return None


def _fit(
    chunks: Iterable[Groups],
    scheme: QuantScheme,
    method: str,
    name: str,
    scratch: Scratch,
    importance: Groups | None,
    palette: NDArray[np.int8] | None,
) -> WeightParams:
    if method == "rtn":  # the scale spans the whole range: nothing is cut off
        return from_range(*ranges(chunks, scheme), scheme, name, palette)
    assert method in ("mse", "imatrix"), method  # another method needs a call of its own here
    return fit_mse(chunks, scheme, name, scratch, importance=importance, palette=palette)
