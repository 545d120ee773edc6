"""``edgeq sensitivity``: what each tensor loses in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeq.cli import render
from edgeq.cli.options import check_output, command, force_option

if TYPE_CHECKING:
    from edgeq.quant.sensitivity import Sensitivity

SHOWN = 12
"""Rows of the table."""


@command("sensitivity", "What each tensor of a checkpoint loses in fewer bits.")
@click.argument("source", metavar="SRC")
@click.option("--calib", required=True, type=click.Path(exists=True, dir_okay=False),
              help="A text like what the model is for, UTF-8.")  # fmt: skip
@click.option("--calib-windows", type=click.IntRange(min=1), default=8,
              help="Pieces of it to use, spread evenly.")  # fmt: skip
@click.option("--calib-context", type=click.IntRange(min=2), default=256,
              help="Tokens in each piece.")  # fmt: skip
@click.option("--mode", type=click.Choice(["kl", "scaled", "output"]), default=None,
              show_default="kl for small models, else scaled",
              help="kl: how far each matrix moves the whole model; scaled: the error of its output "
                   "times what such errors do, measured for each kind of matrix; output: the error "
                   "of its output alone, by which bits cannot be chosen.")  # fmt: skip
@click.option("--method", default="gptq",
              help="How weights are rounded: as the recipe will.")  # fmt: skip
@click.option("--palette", is_flag=True,
              help="Palettes too, for a recipe that has them: takes twice as long.")  # fmt: skip
@click.option("--group", metavar="N", type=click.Choice(["16", "32", "64", "128"]), default="32",
              help="Shortest group of weights that share a scale.")  # fmt: skip
@click.option("--asym", is_flag=True, help="Schemes with zero points.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), default=None,
              help="Write all of it as JSON, for `edgeq quantize --sensitivity`.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), default=None,
              help="Layers side by side in so many processes (Dask).")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS", default=None,
              help="A Dask scheduler whose workers do it, such as tcp://host:8786.")  # fmt: skip
@force_option
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="How to write it to standard output.")  # fmt: skip
def sensitivity(
    source: str,
    calib: str,
    calib_windows: int,
    calib_context: int,
    mode: str | None,
    method: str,
    palette: bool,
    group: str,
    asym: bool,
    output: str | None,
    workers: int | None,
    scheduler: str | None,
    force: bool,
    form: str,
) -> None:
    """Round every matrix of SRC alone, in 2, 3, 4, 8 and 16 bits, and tell what it costs.

    With -o the answer is kept: `edgeq quantize --target-bpw 4.5 --sensitivity FILE` chooses each
    tensor's bits by it, for a recipe of the same method.
    """
    from edgeq.files import write_whole
    from edgeq.importers import load
    from edgeq.quant.sensitivity import measure_sensitivity
    from edgeq.schemes import QuantScheme
    from edgeq.texts import calibration

    if output is not None:
        check_output(Path(output), force)
    base = QuantScheme(4, not asym, "group", int(group), "palette" if palette else None)
    with render.progress("trying tensors") as bar:
        if workers or scheduler:
            from edgeq.sweep import sweep_sensitivity

            found = sweep_sensitivity(
                source, calib, calib_windows, calib_context, str(base), mode, method,
                scheduler=scheduler, workers=workers or 2, progress=bar,
            )  # fmt: skip
        else:
            model = load(source)
            windows = calibration(model, calib, calib_windows, calib_context)
            found = measure_sensitivity(
                model, windows, base, method=method, mode=mode, progress=bar,  # type: ignore[arg-type]
            )  # fmt: skip
    if output is not None:
        write_whole(Path(output), [found.to_json().encode()], "the file of sensitivities")
    render.write(found.to_json() + "\n" if form == "json" else _table(found))


def _table(found: Sensitivity) -> str:
    """The tensors that lose most, a column for each number of bits in the shortest groups."""
    every = next(iter(found.losses.values()))
    columns: dict[tuple[str, bool], str] = {}
    for text in every:
        columns.setdefault((text.split("-")[0], text.endswith("-palette")), text)
    w4 = columns["w4", False]
    order = sorted(found.losses, key=lambda name: -found.losses[name][w4])
    rows = [
        [name, *(f"{found.losses[name].get(text, float('nan')):.2g}" for text in columns.values())]
        for name in order[:SHOWN]
    ]
    left = len(order) - len(rows)
    unit = {
        "kl": "KL in nats per token, measured",
        "scaled": "KL in nats per token, estimated by kinds of matrices",
        "output": "relative squared error of the output",
    }[found.mode]
    return (
        render.aligned(["tensor", *columns.values()], rows)
        + (f"\n... and {left} that lose less in {w4}" if left > 0 else "")
        + f"\n\n{unit}, each tensor alone, by {found.method}; {found.n_tokens} tokens\n"
    )
