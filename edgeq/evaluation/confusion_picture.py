"""A confusion matrix as a table or a picture (`matplotlib`, in the extra ``report``)."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from edgeq.core.errors import MissingDependencyError, UsageError, require
from edgeq.core.files import write_whole
from edgeq.evaluation.graph import GraphEvaluation

PICTURES = (".png", ".svg", ".pdf")
_NUMBERED = 20
"""Most classes whose counts are written into the cells."""


def write_confusion(found: GraphEvaluation, path: str | Path) -> None:
    """Write the counts of labels (rows) and largest scores (columns).

    Args:
        found: what was measured, with labels.
        path: a .csv file, or a picture: its ending says which.

    Raises:
        UsageError: there are no counts, or another ending.
        MissingDependencyError: matplotlib is not installed.
        EdgeqError: the file cannot be written.
    """
    path = Path(path)
    check_ending(path)
    if found.confusion is None:
        raise UsageError("there is no confusion matrix: it needs labels and two scores or more")
    names = found.classes
    if len(names) != len(found.confusion):
        names = tuple(map(str, range(len(found.confusion))))
    if path.suffix == ".csv":
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["label \\ largest score", *names])
        table.writerows([name, *row] for name, row in zip(names, found.confusion, strict=True))
        content = text.getvalue().encode()
    else:
        content = _drawn(found.confusion, names, path.suffix[1:])
    write_whole(path, [content], "the confusion matrix")


def check_ending(path: Path) -> None:
    """Refuse a file that is neither a table nor a picture.

    Raises:
        UsageError: it is neither.
        MissingDependencyError: a picture, and matplotlib is not installed.
    """
    if path.suffix not in (".csv", *PICTURES):
        raise UsageError(
            f"the confusion matrix can be written as .csv or as an image ({', '.join(PICTURES)}), "
            f"not as {path.name}"
        )
    if path.suffix in PICTURES:
        require("report", ("matplotlib",), "to draw plots")


def _drawn(counts: tuple[tuple[int, ...], ...], names: tuple[str, ...], kind: str) -> bytes:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as err:
        raise MissingDependencyError("matplotlib", "report", "to draw plots") from err
    held = np.array(counts, float)
    share = held / np.maximum(held.sum(axis=1, keepdims=True), 1)
    n = len(names)
    side = float(np.clip(0.45 * n, 3.5, 14))
    figure, axis = plt.subplots(figsize=(side + 1.2, side), layout="constrained")
    shown = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axis, label="share of the label's samples")
    axis.set(xlabel="largest score", ylabel="label")
    if n <= 2 * _NUMBERED:
        axis.set_xticks(range(n), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axis.set_yticks(range(n), names)
    if n <= _NUMBERED:
        for i, j in np.ndindex(n, n):
            color = "white" if share[i, j] > 0.5 else "black"
            axis.text(j, i, int(held[i, j]), ha="center", va="center", color=color, fontsize=7)
    raw = io.BytesIO()
    figure.savefig(raw, format=kind, dpi=150)
    plt.close(figure)
    return raw.getvalue()
