"""Where real models and data are found, and how their tests skip where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("EDGEQ_TEST_DATA", _ROOT.parent / "shared"))


def need(relative: str) -> Path:
    """A path below the shared data folder; skips the test, by name, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"shared data absent: {relative}")
    return path
