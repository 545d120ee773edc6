"""Warnings about disturbed measurements and figures that cannot be trusted."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from edgeq.cli import render

MARK = "*"
"""The mark of a figure that exceeds what the machine can do; a footnote gives the reason."""


def wrapped(text: str, indent: str = "") -> str:
    """A sentence, wrapped to the width of the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    return textwrap.fill(text, max(width, 40), subsequent_indent=indent)


def warnings(texts: list[str | None]) -> str:
    """One paragraph for each distinct warning; empty without warnings."""
    distinct = dict.fromkeys(text for text in texts if text)
    return "".join(f"{wrapped(f'Warning: {text}')}\n\n" for text in distinct)


@contextmanager
def watched(threads: int | None = None) -> Iterator[None]:
    """Warn on standard error if the machine was busy during the block, which measures something.

    Args:
        threads: number of threads that the block uses; all cores if None.
    """
    from edgeq.devices.contention import Watch

    watch = Watch()
    yield
    warning = watch.stop().warning(threads)
    if warning:
        render.note(wrapped(f"Warning: {warning}"))
