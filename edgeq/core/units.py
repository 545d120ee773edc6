"""Sizes and counts as people write them."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float) -> str:
    """Bytes in the largest unit that keeps the number above one: ``1.24 MiB``."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} B" if not unit else f"{count:.2f} {_UNITS[unit]}"


def human_count(count: float) -> str:
    """A number of parameters: ``260.03 K``, ``15.19 M``, ``1.24 B``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:.0f}"
