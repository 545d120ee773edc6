"""A command run in this process, with what it printed."""

from __future__ import annotations

import pytest

from edgeq.cli import main


class Said:
    """Runs a command, checks its exit code, and keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *args: object, code: int = 0) -> str:
        self._capsys.readouterr()
        assert main([str(arg) for arg in args]) == code, self._capsys.readouterr().err
        self.out, self.err = self._capsys.readouterr()
        return self.out


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(capsys)
