"""Where a certificate lies, and whether the files it names are still the ones it was made for."""

from __future__ import annotations

import json
from pathlib import Path

from edgeq.converters.validate.integers import TensorFault
from edgeq.core.hashing import file_sha256

NAME = "certificate.json"
PACKAGES = (".mlpackage",)
"""Folders that the system shows as one file: nothing of ours goes inside."""


def certificate_path(out: Path, *, folder: bool) -> Path:
    """Where the certificate of an output lies."""
    if folder and out.suffix not in PACKAGES:
        return out / NAME
    return out.with_name(f"{out.name}.{NAME}")


def changed_files(out: Path) -> list[TensorFault]:
    """Files whose checksum is not the one in the certificate that lies beside them.

    Args:
        out: the converted file or folder.

    Returns:
        a fault for each, by the file's name; none where there is no certificate.
    """
    place = certificate_path(out, folder=out.is_dir())
    if not place.exists():
        return []
    try:
        named = dict(json.loads(place.read_text("utf-8"))["files"])
        wanted = {str(name): str(entry["sha256"]) for name, entry in named.items()}
    except (OSError, ValueError, KeyError, TypeError) as err:
        return [TensorFault(place.name, None, None, f"the certificate cannot be read: {err}")]
    faults = []
    for name, sha in wanted.items():
        # names begin with that of the output, which may have been renamed since
        inside = Path(*Path(name).parts[1:])
        file = out / inside if out.is_dir() else out if len(wanted) == 1 else out.parent / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            faults.append(TensorFault(place.name, None, None, f"names the foreign file {name}"))
        elif not file.is_file():
            faults.append(TensorFault(name, None, None, "is named in the certificate and missing"))
        elif (found := file_sha256(file)) != sha:
            faults.append(
                TensorFault(
                    name, None, None,
                    f"is not the file that {place.name} was made for: its SHA-256 is "
                    f"{found[:12]}..., the certificate says {sha[:12]}...",
                )
            )  # fmt: skip
    return faults
