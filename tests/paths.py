"""Folders of the checkout that tests read."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DEMO = ROOT / "edgeq" / "demo_model"
"""The language model that comes with edgeq."""
