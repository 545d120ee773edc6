"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP of a terminal that was closed."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
"""The file that frames of Python's import system name."""
RETRY_SECONDS = 0.02
"""After how long a signal that arrived in an import is sent again."""


class Terminated(BaseException):  # no Exception: only `main` catches it
    """SIGTERM arrived, or the terminal was closed.

    Like a KeyboardInterrupt it unwinds what is open, so that temporary files are removed.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, SIGTERM and SIGHUP raise `Terminated`, but not in an import.

    Compiled packages (onnx, onnxruntime, coremltools) call Python while they are imported, and an
    exception in such a call ends the process with a core dump, or is reported as a package that is
    not installed. A signal that arrives in an import is therefore sent again until none is running.

    A signal that another handler handles or ignores (as nohup does) is left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main_thread = threading.get_ident()
    imports_around = _running_imports(sys._getframe())
    waiting: dict[int, threading.Timer] = {}
    taken: dict[signal.Signals, Any] = {}

    def end(signum: int, frame: FrameType | None) -> None:
        waiting.pop(signum, None)
        if _running_imports(frame) > imports_around:
            again = threading.Timer(RETRY_SECONDS, signal.pthread_kill, (main_thread, signum))
            again.daemon = True
            waiting[signum] = again
            again.start()
            return
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        for ours in taken:  # removing files must not be interrupted
            if ours != signal.SIGINT:
                signal.signal(ours, signal.SIG_IGN)
        raise Terminated(signum)

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handler = signal.getsignal(name)
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(name, end)
            taken[name] = handler
    try:
        yield
    finally:
        for name, handler in taken.items():
            signal.signal(name, handler)
        for timer in waiting.values():
            timer.cancel()


def _running_imports(frame: FrameType | None) -> int:
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == _IMPORT_SYSTEM
        frame = frame.f_back
    return count
