"""Markdown: inline code of any text, and tables."""

from __future__ import annotations

from edgeq.core.markdown import inline_code, table


def test_any_text_is_inline_code() -> None:
    assert inline_code("[x](y)") == "`[x](y)`"
    assert inline_code("a`b``c") == "```a`b``c```"
    assert inline_code("`") == "`` ` ``"
    assert inline_code("") == "`  `"
    assert "\n" not in inline_code("a\n# b")


def test_columns_are_aligned_as_asked() -> None:
    assert table(["a", "b"], [["1", "2"]], "lr") == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    assert table(["a", "b"], []) == "| a | b |\n| --- | --- |"
