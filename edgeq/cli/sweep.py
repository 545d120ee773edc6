"""``edgeq sweep``: recipes x models on as many processes and machines as there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeq.cli import render
from edgeq.cli.options import command

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeq.sweep import Row


@command("sweep", "Try recipes on models in parallel, and show which are worth it.")
@click.argument("models", metavar="SRC...", nargs=-1, required=True)
@click.option("--recipe", "recipes", multiple=True, required=True, metavar="NAME|FILE",
              help="A preset, a scheme, or a recipe file; give several.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(file_okay=False), required=True,
              help="Folder for results; what it has already is not done again.")  # fmt: skip
@click.option("--calib", type=click.Path(exists=True, dir_okay=False), default=None,
              help="A text like what the models are for, for recipes that learn from "
                   "one.")  # fmt: skip
@click.option("--calib-windows", type=click.IntRange(min=1), default=128,
              help="Pieces of it to use, spread evenly.")  # fmt: skip
@click.option("--calib-context", type=click.IntRange(min=2), default=256,
              help="Tokens in each piece.")  # fmt: skip
@click.option("--eval-text", type=click.Path(exists=True, dir_okay=False), default=None,
              show_default="a text of edgeq's own",
              help="The text that is measured on; not that of --calib.")  # fmt: skip
@click.option("--speed/--no-speed", default=True,
              help="Time each artifact; other tasks run beside it.")  # fmt: skip
@click.option("--requantize", is_flag=True, show_default=False,
              help="Go on from weights that are quantized already, as those of most GGUF files; "
                   "figures are then against these.")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS", default=None,
              help="A Dask scheduler, such as tcp://host:8786; workers must see SRC and texts "
                   "by the same paths.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), default=2,
              help="Without --scheduler: processes on this machine.")  # fmt: skip
@click.option("--plot/--no-plot", default=True, help="Draw pareto.svg in the folder.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="How to write the table.")  # fmt: skip
def sweep(
    models: tuple[str, ...],
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
    """Quantize every SRC by every recipe, measure size, quality and speed, and tell the best.

    Each result is kept in the folder as it comes: a sweep that was interrupted goes on where it
    was, and a worker that dies costs its task only time. The mark * is the Pareto front: no
    other recipe is both smaller and nearer to the float model.
    """
    from edgeq.report import pareto_plot
    from edgeq.sweep import pareto, tasks
    from edgeq.sweep import sweep as run

    todo = tasks(
        models, recipes, eval_text=eval_text, calib=calib, calib_windows=calib_windows,
        calib_context=calib_context, timed=speed, requantize=requantize,
    )  # fmt: skip
    with render.progress("sweeping") as bar:
        rows = run(todo, output, scheduler=scheduler, workers=workers, progress=bar)
    best = pareto(rows)
    if plot and best:
        picture = Path(output) / "pareto.svg"
        pareto_plot(rows, best, picture)
        render.note(f"plot: {picture}")
    if form == "json":
        keys = {row.key for row in best}
        found = [{**row.to_dict(), "pareto": row.key in keys} for row in rows]
        render.write(json.dumps(found, indent=2) + "\n")
    else:
        render.write(_table(rows, best) + "\n")


def _table(rows: Sequence[Row], best: Sequence[Row]) -> str:
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
