"""Documents that are made from the code are current: `python docs/make.py` writes them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT
from tests.project.test_circles import import_graph


def make_module() -> Any:
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCUMENTS: dict[str, Callable[[], str]] = make_module().DOCUMENTS

PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
CONFIGURATION = (".pre-commit-config.yaml", "pyproject.toml", "Makefile", ".ci/run")
_PATH = re.compile(r"(?<!/)\b(?:edgeq|tests|docs|benchmarks|examples)(?:/[\w.-]+)+")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize("page", sorted(PAGES))
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    named = {path.rstrip(".") for path in _PATH.findall(text)}
    linked = {((ROOT / page).parent / path).resolve() for path in _LINK.findall(text)}
    named -= {path for path in named if "NAME" in path or path.endswith("power-consumption")}
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing + [path for path in linked if not path.exists()]


@pytest.mark.parametrize("file", CONFIGURATION)
def test_files_that_the_configuration_names_exist(file: str) -> None:
    text = (ROOT / file).read_text("utf-8")
    named = {path for path in _PATH.findall(text) if path.endswith((".py", ".txt", ".sh", ".md"))}
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_made_document_is_current(path: str) -> None:
    made = DOCUMENTS[path]()
    assert (ROOT / path).read_text("utf-8") == made, "run: python docs/make.py"


GUIDES = ("CONTRIBUTING.md", "docs/architecture.md", "docs/extending.md")
_CODE = re.compile(r"`([^`\n]+)`")
_SHORT_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|toml|sh)|(?:[\w.-]+/)+[\w.-]*")
_NAME = re.compile(r"@?([A-Za-z_][\w.]*)(?:\([^)]*\))?")
_REFUSED_NAMES = {"utils", "helpers", "manager", "common"}
"""Names that CONTRIBUTING.md forbids."""


def sources() -> list[Path]:
    folders = ("edgeq", "tests", "benchmarks", "docs", "examples")
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path for path in found if path != Path(__file__)]


@pytest.fixture(scope="module")
def places() -> set[str]:
    """Paths of files and folders, with each of their endings: ``kernels/abi.py`` is one."""
    known: set[str] = set()
    for path in sources():
        for place in (path, path.parent):
            parts = place.relative_to(ROOT).parts
            known |= {"/".join(parts[i:]) for i in range(len(parts))}
    return known


@pytest.fixture(scope="module")
def words() -> set[str]:
    """Every word of the sources."""
    return {word for path in sources() for word in re.findall(r"\w+", path.read_text("utf-8"))}


@pytest.mark.parametrize("page", GUIDES)
def test_modules_and_names_that_a_guide_names_are_in_the_tree(
    page: str, places: set[str], words: set[str]
) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    missing = []
    for code in _CODE.findall(text):
        if "NAME" in code:
            continue
        if _SHORT_PATH.fullmatch(code):
            short = code.rstrip("/")
            found = short in places or f"{short}.py" in places or (ROOT / short).exists()
            found |= (ROOT / page).parent.joinpath(short).exists()
        elif name := _NAME.fullmatch(code):
            found = all(part in words for part in name[1].split(".") if part)
        else:
            continue
        if not found and code not in _REFUSED_NAMES:
            missing.append(code)
    assert not missing


def test_architecture_lists_each_package_below_those_that_it_imports() -> None:
    rows = [
        re.findall(r"`edgeq/(\w+)(?:\.py)?`", line.split("|")[1])
        for line in (ROOT / "docs/architecture.md").read_text("utf-8").splitlines()
        if line.startswith("| `edgeq/")
    ]
    order = {name: i for i, row in enumerate(rows) for name in row}
    folder = ROOT / "edgeq"
    parts = {path.parent.name for path in folder.glob("*/__init__.py")}
    parts |= {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert order.keys() == parts
    for module, imported in import_graph(ROOT).items():
        for other in imported:
            ends = [name.split(".")[1] for name in (module, other) if "." in name]
            if len(ends) == 2 and order.keys() >= set(ends):
                assert order[ends[1]] <= order[ends[0]], f"{module} imports {other}"
