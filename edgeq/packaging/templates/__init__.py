"""Texts of the glue code that packages hold; a word between at signs is replaced."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

_HOLE = re.compile(r"@([A-Z_]+)@")


def filled(template: str, **values: object) -> str:
    """The text of a template with its holes filled.

    Args:
        template: path below this folder, such as "rpi/run.sh".
        **values: hole, in small letters -> what goes there.
    """
    text = resources.files(__package__).joinpath(template).read_text("utf-8")
    return _HOLE.sub(lambda hole: str(values[hole[1].lower()]), text)


def quoted(
    text: str,
    known: Mapping[str, str],
    escaped: Callable[[str], str],
    plain: Callable[[str], bool],
) -> str:
    """A text between quotation marks, as the source code of a language has it.

    Args:
        text: any.
        known: further characters that have an escape of their own.
        escaped: the escape of any character.
        plain: whether a character may stand as it is.
    """
    short = {'"': '\\"', "\\": "\\\\", "\n": "\\n", **known}
    return '"' + "".join(short.get(c) or (c if plain(c) else escaped(c)) for c in text) + '"'


def write(folder: Path, name: str, text: str, *, executable: bool = False) -> None:
    """Write a text file of a package, whatever the system's own line ends and modes are."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    path.chmod(0o755 if executable else 0o644)
