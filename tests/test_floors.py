"""Imports go down the floors only, and each heavy package stays behind its fence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "edgeq"

FLOORS = {
    "core": 0, "_version": 0,
    "formats": 1,
    "model": 2, "graph": 2,
    "importers": 3,
    "quant": 4, "evaluation": 4,
    "runtime": 5, "converters": 5, "devices": 5,
    "profiling": 6, "calibration_text": 6,
    "sweep": 7, "report": 7,
    "cli": 8, "__main__": 9,
}  # fmt: skip
"""Every room of the house. A new module or folder is given its floor here."""

SEALED = {"runtime", "converters", "devices"}
"""Packages of floor 5: they never import each other."""

FACE = "__init__"
"""The public face re-exports from every floor, lazily; nothing below may import it."""

FENCES = {
    "numba": ("runtime/kernels/",),
    "llvmlite": ("runtime/kernels/",),
    "rich": ("cli/render.py",),
    "click": ("cli/",),
    "dask": ("sweep.py",),
    "distributed": ("sweep.py",),
    "coremltools": ("converters/coreml",),
    "google": ("converters/coreml/exec/", "graph/onnx/file.py"),
    "ai_edge_litert": (
        "converters/tflite/interpreter.py",
        "converters/tflite/file.py",
        "graph/tflite/schema.py",
        "graph/tflite/shapes.py",
    ),
    "flatbuffers": ("converters/tflite/file.py",),
    "litert_lm": ("converters/tflite/litertlm.py",),
    "litert_lm_builder": ("converters/tflite/litertlm.py",),
    "onnx": ("converters/ort", "graph/onnx/"),
    "onnxruntime": ("converters/ort", "graph/execute.py"),
    "onnxruntime_genai": ("converters/ort/genai",),
    "gguf": ("importers/gguf/importer.py", "converters/gguf"),
    "llama_cpp": ("converters/gguf",),
    "torch": ("quant/training/",),
    "tokenizers": (
        "runtime/tokenizer.py",
        "importers/",
        "converters/validate/prompts.py",
        "quant/graph/sentences.py",
    ),
    "jinja2": ("runtime/chat_template.py", "report/page.py"),
    "matplotlib": ("evaluation/confusion_picture.py", "report/picture.py"),
    "PIL": ("quant/graph/images.py",),
    "safetensors": ("quant/decoder/calibrate.py",),
}
"""Third-party package -> the files below edgeq/ that may import it."""

ALWAYS = {"numpy"}
"""What any module may import at its top."""

TOP_LEVEL = {"rich": "cli/render.py", "click": "cli/", "numba": "runtime/kernels/",
             "llvmlite": "runtime/kernels/", "tokenizers": "runtime/tokenizer.py",
             "jinja2": "runtime/chat_template.py"}  # fmt: skip
"""Packages that their fenced files may import at the top; all others only inside functions."""


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether it runs when the module is imported) of each import."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                # annotations bind the floors too, but import nothing at run time
                for inner in child.body:
                    yield from ((name, line, False) for name, line, _ in walk_one(inner, False))
                continue
            yield from walk_one(child, at_top)

    def walk_one(node: ast.AST, at_top: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, at_top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports out, as edgeq.x"
            if node.module == "edgeq":
                for alias in node.names:
                    yield f"edgeq.{alias.name}", node.lineno, at_top
            else:
                yield node.module or "", node.lineno, at_top
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk(node, at_top and not inside)

    yield from walk(ast.parse(path.read_text("utf-8")), True)


def floor_faults(path: Path) -> list[str]:
    here = room(path)
    if here == FACE:
        return []
    found = []
    for name, line, _ in imports(path):
        parts = name.split(".")
        if parts[0] != "edgeq":
            continue
        at = f"{path.relative_to(ROOT)}:{line}"
        target = parts[1] if len(parts) > 1 else FACE
        if target not in FLOORS:
            found.append(f"{at} imports {name}, which is on no floor")
        elif target == here:
            continue
        elif FLOORS[target] > FLOORS[here] or {here, target} <= SEALED:
            found.append(f"{at} on floor {FLOORS[here]} imports {name} of floor {FLOORS[target]}")
    return found


def fence_faults(path: Path) -> list[str]:
    import sys

    relative = path.relative_to(ROOT).as_posix()
    found = []
    for name, line, at_top in imports(path):
        package = name.split(".")[0]
        if package == "edgeq" or package in ALWAYS or package in sys.stdlib_module_names:
            continue
        at = f"{relative}:{line}"
        if package not in FENCES:
            found.append(f"{at} imports {package}, which has no fence")
        elif not relative.startswith(FENCES[package]):
            found.append(f"{at} imports {package}; only {', '.join(FENCES[package])} may")
        elif at_top and not relative.startswith(TOP_LEVEL.get(package, "(nowhere)")):
            found.append(f"{at} imports {package} at the top; import it inside the function")
    return found


def test_every_room_is_on_a_floor() -> None:
    rooms = {room(p) for p in modules()} - {FACE}
    assert rooms | {"_version"} == set(FLOORS), f"give these a floor: {sorted(rooms - set(FLOORS))}"


def test_imports_go_down() -> None:
    faults = [f for p in modules() for f in floor_faults(p)]
    assert not faults, "\n".join(faults)


def test_packages_stay_behind_their_fences() -> None:
    faults = [f for p in modules() for f in fence_faults(p)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("relative", "source", "complaint"),
    [
        ("model/x.py", "from edgeq.quant import quantize", "floor 2 imports edgeq.quant"),
        ("model/x.py", "def f():\n    import edgeq.cli.app", "floor 2 imports edgeq.cli.app"),
        ("core/x.py", "from edgeq import model", "floor 0 imports edgeq.model"),
        ("runtime/x.py", "from edgeq.devices import plan", "floor 5 imports edgeq.devices"),
        ("quant/x.py", "from edgeq import load", "on no floor"),
        ("quant/x.py", "import numba", "only runtime/kernels/ may"),
        ("quant/x.py", "import pandas", "no fence"),
        ("converters/ort/target.py", "import onnx", "inside the function"),
        ("cli/x.py", "from rich.table import Table", "only cli/render.py may"),
    ],
)
def test_the_test_can_fail(
    relative: str, source: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.test_floors.ROOT", tmp_path)
    path = tmp_path / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert complaint in "\n".join(floor_faults(path) + fence_faults(path))


def test_what_is_allowed_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_floors.ROOT", tmp_path)
    path = tmp_path / "converters" / "x.py"
    path.parent.mkdir()
    path.write_text(
        "import os\nfrom edgeq.formats.tensor import Tensor\ndef f():\n    import onnx\n"
    )
    assert not floor_faults(path) + fence_faults(path)


def test_no_module_holds_two_concepts() -> None:
    long = {p.relative_to(ROOT).as_posix(): n for p in modules()
            if (n := len(p.read_text("utf-8").splitlines())) > 500}  # fmt: skip
    assert not long, f"past 500 lines, a module holds a second concept; move it out: {long}"
