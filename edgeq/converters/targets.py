"""The table of targets, and functions that look something up in it.

A new target is one folder below `edgeq.converters`, or any package that calls `register`, and one
row. ``docs/extending.md`` shows the way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.converters.target import GraphTarget, Target
from edgeq.core.errors import FormatError, UsageError, require, unknown

if TYPE_CHECKING:
    from edgeq.converters.runners import GraphRunner


def _imported(place: str) -> Callable[[], Any]:
    """A function that imports ``module:Class`` below `edgeq.converters` and makes one, once."""
    module, _, name = place.partition(":")

    @cache
    def make() -> Any:
        return getattr(importlib.import_module(f"edgeq.converters.{module}"), name)()

    return make


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "ort",
            "ONNX Runtime",
            "model.onnx and its data file model.onnx.data",
            suffixes=(".onnx", ".ort"),
            folder_file="model.onnx",
            graph_outputs=(".onnx", ".ort"),
            packages=("onnx", "onnxruntime"),
            decoder=_imported("ort.decoder:OrtDecoderTarget"),
            graph=_imported("ort.graph:OrtGraphTarget"),
            profiler=_imported("ort.profile:OrtProfiler"),
        ),
        Target(
            "genai",
            "onnxruntime-genai",
            "a folder with model, configuration, tokenizer and chat template",
            folder_file="genai_config.json",
            packages=("onnx", "onnxruntime", "onnxruntime_genai"),
            decoder=_imported("ort.genai:GenaiDecoderTarget"),
        ),
        Target(
            "tflite",
            "LiteRT (TensorFlow Lite)",
            "a .tflite file with prefill and decode signatures",
            suffixes=(".tflite",),
            output=".tflite",
            graph_outputs=(".tflite",),
            packages=("ai_edge_litert", "flatbuffers"),
            decoder=_imported("tflite.decoder:LiteRTDecoderTarget"),
            graph=_imported("tflite.graph:LiteRTGraphTarget"),
            profiler=_imported("tflite.profile:LiteRTProfiler"),
        ),
        Target(
            "litertlm",
            "LiteRT-LM",
            "a .litertlm bundle with tokenizer and chat template",
            suffixes=(".litertlm",),
            output=".litertlm",
            packages=("ai_edge_litert", "flatbuffers", "litert_lm_builder"),
            decoder=_imported("tflite.litertlm:LiteRTLMDecoderTarget"),
        ),
        Target(
            "coreml",
            "Core ML",
            "an .mlpackage for iOS 18 / macOS 15, or for iOS 16",
            suffixes=(".mlpackage", ".mlmodel"),
            folder_file="Manifest.json",
            output=".mlpackage",
            graph_outputs=(".mlpackage",),
            package=True,
            packages=("coremltools",),
            decoder=_imported("coreml.decoder:CoreMLDecoderTarget"),
            graph=_imported("coreml.graph:CoreMLGraphTarget"),
            profiler=_imported("coreml.profile:CoreMLProfiler"),
        ),
        Target(
            "gguf",
            "llama.cpp",
            "a .gguf file with tokenizer and chat template",
            suffixes=(".gguf",),
            output=".gguf",
            decoder=_imported("gguf.decoder:GgufDecoderTarget"),
        ),
    )
}
"""Every target by its name."""


def register(target: Target) -> None:
    """Add a target to the table, so that `edgeq.convert` and the others know it.

    Raises:
        UsageError: there is a target of this name already.
    """
    if target.name in TARGETS:
        raise UsageError(f"there is a target {target.name} already; choose another name")
    TARGETS[target.name] = target


def target_named(name: str) -> Target:
    """A target by its name.

    Raises:
        UsageError: there is no such target; lists those there are.
    """
    if name not in TARGETS:
        raise UsageError(unknown("target", name, tuple(TARGETS)))
    return TARGETS[name]


def graph_target(name: str) -> GraphTarget:
    """The class that converts graphs to a target.

    Raises:
        UsageError: there is no such target, or it takes no graphs.
    """
    target = TARGETS.get(name)
    if target is None or target.graph is None:
        known = tuple(row.name for row in TARGETS.values() if row.graph)
        raise UsageError(unknown("target of a graph", name, known))
    return target.graph()


def require_target(name: str) -> None:
    """Refuse a target whose packages are not installed, before any work.

    Raises:
        UsageError: there is no such target; lists those there are.
        MissingDependencyError: names every missing package, and the target's extra.
    """
    target = target_named(name)
    require(target.extra or name, target.packages, f"for the target {name}")


def target_of(path: str | Path) -> str:
    """Name of the target that a file or folder belongs to, by its suffix and what lies in it.

    Raises:
        FormatError: it does not exist, or no target has such files.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist; give the output of edgeq convert")
    if name := known_target_of(path):
        return name
    suffixes = sorted({suffix for row in TARGETS.values() for suffix in row.suffixes})
    raise FormatError(
        f"the format of {path} is unknown; name it with --target, one of {', '.join(TARGETS)}, "
        f"or give a file that ends in {', '.join(suffixes)}"
    )


def known_target_of(path: Path) -> str | None:
    """Like `target_of`, but None if the path does not exist or no target has such files."""
    suffixes = {suffix: row.name for row in TARGETS.values() for suffix in row.suffixes}
    if path.exists() and path.suffix.lower() in suffixes:
        return suffixes[path.suffix.lower()]
    for row in reversed(TARGETS.values()):  # a later target adds files to those of an earlier one
        if row.folder_file and (path / row.folder_file).exists():
            return row.name
    return None


def graph_suffixes() -> tuple[str, ...]:
    """Endings of the files that graphs are converted to."""
    return tuple(suffix for row in TARGETS.values() for suffix in row.graph_outputs)


def graph_target_of(path: str | Path) -> str:
    """Name of the target that a converted graph belongs to, by its suffix.

    Raises:
        FormatError: it does not exist, or graphs are not written to such files.
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist")
    for row in TARGETS.values():
        if path.suffix.lower() in row.graph_outputs:
            return row.name
    if path.suffix.lower() in (suffix for row in TARGETS.values() for suffix in row.suffixes):
        raise FormatError(
            f"{path} is a model that edgeq did not convert, and whose weights it does not read in "
            "this form; edgeq profile shows its operations and size"
        )
    raise FormatError(
        f"{path} is not a graph; its name must end in one of {', '.join(graph_suffixes())}"
    )


def is_written_graph(path: Path) -> bool:
    """Whether edgeq converted a graph to this file; its metadata says so.

    Raises:
        FormatError: it is damaged.
        MissingDependencyError: the package that reads it is not installed.
    """
    return _is_graph_file(path) and graph_target(graph_target_of(path)).wrote(path)


def opens_as_graph(path: Path) -> bool:
    """Whether `open_graph` opens a file.

    Raises:
        FormatError, MissingDependencyError: as `is_written_graph`.
    """
    return _is_graph_file(path) and graph_target(graph_target_of(path)).opens(path)


def _is_graph_file(path: Path) -> bool:
    return path.exists() and path.suffix.lower() in graph_suffixes()


def open_graph(path: str | Path, *, threads: int = 1) -> GraphRunner:
    """A graph that was converted to any target, in the target's runtime.

    Raises:
        FormatError: edgeq did not convert it, or it is damaged.
        MissingDependencyError: the runtime is not installed.
    """
    return graph_target(graph_target_of(path)).open_runner(Path(path), threads=threads)
