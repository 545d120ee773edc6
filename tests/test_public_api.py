"""The public face: its names, that each is there, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edgeq

PUBLIC = [
    "PRESETS", "Chunk", "DeviceError", "DoesNotFitError", "EdgeqError", "Engine", "FloatTensor",
    "FormatError", "MissingDependencyError", "Model", "ModelConfig", "QuantScheme", "QuantTensor",
    "Recipe", "Reference", "Rule", "SamplingParams", "SchemeError", "Tokenizer",
    "UnsupportedError", "UsageError", "__version__", "generate", "load", "parse_scheme",
    "quantize", "render_chat", "save",
]  # fmt: skip

HEAVY = {
    "numba", "llvmlite", "numpy", "onnx", "onnxruntime", "coremltools", "ai_edge_litert", "torch",
    "tflite_runtime", "transformers", "gguf", "tokenizers", "jinja2", "rich", "click",
}  # fmt: skip


def test_the_names() -> None:
    assert sorted(edgeq.__all__) == sorted(PUBLIC)
    assert set(edgeq.__all__) <= set(dir(edgeq))


@pytest.mark.parametrize("name", PUBLIC)
def test_each_name_is_there_and_documented(name: str) -> None:
    value = getattr(edgeq, name)
    if callable(value):
        assert value.__module__.startswith("edgeq.")
        assert (value.__doc__ or "").strip()


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        edgeq.quantise  # noqa: B018


def imported(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter imports while running ``code``."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert lines, "no import times were printed"
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_import_edgeq_loads_nothing_heavy() -> None:
    assert not imported("import edgeq") & HEAVY


def test_the_command_line_alone_loads_nothing_heavy() -> None:
    loaded = imported("from edgeq.cli import main; main(['--help'])")
    assert "click" in loaded
    assert not loaded & (HEAVY - {"click"})
