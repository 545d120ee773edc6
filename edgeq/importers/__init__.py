"""Models from files: whatever the format, `load` gives a `Model` whose tensors are lazy.

A file is known by its content, not by its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path

from edgeq.core.errors import FormatError, UnsupportedError, check_type
from edgeq.core.hashing import file_sha256
from edgeq.model.model import Model

__all__ = ["describe", "load", "source_sha256"]

ACCEPTED = (
    "a Hugging Face folder (config.json, safetensors, tokenizer.json), a GGUF file, "
    "an .edgeq artifact, or a llama2.c .bin"
)
_GRAPHS = (".onnx", ".ort", ".tflite")


def load(path: str | Path) -> Model:
    """Open a model; nothing but headers and tokenizer files is read.

    Args:
        path: a Hugging Face folder, a GGUF file, an edgeq artifact or a llama2.c checkpoint.

    Raises:
        FormatError: the path does not exist, is none of these, or is damaged.
        UnsupportedError: a family, type or option edgeq does not know.
        MissingDependencyError: quantized GGUF tensors without the package that reads them.
    """
    check_type("path", path, str, PathLike)
    return _importer(Path(path))(path)


def describe(path: str | Path) -> Model:
    """What `load` opens, from headers alone: for questions of shape and size.

    Tokenizer files are not read and the model has none. Quantized GGUF tensors can be described
    without the package that reads them.

    Raises:
        FormatError, UnsupportedError: as `load`.
    """
    return _importer(Path(path))(path, headers_only=True)


def source_sha256(path: str | Path) -> str:
    """The sha256 of a model's source, read in pieces of a few megabytes.

    A file's is its own; a folder's is that of one ``<sha256>  <name>`` line (as ``sha256sum``
    prints) for config.json and each safetensors file, in the order of their names.

    Raises:
        FormatError: it cannot be read.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return file_sha256(path)
        members = sorted((path / "config.json", *path.glob("*.safetensors")))
        lines = "".join(f"{file_sha256(member)}  {member.name}\n" for member in members)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    return hashlib.sha256(lines.encode()).hexdigest()


def _importer(path: Path) -> Callable[..., Model]:
    # imported where needed, so that opening an artifact does not load every importer
    try:
        if path.is_dir():
            return _folder_importer(path)
        if not path.exists():
            raise FormatError(f"{path} does not exist; give {ACCEPTED}")
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    if head[:4] == b"GGUF":
        from edgeq.importers.gguf.importer import load as load_gguf

        return load_gguf
    if head[8:9] == b"{":
        from edgeq.formats.safetensors_file import open_safetensors

        file_ = open_safetensors(path)
        ours = file_.metadata.get("format") == "edgeq"
        file_.close()
        if not ours:
            raise FormatError(
                f"{path} is a bare safetensors file without a configuration; "
                "give the folder with its config.json"
            )
        from edgeq.model import artifact

        return artifact.load
    from edgeq.importers import llama2c

    if llama2c.is_llama2c(path):
        return llama2c.load
    if head[:4] == b"FUGG":
        raise FormatError(f"{path} is a big-endian GGUF file; edgeq reads little-endian ones")
    if path.suffix.lower() in _GRAPHS:
        raise UnsupportedError(
            f"{path} is a graph of operators, but this command needs a language model; quantize, "
            "inspect, convert, validate, eval, bench and profile accept graphs"
        )
    what = "is empty" if not head else f"starts with {head[:8]!r} and is no known format"
    raise FormatError(f"{path} {what}; give {ACCEPTED}")


def _folder_importer(path: Path) -> Callable[..., Model]:
    if (path / "config.json").exists():
        from edgeq.importers.huggingface import importer as huggingface

        return huggingface.load
    if (path / "adapter_config.json").exists():
        from edgeq.importers.huggingface.checkpoint import adapter_message

        raise UnsupportedError(adapter_message(path))
    inside = sorted(p.name for p in path.iterdir() if p.suffix in (".gguf", ".edgeq", ".bin"))
    hint = f", but it holds {', '.join(inside[:5])}" if inside else ""
    raise FormatError(f"{path} is a folder without config.json{hint}; give {ACCEPTED}")
