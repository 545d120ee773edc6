"""A confusion matrix as a table (.csv) or as a picture (.svg)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from edgeq.core.errors import UsageError
from edgeq.core.files import write_whole
from edgeq.evaluation.graph import GraphEvaluation

SUFFIXES = (".csv", ".svg")
_CELL = 36
"""Width and height of a cell in the picture's units."""
_LETTER = 7
"""Width of a letter of a class name, about."""


def write_confusion(evaluation: GraphEvaluation, path: str | Path) -> None:
    """Write the counts of labels (rows) and largest scores (columns).

    Args:
        evaluation: a measurement with labels.
        path: a .csv or an .svg file.

    Raises:
        UsageError: there are no counts, or another suffix.
        EdgeqError: the file cannot be written.
    """
    path = Path(path)
    check_suffix(path)
    counts = evaluation.confusion
    if counts is None:
        raise UsageError("there is no confusion matrix: it needs labels and two scores or more")
    names = evaluation.classes
    if len(names) != len(counts):
        names = tuple(map(str, range(len(counts))))
    text = _table(counts, names) if path.suffix == ".csv" else _picture(counts, names)
    write_whole(path, [text.encode()], "the confusion matrix")


def check_suffix(path: Path) -> None:
    """Refuse a file that is neither a table nor a picture.

    Raises:
        UsageError: it is neither.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"the confusion matrix can be written as {' or '.join(SUFFIXES)}, not as {path.name}"
        )


def _table(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["label \\ largest score", *names])
    table.writerows([name, *row] for name, row in zip(names, counts, strict=True))
    return text.getvalue()


def _picture(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Cells shaded by their share of the label's samples, with the counts written into them."""
    margin = _LETTER * max(map(len, names)) + 24
    size = margin + _CELL * len(names) + 8
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" '
            f'width="{size}" font-family="sans-serif" font-size="12">',
            "<title>Confusion matrix: labels in rows, largest scores in columns</title>",
            f'<rect width="{size}" height="{size}" fill="white"/>',
            *_labels(names, margin),
            *_cells(counts, margin),
            "</svg>\n",
        ]
    )


def _labels(names: Sequence[str], margin: int) -> Iterator[str]:
    for i, name in enumerate(names):
        middle, edge = margin + _CELL * i + _CELL // 2, margin - 6
        text = escape(name)
        yield f'<text x="{edge}" y="{middle + 4}" text-anchor="end">{text}</text>'
        yield f'<text transform="translate({middle + 4} {edge}) rotate(-90)">{text}</text>'


def _cells(counts: Sequence[Sequence[int]], margin: int) -> Iterator[str]:
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            x, y = margin + _CELL * j, margin + _CELL * i
            share = count / max(sum(row), 1)
            yield (
                f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="#08519c" '
                f'fill-opacity="{share:.3f}" stroke="#ccc"/>'
            )
            if count:
                color = "white" if share > 0.5 else "black"
                yield (
                    f'<text x="{x + _CELL // 2}" y="{y + _CELL // 2 + 4}" text-anchor="middle" '
                    f'fill="{color}">{count}</text>'
                )
