"""Output to the terminal: progress bars, tables, headings. Only this module uses colors.

Progress bars are drawn only if standard error is a terminal; tables and headings are plain text if
standard output is not one.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from edgeq.core.progress import Progress
from edgeq.core.units import human_bytes as human_bytes
from edgeq.core.units import human_count as human_count

_PATIENCE_S = 0.4
"""Seconds before a progress bar is drawn."""
_PROSE = 100
"""Width to which sentences are wrapped if the output is not a terminal."""
_NARROWEST = 40
"""Smallest width to which text is wrapped."""
_COLUMN = 12
"""Smallest width to which a column of a table is narrowed."""


def width_of(stream: TextIO) -> int | None:
    """Width to which lines are wrapped; None for a file or pipe, whose lines are not wrapped.

    The environment variable COLUMNS sets the width for files and pipes too.
    """
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return max(int(given), _NARROWEST)
    if not stream.isatty():
        return None
    return max(shutil.get_terminal_size().columns, _NARROWEST)


def prose_width() -> int:
    """Width to which paragraphs on standard output are wrapped."""
    return min(width_of(sys.stdout) or _PROSE, _PROSE)


def wrapped(text: str, width: int | None, indent: str = "") -> str:
    """Wrap the lines of a text to a width, breaking only between words.

    Args:
        text: one or more lines.
        width: width in columns; None does not wrap.
        indent: beginning of continuation lines.
    """
    if width is None:
        return text
    return "\n".join(
        textwrap.fill(
            line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False,
            replace_whitespace=False, drop_whitespace=True,
        ) if len(line) > width else line
        for line in text.split("\n")
    )  # fmt: skip


def note(text: str) -> None:
    """Write a message for the user to standard error, separate from the result."""
    print(wrapped(text, width_of(sys.stderr)), file=sys.stderr, flush=True)


def lines(text: str) -> None:
    """Write lines of the result, wrapped to the width of the terminal."""
    write(wrapped(text, width_of(sys.stdout), "    ") + "\n")


def facts(rows: Sequence[tuple[str, str]], label: int = 0) -> str:
    """A list of named values, one per line, wrapped to the width of the terminal.

    Args:
        rows: name and value. An empty name continues the previous value; rows without a value are
            left out.
        label: width of the names, at least the longest name and one space. 0 is the longest name
            and two spaces.
    """
    shown = [(name, value) for name, value in rows if value]
    longest = max((len(name) for name, _ in shown), default=0)
    label = max(label, longest + 1) if label else longest + 2
    width = width_of(sys.stdout)
    return "\n".join(
        wrapped(f"{name:{label}s}{value}".rstrip(), width, " " * label) for name, value in shown
    )


def write(text: str) -> None:
    """Write a part of the result and flush it."""
    sys.stdout.write(text)
    sys.stdout.flush()


_PICTURES = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def visible(text: str) -> str:
    """Text of a model or a file, with control characters replaced by visible symbols.

    Escape sequences could change the settings of the terminal, its title or the clipboard.

    Example:
        >>> visible("\x1b[2J")
        '␛[2J'
    """
    return text.translate(_PICTURES)


def generated(text: str) -> None:
    """Write a part of a model's text: unchanged to a file or pipe, and `visible` on a terminal."""
    write(visible(text) if sys.stdout.isatty() else text)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """A table as plain text, folded to the width of the terminal.

    Args:
        head: column names.
        rows: cells.
        right: one letter for each column; "r" aligns the column to the right.
    """
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    sides = right.ljust(len(head), "l")
    if (limit := width_of(sys.stdout)) is not None:
        widths = _narrowed(widths, sides, limit)
        table = [part for row in table for part in _folded(row, widths)]
    heads = len(_folded(list(head), widths))

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        )
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * w for w in widths)
    return "\n".join([*map(line, table[:heads]), rule, *map(line, table[heads:])])


def _narrowed(widths: list[int], sides: str, limit: int) -> list[int]:
    """Widths of columns that fit in a line; the widest columns of text are narrowed."""
    widths = list(widths)
    while sum(widths) + 2 * (len(widths) - 1) > limit:
        able = [i for i, side in enumerate(sides) if side != "r" and widths[i] > _COLUMN]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def _folded(row: Sequence[str], widths: Sequence[int]) -> list[list[str]]:
    """A row of a table as several lines of cells that fit in their columns."""
    cells = [_fold(cell, width) for cell, width in zip(row, widths, strict=True)]
    height = max(map(len, cells), default=1)
    return [[cell[i] if i < len(cell) else "" for cell in cells] for i in range(height)]


