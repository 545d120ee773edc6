"""``edgeq calibrate``: collect statistics of the inputs of a model's matrices on a text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq import calibration_text as texts
from edgeq.cli import render
from edgeq.cli.options import check_output, command, force_option, source_argument

if TYPE_CHECKING:
    from edgeq.quant.decoder.calibrate import CalibrationStats, CalibrationText

_WORST = 3
"""Number of matrices with the largest outliers that are named."""


@command("calibrate", "Collect activation statistics of a model on a text, for `quantize`.")
@source_argument
@click.option("--calib", type=click.Path(exists=True, dir_okay=False), required=True,
              help="The calibration text, UTF-8; it should resemble what the model is used "
                   "for.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(dir_okay=False), required=True,
              help="The file to write, such as model.calib.")  # fmt: skip
@click.option("--observer", metavar="NAME", default="minmax",
              help="How the range of the inputs of each matrix is chosen: minmax, moving-average, "
                   "percentile, entropy or mse.")  # fmt: skip
@click.option("--windows", "--calib-windows", type=click.IntRange(min=1), default=128,
              help="Number of windows of the text to use, spread evenly over it.")  # fmt: skip
@click.option("--context", "--calib-context", type=click.IntRange(min=2), default=256,
              help="Tokens in each window, at most the model's own context length.")  # fmt: skip
@click.option("--resume", is_flag=True,
              help="Continue an interrupted run with the same output file.")  # fmt: skip
@force_option
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text",
              help="Format of the summary on standard output.")  # fmt: skip
def calibrate(
    source: str,
    calib: str,
    output: str,
    observer: str,
    windows: int,
    context: int,
    resume: bool,
    force: bool,
    form: str,
) -> None:
    """Run MODEL over a text in float32 and save statistics of the inputs of each matrix: the mean
    magnitude and mean square of every channel, and a range for INT8 activations.

    `edgeq quantize --stats` reads the file. After each layer the progress is saved next to it, as
    FILE.partial; --resume continues an interrupted run from there and gives bit-identical
    results.
    """
    from edgeq.core.errors import UsageError
    from edgeq.core.memory import peak_rss_bytes
    from edgeq.importers import load
    from edgeq.quant.decoder.calibrate import calibrate as run

    out = Path(output)
    partial = out.with_name(out.name + ".partial")
    check_output(out, force)
    if resume and not partial.exists():
        raise UsageError(
            f"{partial} does not exist, so there is no run to continue; leave out --resume"
        )
    model = load(source)
    cut = texts.calibration(model, calib, windows, context)
    if not resume:
        partial.unlink(missing_ok=True)
    started = time.perf_counter()
    with render.progress("Calibrating") as bar:
        stats = run(model, cut, observer=observer, resume=partial, progress=bar)
    size = stats.save(out)
    partial.unlink(missing_ok=True)
    seconds = time.perf_counter() - started
    record = {
        "path": str(out),
        "file_bytes": size,
        "sha256": stats.sha256,
        "model_sha256": stats.model_sha256,
        "text_sha256": stats.text_sha256,
        "observer": stats.observer,
        "windows": len(cut.windows),
        "context": cut.context,
        "tokens": stats.n_tokens,
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "inputs": _inputs(stats),
    }
    render.write(json.dumps(record, indent=2) + "\n" if form == "json" else _text(record, cut))


def _inputs(stats: CalibrationStats) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "low": seen.low,
            "high": seen.high,
            "rms": float(seen.mean_square.mean() ** 0.5),
        }
        for name, seen in stats.inputs.items()
    ]


def _text(summary: dict[str, Any], cut: CalibrationText) -> str:
    peak = summary["peak_rss_bytes"]

    def reach(seen: dict[str, Any]) -> float:
        """The largest magnitude divided by the RMS; large values reduce the precision of INT8."""
        return float(max(-seen["low"], seen["high"]) / seen["rms"]) if seen["rms"] else 0.0

    farthest = sorted(summary["inputs"], key=reach, reverse=True)[:_WORST]
    named = ", ".join(f"{seen['name']} {reach(seen):.0f}x" for seen in farthest)
    return (
        f"{summary['path']}: {render.human_bytes(summary['file_bytes'])}, inputs of "
        f"{len(summary['inputs'])} matrices over {summary['tokens']} tokens "
        f"({len(cut.windows)} windows, ranges by {summary['observer']}) "
        f"in {summary['seconds']:.1f} s"
        + (f", peak memory {render.human_bytes(peak)}" if peak else "")
        + f"\nlargest outliers (maximum / RMS): {named}\n"
    )
