"""Where a conversion's output goes: made in a hidden folder, moved to its place when whole."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgeq.core.errors import EdgeqError, UsageError
from edgeq.core.files import check_folder, no_room, refuse_special, sync_folder

_MADE = ("certificate.json", "genai_config.json", "model.onnx", "Manifest.json")
"""Of which a folder that was made here holds one at least."""
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_place(path: Path, force: bool) -> None:
    """Refuse an output that cannot be made there.

    Raises:
        UsageError: it has no name or no folder, exists and ``force`` is not given, or is a device
            or a folder of other things, which replacing it would delete.
    """
    if not path.name or path.name in (".", ".."):
        raise UsageError(
            f"--output is {path}, which cannot be overwritten; give the name of a "
            "file or a new folder"
        )
    check_folder(path)
    refuse_special(path)
    if path.exists() and not force:
        raise UsageError(
            f"{path} already exists; give another --output, or --force to overwrite it"
        )
    if path.is_dir() and any(path.iterdir()) and not any((path / n).exists() for n in _MADE):
        raise UsageError(
            f"{path} is a folder with other files, which overwriting would delete; give "
            "another output"
        )


@contextlib.contextmanager
def workshop(path: Path) -> Iterator[Path]:
    """A hidden folder beside the output, gone at the end, whatever comes."""
    room = path.absolute().parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        room.mkdir()
        yield room
    except OSError as err:
        if full := no_room(str(path), err):
            raise full from err
        if err.errno in _FORBIDDEN:
            raise EdgeqError(
                f"{path} cannot be written ({err.strerror}); choose a folder that you may write to"
            ) from err
        where = f": {err.filename}" if err.filename else ""
        raise EdgeqError(f"{path} cannot be made: {err.strerror or err}{where}") from err
    finally:
        shutil.rmtree(room, ignore_errors=True)


def files(made: Path) -> Mapping[str, Path]:
    """Every file that was made, by its name below the output's folder."""
    return {file.relative_to(made).as_posix(): file for file in made.rglob("*") if file.is_file()}


def deliver(made: Path, path: Path, room: Path, force: bool) -> None:
    """Move what was made to its place: companions first, the output itself last.

    Args:
        made: the folder that holds the output and its companions, and nothing else.
        path: of the output.
        room: of `workshop`, where what was there before waits meanwhile.
        force: replace what is there.
    """
    for file in files(made).values():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    parent = path.absolute().parent
    entries = sorted(made.iterdir(), key=lambda entry: (entry.name == path.name, entry.name))
    taken = [entry.name for entry in entries if (parent / entry.name).exists()]
    if taken and not force:
        raise UsageError(
            f"{parent / taken[0]} already exists; give another --output, or --force to overwrite it"
        )
    old = room / "old"
    old.mkdir()
    placed: list[Path] = []
    try:
        for entry in entries:
            to = parent / entry.name
            if to.exists():
                to.rename(old / entry.name)
            entry.rename(to)
            placed.append(to)
    except BaseException:
        for to in placed:
            _remove(to)
        for entry in old.iterdir():
            entry.rename(parent / entry.name)
        raise
    sync_folder(parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
