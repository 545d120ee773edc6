"""Inputs of graphs: the types of samples, and conversion to the types of a runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.graph.ir import Graph

Feeds = Mapping[str, NDArray[Any]]
"""The inputs of a graph by name: one sample."""
RunGraph = Callable[[Feeds], Mapping[str, NDArray[Any]]]
"""Runs a graph on one sample; gives its outputs and the watched values by name."""
OpenSession = Callable[[Graph, Sequence[str]], RunGraph]
"""Makes what runs a graph, from the graph and the names of values to watch beside its outputs."""


def held_as(name: str, array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Convert an input to the type that a runtime takes, or refuse if a number would change.

    Args:
        name: of the input.
        array: what is given.
        dtype: what the runtime holds.

    Raises:
        UsageError: a whole number is past the range of a type of whole numbers.
    """
    kind = np.dtype(dtype)
    if kind.kind in "iu" and array.dtype.kind in "iu" and array.size:
        limit = np.iinfo(kind)
        least, most = int(array.min()), int(array.max())
        if least < limit.min or most > limit.max:
            raise UsageError(
                f"the input {name!r} holds numbers from {least} to {most}; the model takes "
                f"{kind.name}, {limit.min} to {limit.max}"
            )
    return array.astype(kind)
