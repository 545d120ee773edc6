"""The content of a page: profiles and results of sweeps, read from files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeq.core.documents import read_document
from edgeq.core.errors import EdgeqError, FormatError
from edgeq.profiling import document as documents
from edgeq.profiling.document import Document, Run
from edgeq.profiling.summary import summary
from edgeq.sweeping import SweepResult

MADE_BY = "make one with edgeq profile -o run.json or edgeq sweep -o FOLDER"


@dataclass(frozen=True)
class Sources:
    """What a page shows.

    Args:
        documents: profiles and their names.
        rows: of sweeps.
    """

    documents: tuple[tuple[str, Document], ...] = ()
    rows: tuple[SweepResult, ...] = ()


@dataclass(frozen=True)
class ReportedRun:
    """A run on the page.

    Args:
        letter: its name in legends.
        color: of its lines.
        document, run: the run.
        figures: its `summary`.
    """

    letter: str
    color: int
    document: Document
    run: Run
    figures: Mapping[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """Letter and file, for legends."""
        path = str(self.run.subject["name"]).rstrip("/")
        return f"{self.letter} · {path.rsplit('/', 1)[-1]}"


def entries(sources: Sources) -> list[list[ReportedRun]]:
    """The runs of each document, each with a letter of its own.

    Raises:
        FormatError: a run has invalid numbers.
    """
    groups: list[list[ReportedRun]] = []
    count = 0
    for name, document in sources.documents:
        group = []
        for run in document.runs:
            with blaming(name):
                figures = summary(document, run)
            group.append(ReportedRun(_letter(count), count, document, run, figures))
            count += 1
        groups.append(group)
    return groups


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Name the document whose numbers could not be used; only a damaged one has such numbers."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as err:
        raise FormatError(f"{name} is damaged: {type(err).__name__} {err}; profile again") from err


def read(paths: Sequence[str | Path]) -> Sources:
    """Read profiles, results of sweeps, and folders of a sweep.

    Args:
        paths: files of `edgeq profile -o`, of `edgeq sweep --format json`, or a sweep's folder or
            single results.

    Raises:
        FormatError: a file cannot be read, or is none of these.
    """
    documents: list[tuple[str, Document]] = []
    rows: dict[str, SweepResult] = {}
    for path in map(Path, paths):
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise FormatError(f"{path} contains no .json file; {MADE_BY}")
        for file in files:
            content = _read(file)
            if isinstance(content, Document):
                documents.append((file.name, content))
            else:
                rows |= {row.key: row for row in content}
    return Sources(tuple(documents), tuple(rows.values()))


def _read(path: Path) -> Document | list[SweepResult]:
    document = read_document(path, MADE_BY)
    if isinstance(document, dict) and document.get("format") == documents.FORMAT:
        return Document.from_json(document, str(path))
    results = document if isinstance(document, list) else [document]
    if not results or not all(isinstance(one, dict) and "key" in one for one in results):
        raise FormatError(f"{path} is neither a profile nor a result of a sweep; {MADE_BY}")
    rows = []
    for one in results:
        try:
            # the command adds whether a row is on the front, which depends on the others
            rows.append(SweepResult.from_dict({k: v for k, v in one.items() if k != "pareto"}))
        except EdgeqError as err:
            raise FormatError(
                f"{path} is not a sweep result: {err}; run edgeq sweep again"
            ) from err
    return rows


def _letter(number: int) -> str:
    """A to Z, then AA, AB, ..."""
    rest, last = divmod(number, 26)
    return (_letter(rest - 1) if rest else "") + chr(ord("A") + last)
