"""Signals that end a command."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from pathlib import Path

import pytest

from edgeq.cli import signals
from edgeq.cli.signals import Terminated, ending_signals

INTERRUPTED_IMPORT = """
import signal
signal.raise_signal(signal.{name})
for _ in range(1000):
    pass
complete = True
"""


def _import_and_wait(module: str) -> None:
    importlib.import_module(module)
    time.sleep(30)  # the signal is sent again, and ends this


@pytest.mark.parametrize(
    ("name", "raised"),
    [("SIGINT", KeyboardInterrupt), ("SIGTERM", Terminated), ("SIGHUP", Terminated)],
)
def test_a_signal_in_an_import_comes_after_it(
    name: str, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in the import of a compiled package would end the process with a core dump."""
    module = f"interrupted_by_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(INTERRUPTED_IMPORT.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.getsignal(getattr(signal, name))
    with pytest.raises(raised), ending_signals():
        _import_and_wait(module)
    assert sys.modules[module].complete
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_signal_that_waits_when_the_command_is_done_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "interrupted_last.py").write_text(INTERRUPTED_IMPORT.format(name="SIGINT"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(signals, "RETRY_SECONDS", 1.0)
    with ending_signals():
        importlib.import_module("interrupted_last")
    time.sleep(1.5)


def test_signals_that_others_handle_are_left_alone() -> None:
    seen = []
    before = signal.signal(signal.SIGHUP, lambda *_: seen.append("hup"))
    try:
        with ending_signals():
            signal.raise_signal(signal.SIGHUP)
            assert seen == ["hup"]
    finally:
        signal.signal(signal.SIGHUP, before)
