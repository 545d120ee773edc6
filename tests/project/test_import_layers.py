"""Packages import lower layers only, and each heavy package is imported in its own place.

The contracts stand in pyproject.toml and are checked by import-linter. What it cannot see, that a
heavy package is imported inside the function that needs it, is checked here.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT as REPOSITORY

ROOT = REPOSITORY / "edgeq"

ANYWHERE = {"numpy"}
"""What any module may import at its top."""

KERNELS = ("compiler/", "quant/kernels/", "runtime/kernels/")
TOP_LEVEL = {"rich": "cli/render.py", "click": "cli/", "numba": "runtime/kernels/",
             "llvmlite": KERNELS, "tokenizers": "runtime/tokenizer.py",
             "jinja2": "runtime/chat_template.py", "starlette": "serving/app.py"}  # fmt: skip
"""Packages that these files may import at the top; all others only inside functions."""


def contracts() -> list[dict[str, Any]]:
    """Those of import-linter in pyproject.toml."""
    document = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    found: list[dict[str, Any]] = document["tool"]["importlinter"]["contracts"]
    return found


def lint(folder: Path) -> str:
    """What import-linter reports of the package edgeq in a folder."""
    pytest.importorskip("importlinter")
    settings = str(REPOSITORY / "pyproject.toml")
    code = (
        "import sys; from importlinter.cli import lint_imports;"
        f"sys.exit(lint_imports({settings!r}, no_cache=True, no_logo=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    return "" if done.returncode == 0 else done.stdout + done.stderr


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py") if "__pycache__" not in p.parts)


def third_party_imports(source: str) -> Iterator[tuple[str, int, bool]]:
    """(package, line, whether it runs when the module is imported) of each third-party import."""

    def walk(node: ast.AST, at_top: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            at_top = False  # annotations import nothing at run time
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], node.lineno, at_top
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports out, as edgeq.x"
            yield (node.module or "").split(".")[0], node.lineno, at_top
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_top and not inside)

    for package, line, at_top in walk(ast.parse(source), True):
        if package not in {"edgeq", *ANYWHERE, *sys.stdlib_module_names}:
            yield package, line, at_top


def import_faults(relative: str, source: str) -> list[str]:
    """Third-party imports that have no contract, or that a module makes when it is imported."""
    known = {name for one in contracts() for name in one.get("forbidden_modules", ())}
    faults = []
    for package, line, at_top in third_party_imports(source):
        if package not in known:
            faults.append(f"{relative}:{line} imports {package}, which has no contract")
        elif at_top and not relative.startswith(TOP_LEVEL.get(package, "(nowhere)")):
            faults.append(
                f"{relative}:{line} imports {package} at the top; import it inside the function"
            )
    return faults


def test_the_contracts_hold() -> None:
    assert not lint(REPOSITORY)


def test_heavy_packages_are_imported_inside_functions() -> None:
    faults = [
        fault
        for path in modules()
        for fault in import_faults(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    ]
    assert not faults, "\n".join(faults)


def test_the_places_of_contracts_exist() -> None:
    """Import-linter does not say when a contract allows a module that is gone."""
    for contract in contracts():
        for rule in contract.get("ignore_imports", ()):
            place = REPOSITORY / rule.split(" -> ")[0].removesuffix(".**").replace(".", "/")
            assert place.is_dir() or place.with_suffix(".py").exists(), rule


@pytest.fixture(scope="module")
def empty_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package edgeq whose modules are all empty."""
    folder = tmp_path_factory.mktemp("empty")
    for path in modules():
        copy = folder / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    return folder


@pytest.mark.parametrize(
    ("relative", "source", "complaint"),
    [
        ("model/x.py", "from edgeq.quant import quantize", "edgeq.model is not allowed to import"),
        ("model/x.py", "def f():\n    import edgeq.cli.app", "edgeq.model is not allowed to"),
        ("core/x.py", "from edgeq import model", "edgeq.core is not allowed to import edgeq.model"),
        ("graph/x.py", "import edgeq.model.model", "edgeq.graph is not allowed to import"),
        ("runtime/x.py", "from edgeq.devices import detect", "edgeq.runtime is not allowed to"),
        ("attic.py", "", "attic"),
        ("quant/x.py", "import numba", "edgeq is not allowed to import numba"),
        ("cli/x.py", "from rich.table import Table", "edgeq is not allowed to import rich"),
    ],
)
def test_the_contracts_can_fail(
    empty_package: Path, relative: str, source: str, complaint: str
) -> None:
    path = empty_package / "edgeq" / relative
    path.write_text(source)
    try:
        report = " ".join(lint(empty_package).split())
    finally:
        path.unlink()
    assert complaint in report


@pytest.mark.parametrize(
    ("relative", "source", "complaint"),
    [
        ("quant/x.py", "import pandas", "no contract"),
        ("converters/ort/target.py", "import onnx", "inside the function"),
        (
            "converters/ort/target.py",
            "try:\n    import onnx\nexcept ImportError:\n    pass",
            "insid",
        ),
    ],
)
def test_imports_at_the_top_are_found(relative: str, source: str, complaint: str) -> None:
    assert complaint in "\n".join(import_faults(relative, source))


def test_what_is_allowed_passes() -> None:
    source = "import os\nimport numpy as np\ndef f():\n    import onnx\n"
    assert not import_faults("converters/ort/x.py", source)


def test_no_module_holds_two_concepts() -> None:
    long = {p.relative_to(ROOT).as_posix(): n for p in modules()
            if (n := len(p.read_text("utf-8").splitlines())) > 500}  # fmt: skip
    assert not long, f"past 500 lines, a module holds a second concept; move it out: {long}"
