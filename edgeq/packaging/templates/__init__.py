"""Templates of the glue code of packages. A placeholder is a word between at signs: ``@NAME@``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

_HOLE = re.compile(r"@([A-Z_]+)@")


def filled(template: str, **values: object) -> str:
    """The text of a template with its placeholders replaced.

    Args:
        template: path below this folder, such as "rpi/run.sh".
        **values: name of a placeholder, in lower case -> the text that replaces it.
    """
    text = resources.files(__package__).joinpath(template).read_text("utf-8")
    return _HOLE.sub(lambda hole: str(values[hole[1].lower()]), text)


def quoted(
    text: str,
    known: Mapping[str, str],
    escaped: Callable[[str], str],
    plain: Callable[[str], bool],
) -> str:
    """A text as a double-quoted string literal of a programming language.

    Args:
        text: any text.
        known: escapes of characters besides the quotation mark, the backslash and the line feed.
        escaped: gives the escape of any character.
        plain: whether a character needs no escape.
    """
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", **known}
    return '"' + "".join(short.get(c) or (c if plain(c) else escaped(c)) for c in text) + '"'


def write(folder: Path, name: str, text: str, *, executable: bool = False) -> None:
    """Write a text file with line feeds and a fixed mode, whatever the system's defaults are."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    path.chmod(0o755 if executable else 0o644)
