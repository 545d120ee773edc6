"""Documents that are made from the code are current: `python docs/make.py` writes them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.paths import ROOT


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
