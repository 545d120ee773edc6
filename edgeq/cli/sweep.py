"""``edgeq sweep``: compare recipes on models, with several processes or machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeq.cli import render
from edgeq.cli.options import command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeq.sweeping import SweepResult


@command("sweep", "Compare recipes on models in parallel.")
@click.argument("models", metavar="MODEL...", nargs=-1)
@click.option("-m", "--model", "named", multiple=True, metavar="MODEL", show_default=False,
              help="Same as the MODEL argument. May be given several times.")  # fmt: skip
@click.option("--recipe", "recipes", multiple=True, required=True, metavar="NAME|FILE",
              help="A preset, a scheme or a recipe file. May be given several times.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(file_okay=False), required=True,
              help="The folder for results; results that it already has are not computed "
                   "again.")  # fmt: skip
@click.option("--calib", type=click.Path(exists=True, dir_okay=False), default=None,
              help="The calibration text, for recipes that need one.")  # fmt: skip
@click.option("--calib-windows", type=click.IntRange(min=1), default=128,
              help="Number of windows of the calibration text to use, spread evenly over "
                   "it.")  # fmt: skip
@click.option("--calib-context", type=click.IntRange(min=2), default=256,
              help="Tokens in each window.")  # fmt: skip
@click.option("--eval-text", type=click.Path(exists=True, dir_okay=False), default=None,
              show_default="a text that edgeq includes",
              help="The text that quality is measured on; it must not be the text of "
                   "--calib.")  # fmt: skip
@click.option("--speed/--no-speed", default=True,
              help="Also measure speed, while other tasks may be running.")  # fmt: skip
@click.option("--requantize", is_flag=True, show_default=False,
              help="Accept models whose weights are already quantized, such as most GGUF files; "
                   "quality is then measured against those.")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS", default=None,
              help="A Dask scheduler, such as tcp://host:8786; its workers must find the models "
                   "and texts at the same paths.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), default=2,
              help="Number of processes on this machine, without --scheduler.")  # fmt: skip
@click.option("--plot/--no-plot", default=True,
              help="Write a report with plots, report.html, to the folder.")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="Format of the table on standard output.")  # fmt: skip
def sweep(
    models: tuple[str, ...],
    named: tuple[str, ...],
    recipes: tuple[str, ...],
    output: str,
    calib: str | None,
    calib_windows: int,
    calib_context: int,
    eval_text: str | None,
    speed: bool,
    requantize: bool,
    scheduler: str | None,
    workers: int,
    plot: bool,
    form: str,
) -> None:
    """Quantize each MODEL with each recipe, and compare size, quality and speed.

    Each result is saved to the folder when it is ready: an interrupted sweep continues where it
    stopped, and the task of a worker that died is run again. Recipes marked * are on the Pareto
    front: no other recipe is both smaller and closer to the float model.
    """
    from edgeq.api.sweep import sweep as run
    from edgeq.reporting import Sources, write
    from edgeq.sweeping import pareto

    models = (*models, *named)
    if not models:
        raise click.UsageError("Missing argument 'MODEL...'.")
    with render.progress("Comparing recipes") as bar:
        rows = run(
            models, recipes, output, text_file=calib, windows=calib_windows,
            context=calib_context, eval_text=eval_text, speed=speed, requantize=requantize,
            scheduler=scheduler, workers=workers, progress=bar,
        )  # fmt: skip
    best = pareto(rows)
    if plot and best:
        page = Path(output) / "report.html"
        write(Sources(rows=tuple(rows)), page, "edgeq sweep")
        render.note(f"report: {page}")
    if form == "json":
        keys = {row.key for row in best}
        records = [{**row.to_dict(), "pareto": row.key in keys} for row in rows]
        render.write(json.dumps(records, indent=2) + "\n")
    else:
        render.write(_table(rows, best) + "\n")


def _table(rows: Sequence[SweepResult], best: Sequence[SweepResult]) -> str:
    keys = {row.key for row in best}
    ordered = sorted(rows, key=lambda row: (row.model, row.nbytes is None, row.nbytes or 0))
    lines = [
        [
            row.model,
            ("* " if row.key in keys else "  ") + row.name,
            _cell(row.nbytes and row.nbytes / 1e6, ".2f"),
            _cell(row.bpw, ".2f"),
            _cell(row.kl, ".4f"),
            _cell(row.top1 and 100 * row.top1, ".1f"),
            _cell(row.nll, ".4f"),
            _cell(row.tokens_per_s, ".0f"),
            row.error or "",
        ]
        for row in ordered
    ]
    head = ["model", "  recipe", "MB", "bpw", "KL nats", "top-1 %", "nats/token", "tok/s", ""]
    return render.aligned(head, lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
