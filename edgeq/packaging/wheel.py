"""Build a wheel of the running edgeq from its installed files, for packages that include edgeq.

The same files give the same wheel: names are sorted, times are fixed, and nothing is compressed,
because versions of zlib compress differently. The wheel declares no dependencies: the
requirements.txt of the package lists all of them, with hashes.

Source: PEP 427 (the wheel format), PEP 376 (RECORD).
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from edgeq import _version
from edgeq._version import __version__

NAME = f"edgeq-{__version__}-py3-none-any.whl"
_INFO = f"edgeq-{__version__}.dist-info"
_TIME = (1980, 1, 1, 0, 0, 0)
_METADATA = f"""\
Metadata-Version: 2.1
Name: edgeq
Version: {__version__}
Summary: edgeq as it was when a package was made; requirements.txt lists what it needs
Requires-Python: >=3.11
License: Apache-2.0
"""
_WHEEL = """\
Wheel-Version: 1.0
Generator: edgeq
Root-Is-Purelib: true
Tag: py3-none-any
"""
_ENTRY = """\
[console_scripts]
edgeq = edgeq.cli:main
"""
_LEFT_OUT = frozenset(("__pycache__", "demo_model"))
"""Folders that are left out because a device does not need them; ``edgeq demo`` does not work
there."""


def write_wheel(folder: Path) -> Path:
    """Write the wheel into a folder.

    Args:
        folder: an existing folder.

    Returns:
        the path of the wheel.
    """
    path = folder / NAME
    record = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in _members():
            info = zipfile.ZipInfo(name, _TIME)
            info.external_attr = 0o100644 << 16
            info.create_system = 3  # Unix, so that systems do not differ
            archive.writestr(info, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            record.append(f"{name},sha256={digest.decode()},{len(content)}")
        record.append(f"{_INFO}/RECORD,,")
        info = zipfile.ZipInfo(f"{_INFO}/RECORD", _TIME)
        info.external_attr = 0o100644 << 16
        info.create_system = 3
        archive.writestr(info, "\n".join([*record, ""]))
    return path


def _members() -> Iterator[tuple[str, bytes]]:
    root = Path(_version.__file__).parent
    for path in sorted(root.rglob("*"), key=lambda one: one.relative_to(root).as_posix()):
        inside = path.relative_to(root)
        if path.is_file() and not _LEFT_OUT & set(inside.parts) and path.suffix != ".pyc":
            yield f"edgeq/{inside.as_posix()}", path.read_bytes()
    yield f"{_INFO}/METADATA", _METADATA.encode()
    yield f"{_INFO}/WHEEL", _WHEEL.encode()
    yield f"{_INFO}/entry_points.txt", _ENTRY.encode()