def _fold(cell: str, width: int) -> list[str]:
    """A cell as lines, broken at spaces, and in long names after a dot, slash or underscore."""
    if len(cell) <= width:
        return [cell]
    folded = [""]
    for piece in re.findall(r"[^\s./_,]*[./_,]+|[^\s./_,]+|\s+", cell):
        while len(folded[-1]) + len(piece.rstrip()) > width:
            room = 0 if folded[-1] else width
            folded[-1] += piece[:room]
            piece = piece[room:].lstrip()
            folded.append("")
        if folded[-1] or not piece.isspace():
            folded[-1] += piece
    return [line.rstrip() for line in folded if line.strip()]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """A table as Markdown, padded so that it is readable as plain text too.

    On a terminal that is too narrow, columns with the same value in all rows are listed above a
    plain table of the others.
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    sides = right.ljust(len(head), "l")

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        )
        return "| " + " | ".join(cells) + " |"

    rule = (
        "-" * (width + 1) + ":" if side == "r" else "-" * (width + 2)
        for width, side in zip(widths, sides, strict=True)
    )
    limit = width_of(sys.stdout) if sys.stdout.isatty() else None
    if limit is not None and sum(widths) + 3 * len(widths) + 1 > limit:
        same = [i for i in range(len(head)) if len({row[i] for row in rows}) == 1]
        rest = [i for i in range(len(head)) if i not in same]
        listed = facts([(head[i], rows[0][i]) for i in same])
        others = [[row[i] for i in rest] for row in rows]
        table = aligned([head[i] for i in rest], others, "".join(sides[i] for i in rest))
        return "\n\n".join(filter(None, [listed, table if rest else ""]))
    return "\n".join([line(head), "|" + "|".join(rule) + "|", *map(line, rows)])


@contextmanager
def progress(title: str, *, still: bool = False) -> Iterator[Progress]:
    """A progress bar on standard error while the block runs, if standard error is a terminal.

    It shows the title, the percentage, the elapsed time, the estimated time that is left, and the
    current step.

    Args:
        title: name of the work.
        still: draw only when the callback is called, because a running clock would disturb
            measurements.

    Yields:
        the callback that reports progress.
    """
    if not sys.stderr.isatty():
        yield lambda label, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    columns = (
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[clock]}"),
        TextColumn("[dim]{task.description}", table_column=Column(no_wrap=True, ratio=1)),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=not still)
    bar.expand = True
    clock = _ProgressTimes()
    task = bar.add_task("", total=None, title=title, clock=clock)

    def move(label: str, done: int, total: int) -> None:
        clock.move(done, total)
        text = label.replace("[", r"\[")
        bar.update(task, description=text, completed=done, total=total or None)
        if still and bar.live.is_started:
            bar.refresh()

    # work that takes only a moment shows no bar, which would flicker
    later = threading.Timer(_PATIENCE_S, bar.start)
    later.daemon = True
    later.start()
    try:
        yield move
    finally:
        later.cancel()
        later.join()
        bar.stop()


class _ProgressTimes:
    """The elapsed time of work, and an estimate of the time that is left."""

    def __init__(self) -> None:
        self._begin = self._phase = self._last = time.monotonic()
        self._first = self._done = self._total = 0

    def move(self, done: int, total: int) -> None:
        """Record a step; a count that starts again at 0 begins a new phase."""
        self._last = time.monotonic()
        if total != self._total or done < self._done:
            self._phase, self._first = self._last, done
        self._done, self._total = done, total

    def __str__(self) -> str:
        """The percentage, the elapsed time, and the time that is left in this phase."""
        now = time.monotonic()
        parts = [] if not self._total else [f"{100 * self._done // self._total:3d}%"]
        parts.append(f"{_duration(now - self._begin)} elapsed")
        if self._total and self._done > self._first:
            each = (self._last - self._phase) / (self._done - self._first)
            left = each * (self._total - self._done) - (now - self._last)
            parts.append(f"about {_duration(max(left, 0.0))} left")
        return ", ".join(parts)


def _duration(seconds: float) -> str:
    """Seconds as ``0:07`` or ``1:02:45``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Lines:
    """Wraps text that arrives in pieces, breaking only between words; lines are indented by two."""

    def __init__(self, width: int) -> None:
        self._width, self._column = max(width, 20), 0
        self._word, self._apart = "", False

    def take(self, text: str) -> Iterator[str]:
        """Add text and yield the parts that can be shown now."""
        for part in re.findall(r"\s|\S+", text):
            if not part.isspace():
                self._word += part
                continue
            yield self.rest()
            self._apart = True
            if part == "\n":
                self._column = 0
                yield "\n  "

    def rest(self) -> str:
        """The last word, which might have continued, and the space or line break before it."""
        word, self._word = self._word, ""
        if not word:
            return ""
        space = " " if self._apart and self._column else ""
        self._apart = False
        if self._column and self._column + len(space) + len(word) > self._width:
            self._column = len(word)
            return "\n  " + word
        self._column += len(space) + len(word)
        return space + word


class Page:
    """Formatted output: headings, facts, a story, a table. It is plain text without a terminal.

    Args:
        stream: the stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._color = stream.isatty()

    def _styled(self, text: str, style: str) -> None:
        if not self._color:
            self._stream.write(text)
        else:
            from rich.console import Console

            Console(file=self._stream, highlight=False).print(
                text, style=style, end="", markup=False, soft_wrap=True
            )
        self._stream.flush()

    def heading(self, text: str) -> None:
        """Write a heading."""
        self._styled(f"\n{text}\n\n", "bold cyan")

    def fact(self, text: str) -> None:
        """Write a line in a dim style."""
        self._styled(f"  {text}\n", "dim")

    @contextmanager
    def story(self, prompt: str) -> Iterator[Callable[[str], None]]:
        """Write text that arrives in pieces, wrapped between words and indented.

        Args:
            prompt: the prompt, which is shown in bold before the text.

        Yields:
            the function that writes a piece.
        """
        lines = _Lines(self._width() - 4)

        def say(text: str, style: str = "") -> None:
            for piece in lines.take(text):
                self._styled(piece, style)

        self._styled("  ", "")
        say(prompt, "bold")
        self._styled(lines.rest(), "bold")
        yield say
        self._styled(lines.rest() + "\n\n", "")

    def _width(self) -> int:
        return min(shutil.get_terminal_size().columns, 100) if self._color else 88

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> None:
        """Write a table; the arguments are those of `aligned`."""
        if not self._color:
            text = aligned(head, rows, right)
            self._stream.write("".join(f"  {line}\n" for line in text.splitlines()))
            self._stream.flush()
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAVY, header_style="bold", pad_edge=False)
        for name, side in zip(head, right.ljust(len(head), "l"), strict=True):
            table.add_column(name, justify="right" if side == "r" else "left")
        for row in rows:
            table.add_row(*row)
        Console(file=self._stream, highlight=False).print(table)
