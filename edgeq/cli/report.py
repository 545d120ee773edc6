"""``edgeq report``: saved runs and sweeps as one page."""

from __future__ import annotations

from pathlib import Path

import click

from edgeq.cli import render
from edgeq.cli.options import command


@command("report", "Make one HTML page of saved runs and sweeps.")
@click.argument("sources", metavar="FILE...", nargs=-1, required=True,
                type=click.Path(path_type=Path))  # fmt: skip
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True,
              help="The page to write, as report.html.")  # fmt: skip
@click.option("--title", default="edgeq report", help="Of the page.")
def report(sources: tuple[Path, ...], output: Path, title: str) -> None:
    """Show runs beside each other: summary, time of tokens, meters over time, operations, roofline,
    and the size, divergence and speed of a sweep's recipes.

    FILE is what `edgeq profile -o run.json` kept, what `edgeq sweep --format json` printed, or the
    folder of a sweep. The page is one file that needs no network, on a phone or a desk.
    """
    from edgeq.report import read, write

    if output.suffix.lower() != ".html":
        raise click.UsageError(f"{output} is to be a page; let its name end in .html")
    write(read(sources), output, title)
    render.note(f"report: {output}")
