"""The path that a model was opened from, and the digest of its content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgeq.core.errors import FormatError
from edgeq.core.hashing import file_sha256


@dataclass(frozen=True)
class Origin:
    """The file or folder a model was opened from.

    Args:
        path: as it was given.
    """

    path: Path

    @property
    def name(self) -> str:
        """The name of the file or folder, symbolic links followed."""
        return self.path.resolve().name

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 in hexadecimal; all bytes are read the first time it is asked for.

        A file's is its own. A folder's is that of one ``<sha256>  <name>`` line, as ``sha256sum``
        prints, for config.json and each safetensors file, in the order of their names.

        Raises:
            FormatError: it cannot be read.
        """
        try:
            if not self.path.is_dir():
                return file_sha256(self.path)
            members = sorted((self.path / "config.json", *self.path.glob("*.safetensors")))
            lines = "".join(f"{file_sha256(member)}  {member.name}\n" for member in members)
        except OSError as err:
            raise FormatError(f"{self.path} cannot be read: {err.strerror or err}") from err
        return hashlib.sha256(lines.encode()).hexdigest()
