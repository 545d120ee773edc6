"""The Transport protocol, and its implementation with a POSIX shell on the other machine."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, Protocol

from edgeq.core.errors import DeviceError
from edgeq.core.files import write_whole
from edgeq.core.progress import Progress

_CHUNK = 1 << 20
_LEAVE_S = 30.0
"""Seconds that removing the folder may take."""
_MARK = b"edgeq:"
"""Begins our first line; what a login script prints before it is passed over."""
_SAY = r'printf "\nedgeq:%s\n" '

# One line each, as the user's shell there may be csh or fish. Process numbers are kept as names
# of empty files, which a full disk can still hold.
_KEEP = (
    'trap "" HUP INT TERM PIPE; umask 077; t={folder}; '
    'if [ -z "$t" ]; then for t in "$TMPDIR" /var/tmp /tmp /data/local/tmp; do '
    '[ -n "$t" ] && [ -d "$t" ] && [ -w "$t" ] && break; done; fi; '
    'd=$(mktemp -d "$t/edgeq-XXXXXX") || exit 73; '
    f'{_SAY}"$d"; cat >/dev/null; '
    'for p in "$d"/.run.*; do kill -9 "${{p##*.}}" 2>/dev/null; done; '
    'rm -rf "$d" 2>/dev/null || {{ sleep 1; rm -rf "$d"; }} && echo edgeq:gone'
)
_RUN = (
    f'{_SAY}""; '
    'cd {folder} || exit 72; {command} </dev/null & p=$!; : >".run.$p"; wait "$p"; r=$?; '
    'rm -f ".run.$p"; exit $r'
)
_FULL = ("no space left", "quota exceeded")


@dataclass(frozen=True)
class Finished:
    """A command that ended on the other machine.

    Args:
        code: its exit code; 128 and more: the number of the signal that killed it, plus 128.
        errors: the end of what it wrote to stderr.
    """

    code: int
    errors: str

    @property
    def last_words(self) -> str:
        """The last line of its stderr."""
        lines = [line.strip() for line in self.errors.splitlines() if line.strip()]
        return lines[-1] if lines else ""


class Transport(Protocol):
    """A place where commands can be run, in a fresh folder of its own."""

    where: str
    """As the user wrote it."""
    python: str
    """The interpreter to try first."""
    no_python: str
    """How to fix it if the program is absent."""

    @property
    def folder(self) -> str:
        """The fresh folder, absolute."""

    def __enter__(self) -> Transport:
        """Connect, and make the folder."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill what still runs, remove the folder and disconnect."""

    def push(self, source: Path | bytes, name: str, progress: Progress | None = None) -> None:
        """Put a file, or all files of a folder, into the folder."""

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Finished:
        """Run a command in the folder."""

    def pull(self, name: str, to: Path) -> None:
        """Bring a file back, whole or not at all."""

    def remove(self, name: str) -> None:
        """Remove a file or folder from the folder."""


