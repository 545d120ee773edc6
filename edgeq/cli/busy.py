"""Warnings about disturbed measurements and figures that cannot be trusted."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from edgeq.cli import render

MARK = "*"
"""The mark of a figure beyond what the machine can do; a footnote gives the reason."""


def wrapped(text: str, indent: str = "") -> str:
    """A sentence in lines that fit the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    return textwrap.fill(text, max(width, 40), subsequent_indent=indent)


def warnings(texts: list[str | None]) -> str:
    """A paragraph for each different warning; empty if there is none."""
    distinct = dict.fromkeys(text for text in texts if text)
    return "".join(f"{wrapped(f'Warning: {text}')}\n\n" for text in distinct)


@contextmanager
def watched(threads: int | None = None) -> Iterator[None]:
    """Warn on stderr if the machine was busy while the block measured something.

    Args:
        threads: that the block runs on; all cores if None.
    """
    from edgeq.devices.contention import Watch

    watch = Watch()
    yield
    warning = watch.stop().warning(threads)
    if warning:
        render.note(wrapped(f"Warning: {warning}"))
