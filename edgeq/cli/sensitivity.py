"""``edgeq sensitivity``: measure the loss from quantizing each tensor to fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeq.cli import render
from edgeq.cli.options import check_output, command, force_option, source_argument

if TYPE_CHECKING:
    from edgeq.quant.decoder.sensitivity import Sensitivity

SHOWN = 12
"""Most rows of the table."""


@command("sensitivity", "Measure the loss from quantizing each tensor to fewer bits.")
@source_argument
@click.option("--calib", required=True, type=click.Path(exists=True, dir_okay=False),
              help="The calibration text, UTF-8; it should resemble what the model is used "
                   "for.")  # fmt: skip
@click.option("--calib-windows", type=click.IntRange(min=1), default=8,
              help="Number of windows of the text to use, spread evenly over it.")  # fmt: skip
@click.option("--calib-context", type=click.IntRange(min=2), default=256,
              help="Tokens in each window.")  # fmt: skip
@click.option("--mode", type=click.Choice(["kl", "scaled", "output"]), default=None,
              show_default="kl for small models, else scaled",
              help="kl: the KL divergence of the whole model, measured. scaled: the error of the "
                   "output of the matrix times the KL divergence that such errors cause, measured "
                   "for each kind of matrix. output: the relative error of the output alone, which "
                   "cannot be used to choose bits.")  # fmt: skip
@click.option("--method", default="gptq",
              help="How weights are rounded; it should be the method of the recipe.")  # fmt: skip
@click.option("--palette", is_flag=True,
              help="Also measure palettes, for recipes that use them; takes twice as "
                   "long.")  # fmt: skip
@click.option("--group", "--group-size", "group", metavar="N",
              type=click.Choice(["16", "32", "64", "128"]), default="32",
              help="Smallest group size: how many weights share a scale.")  # fmt: skip
@click.option("--asym", is_flag=True, help="Use zero points.")
@click.option("-o", "--output", type=click.Path(dir_okay=False), default=None,
              help="The file to write all losses to, as JSON, for `edgeq quantize "
                   "--sensitivity`.")  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), default=None,
              help="Number of processes to measure layers in parallel (Dask).")  # fmt: skip
@click.option("--scheduler", metavar="ADDRESS", default=None,
              help="Measure on the workers of this Dask scheduler, such as "
                   "tcp://host:8786.")  # fmt: skip
@force_option
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="Format of the result on standard output.")  # fmt: skip
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
    """Quantize each matrix of MODEL by itself to 2, 3, 4, 5, 6, 8 and 16 bits and measure the loss.

    -o saves the result; `edgeq quantize --target-bpw 4.5 --sensitivity FILE` uses it to choose the
    bits of each tensor, for a recipe with the same method.
    """
    from edgeq.api.calibrate import sensitivity as measure
    from edgeq.core.files import write_whole
    from edgeq.formats.schemes import QuantScheme

    if output is not None:
        check_output(Path(output), force)
    base = QuantScheme(4, not asym, "group", int(group), "palette" if palette else None)
    with render.progress("Measuring sensitivity") as bar:
        losses = measure(
            source, calib, scheme=base, mode=mode, method=method,  # type: ignore[arg-type]
            windows=calib_windows, context=calib_context, workers=workers, scheduler=scheduler,
            progress=bar,
        )  # fmt: skip
    if output is not None:
        write_whole(Path(output), [losses.to_json().encode()], "the file of sensitivities")
    render.write(losses.to_json() + "\n" if form == "json" else _table(losses))


def _table(sensitivity: Sensitivity) -> str:
    """The tensors with the largest losses, by number of bits in the shortest groups."""
    every = next(iter(sensitivity.losses.values()))
    columns: dict[tuple[str, bool], str] = {}
    for text in every:
        columns.setdefault((text.split("-")[0], text.endswith("-palette")), text)
    w4 = columns["w4", False]
    order = sorted(sensitivity.losses, key=lambda name: -sensitivity.losses[name][w4])
    rows = [
        [
            name,
            *(
                f"{sensitivity.losses[name].get(text, float('nan')):.2g}"
                for text in columns.values()
            ),
        ]
        for name in order[:SHOWN]
    ]
    left = len(order) - len(rows)
    unit = {
        "kl": "KL in nats per token, measured",
        "scaled": "KL in nats per token, estimated by kinds of matrices",
        "output": "relative squared error of the output",
    }[sensitivity.mode]
    return (
        render.aligned(["tensor", *columns.values()], rows)
        + (f"\n... and {left} with smaller losses in {w4}" if left > 0 else "")
        + f"\n\n{unit}, one tensor at a time, method {sensitivity.method}, "
        f"{sensitivity.n_tokens} tokens\n"
    )
