"""``edgeq report``: write an HTML report of saved profiles and sweeps."""

from __future__ import annotations

from pathlib import Path

import click

from edgeq.cli import render
from edgeq.cli.options import command


@command("report", "Write an HTML report of saved profiles and sweeps.")
@click.argument("sources", metavar="FILE...", nargs=-1, required=True,
                type=click.Path(path_type=Path))  # fmt: skip
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True,
              help="The file to write, such as report.html.")  # fmt: skip
@click.option("--title", default="edgeq report", help="Title of the report.")
def report(sources: tuple[Path, ...], output: Path, title: str) -> None:
    """Compare runs side by side: summary, time per token, meters over time, operations, roofline,
    and the size, KL divergence and speed of the recipes of a sweep.

    FILE is a file written by `edgeq profile -o run.json`, the output of `edgeq sweep --format
    json`, or the output folder of a sweep. The report is one HTML file that needs no network.
    """
    from edgeq.api.profile import report as write_report

    if output.suffix.lower() != ".html":
        raise click.UsageError(f"--output is {output}; its name must end in .html")
    write_report(sources, output, title=title)
    render.note(f"report: {output}")
