"""Atomic output of a conversion: written to a hidden folder, moved to its place when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgeq.converters.targets import TARGETS
from edgeq.core.errors import EdgeqError, UsageError
from edgeq.core.files import (
    check_folder,
    exchange,
    no_room,
    refuse_special,
    sync_folder,
    temporary_name,
)

_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def check_output(path: Path, force: bool) -> None:
    """Refuse an output that cannot be written there.

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
    known = ("certificate.json", *(row.folder_file for row in TARGETS.values() if row.folder_file))
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in known):
        raise UsageError(
            f"{path} is a folder with other files, which overwriting would delete; give "
            "another output"
        )


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A hidden folder next to the output, which is removed at the end in any case."""
    folder = path.absolute().parent / temporary_name(path)
    try:
        folder.mkdir()
        yield folder
    except OSError as err:
        if full := no_room(str(path), err):
            raise full from err
        if err.errno in _FORBIDDEN:
            raise EdgeqError(
                f"{path} cannot be written ({err.strerror}); choose a folder that you may write to"
            ) from err
        where = f": {err.filename}" if err.filename else ""
        raise EdgeqError(f"{path} cannot be written: {err.strerror or err}{where}") from err
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def files_below(folder: Path) -> Mapping[str, Path]:
    """Every file below a folder, by its name relative to it."""
    return {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}


def publish(written: Path, path: Path, staged: Path, force: bool) -> None:
    """Move what was written to its place: companions first, the output itself last.

    Each file or folder that is there already is exchanged with the new one in one step, where the
    system can (Linux and macOS), so that a process that is killed leaves one of the two in its
    place.

    Args:
        written: a folder with the output and its companions, and nothing else.
        path: the output.
        staged: the folder of `staging`, which keeps what was there before until all is moved.
        force: replace what is there.
    """
    for file in files_below(written).values():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    for folder, _, _ in os.walk(written):
        sync_folder(Path(folder))
    parent = path.absolute().parent
    entries = sorted(written.iterdir(), key=lambda entry: (entry.name == path.name, entry.name))
    taken = [entry.name for entry in entries if (parent / entry.name).exists()]
    if taken and not force:
        raise UsageError(
            f"{parent / taken[0]} already exists; give another --output, or --force to overwrite it"
        )
    old = staged / "old"
    old.mkdir()
    placed: list[Path] = []
    exchanged: list[tuple[Path, Path]] = []
    try:
        for entry in entries:
            to = parent / entry.name
            if to.exists() and exchange(entry, to):
                exchanged.append((entry, to))
                continue
            if to.exists():
                to.rename(old / entry.name)
            entry.rename(to)
            placed.append(to)
    except BaseException:
        for entry, to in exchanged:
            exchange(entry, to)
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
