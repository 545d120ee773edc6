"""A command in a terminal of its own: a real pseudoterminal, whose screen is read as it comes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType

from tests.paths import ROOT

ROWS, COLUMNS = 24, 100
PATIENCE_S = 120.0


class Terminal:
    """A command that believes that a person uses it.

    Args:
        arguments: of ``edgeq``.
        home: the user's folder.
    """

    def __init__(self, *arguments: object, home: Path) -> None:
        self._side, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith(("XDG_", "COLUMNS", "LINES"))}  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgeq", *map(str, arguments)],
            stdin=other, stdout=other, stderr=other, start_new_session=True,
            preexec_fn=_take_terminal,
            env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm",
                 "HOME": str(home), "EDGEQ_CACHE": os.environ.get("EDGEQ_CACHE", "")
                 or str(Path.home() / ".cache" / "edgeq")},
        )  # fmt: skip
        os.close(other)
        self.said = ""
        self._seen = 0

    def until(self, pattern: str) -> re.Match[str]:
        """Read until the screen has shown something new that matches."""
        limit = time.monotonic() + PATIENCE_S
        while not (match := re.compile(pattern).search(self.said, self._seen)):
            assert self._read(limit), f"{pattern!r} was not shown: {self.said[-2000:]!r}"
        self._seen = match.end()
        return match

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._side, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C at a prompt, when the line editor waits for a key.

        Python's readline notices a signal that comes between two of its reads only with the key
        after it.
        """
        time.sleep(0.5)
        self.type("\x03")

    def end(self) -> int:
        """Read to the end; the exit code."""
        limit = time.monotonic() + PATIENCE_S
        while self._read(limit):
            pass
        return self.process.wait(PATIENCE_S)

    def _read(self, limit: float) -> bool:
        ready, _, _ = select.select([self._side], [], [], max(0.0, limit - time.monotonic()))
        if not ready:
            return False
        try:
            new = os.read(self._side, 65536)
        except OSError:  # Linux says so when the command has ended
            return False
        self.said += new.decode("utf-8", "replace")
        return bool(new)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._side)


def _take_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C becomes a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
