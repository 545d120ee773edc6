"""Documents that are made from the code are current: `python docs/make.py` writes them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def make_module() -> Any:
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOCUMENTS: dict[str, Callable[[], str]] = make_module().DOCUMENTS


@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_made_document_is_current(path: str) -> None:
    made = DOCUMENTS[path]()
    assert (ROOT / path).read_text("utf-8") == made, "run: python docs/make.py"
