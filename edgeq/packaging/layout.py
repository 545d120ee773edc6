"""The folder and the name of a package."""

from __future__ import annotations

import re
from pathlib import Path

from edgeq.core.errors import FormatError, UsageError
from edgeq.core.files import check_folder, refuse_special
from edgeq.packaging import manifest, tree

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_ENDINGS = re.compile(r"\.(edgeq|gguf|onnx|tflite|bin|safetensors)$", re.IGNORECASE)


def check_output(path: Path, force: bool) -> None:
    """Refuse an output folder that cannot be written, before any work starts.

    Args:
        path: folder to write the package to.
        force: replace a package that exists there.

    Raises:
        UsageError: the path has no name, its parent folder does not exist, it is a file, it exists
            and ``force`` is not given, it is not a package, or it holds files that do not belong to
            the package and that replacing it would delete.
    """
    if not path.name or path.name in (".", ".."):
        raise UsageError(f"--output is {path}; give the name of a new folder")
    check_folder(path)
    refuse_special(path)
    if not path.exists() and not path.is_symlink():
        return
    if path.is_symlink() or not path.is_dir():
        raise UsageError(f"{path} is a file, and a package is a folder; give the name of a folder")
    if any(path.iterdir()):
        _refuse_foreign(path)
    if not force:
        raise UsageError(
            f"{path} already exists; give another --output, or --force to overwrite it"
        )


def _refuse_foreign(path: Path) -> None:
    """Refuse to replace a folder that is not a package or that holds files of others.

    Files of the package that were edited are replaced, as ``force`` asks for.
    """
    try:
        made = manifest.read_manifest(path)
    except FormatError as err:
        raise UsageError(
            f"{path} is a folder that is not a package ({err}), and overwriting it would delete "
            "its files; give another output"
        ) from err
    if strange := tree.foreign_to(path, made):
        raise UsageError(
            f"{path} holds {strange}, which does not belong to the package there and which "
            "overwriting would delete; move it away, or give another output"
        )


def refuse_inside(path: Path, folder: Path, reason: str) -> None:
    """Refuse a path that is a folder or lies in it, such as an output in a package that is read.

    Args:
        path: the path that is checked; it need not exist.
        folder: the folder that it must not lie in.
        reason: why it must not, and what to do: the end of the message.

    Raises:
        UsageError: the path is the folder or lies in it.
    """
    if path.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{path} lies in {folder}, {reason}")


def package_name(given: str | None, source: Path | None) -> str:
    """The name of a package: the given one, or one that is derived from the name of the source.

    Args:
        given: the name that the user gave; None derives one.
        source: file or folder of the model; None if the model has none.

    Raises:
        UsageError: the given name is not a lower-case letter followed by lower-case letters,
            digits and hyphens.
    """
    if given is None:
        stem = _ENDINGS.sub("", source.resolve().name) if source else "model"
        made = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63].rstrip("-")
        return made if _NAME.fullmatch(made) else f"model-{made}"[:63].rstrip("-")
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise UsageError(
            f"the name of the package is {given!r}; use a lower-case letter, then lower-case "
            "letters, digits and hyphens, at most 63 characters in all"
        )
    return given
