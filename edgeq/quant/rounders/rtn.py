"""Round to nearest: the scale spans each group's whole range."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.schemes import QuantScheme
from edgeq.quant.rounders.qparams import Groups, WeightParams, from_range, ranges


def fit_rtn(
    chunks: Iterable[Groups],
    scheme: QuantScheme,
    name: str,
    *,
    palette: NDArray[np.int8] | None = None,
) -> WeightParams:
    """Parameters that cut nothing off.

    Args:
        chunks: float32 [R, G, S]: one array, or, for granularity "tensor", all the tensor's.
        scheme: the scheme.
        name: the tensor, for messages.
        palette: the levels, if the scheme has a codebook.

    Returns:
        Parameters [R, G] ([1, 1] for granularity "tensor").

    Raises:
        SchemeError: a scale is beyond float16.
    """
    return from_range(*ranges(chunks, scheme), scheme, name, palette)
