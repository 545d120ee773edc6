"""The source of a quantization: its SHA-256, and whether its weights are quantized already."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

from edgeq.core.errors import UsageError
from edgeq.formats.kept import stored_type
from edgeq.formats.schemes import FLOAT_TAGS
from edgeq.model.model import Model
from edgeq.model.origin import Origin

REQUANTIZE = (
    "quantizing them again adds a second rounding error to the first, so quantize the float "
    "checkpoint that it was made from if there is one; to keep their integers as they are, pass "
    "--repack to edgeq quantize (in Python call edgeq.repack); to quantize the rounded weights, "
    "pass --requantize (in Python requantize=True)"
)
"""Why quantized weights are refused, and the options that accept them."""


def quantized_types(model: Model) -> dict[str, int]:
    """Number of quantized tensors by their type, such as ``{"Q4_1": 210, "Q8_0": 1}``.

    Args:
        model: a model of any format. Tensors that rearrange others count as those.

    Returns:
        counts by type, the most frequent type first; empty if all tensors are floating point.
    """
    kinds = map(stored_type, model.tensors.values())
    floats = ("float", *FLOAT_TAGS.values())
    return dict(Counter(kind for kind in kinds if kind not in floats).most_common())


def refuse_quantized(model: Model, where: str) -> None:
    """Refuse a model whose weights are quantized.

    Args:
        model: the source.
        where: path or description of the model, for the message.

    Raises:
        UsageError: weights are quantized; the message names their types and what can be done.
    """
    if counts := quantized_types(model):
        raise UsageError(
            f"{where} cannot be quantized as a float model: its weights are already quantized "
            f"({type_counts(counts)}); {REQUANTIZE}"
        )


def type_counts(counts: Mapping[str, int]) -> str:
    """Counts of types as text: "Q4_1 x 210, Q8_0 x 1"."""
    return ", ".join(f"{kind} x {count}" for kind, count in counts.items())


class BackgroundDigest:
    """The SHA-256 of a source, computed by a thread while the model is quantized."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._sha256 = ""
        self._error: BaseException | None = None
        # a daemon thread, so that an interrupted run does not wait for it
        self._thread = threading.Thread(target=self._compute, daemon=True, name="edgeq-sha256")
        self._thread.start()

    def _compute(self) -> None:
        try:
            self._sha256 = self._origin.sha256
        except BaseException as err:  # noqa: BLE001  raised again by `result`
            self._error = err

    def result(self) -> str:
        """Wait for the SHA-256 and return it; raises the error of the thread, if there was one."""
        self._thread.join()
        if self._error:
            raise self._error
        return self._sha256
