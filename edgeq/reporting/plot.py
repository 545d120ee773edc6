"""A plot: lines, dots and shades on two axes.

Only the drawing is SVG. It is stretched to the width there is, so that lines and dots keep their
thickness, and all text beside it is HTML, which keeps its size on a phone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeq.reporting.axes import Axis

SIZE = 1000
"""Units of the drawing in both directions."""

POINTS = 400
"""Stretches of a line's width, of which each keeps its least and its most."""

NEAR = 0.08
"""Of the width and height: dots nearer than this share a name's place."""

ROOM = 0.6
"""Of the width: dots further right have their names on the left."""

SHARED = 4
"""Names that do."""

COLORS = 6
"""Colors of page.css; then they begin again, dashed."""


@dataclass(frozen=True)
class Line:
    """A line.

    Args:
        name: for the legend.
        x, y: [S] values; the line is broken where y is nan.
        color: which, from 0.
        quiet: a limit or a guide, thin and dashed.
        dots: mark the points themselves.
    """

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    color: int
    quiet: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Dot:
    """A point with its name beside it."""

    name: str
    x: float
    y: float
    color: int
    hollow: bool = False


@dataclass(frozen=True)
class Shade:
    """Stretches of x, (from, to) each, that are shaded over the whole height.

    Args:
        kind: its class in page.css.
        name: for the legend.
        stretches: what is shaded.
    """

    kind: str
    name: str
    stretches: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Plot:
    """A plot and what stands around it.

    Args:
        key: its name within the page.
        title: what it shows.
        about: the same for those who cannot see it.
        x, y: axes.
        lines, dots, shades: what is drawn, shades below.
        notes: what must be known to read it.
        columns, rows: the numbers drawn, as a table.
        low: not as high as others, to stand above or below another.
        open: show the table at once, as it says what the dots' names mean.
    """

    key: str
    title: str
    about: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...] = ()
    dots: tuple[Dot, ...] = ()
    shades: tuple[Shade, ...] = ()
    notes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = field(default_factory=tuple)
    low: bool = False
    open: bool = False

    def path(self, line: Line) -> str:
        """A line as SVG."""
        x, y = thinned(self.x.at(line.x), line.y)
        places = np.column_stack([x, 1 - self.y.at(y)]) * SIZE
        pieces, pen = [], "M"
        for px, py in places:
            if np.isnan(py):
                pen = "M"
                continue
            pieces.append(f"{pen}{px:.1f} {py:.1f}")
            pen = "L"
        return "".join(pieces)

    def specks(self, line: Line) -> str:
        """The points of a line as SVG: strokes of no length, whose round caps are dots."""
        places = zip(self.x.at(line.x), self.y.at(line.y), strict=True)
        return "".join(
            f"M{x * SIZE:.1f} {(1 - y) * SIZE:.1f}h.01" for x, y in places if not np.isnan(y)
        )

    def place(self, dot: Dot) -> tuple[float, float]:
        """(from the left, from the top) of a dot, 0 to 1."""
        return float(self.x.at(dot.x)), 1 - float(self.y.at(dot.y))

    def tags(self) -> list[tuple[float, float, str]]:
        """(from the left, from the top, text) of the dots' names; those too near share one."""
        groups: list[list[tuple[float, float, str]]] = []
        for left, top, name in sorted((*self.place(dot), dot.name) for dot in self.dots):
            near = [g for g in groups if left - g[0][0] < NEAR and abs(top - g[0][1]) < NEAR]
            if near:
                near[0].append((left, top, name))
            else:
                groups.append([(left, top, name)])
        return [
            # beyond the group's last dot, or before its first where there is no room
            (*group[-1 if group[-1][0] <= ROOM else 0][:2], _listed([name for *_, name in group]))
            for group in groups
        ]

    def blocks(self, shade: Shade) -> str:
        """A shade as SVG."""
        if not shade.stretches:
            return ""
        edges = np.clip(self.x.at(np.array(shade.stretches)), 0, 1) * SIZE
        return "".join(f"M{a:.1f} 0H{b:.1f}V{SIZE}H{a:.1f}z" for a, b in edges)


def _listed(names: Sequence[str]) -> str:
    names = sorted(names, key=lambda name: (len(name), name))
    return ", ".join(names[:SHARED]) + (" …" if len(names) > SHARED else "")


def thinned(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most two points of every stretch, its least and its most, so that peaks stay.

    Args:
        x: [S] ascending.
        y: [S], nan where there is nothing.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) <= 2 * POINTS:
        return x, y
    keep = set(np.flatnonzero(np.isnan(y)).tolist()) | {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), POINTS):
        seen = part[~np.isnan(y[part])]
        if seen.size:
            keep |= {int(seen[y[seen].argmin()]), int(seen[y[seen].argmax()])}
    kept = np.array(sorted(keep))
    return x[kept], y[kept]
