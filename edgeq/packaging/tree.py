"""The files of a package on disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from edgeq.core.errors import FormatError
from edgeq.core.progress import Progress
from edgeq.packaging import manifest
from edgeq.packaging.blocks import digest_and_blocks
from edgeq.packaging.manifest import Entry, Manifest

SIGNATURE = "manifest.sig"
"""The file with the signature of the manifest. The manifest does not list it."""
UNLISTED = (manifest.NAME, SIGNATURE)
"""Files that the manifest does not list."""


def files_in(folder: Path) -> dict[str, Path]:
    """All files of a package except those in `UNLISTED`, sorted by their path in the package.

    Raises:
        FormatError: the folder holds a link, a device or an empty folder; packages have none.
    """
    files, foreign, empty = _scan(folder)
    for name, what in (*foreign.items(), *empty.items()):
        raise FormatError(f"{name} is {what}, which no package has")
    return files


def _scan(folder: Path) -> tuple[dict[str, Path], dict[str, str], dict[str, str]]:
    """Scan a folder.

    Returns:
        the regular files, by their path in the folder; what is neither a regular file nor a
        folder, as path -> what it is; the empty folders, as path -> "an empty folder".
    """
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
    """The first file, link or folder that does not belong to the package; None if there is none."""
    files, foreign, empty = _scan(folder)
    return next(iter(sorted({*foreign, *empty, *(set(files) - set(made.files))})), None)


def entry_of(path: Path) -> Entry:
    """The manifest's entry for a file; the file is read once."""
    status = path.stat()
    sha256, blocks = digest_and_blocks(path)
    return Entry(sha256, status.st_size, bool(status.st_mode & 0o100), blocks)


def entries_of(folder: Path, progress: Progress | None = None) -> dict[str, Entry]:
    """The manifest's entries for all files of a folder, by path."""
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
    """Compare the files of a package with its manifest, up to the first difference.

    Returns:
        the path of the first file that differs, and a sentence that says how; None if all files
        are as the manifest lists them.
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
        expected, size = made.files[name], path.stat().st_size
        if size != expected.nbytes:
            return name, f"{name} has {size} bytes, the manifest says {expected.nbytes}"
        actual = entry_of(path)
        if actual.sha256 != expected.sha256:
            return name, (
                f"{name} was changed: its SHA-256 is {actual.sha256[:12]}..., the manifest says "
                f"{expected.sha256[:12]}..."
            )
        if actual.blocks != expected.blocks:
            return name, f"{name} does not have the blocks that the manifest lists"
        if path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID):
            return name, f"{name} runs with the rights of its owner (setuid), which no package has"
        if actual.executable != expected.executable:
            mode = "executable" if expected.executable else "not executable"
            return name, f"{name} must be {mode}; set its mode (chmod)"
    return None
