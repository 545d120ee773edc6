"""Figures above the measured limits of the machine, and why they are not plausible."""

from __future__ import annotations

from collections.abc import Sequence

from edgeq.core.cpu import cache_bytes

ROUNDING = 0.5
"""Percent above 100 that are shown as 100."""


def exceeds(percent: float | None) -> bool:
    """Whether a percentage of a limit exceeds 100, rounding aside."""
    return percent is not None and percent > 100 + ROUNDING


def bandwidth_doubt(
    percent: float | None, nbytes: float | None, busy: Sequence[str] = ()
) -> str | None:
    """Why a bandwidth above the measured memory bandwidth is not plausible; None if it is below.

    Args:
        percent: the figure's share of the measured bandwidth.
        nbytes: bytes that each token reads.
        busy: what disturbed the measurement of the limit, of `Contention.reasons`.
    """
    if not exceeds(percent):
        return None
    if busy:
        return (
            "more than memory was measured to give, but that was measured while "
            f"{' and '.join(busy)}, and is too low"
        )
    caches = cache_bytes()
    if nbytes is not None and caches is not None and nbytes <= caches:
        return (
            f"more than memory gives here: the {nbytes / 1e6:.0f} MB that each token reads fit in "
            f"the processor's caches of {caches / 1e6:.0f} MB, so this is not memory bandwidth"
        )
    return (
        "more than memory was measured to give, which cannot be: some of it was read from caches, "
        "or the machine was slower when its bandwidth was measured; measure again"
    )


def throughput_doubt(percent: float | None, busy: Sequence[str] = ()) -> str | None:
    """Why a rate of operations above the kernel's measured peak cannot be relied on.

    Args:
        percent: the figure's share of the measured peak.
        busy: what disturbed the measurement of the peak, of `Contention.reasons`.
    """
    if not exceeds(percent):
        return None
    if busy:
        return (
            "more than the kernel's peak as measured here, but that was measured while "
            f"{' and '.join(busy)}, and is too low"
        )
    return (
        "more than the kernel's peak as measured here, which cannot be: the machine was slower "
        "when its peak was measured; measure again"
    )
