"""Plots of what was measured (`matplotlib`, in the extra ``report``)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.core.errors import MissingDependencyError
from edgeq.core.files import write_whole

if TYPE_CHECKING:
    from edgeq.sweeping import SweepResult


def pareto_plot(rows: Sequence[SweepResult], best: Sequence[SweepResult], path: str | Path) -> None:
    """Size against divergence, a panel for each model; the Pareto front as a line.

    Args:
        rows: of a sweep; those without size or divergence are left out.
        best: those on the front, by size.
        path: of the picture; its ending (.svg, .png, .pdf) says the format.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        EdgeqError: the picture cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as err:
        raise MissingDependencyError("matplotlib", "report", "to draw plots") from err
    path = Path(path)
    models = list(dict.fromkeys(row.model for row in rows))
    figure, axes = plt.subplots(
        len(models), 1, figsize=(7, 4.2 * len(models)), squeeze=False, layout="constrained"
    )
    for (axis,), model in zip(axes, models, strict=True):
        shown = [r for r in rows if r.model == model and r.nbytes is not None and r.kl is not None]
        front = [r for r in best if r.model == model]
        speeds = [r.tokens_per_s for r in shown]
        points = axis.scatter(
            [_mb(r) for r in shown],
            [r.kl for r in shown],
            c=speeds if None not in speeds else "tab:blue",
            cmap="viridis",
            s=36,
            zorder=3,
        )
        if shown and None not in speeds:
            figure.colorbar(points, ax=axis, label="tokens per second, one thread")
        axis.plot([_mb(r) for r in front], [r.kl for r in front], color="0.6", lw=1, zorder=2)
        middle = (min(map(_mb, shown)) + max(map(_mb, shown))) / 2 if shown else 0.0
        for row in shown:
            left = _mb(row) <= middle  # names stay within the picture
            axis.annotate(
                row.name,
                (_mb(row), row.kl),
                xytext=(5 if left else -5, 4),
                textcoords="offset points",
                ha="left" if left else "right",
                fontsize=7,
            )
        if any(row.kl for row in shown):
            axis.set_yscale("log")
        axis.set_title(f"{model}: size and divergence from float; the line is the Pareto front",
                       fontsize=9)  # fmt: skip
        axis.set_xlabel("artifact, MB")
        axis.set_ylabel("mean KL, nats per token")
        axis.grid(alpha=0.3)
        axis.margins(x=0.15)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix(".") or "svg", dpi=150)
    plt.close(figure)
    write_whole(path, [picture.getvalue()], "the plot")


def _mb(row: SweepResult) -> float:
    return (row.nbytes or 0) / 1e6
