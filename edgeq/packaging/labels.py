"""The names of a graph's classes, such as the kinds of objects that a detector finds.

They are those of a file of the user's, a name on each line, or those that an ONNX file has in its
metadata under "names", as Ultralytics writes them: {0: 'person', 1: 'bicycle'}. Their order is that
of the model's numbers.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.core.errors import UsageError

FILE = "labels/labels.txt"
"""Path of the file in a package, which has one name per line."""
META = "names"
_MOST = 1 << 20
"""Most characters of a file or of metadata that are read."""


def read_labels(path: str | Path) -> tuple[str, ...]:
    """The names in a text file, one on each line; empty lines at the end do not count.

    Raises:
        UsageError: the file cannot be read, is not text, or a line has no printable name.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_MOST + 1)
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"the labels {path} cannot be read: {err}") from err
    lines = text.rstrip().splitlines()
    if len(text) > _MOST or not lines:
        raise UsageError(
            f"{path} is empty or longer than {_MOST} characters; give one name per line"
        )
    for number, line in enumerate(lines, 1):
        if not is_label(line):
            raise UsageError(
                f"line {number} of {path} is {line[:40]!r}; give a printable name on each line"
            )
    return tuple(lines)


def labels_in(meta: Mapping[str, str]) -> tuple[str, ...] | None:
    """The names in the metadata of a graph; None if it has none that can be read."""
    text = meta.get(META, "")
    if not text or len(text) > _MOST:
        return None
    try:
        found: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if isinstance(found, dict):
        if set(found) != set(range(len(found))):
            return None
        found = [found[number] for number in range(len(found))]
    if not isinstance(found, list | tuple) or not found or not all(map(is_label, found)):
        return None
    return tuple(found)


def is_label(text: Any) -> bool:
    """Whether a value is a printable, non-empty text of one line."""
    return isinstance(text, str) and bool(text.strip()) and text.isprintable()
