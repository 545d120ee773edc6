"""Parts of Markdown pages that edgeq writes."""

from __future__ import annotations

import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """A text on one line, with a replacement for each character that cannot be printed.

    Example:
        >>> from edgeq.core.markdown import printable
        >>> printable("a\\tb") == "a\\N{REPLACEMENT CHARACTER}b"
        True
    """
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def inline_code(text: str) -> str:
    """Any text as inline code; characters that cannot be printed are replaced."""
    shown = printable(text)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    edge = " " if shown[:1] in ("", "`") or shown[-1:] == "`" else ""
    return f"{'`' * (longest + 1)}{edge}{shown}{edge}{'`' * (longest + 1)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], sides: str = "") -> str:
    """A table as Markdown.

    Args:
        head: the heading of each column.
        rows: the cells of each row, as many as there are headings.
        sides: "l" or "r" for each column: aligned left or right. Columns without one are aligned
            left.
    """
    rule = ["---:" if side == "r" else "---" for side in sides.ljust(len(head), "l")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])
