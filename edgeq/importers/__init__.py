"""Opening sources: `open_source` gives a `Model` or a `Graph`, `load` a model alone.

What a source is, is decided here and nowhere else, by its content; its name decides only where the
content says nothing. Tensors of a model are lazy.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeq.core.errors import FormatError, UnsupportedError, check_type
from edgeq.core.files import STAND_IN_BYTES, stand_in
from edgeq.graph.files import graph_format

if TYPE_CHECKING:  # the command line asks for the kind of a source before NumPy is needed
    from edgeq.graph.ir import Graph
    from edgeq.model.model import Model

__all__ = ["SourceKind", "describe", "load", "open_source", "source_kind"]

SourceKind = Literal["model", "graph", "program"]
"""A language model; a graph that edgeq quantizes and converts; or a graph in a form that only its
runtime reads (.ort, .mlpackage, .mlmodel)."""

ACCEPTED = (
    "a Hugging Face folder (config.json, safetensors, tokenizer.json), a GGUF file, "
    "an .edgeq artifact, or a llama2.c .bin"
)
_OTHER_FOLDERS = {
    "params.json": "the layout in which Meta and Mistral publish weights (params.json); give the "
    "folder of the same model in Hugging Face's",
    "model_index.json": "a pipeline for pictures (model_index.json), no language model",
    "modules.json": "a model of sentence embeddings (modules.json), no language model",
}
"""Files by which folders of other kinds are known, and what these are."""
_PROGRAMS = (".ort", ".mlpackage", ".mlmodel")
_ORT_IDENTIFIER = b"ORTM"


def source_kind(path: str | Path) -> SourceKind:
    """What a source is. At most its first bytes are read, and nothing is imported for it.

    A path that is neither a graph nor a program counts as a model: `load` says what is wrong with
    it.

    Example:
        >>> source_kind("vision.onnx")
        'graph'
        >>> source_kind("model.edgeq")
        'model'
    """
    path = Path(path)
    if (path / "config.json").exists():
        return "model"
    head = b"" if path.is_dir() else _head(path)
    if head[:4] == b"GGUF" or head[8:9] == b"{":
        return "model"
    if head[4:8] == _ORT_IDENTIFIER or path.suffix.lower() in _PROGRAMS:
        return "program"
    return "model" if graph_format(path) is None else "graph"


def open_source(path: str | Path) -> Model | Graph:
    """Open a language model or a graph; of a model nothing but headers and tokenizer files is read.

    Args:
        path: a Hugging Face folder, a GGUF file, an edgeq artifact, a llama2.c checkpoint, or an
            ONNX or LiteRT file.

    Raises:
        FormatError: the path does not exist, is none of these, or is damaged.
        UnsupportedError: a family, type, operator or option edgeq does not know, or a program that
            only its runtime reads.
        UsageError: a graph with unknown axes, whose shapes must be given: see
            `edgeq.graph.files.read`.
        MissingDependencyError: a package that reads the format is not installed.

    Example:
        >>> type(edgeq.open_source("graph.onnx")).__name__
        'Graph'
    """
    check_type("path", path, str, PathLike)
    if source_kind(path) != "graph":
        return load(path)
    from edgeq.graph.files import read

    return read(path)


def load(path: str | Path) -> Model:
    """Open a language model; nothing but headers and tokenizer files is read.

    Args:
        path: a Hugging Face folder, a GGUF file, an edgeq artifact or a llama2.c checkpoint.

    Raises:
        FormatError: the path does not exist, is none of these, or is damaged.
        UnsupportedError: a family, type or option edgeq does not know, or a graph.

    Example:
        >>> model = edgeq.load("model.edgeq")
        >>> model.config.family
        'llama'
    """
    check_type("path", path, str, PathLike)
    return _importer(Path(path))(path).opened_from(path)


def describe(path: str | Path) -> Model:
    """What `load` opens, from headers alone: for questions of shape and size.

    Tokenizer files are not read and the model has none. Quantized GGUF tensors can be described
    without the package that reads them.

    Raises:
        FormatError, UnsupportedError: as `load`.
    """
    return _importer(Path(path))(path, headers_only=True).opened_from(path)


def _importer(path: Path) -> Callable[..., Model]:
    # imported where needed, so that opening an artifact does not load every importer
    try:
        if path.is_dir():
            return _folder_importer(path)
        if not path.exists():
            raise FormatError(f"{path} does not exist; give {ACCEPTED}")
        with path.open("rb") as file:
            head = file.read(STAND_IN_BYTES)
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    if words := stand_in(head):
        raise FormatError(f"{path} {words}")
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
    if source_kind(path) != "model":
        raise _is_graph(path)
    what = "is empty" if not head else f"starts with {head[:8]!r} and is no known format"
    raise FormatError(f"{path} {what}; give {ACCEPTED}")


def _folder_importer(path: Path) -> Callable[..., Model]:
    if (path / "config.json").exists():
        from edgeq.importers.huggingface import importer as huggingface

        return huggingface.load
    if (path / "adapter_config.json").exists():
        from edgeq.importers.huggingface.checkpoint import adapter_message

        raise UnsupportedError(adapter_message(path))
    for name, what in _OTHER_FOLDERS.items():
        if (path / name).exists():
            raise UnsupportedError(f"{path} holds {what}")
    inside = sorted(p.name for p in path.iterdir() if p.suffix in (".gguf", ".edgeq", ".bin"))
    hint = f", but it holds {', '.join(inside[:5])}" if inside else ""
    raise FormatError(f"{path} is a folder without config.json{hint}; give {ACCEPTED}")


def _is_graph(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path} is a graph of operators, but this command needs a language model; quantize, "
        "inspect, convert, validate, eval, bench and profile accept graphs"
    )


def _head(path: Path) -> bytes:
    """The first bytes of a file; none of what is no regular file or cannot be read."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(9)
    except OSError:
        return b""
