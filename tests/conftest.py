"""Where shared data is found, how tests skip without it, and what is said of skipped tests."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests import skips

with contextlib.suppress(ImportError):  # emulated boards do without it
    from hypothesis import HealthCheck, settings

    # no test fails for being slow on a busy machine
    settings.register_profile("edgeq", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("edgeq")

os.environ.pop("COLUMNS", None)  # lines are whole unless a test asks for a width

_ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("EDGEQ_TEST_DATA", _ROOT.parent / "shared"))
DEMO = _ROOT / "edgeq" / "demo_model"


def pytest_configure() -> None:
    """Let commands that the tests start be interrupted, even if the tests run in the background.

    A shell starts background jobs with these signals ignored, and children inherit that.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (getattr(signal, "SIGHUP", None), signal.SIGTERM):
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def clear_settings(monkeypatch: pytest.MonkeyPatch, *kept: str) -> None:
    """Remove the variables that set options of edgeq, but those that are kept."""
    for name in [name for name in os.environ if name.startswith("EDGEQ_") and name not in kept]:
        monkeypatch.delenv(name)


def need(relative: str) -> Path:
    """A path below the shared data folder; skips the test, by name, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"shared data absent: {relative}")
    return path


def small_checkpoint() -> Path:
    """A trained Llama in the Hugging Face layout: stories260K, or without it the demo's model."""
    shared = SHARED / "models/stories260K"
    return shared if shared.exists() else DEMO


def story_text() -> Path:
    """Text of the kind that `small_checkpoint` was trained on."""
    shared = SHARED / "data/text_tinystories_train/tinystories_train_2MB.txt"
    return shared if shared.exists() else DEMO / "heldout.txt"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was skipped and why, a line for each reason; keep the list for another run."""
    found = []
    for report in terminalreporter.stats.get("skipped", []):
        told = report.longrepr
        found.append((report.nodeid, str(told[2] if isinstance(told, tuple) else told)))
    cache = getattr(config, "cache", None)
    if cache is not None:  # `pytest @FILE` of these runs only what was skipped
        cache.set("edgeq/skipped", sorted({node for node, _ in found}))
    terminalreporter.section("not run")
    for line in skips.summary(found, str(config.option.markexpr)):
        terminalreporter.write_line(line)
