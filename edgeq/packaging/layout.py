"""Where a package is put, and what it is called."""

from __future__ import annotations

import re
from pathlib import Path

from edgeq.core.errors import FormatError, UsageError
from edgeq.core.files import check_folder, refuse_special
from edgeq.packaging import manifest, tree

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_ENDINGS = re.compile(r"\.(edgeq|gguf|onnx|tflite|bin|safetensors)$", re.IGNORECASE)


def check_output(path: Path, force: bool) -> None:
    """Refuse a place where no package can be put, before any work.

    Raises:
        UsageError: it has no name or no folder, is a file, exists and ``force`` is not given, is no
            package, or holds files beside those of the package, which replacing it would delete.
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
    """Refuse to replace a folder that is no package, or in which someone put something.

    A file of the package that was edited is replaced: ``force`` asks for that.
    """
    try:
        made = manifest.read_manifest(path)
    except FormatError as err:
        raise UsageError(
            f"{path} is a folder with other files than a package, which overwriting would delete "
            f"({err}); give another output"
        ) from err
    if strange := tree.foreign_to(path, made):
        raise UsageError(
            f"{path} holds {strange}, which does not belong to the package there and which "
            "overwriting would delete; move it away, or give another output"
        )


def refuse_replaced(source: Path, path: Path) -> None:
    """Refuse a source that lies in the package which is replaced: it would be deleted.

    Raises:
        UsageError: it does.
    """
    if source.resolve().is_relative_to(path.resolve()):
        raise UsageError(
            f"{source} lies in {path}, which overwriting would delete; give another output"
        )


def refuse_within(out: Path, folder: Path, what: str) -> None:
    """Refuse an output that would be put into a folder which is read, or in its place.

    Args:
        out: where the output goes.
        folder: of what is read.
        what: what is read, in words.

    Raises:
        UsageError: the output lies there.
    """
    if out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{out} lies in {what}, {folder}; give an output outside of it")


def package_name(given: str | None, source: Path | None) -> str:
    """The name of a package: as given, or made of the name of its source.

    Args:
        given: by the user; None makes one.
        source: file or folder of the model, if it has one.

    Raises:
        UsageError: the name given is not of small letters, digits and hyphens.
    """
    if given is None:
        stem = _ENDINGS.sub("", source.resolve().name) if source else "model"
        made = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:63].rstrip("-")
        return made if _NAME.fullmatch(made) else f"model-{made}"[:63].rstrip("-")
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise UsageError(
            f"the name of the package is {given!r}; use a letter, then small letters, digits and "
            "hyphens, at most 63"
        )
    return given
