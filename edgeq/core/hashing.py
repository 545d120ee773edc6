"""SHA-256 of files, read in pieces of a few megabytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

_PIECE = 1 << 22


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    Args:
        path: an existing file.

    Returns:
        64 lower-case hexadecimal digits, as ``sha256sum`` prints them.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
