"""The page: one HTML file that needs nothing else, runs no script and asks for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeq._version import __version__
from edgeq.core.errors import UsageError
from edgeq.core.files import write_whole
from edgeq.profiling.document import Document
from edgeq.reporting import figures, tables
from edgeq.reporting.figures import Missing
from edgeq.reporting.plot import COLORS, ROOM, SIZE, Plot
from edgeq.reporting.sources import ReportedRun, Sources, blaming, entries
from edgeq.reporting.timeline import timeline


def page(sources: Sources, title: str = "edgeq report") -> str:
    """A page of runs and sweeps.

    Every text that comes from a file is escaped, and the page forbids itself scripts and requests.

    Args:
        sources: what to show.
        title: of the page.

    Raises:
        UsageError: there is nothing to show.
        FormatError: a run's numbers are none.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not sources.documents and not sources.rows:
        raise UsageError("nothing to report; give a profile or a sweep's results")
    groups = entries(sources)
    sections = []
    for i, ((name, document), group) in enumerate(zip(sources.documents, groups, strict=True)):
        with blaming(name):
            sections.append(_section(f"d{i}", name, document, group))
    every = [e for group in groups for e in group]
    with blaming(", ".join(name for name, _ in sources.documents)):
        shared = [*figures.latency(every), *figures.speed(every)]
        compared = tables.compared(every) if len(every) > 1 else []
    environment = Environment(
        loader=PackageLoader("edgeq.reporting", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("page.html").render(
        title=title,
        tool=f"edgeq {__version__}",
        sections=sections,
        columns=tables.COMPARED,
        compared=compared,
        shared=shared,
        pareto=figures.pareto_plots(sources.rows),
        unswept=figures.not_swept(sources.rows),
        swept=bool(sources.rows),
        size=SIZE,
        room=ROOM,
        colors=COLORS,
    )


def write(sources: Sources, path: str | Path, title: str = "edgeq report") -> None:
    """Write a page, whole or not at all.

    Raises:
        EdgeqError: there is nothing to show, or it cannot be written.
    """
    # a name may hold half a surrogate pair, which no encoding has
    text = page(sources, title).encode("utf-8", "replace")
    write_whole(Path(path), [text], "the report")


def _section(
    key: str, name: str, document: Document, group: Sequence[ReportedRun]
) -> dict[str, Any]:
    """What the template shows of a document."""
    plots, missing = timeline(key, document)
    roofline = figures.roofline(f"{key}-roofline", group)
    if isinstance(roofline, Missing):
        missing.append(roofline)
    runs = []
    for entry in group:
        known = entry.run.operations
        runs.append(
            {
                "name": entry.name,
                "subject": entry.figures["name"],
                "figures": tables.figures(entry),
                "operations": known,
                "bars": [tables.operations(phase) for phase in (known.phases if known else ())],
            }
        )
    return {
        "name": name,
        "runs": runs,
        "timeline": plots,
        "roofline": [roofline] if isinstance(roofline, Plot) else [],
        "missing": missing,
        "absent": document.recording.absent,
        "problems": tables.problems(document),
        "machine": tables.machine(document),
    }
