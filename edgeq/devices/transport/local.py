"""This machine, as if it were another: a fresh folder, and a process of its own."""

from __future__ import annotations

import sys

from edgeq.core.errors import UsageError
from edgeq.devices.transport.base import Finished, ShellTransport


class LocalTransport(ShellTransport):
    """``local:`` or ``local:/folder``."""

    scheme = "local:"

    def __init__(self, where: str) -> None:
        folder = where.removeprefix(self.scheme)
        if folder and not folder.startswith("/"):
            raise UsageError(f"--on {where!r}: write local: or local:/folder")
        super().__init__(where, folder.rstrip("/"))
        self.python = sys.executable

    def _argv(self, script: str, *, first: bool) -> list[str]:
        return ["sh", "-c", script]

    def _explain(self, finished: Finished) -> str:
        return f"{self.where}: no shell can be started: {finished.last_words}"

    def _example(self) -> str:
        return "local:/folder"
