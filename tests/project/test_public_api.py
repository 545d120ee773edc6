"""The Python API: its names, a function for each command, and that importing it costs nothing."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import edgeq
from edgeq.cli.app import cli

HEAVY = {
    "numba", "llvmlite", "numpy", "onnx", "onnxruntime", "coremltools", "ai_edge_litert", "torch",
    "tflite_runtime", "transformers", "gguf", "tokenizers", "jinja2", "rich", "click",
}  # fmt: skip

VERBS = {
    "demo": ("demo_model",),
    "run": ("run", "generate"),
    "eval": ("evaluate", "evaluate_graph"),
    "bench": ("bench", "bench_graphs"),
    "devices list": ("device_names",),
    "devices show": ("device",),
    "devices detect": ("detect",),
}
"""Commands whose function in Python has another name, or that are several functions there."""


def typed_imports() -> dict[str, list[str]]:
    """Module -> names of what edgeq/__init__.py imports for type checkers."""
    tree = ast.parse(Path(edgeq.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    return {
        str(node.module): [alias.name for alias in node.names]
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }


def test_what_type_checkers_see_is_what_is_exported() -> None:
    typed = typed_imports()
    assert {module: sorted(names) for module, names in typed.items()} == {
        module: sorted(names) for module, names in edgeq._HOMES.items()
    }
    every = [name for names in typed.values() for name in names]
    assert len(edgeq.__all__) == len(set(edgeq.__all__))
    assert {*edgeq.__all__} == {*every, "__version__"}
    assert set(edgeq.__all__) <= set(dir(edgeq))


@pytest.mark.parametrize("name", edgeq.__all__)
def test_each_name_is_there_and_documented(name: str) -> None:
    value = getattr(edgeq, name)
    if callable(value):
        assert value.__module__.startswith("edgeq.")
        assert (value.__doc__ or "").strip()


def test_no_name_is_a_submodule_s() -> None:
    """Importing a submodule sets an attribute of the package, which would hide the function."""
    modules = {module.name for module in pkgutil.iter_modules([str(Path(edgeq.__file__).parent)])}
    assert not modules & set(edgeq.__all__)


def commands() -> list[str]:
    found = []
    for name, command in cli.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {}
        found += [f"{name} {verb}" for verb in inner] if inner else [name]
    return found


@pytest.mark.parametrize("name", commands())
def test_each_command_has_its_functions(name: str) -> None:
    for function in VERBS.get(name, (name,)):
        assert function in edgeq.__all__
        assert callable(getattr(edgeq, function))


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
