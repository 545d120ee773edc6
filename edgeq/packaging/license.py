"""The license of a model and the model that it was made from, as far as its files say.

    GGUF             general.license, general.base_model.0.repo_url or .name
    Hugging Face     the front matter of README.md: license, base_model
    edgeq artifact   what it recorded of its source

What no file says is None, and the package's README says that it is unknown.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgeq.importers.gguf.file import open_gguf

_FIELD = re.compile(r"^(license|base_model):[ \t]*(.*)$", re.MULTILINE)
_MOST = 1 << 20


@dataclass(frozen=True)
class License:
    """What is known of a model's license and origin.

    Args:
        license: an identifier such as "apache-2.0"; None if unknown.
        base_model: the model that it was made from; None if unknown.
        said_by: where that is written.
    """

    license: str | None = None
    base_model: str | None = None
    said_by: str | None = None


def license_of(path: Path) -> License:
    """What the files of a model say of its license."""
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
    """The front matter of a model card, which is YAML of single lines as far as it matters."""
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
    license, base = found.get("license") or None, found.get("base_model") or None
    return License(license, base, path.name if license or base else None)


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
    return License(license, base, "the metadata of the GGUF file" if license or base else None)
