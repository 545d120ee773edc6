"""The files of a package on disk."""

from __future__ import annotations

import os
from pathlib import Path

from edgeq.core.errors import FormatError
from edgeq.core.hashing import file_sha256
from edgeq.core.progress import Progress
from edgeq.packaging import manifest
from edgeq.packaging.blocks import blocks_of
from edgeq.packaging.manifest import Entry, Manifest

SIGNATURE = "manifest.sig"
"""The signature of the manifest, which is no part of it."""
UNLISTED = (manifest.NAME, SIGNATURE)
"""Files that the manifest does not list."""


def files_in(folder: Path) -> dict[str, Path]:
    """Every file of a package but those in `UNLISTED`, by its path within, sorted.

    Raises:
        FormatError: there is a link, a device or an empty folder, which packages do not have.
    """
    files, foreign, empty = _scan(folder)
    for name, what in (*foreign.items(), *empty.items()):
        raise FormatError(f"{name} is {what}, which no package has")
    return files


def _scan(folder: Path) -> tuple[dict[str, Path], dict[str, str], dict[str, str]]:
    """Files by their path within; what is no plain file, and empty folders, with what they are."""
    files: dict[str, Path] = {}
    foreign: dict[str, str] = {}
    empty: dict[str, str] = {}
    pending = [folder]
    while pending:
        here = pending.pop()
        entries = list(os.scandir(here))
        if not entries and here != folder:
            empty[here.relative_to(folder).as_posix()] = "an empty folder"
        for entry in entries:
            path = Path(entry.path)
            name = path.relative_to(folder).as_posix()
            if entry.is_symlink():
                foreign[name] = "a link"
            elif entry.is_dir():
                pending.append(path)
            elif not entry.is_file():
                foreign[name] = "a device or a pipe"
            elif name not in UNLISTED:
                files[name] = path
    return dict(sorted(files.items())), dict(sorted(foreign.items())), dict(sorted(empty.items()))


def foreign_to(folder: Path, made: Manifest) -> str | None:
    """The first file, link or folder that someone put into a package; None if there is none."""
    files, foreign, empty = _scan(folder)
    return next(iter(sorted({*foreign, *empty, *(set(files) - set(made.files))})), None)


def entry_of(path: Path) -> Entry:
    """What a manifest says of a file."""
    return Entry(
        file_sha256(path), path.stat().st_size, bool(path.stat().st_mode & 0o100), blocks_of(path)
    )


def entries_of(folder: Path, progress: Progress | None = None) -> dict[str, Entry]:
    """What a manifest says of all files of a folder."""
    files = files_in(folder)
    entries = {}
    for done, (name, path) in enumerate(files.items()):
        if progress:
            progress("hashing files", done, len(files))
        entries[name] = entry_of(path)
    return entries


def first_difference(
    folder: Path, made: Manifest, progress: Progress | None = None
) -> tuple[str, str] | None:
    """The first file that is not what the manifest says.

    Returns:
        its path and what is wrong with it; None if all are right.
    """
    files, foreign, empty = _scan(folder)
    for name, what in foreign.items():
        return name, f"{name} is {what}, which no package has"
    for name in made.files:
        if name not in files:
            return name, f"{name} is missing"
    for name, what in empty.items():
        return name, f"{name} is {what}, which no package has"
    for name in files:
        if name not in made.files:
            return name, f"{name} does not belong to the package: the manifest does not list it"
    for done, (name, path) in enumerate(files.items()):
        if progress:
            progress("checking files", done, len(files))
        want, size = made.files[name], path.stat().st_size
        if size != want.nbytes:
            return name, f"{name} has {size} bytes, the manifest says {want.nbytes}"
        found = entry_of(path)
        if found.sha256 != want.sha256:
            return name, (
                f"{name} was changed: its SHA-256 is {found.sha256[:12]}..., the manifest says "
                f"{want.sha256[:12]}..."
            )
        if found.blocks != want.blocks:
            return name, f"{name} does not have the blocks that the manifest lists"
        if found.executable != want.executable:
            said = "executable" if want.executable else "not executable"
            return name, f"{name} must be {said}; set its mode (chmod)"
    return None