class ShellTransport:
    """A transport to wherever a POSIX ``sh`` can be started.

    A kind of it says how (`_argv`) and what its failures mean (`_explain`).
    """

    scheme: str
    _lost_code = 255
    """What the client exits with when the connection breaks."""
    python = "python3"
    no_python = "install Python 3.11 or later there"

    def __init__(self, where: str, parent: str) -> None:
        self.where = where
        self._parent = parent
        self._folder: str | None = None
        self._keeper: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def _argv(self, script: str, *, first: bool) -> list[str]:
        """The command here that runs a script there; ``first`` opens the connection."""
        raise NotImplementedError

    def _explain(self, finished: Finished) -> str:
        """Why the connection could not be made, and how to fix that."""
        raise NotImplementedError

    def _disconnect(self) -> None:
        """Remove what the connection left here."""

    @property
    def folder(self) -> str:
        """The fresh folder, absolute."""
        if self._folder is None:
            raise DeviceError(f"{self.where} is not connected; use it in a with block")
        return self._folder

    def __enter__(self) -> ShellTransport:
        """Connect, and make the folder.

        Raises:
            DeviceError: it cannot be reached, refuses us, or no folder can be made there.
        """
        script = _KEEP.format(folder=shlex.quote(self._parent))
        try:
            self._said = tempfile.TemporaryFile()
            self._keeper = self._start(script, first=True, out=subprocess.PIPE, err=self._said)
            assert self._keeper.stdout is not None
            if (line := _ours(self._keeper.stdout)) is not None:
                self._folder = line
                return self
            finished = Finished(self._keeper.wait(), _tail(self._said))
            if finished.code == 73:
                raise DeviceError(
                    f"{self.where}: no folder can be made there: {finished.last_words}; name "
                    "one that "
                    f"can be written, as {self._example()}"
                )
            raise DeviceError(self._explain(finished))
        except BaseException:
            self._end()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Kill what still runs, remove the folder and disconnect.

        Raises:
            DeviceError: the folder could not be removed, or nobody knows.
        """
        folder, gone = self.folder, self._end()
        if gone or (error is not None and not isinstance(error, DeviceError)):
            return
        left = (
            f"{folder} is removed there as soon as {self.where} notices that the connection ended; "
            "look whether it is gone"
        )
        if error is not None:
            raise DeviceError(f"{error}; {left}") from error
        raise DeviceError(f"{self.where}: the connection broke at the very end; {left}")

    def push(self, source: Path | bytes, name: str, progress: Progress | None = None) -> None:
        """Put a file, or all files of a folder, into the folder.

        Args:
            source: here; or the content itself.
            name: relative to the folder; folders on the way are made.
            progress: called with the name, and bytes done and in all.

        Raises:
            DeviceError: the disk there is full, or the connection broke.
            OSError: it cannot be read here.
        """
        if isinstance(source, Path) and source.is_dir():
            for file in sorted(f for f in source.rglob("*") if f.is_file()):
                self.push(file, f"{name}/{file.relative_to(source).as_posix()}", progress)
            return
        total = len(source) if isinstance(source, bytes) else source.stat().st_size
        target = self._inside(name)
        folder = shlex.quote(str(PurePosixPath(target).parent))
        script = f"mkdir -p {folder} && cat >{shlex.quote(target)}"
        with self._talk(script, stdin=subprocess.PIPE) as (process, log):
            assert process.stdin is not None
            done = 0
            # a pipe that breaks: what the command said about it is told below
            with contextlib.suppress(BrokenPipeError):
                for piece in _pieces(source):
                    process.stdin.write(piece)
                    done += len(piece)
                    if progress:
                        progress(PurePosixPath(name).name, done, total)
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            finished = self._finish(process, log)
        if finished.code:
            raise DeviceError(self._not_pushed(name, total, finished))

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Finished:
        """Run a command in the folder; it ends with the connection at the latest.

        Args:
            command: the program and its arguments, as they are.
            environment: variables to set.
            on_line: called with each line of its stdout.

        Raises:
            DeviceError: the connection broke.
        """
        words = [f"{key}={value}" for key, value in (environment or {}).items()]
        line = shlex.join((["env", *words] if words else []) + list(command))
        script = _RUN.format(folder=shlex.quote(self.folder), command=line)
        with self._talk(script, out=subprocess.PIPE) as (process, log):
            assert process.stdout is not None
            _ours(process.stdout)
            for raw in process.stdout:
                if on_line:
                    on_line(raw.decode("utf-8", "replace").rstrip("\r\n"))
            return self._finish(process, log)

    def pull(self, name: str, to: Path) -> None:
        """Bring a file back, whole or not at all.

        Raises:
            DeviceError: it is not there, or the connection broke.
            EdgeqError: it cannot be written here.
        """
        script = f'{_SAY}""; cat {shlex.quote(self._inside(name))}'
        with self._talk(script, out=subprocess.PIPE) as (process, log):
            assert process.stdout is not None
            out = process.stdout

            def pieces() -> Iterator[bytes]:
                _ours(out)
                while piece := out.read(_CHUNK):
                    yield piece
                finished = self._finish(process, log)
                if finished.code:
                    raise DeviceError(
                        f"{self.where}: {name} cannot be brought back: {finished.last_words}"
                    )

            write_whole(to, pieces(), "the copy")

    def remove(self, name: str) -> None:
        """Remove a file or folder from the folder.

        Raises:
            DeviceError: it cannot be removed, or the connection broke.
        """
        finished = self.run(["rm", "-rf", self._inside(name)])
        if finished.code:
            raise DeviceError(f"{self.where}: {name} cannot be removed: {finished.last_words}")

    def _inside(self, name: str) -> str:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise DeviceError(f"{name!r} is not below the folder of {self.where}")
        return f"{self.folder}/{path}"

    def _example(self) -> str:
        return f"{self.scheme}.../folder"

    def _not_pushed(self, name: str, total: int, finished: Finished) -> str:
        if any(words in finished.errors.lower() for words in _FULL):
            return (
                f"{self.where}: no space left in {self.folder} for {name} ({total / 2**20:.1f} "
                f"MiB); free some, or name a folder on a larger disk, as {self._example()}"
            )
        return f"{self.where}: {name} cannot be written there: {finished.last_words}"

    def _start(
        self,
        script: str,
        *,
        first: bool = False,
        stdin: int = subprocess.PIPE,
        out: int = subprocess.DEVNULL,
        err: IO[bytes],
    ) -> subprocess.Popen[bytes]:
        argv = self._argv(script, first=first)
        try:
            # in a session of its own: Ctrl-C is ours to handle, and there is nobody to ask
            return subprocess.Popen(
                argv, stdin=stdin, stdout=out, stderr=err, start_new_session=True
            )
        except FileNotFoundError as err_:
            raise DeviceError(
                f"{self.where} needs the program {argv[0]!r} here, which is not installed"
            ) from err_

    @contextlib.contextmanager
    def _talk(
        self, script: str, *, stdin: int = subprocess.DEVNULL, out: int = subprocess.DEVNULL
    ) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
        """A command there, killed here if the block fails; the keeper kills it there."""
        with tempfile.TemporaryFile() as log:
            process = self._start(script, stdin=stdin, out=out, err=log)
            try:
                yield process, log
            finally:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        with contextlib.suppress(OSError):
                            pipe.close()

    def _finish(self, process: subprocess.Popen[bytes], log: IO[bytes]) -> Finished:
        """How a command ended.

        Raises:
            DeviceError: the connection broke.
        """
        finished = Finished(process.wait(), _tail(log))
        if finished.code and self._broken(finished.code):
            assert self._said is not None
            words = Finished(0, _tail(self._said)).last_words or finished.last_words
            raise DeviceError(
                f"{self.where}: the connection broke" + (f" ({words})" if words else "")
            )
        return finished

    def _broken(self, code: int) -> bool:
        """Whether the keeper's connection has ended too; it may take a moment to notice."""
        assert self._keeper is not None
        if code == self._lost_code:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._keeper.wait(1.0)
        return self._keeper.poll() is not None

    def _end(self) -> bool:
        """End the process that owns the folder; whether it reported that the folder is removed."""
        keeper, self._keeper, self._folder = self._keeper, None, None
        gone = False
        if keeper is not None:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired, OSError, ValueError):
                    rest, _ = keeper.communicate(timeout=_LEAVE_S)
                    gone = _MARK + b"gone" in rest
            finally:
                keeper.kill()
                keeper.wait()
        if self._said is not None:
            self._said.close()
            self._said = None
        self._disconnect()
        return gone


def split_folder(rest: str) -> tuple[str, str]:
    """``host/folder`` as host and ``/folder``, which is empty if there is none."""
    match = re.fullmatch(r"([^/]*)(/.*)?", rest, re.DOTALL)
    assert match is not None
    return match[1], (match[2] or "").rstrip("/")


def _pieces(source: Path | bytes) -> Iterable[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while piece := file.read(_CHUNK):
            yield piece


def _ours(out: IO[bytes]) -> str | None:
    """The text of the first line that begins with the mark; None if there is none."""
    for line in out:
        if line.startswith(_MARK):
            return line[len(_MARK) :].decode("utf-8", "replace").strip()
    return None


def _tail(log: IO[bytes]) -> str:
    size = log.seek(0, 2)
    log.seek(max(size - (1 << 14), 0))
    return log.read().decode("utf-8", "replace")
