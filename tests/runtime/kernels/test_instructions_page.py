"""docs/kernels.md lists the instructions that the kernels are compiled to now."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import llvmlite
import pytest

from tests.paths import ROOT


def writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "instructions", ROOT / "benchmarks" / "kernels" / "instructions.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_instructions_of_this_compiler() -> None:
    page = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    if f"llvmlite {llvmlite.__version__}" not in page:
        pytest.skip("docs/kernels.md was written with another version of llvmlite")
    made = writer()
    _, title, rest = page.partition(made.TITLE)
    assert title + rest == made.section(), (
        "python benchmarks/kernels/instructions.py writes it anew"
    )


def test_an_inner_loop_has_the_products_of_a_block() -> None:
    """A block of 16 rows x 32 columns is 8 products of 64 bytes each, whatever the weights are."""
    made = writer()
    for name in made.SCHEMES:
        found = made.instructions(made.scheme_named(name))
        assert found["vpdpbusd"] == 8
        assert "vgf2p8affineqb" not in found
