"""The license and the base model of a model, as far as its files state them.

    GGUF             general.license, general.base_model.0.repo_url or .name
    Hugging Face     the front matter of README.md: license, base_model
    ONNX             its metadata: license; else the front matter of the README.md beside the file

Artifacts of edgeq do not state a license, and the metadata of .tflite files is not read. What no
file states is None, and the README of the package says that it is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgeq.core.errors import UsageError, check_type
from edgeq.importers.gguf.file import open_gguf

_FIELD = re.compile(r"^(license|base_model):[ \t]*(.*)$", re.MULTILINE)
_MOST = 1 << 20
_LONGEST = 200
"""Most characters of a license or of the name of a model."""
_USER = "whoever made this package"


@dataclass(frozen=True)
class License:
    """The license and the base model of a model.

    Args:
        license: an identifier such as "apache-2.0"; None if unknown.
        base_model: the model that this model was derived from; None if unknown.
        license_said_by, base_model_said_by: the file, or the person, that states it.
    """

    license: str | None = None
    base_model: str | None = None
    license_said_by: str | None = None
    base_model_said_by: str | None = None


def given(said: License, license: str | None, base_model: str | None) -> License:
    """Replace what the files of the model state by what the user states.

    Args:
        said: what the files of the model state.
        license, base_model: what the user states; None keeps what the files state.

    Raises:
        UsageError: one of the two is not a single line of text, or is too long.
    """
    for name, value in (("license", license), ("base_model", base_model)):
        check_type(name, value, str, None)
        if value is not None and value != _one_line(value):
            raise UsageError(
                f"{name} is {value[:_LONGEST]!r}; give one line of text of at most {_LONGEST} "
                "characters, without spaces at its ends"
            )
    if license is not None:
        said = replace(said, license=license, license_said_by=_USER)
    if base_model is not None:
        said = replace(said, base_model=base_model, base_model_said_by=_USER)
    return said


def _one_line(text: str) -> str | None:
    """A text from a file as one printable line; None if nothing printable is left of it."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(shown.split())[:_LONGEST].strip() or None


def _said(license: str | None, base_model: str | None, where: str) -> License:
    license, base_model = (one and _one_line(one) for one in (license, base_model))
    return License(license, base_model, where if license else None, where if base_model else None)


def license_in(meta: Mapping[str, str], beside: License) -> License:
    """What the metadata of a graph says of its license, and else what lies beside the file.

    Args:
        meta: of the graph.
        beside: what was found beside its file.
    """
    said = _said(meta.get("license"), None, "the metadata of the model's file")
    if said.license is None:
        return beside
    return replace(beside, license=said.license, license_said_by=said.license_said_by)


def license_of(path: Path) -> License:
    """The license that the files of a model state.

    Args:
        path: file or folder of the model.
    """
    if path.is_dir():
        return _of_card(path / "README.md")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError:
        return License()
    if magic == b"GGUF":
        return _of_gguf(path)
    return _of_card(path.with_name("README.md")) if path.suffix == ".onnx" else License()


def _of_card(path: Path) -> License:
    """The license in the front matter of a model card: the YAML keys license and base_model."""
    try:
        if path.stat().st_size > _MOST:
            return License()
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return License()
    if not text.startswith("---\n"):
        return License()
    front = text[4:].partition("\n---")[0]
    found = {name: value.strip().strip("'\"") for name, value in _FIELD.findall(front)}
    if "base_model" in found and not found["base_model"]:  # a list below it
        first = re.search(r"^base_model:\s*\n\s*-\s*(.+)$", front, re.MULTILINE)
        found["base_model"] = first[1].strip().strip("'\"") if first else ""
    return _said(found.get("license"), found.get("base_model"), path.name)


def _of_gguf(path: Path) -> License:
    metadata = open_gguf(path).metadata

    def text(*keys: str) -> str | None:
        for key in keys:
            value = metadata.get(key)
            if isinstance(value, str) and value.strip():
                return value.strip()
        return None

    license = text("general.license")
    base = text("general.base_model.0.repo_url", "general.base_model.0.name", "general.source.url")
    base = base or text("general.name")
    return _said(license, base, "the metadata of the GGUF file")
