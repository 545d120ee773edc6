"""What a file is, is decided in one place: no error of a reader makes another reader try it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT

CAUGHT = ("FormatError", "EdgeqError")


def second_tries(text: str) -> Iterator[int]:
    """Lines of handlers that catch a `FormatError` and go on, without using what it says."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler) or node.type is None:
            continue
        caught = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)}
        if not caught.intersection(CAUGHT) or isinstance(node.body[-1], ast.Raise):
            continue
        body = [inner for statement in node.body for inner in ast.walk(statement)]
        if not any(isinstance(name, ast.Name) and name.id == node.name for name in body):
            if any(isinstance(inner, ast.Call) for inner in body):
                yield node.lineno
        elif any(isinstance(inner, ast.Try) for inner in body):
            yield node.lineno


@pytest.mark.parametrize(
    ("text", "tries"),
    [
        ("try:\n a()\nexcept FormatError:\n b()", [3]),
        ("try:\n a()\nexcept (FormatError, OSError) as err:\n try:\n  b()\n except A:\n  raise err\n", [3]),  # noqa: E501
        ("try:\n a()\nexcept FormatError as err:\n raise C() from err", []),
        ("try:\n a()\nexcept FormatError as err:\n report(err)", []),
        ("try:\n a()\nexcept OSError:\n b()", []),
    ],
)  # fmt: skip
def test_a_second_try_is_recognized(text: str, tries: list[int]) -> None:
    assert list(second_tries(text)) == tries


def test_no_reader_is_tried_after_another() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted(Path(ROOT, "edgeq").rglob("*.py"))
        for line in second_tries(path.read_text("utf-8"))
    ]
    assert not found, (
        "importers.source_kind says what a source is, and each target's `wrote` what it converted: "
        f"ask them instead of catching the error of a reader: {', '.join(found)}"
    )
