"""What a graph is run with, in the types that a runtime takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError


def held_as(name: str, array: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """An input in the type that a runtime holds it in, no number of it being another.

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
