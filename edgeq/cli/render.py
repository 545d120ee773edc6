"""What the terminal shows: progress bars, tables, headings. The only file that knows colours.

Nothing here is drawn where the stream is not a terminal: bars vanish, tables become plain text.
"""

from __future__ import annotations

import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

Progress = Callable[[str, int, int], None]
"""Called with a label, how much is done, and how much there is."""

_PATIENCE_S = 0.4
"""Seconds before a bar is drawn."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(count: float) -> str:
    """Bytes in the largest unit that keeps the number above one: ``1.24 MiB``."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.0f} B" if not unit else f"{count:.2f} {_UNITS[unit]}"


def human_count(count: float) -> str:
    """A number of parameters: ``260.03 K``, ``15.19 M``, ``1.24 B``."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:.0f}"


def note(text: str) -> None:
    """A line for the user beside the result: to stderr."""
    print(text, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """A piece of the result, shown at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """A table as plain text.

    Args:
        head: column names.
        rows: cells.
        right: a letter for each column, "r" where it is aligned to the right.
    """
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    sides = right.ljust(len(head), "l")

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=True)
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(table[0]), "  ".join("-" * w for w in widths), *map(line, table[1:])])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """A table as Markdown, padded so that it reads well unrendered too."""
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
    return "\n".join([line(head), "|" + "|".join(rule) + "|", *map(line, rows)])


@contextmanager
def progress(title: str, *, still: bool = False) -> Iterator[Progress]:
    """A bar on stderr while the block runs; nothing if stderr is not a terminal.

    Args:
        title: what is going on.
        still: draw only when called, as a clock that ticks would disturb what is being timed.

    Yields:
        The callback that moves the bar.
    """
    if not sys.stderr.isatty():
        yield lambda label, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.description}", markup=True),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=not still)
    task = bar.add_task("", total=None, title=title)

    def move(label: str, done: int, total: int) -> None:
        bar.update(task, description=label.replace("[", r"\["), completed=done, total=total)
        if still and bar.live.is_started:
            bar.refresh()

    # what is over in a moment needs no bar that flickers
    later = threading.Timer(_PATIENCE_S, bar.start)
    later.daemon = True
    later.start()
    try:
        yield move
    finally:
        later.cancel()
        later.join()
        bar.stop()


class _Lines:
    """Breaks text that comes in pieces into lines, never within a word; two spaces before each."""

    def __init__(self, width: int) -> None:
        self._width, self._column = max(width, 20), 0
        self._word, self._apart = "", False

    def take(self, text: str) -> Iterator[str]:
        """What can be shown now that this came."""
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
        """The word that may have been going on, and the space or line break before it."""
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
    """A page for people: headings, facts, a story, a table. Plain where there is no terminal.

    Args:
        stream: where it is shown.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colour = stream.isatty()

    def _styled(self, text: str, style: str) -> None:
        if not self._colour:
            self._stream.write(text)
        else:
            from rich.console import Console

            Console(file=self._stream, highlight=False).print(
                text, style=style, end="", markup=False, soft_wrap=True
            )
        self._stream.flush()

    def heading(self, text: str) -> None:
        """A line that opens a part."""
        self._styled(f"\n{text}\n\n", "bold cyan")

    def fact(self, text: str) -> None:
        """A quiet line."""
        self._styled(f"  {text}\n", "dim")

    @contextmanager
    def story(self, prompt: str) -> Iterator[Callable[[str], None]]:
        """Text that comes in pieces, broken between words and set in from the edge.

        Args:
            prompt: what the reader said, shown apart from what follows.

        Yields:
            The function that shows a piece.
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
        return min(shutil.get_terminal_size().columns, 100) if self._colour else 88

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> None:
        """A table."""
        if not self._colour:
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
