"""Interaction with a user at a terminal: a live rate, Ctrl-C, line editing, history."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from edgeq.core.errors import UsageError

if TYPE_CHECKING:
    from edgeq.runtime.generate import Chunk

REFRESH_S = 0.2
"""Seconds after which the rate is drawn again."""
_FEWEST_ROWS = 5
"""A terminal with fewer rows does not show the rate."""
KEPT = 1000
"""Most messages that the history keeps."""
_LARGEST = 64 << 20
"""Largest size of a history file that is read, in bytes."""


def default_history() -> Path:
    """The default history file, in the user's state folder (XDG_STATE_HOME)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "edgeq" / "chat_history"


class LiveRate:
    """Shows the rate of a running answer in the last row of the terminal, which does not scroll.

    The row is excluded from the scrolling region (DECSTBM of the VT100) while the answer runs, as
    package managers do. Nothing is drawn unless standard output and standard error are terminals.
    The cursor must be at the beginning of a line when the context is entered.
    """

    def __init__(self) -> None:
        self._rows = 0  # rows of the terminal; 0 draws nothing
        self._drawn = time.monotonic()

    def __enter__(self) -> LiveRate:
        if sys.stdout.isatty() and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._reserve("\n")
        return self

    def show(self, chunk: Chunk) -> None:
        """Draw the rate of an answer, at most every `REFRESH_S` seconds."""
        now = time.monotonic()
        if not self._rows or chunk.token is None or now - self._drawn < REFRESH_S:
            return
        self._drawn = now
        if shutil.get_terminal_size().lines != self._rows:
            self._reserve("")
        rate = chunk.decode_tokens_per_s
        text = f"{chunk.n_generated} tokens" + (f", {rate:.1f} tok/s" if rate else "")
        self._put(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[2m{text}\x1b[0m\x1b8")

    def __exit__(self, *_: object) -> None:
        if self._rows:
            self._put(f"\x1b7\x1b[{self._rows};1H\x1b[2K\x1b[r\x1b8")
            self._rows = 0

    def _reserve(self, first: str) -> None:
        """Exclude the last row from the scrolling region; ``first`` makes room for it."""
        rows = shutil.get_terminal_size().lines
        self._rows = rows if rows >= _FEWEST_ROWS else 0
        if self._rows:
            up = "\x1b[1A" if first else ""
            self._put(f"{first}\x1b7\x1b[1;{rows - 1}r\x1b8{up}")

    def _put(self, text: str) -> None:
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()


class Interrupt:
    """Whether Ctrl-C was pressed.

    Attributes:
        asked: whether it was pressed once; pressing it again raises KeyboardInterrupt.
    """

    asked = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Make the first Ctrl-C only set a flag; the second one raises KeyboardInterrupt.

    An answer then ends between two tokens, and its text so far is complete.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def ask(signum: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


class CtrlC:
    """Ctrl-C of a session, while it is entered: it does nothing but where it is heard.

    So a key that is pressed twice does not end the session while the first press is dealt with.
    """

    def __init__(self) -> None:
        self._heard = False
        self._before: Any = None  # None is no handler that Python could restore

    def __enter__(self) -> CtrlC:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """While it is entered, the first press raises KeyboardInterrupt."""
        self._heard = True
        try:
            yield
        finally:
            self._heard = False

    def _press(self, signum: int, frame: FrameType | None) -> None:
        if self._heard:
            self._heard = False
            raise KeyboardInterrupt


class LineEditor:
    """Reads lines from the user, with editing keys, history and completion if readline exists.

    Args:
        history: file of earlier messages, which only its user can read; None keeps no history.
        words: words that the Tab key completes.

    Raises:
        UsageError: the history file cannot be used.
    """

    def __init__(self, history: Path | None, words: Sequence[str] = ()) -> None:
        self._history = history
        try:
            import readline
        except ImportError:  # Windows
            return
        earlier = _read_history(history) if history else []
        for line in earlier:
            _remember(line)
        readline.set_auto_history(False)

        def complete(text: str, state: int) -> str | None:
            start = readline.get_line_buffer().lstrip()
            matches = [word for word in words if word.startswith(text)] if start == text else []
            return matches[state] + " " if state < len(matches) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" \t\n")
        readline.parse_and_bind("tab: complete")
        # pasted text of several lines is one message
        readline.parse_and_bind("set enable-bracketed-paste on")

    def ask(self, prompt: str) -> str | None:
        """The next line; None at the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        if not sys.stdout.isatty():  # the prompt is not part of the result
            sys.stderr.write(prompt)
            sys.stderr.flush()
            return sys.stdin.readline() or None
        try:
            line = input(prompt)
        except EOFError:
            return None
        if line.strip():
            self._keep(line)
        return line

    def _keep(self, line: str) -> None:
        _remember(line)
        if self._history is not None:
            with contextlib.suppress(OSError):  # a full disk must not end the conversation
                descriptor = os.open(self._history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _remember(line: str) -> None:
    """Add a line to readline's history, if readline can represent it."""
    with contextlib.suppress(ImportError, UnicodeEncodeError):  # the locale may lack a character
        import readline

        readline.add_history(line.replace("\0", ""))  # which would end the string in readline


def _read_history(path: Path) -> list[str]:
    """Read the earlier messages, oldest first, and truncate a long file to `KEPT` of them.

    Raises:
        UsageError: the file cannot be read or created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not path.exists():
            return []
        if not path.is_file():
            raise UsageError(f"the history {path} is not a file; give another file with --history")
        if path.stat().st_size > _LARGEST:
            raise UsageError(
                f"the history {path} is larger than {_LARGEST >> 20} MiB; delete it, or give "
                "another file with --history"
            )
        text = path.read_bytes().decode("utf-8", "replace")
    except OSError as err:
        raise UsageError(
            f"the history {path} cannot be used: {err.strerror}; give another file with "
            "--history, or keep none with --no-history"
        ) from err
    # not splitlines(), because JSON does not escape other line separators such as U+2028
    lines = [line for line in text.split("\n") if line]
    entries = list(map(_entry, lines))
    if entries and entries[0] is None:
        raise UsageError(f"{path} is not a history file of edgeq; give another file with --history")
    messages = [entry for entry in entries if entry is not None]  # a full disk may truncate one
    if len(lines) > 2 * KEPT:
        from edgeq.core.files import write_whole

        kept = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in messages[-KEPT:])
        write_whole(path, [kept.encode("utf-8", "replace")], "the history")
        path.chmod(0o600)
    return messages[-KEPT:]


def _entry(line: str) -> str | None:
    """The message of a line of the history; None if the line is damaged."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, str) else None
