"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from edgeq.core.errors import EdgeqError, UsageError

STAND_IN_BYTES = 64
"""First bytes of a file that `stand_in` needs."""
_STAND_INS = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, not the file itself; fetch it with git lfs pull, or download it",
    ),
    (b"<!doctype html", "is a web page, not the file that was wanted; download it again"),
    (b"<html", "is a web page, not the file that was wanted; download it again"),
)
_SWAP = 2
"""RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS."""
_HERE = -100
"""AT_FDCWD of Linux: relative paths start at the current folder."""
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(what: str, err: OSError) -> EdgeqError | None:
    """The error to raise where a file system is full; None if that is not what went wrong.

    Args:
        what: that was being written.
        err: the system's error.
    """
    if err.errno not in _FULL:
        return None
    return EdgeqError(f"no room for {what} ({err.strerror}); free some space or write elsewhere")


def stand_in(head: bytes) -> str | None:
    """What a file is that stands in the place of the one that was meant to be fetched, or None.

    Args:
        head: its first `STAND_IN_BYTES` bytes.

    Example:
        >>> from edgeq.core.files import stand_in
        >>> stand_in(b"<!DOCTYPE html><html>")
        'is a web page, not the file that was wanted; download it again'
    """
    start = head.lstrip().lower()
    return next((words for mark, words in _STAND_INS if start.startswith(mark)), None)


def temporary_name(path: Path) -> str:
    """The hidden name under which a file or folder is made before it is renamed to its own:
    ``.NAME.PID-RANDOM.tmp``."""
    return f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp"


def is_inside(name: Any) -> bool:
    """Whether a name from a file is that of a file below a folder: it does not lead out of it.

    Args:
        name: with slashes between folders.

    Example:
        >>> from edgeq.core.files import is_inside
        >>> is_inside("templates/chat.jinja"), is_inside("../chat.jinja"), is_inside("/etc/passwd")
        (True, False, False)
    """
    if not isinstance(name, str) or not name or "\\" in name or not name.isprintable():
        return False
    pure = PurePosixPath(name)
    inside = not pure.is_absolute() and ".." not in pure.parts and bool(pure.parts)
    return inside and pure.as_posix() == name


def refuse_special(path: Path) -> None:
    """Refuse what would be lost if a file took its place: a device, a pipe, a socket.

    Files get their names by renaming, so a file "written to" /dev/null would replace it.

    Raises:
        UsageError: the path is one, or an entry of /dev (as /dev/stdout, a link to anything).
    """
    special = path.exists() and not path.is_file() and not path.is_dir()
    if special or path.absolute().parent == Path("/dev"):
        raise UsageError(f"{path} is a device or a pipe; give the name of a file")


def check_folder(path: Path) -> None:
    """Refuse a place in a folder that does not exist.

    Raises:
        UsageError: there is no such folder.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist; make it first")


def check_target(path: Path) -> None:
    """Refuse a place where no file can be put, before work starts.

    Raises:
        UsageError: it is a folder, a device or a pipe, or its folder does not exist.
        EdgeqError: its folder may not be written to.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file")
    check_folder(path)
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise EdgeqError(
            f"{path} cannot be written: Permission denied; choose a folder that you may write to"
        )
    refuse_special(path)


def write_whole(path: Path, pieces: Iterable[bytes | memoryview], what: str) -> None:
    """Write a file next to the target, sync it, and rename it to the target.

    Whatever happens, the target is the old file or the whole new one, and unless the process is
    killed nothing else is left behind.

    Args:
        path: the file to make or replace.
        pieces: its content; an error raised by the iterable leaves the target as it was.
        what: the file's purpose, for the message, as "the state".

    Raises:
        UsageError: the target is a device or a pipe.
        EdgeqError: it cannot be written.
    """
    refuse_special(path)
    temporary = path.with_name(temporary_name(path))
    try:
        try:
            with temporary.open("xb") as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as err:
        if full := no_room(f"{what} {path}", err):
            raise full from err
        raise EdgeqError(f"{what} {path} cannot be written: {err.strerror or err}") from err


def exchange(one: Path, other: Path) -> bool:
    """Exchange two files or folders in one step: at no time is one of the names absent.

    Args:
        one, other: existing paths on the same file system.

    Returns:
        whether they were exchanged. If the system or the file system cannot do it, nothing is
        changed.

    Raises:
        OSError: they cannot be exchanged for another reason, such as missing permissions.

    Example:
        >>> import pathlib, tempfile
        >>> from edgeq.core.files import exchange
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "a").write_text("1"), (folder / "b").write_text("2")
        >>> (folder / "a").read_text() == "2" if exchange(folder / "a", folder / "b") else True
        True
    """
    a, b = os.fsencode(one), os.fsencode(other)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            failed = library.renamex_np(a, b, _SWAP)
        else:
            failed = library.renameat2(_HERE, a, _HERE, b, _SWAP)
    except (AttributeError, OSError, TypeError):  # no such function, or no such library
        return False
    if failed and ctypes.get_errno() not in _CANNOT:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))
    return not failed


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
