"""The section of the quality page on a published model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.paths import ROOT


def row(nbytes: int, kl: float, **more: Any) -> dict[str, Any]:
    figures = {"nll": 3.0, "kl_mean": kl, "kl_p99": 5 * kl, "top1": 0.9}
    return {
        "bytes": nbytes,
        "measured": "2026-12-01",
        "kl_by_text": {"card": kl},
        **figures,
        **more,
    }


def test_rivals_take_no_more_bytes_and_steep_steps_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A larger file of edgeq is no rival; a step above the limit is named, one below it is not."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "quality")
    section = importlib.import_module("published").section
    rows = {
        "edgeq 8.5bpw": row(200, 0.01),
        "edgeq 6.5bpw": row(150, 0.02),
        "edgeq 5.5bpw": row(90, 0.06),
        "llama.cpp Q4_K_M, imatrix": row(100, 0.08, types={"Q5_0": 7}, imatrix_tokens=64),
        "llama.cpp Q3_K_M, imatrix": row(90, 0.2, types={"Q4_0": 7}, imatrix_tokens=64),
        "llama.cpp IQ2_M": {"refused": "this needs an imatrix"},
    }
    about = {"tokens": {"card": 100}, "machine": "some machine", "rows": rows}
    text = "\n".join(section("model", about))
    assert "- Q4_K_M, imatrix: 0.0600 (5.5bpw, 90 bytes) / 0.0800 (100 bytes) = **0.75x**" in text
    assert "the goal, 0.7x, is missed" in text
    assert "= **0.30x**; the goal, 0.6x, is met" in text
    assert "8.5bpw to 6.5bpw 2.0, 6.5bpw to 5.5bpw 3.0; more than 2.5 for 6.5bpw to 5.5bpw" in text
    assert "llama.cpp IQ2_M was not written: this needs an imatrix." in text
    assert "Q5_0 x 7" in text
