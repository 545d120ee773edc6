"""Which packages are installed, and whether they work on this processor.

A package built for a newer processor dies when it is imported, of an illegal instruction; so
each is imported in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from dataclasses import dataclass

from edgeq.core.progress import Progress

EXTRAS: dict[str, tuple[str, ...]] = {
    # extra -> the packages (as pip names them) that it brings
    "gguf": ("gguf",),
    "ort": ("onnx", "onnxruntime"),
    "genai": ("onnx", "onnxruntime", "onnxruntime-genai"),
    "tflite": ("ai-edge-litert", "flatbuffers"),
    "litertlm": ("ai-edge-litert", "flatbuffers", "litert-lm-builder", "litert-lm-api"),
    "coreml": ("coremltools",),
    "llamacpp": ("llama-cpp-python",),
    "serve": ("segno", "starlette", "uvicorn"),
    "sign": ("cryptography",),
    "structured": ("llguidance",),
    "sweep": ("dask", "distributed"),
    "vision": ("pillow",),
    "train": ("torch",),
}
REQUIRED = ("numpy", "numba", "llvmlite", "tokenizers", "click", "rich", "jinja2")
PURPOSES = {
    "gguf": "read and write GGUF files", "ort": "convert to ONNX",
    "genai": "run ONNX files in onnxruntime-genai", "tflite": "convert to TFLite",
    "litertlm": "package for LiteRT-LM", "coreml": "convert to Core ML",
    "llamacpp": "run GGUF files to validate them",
    "serve": "serve models over HTTP",
    "sign": "sign packages and check signatures",
    "structured": "constrain answers to JSON schemas and grammars",
    "sweep": "sweep on several processes or machines",
    "vision": "read pictures for graphs",
    "train": "train for quantization",
}  # fmt: skip
_MODULES = {"ai-edge-litert": "ai_edge_litert.interpreter", "litert-lm-api": "litert_lm",
            "llama-cpp-python": "llama_cpp", "pillow": "PIL"}  # fmt: skip
"""Packages that are imported under another name."""
_PATIENCE_S = 120
_SIGNALS = {4: "illegal instruction", 6: "aborted", 11: "segmentation fault"}


@dataclass(frozen=True)
class State:
    """One package.

    Args:
        version: empty if it is not installed.
        fault: why it does not work; empty if it does, or is not there.
    """

    version: str
    fault: str = ""

    @property
    def works(self) -> bool:
        """Whether it is there and works."""
        return bool(self.version) and not self.fault


def installed(*, imports: bool = True, progress: Progress | None = None) -> dict[str, State]:
    """The state of every package that edgeq needs or can use.

    Args:
        imports: import what is there, each package in a process of its own; else only look
            whether its files are there.
        progress: called before each package.
    """
    wanted = [*REQUIRED, *dict.fromkeys(p for packages in EXTRAS.values() for p in packages)]
    states = {}
    for done, package in enumerate(wanted):
        if progress:
            progress(package, done, len(wanted))
        states[package] = _state(package, imports)
    return states


def unavailable(extra: str, system: str, machine: str, python: tuple[int, int]) -> str:
    """Why an extra's packages do not exist for a machine; empty if they do.

    Args:
        extra: a key of `EXTRAS`.
        system: as `platform.system` says.
        machine: as `platform.machine` says.
        python: major and minor version.
    """
    if extra == "coreml" and python >= (3, 14):
        return "coremltools has no wheels for Python 3.14 or newer"
    if extra == "coreml" and system != "Darwin" and (system, machine) != ("Linux", "x86_64"):
        return "coremltools exists for macOS and x86-64 Linux only"
    if extra == "tflite" and system == "Windows":
        return "LiteRT has no wheels for Windows"
    if extra == "litertlm" and system != "Linux":
        return "the LiteRT-LM tools have wheels for Linux only"
    return ""


def _state(package: str, imports: bool) -> State:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return State("")
    module = _MODULES.get(package, package.replace("-", "_"))
    if not imports:
        there = importlib.util.find_spec(module.partition(".")[0]) is not None
        return State(version, "" if there else "its files are gone")
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True, text=True, errors="replace", timeout=_PATIENCE_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as err:
        return State(version, str(err))
    if done.returncode < 0:
        number = -done.returncode
        return State(version, _SIGNALS.get(number, f"ended by signal {number}"))
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return State(version, lines[-1] if done.returncode else "")
