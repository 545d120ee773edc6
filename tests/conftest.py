"""Where real models and data are found, and how their tests skip where they are absent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

with contextlib.suppress(ImportError):  # emulated boards do without it
    from hypothesis import HealthCheck, settings

    # no test fails for being slow on a busy machine
    settings.register_profile("edgeq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("edgeq")

os.environ.pop("COLUMNS", None)  # lines are whole unless a test asks for a width

_ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("EDGEQ_TEST_DATA", _ROOT.parent / "shared"))


def need(relative: str) -> Path:
    """A path below the shared data folder; skips the test, by name, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"shared data absent: {relative}")
    return path
