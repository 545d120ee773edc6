"""A stand-in for the device's end of adb, written from the protocol's description.

The `adb` client and its server are the real ones; what is no Android is this small daemon, which
answers them over TCP and runs commands in this machine's shell, as adbd does with the service
``shell,v2,raw``.

Source: Android's packages/modules/adb: docs/dev/protocol.md ("message" headers, CNXN, OPEN, OKAY,
WRTE, CLSE) and shell_protocol.h (packets of the shell's version 2).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import pytest

from tests.loopback import free_port

VERSION, MOST = 0x01000001, 1 << 18
STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN = range(5)
ABOUT = b"device::ro.product.name=standin;ro.product.model=standin;features=shell_v2"


class Daemon:
    """Takes one connection after another; its sessions have this environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = {**os.environ, **environment}
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.server.getsockname()[1])
        self.link: Link | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire, _ = self.server.accept()
                self.link = Link(wire, self.environment)
                threading.Thread(target=self.link.serve, daemon=True).start()

    def unplug(self) -> None:
        """Nothing answers from now on."""
        self.server.close()
        if self.link:
            self.link.end()


class Link:
    """A connection and its streams."""

    def __init__(self, wire: socket.socket, environment: Mapping[str, str]) -> None:
        self.wire, self.environment = wire, environment
        self.streams: dict[int, Stream] = {}
        self.sending = threading.Lock()

    def send(self, command: bytes, a: int, b: int, data: bytes = b"") -> None:
        (number,) = struct.unpack("<I", command)
        head = struct.pack("<6I", number, a, b, len(data), sum(data), number ^ 0xFFFFFFFF)
        with self.sending, contextlib.suppress(OSError):
            self.wire.sendall(head + data)

    def serve(self) -> None:
        with contextlib.suppress(OSError, EOFError), self.wire.makefile("rb") as incoming:
            while True:
                command, a, b, data = self._message(incoming)
                if command == b"CNXN":
                    self.send(b"CNXN", VERSION, MOST, ABOUT)
                elif command == b"OPEN":
                    service = data.rstrip(b"\0").decode()
                    kind, _, line = service.partition(":")
                    if kind.split(",")[:2] != ["shell", "v2"]:
                        self.send(b"CLSE", 0, a)
                        continue
                    mine = len(self.streams) + 1
                    self.streams[mine] = Stream(self, mine, a, line)
                elif command == b"WRTE":
                    self.send(b"OKAY", b, a)
                    self.streams[b].take(data)
                elif command == b"OKAY":
                    self.streams[b].ready.release()
                elif command == b"CLSE" and b in self.streams:
                    self.streams[b].hang_up()
        self.end()

    @staticmethod
    def _message(incoming: IO[bytes]) -> tuple[bytes, int, int, bytes]:
        head = incoming.read(24)
        if len(head) < 24:
            raise EOFError
        command, a, b, size, _, _ = struct.unpack("<4s5I", head)
        return command, a, b, incoming.read(size)

    def end(self) -> None:
        for stream in list(self.streams.values()):
            stream.hang_up()
        with contextlib.suppress(OSError):
            self.wire.shutdown(socket.SHUT_RDWR)
        self.wire.close()


class Stream:
    """A command that runs."""

    def __init__(self, link: Link, mine: int, theirs: int, line: str) -> None:
        self.link, self.mine, self.theirs = link, mine, theirs
        self.ready, self.writing = threading.Semaphore(1), threading.Lock()
        self.held = b""
        self.gone = False
        self.process = subprocess.Popen(
            ["sh", "-c", line], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=link.environment, start_new_session=True,
        )  # fmt: skip
        link.send(b"OKAY", mine, theirs)
        threading.Thread(target=self._watch, daemon=True).start()

    def take(self, data: bytes) -> None:
        """Packets for the shell, which may come in pieces."""
        self.held += data
        assert self.process.stdin is not None
        while len(self.held) >= 5:
            kind, size = struct.unpack("<BI", self.held[:5])
            if len(self.held) < 5 + size:
                return
            piece, self.held = self.held[5 : 5 + size], self.held[5 + size :]
            with contextlib.suppress(BrokenPipeError, ValueError):
                if kind == STDIN:
                    self.process.stdin.write(piece)
                    self.process.stdin.flush()
                elif kind == CLOSE_STDIN:
                    self.process.stdin.close()

    def hang_up(self) -> None:
        """The other side is gone."""
        self.gone = True
        self.ready.release()
        with contextlib.suppress(BrokenPipeError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGHUP)

    def _watch(self) -> None:
        readers = [
            threading.Thread(target=self._pass_on, args=(kind, pipe), daemon=True)
            for kind, pipe in ((STDOUT, self.process.stdout), (STDERR, self.process.stderr))
        ]
        for reader in readers:
            reader.start()
        code = self.process.wait()
        for reader in readers:
            reader.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                assert pipe is not None
                pipe.close()
        self._say(EXIT, bytes([code & 0xFF if code >= 0 else 128 - code]))
        self.link.send(b"CLSE", self.mine, self.theirs)

    def _pass_on(self, kind: int, pipe: IO[bytes]) -> None:
        while piece := os.read(pipe.fileno(), 1 << 15):
            self._say(kind, piece)

    def _say(self, kind: int, piece: bytes) -> None:
        with self.writing:
            self.ready.acquire()  # one message at a time is under way
            if not self.gone:
                data = struct.pack("<BI", kind, len(piece)) + piece
                self.link.send(b"WRTE", self.mine, self.theirs, data)
            else:
                self.ready.release()


@contextlib.contextmanager
def adb_server(folder: Path) -> Iterator[Mapping[str, str]]:
    """A real adb server of our own; yields the environment in which the client finds it."""
    program = shutil.which("adb")
    if program is None:
        pytest.skip("adb is absent: apt-get install adb")
    found = {"ANDROID_ADB_SERVER_PORT": str(free_port()), "HOME": str(folder)}
    environment = {**os.environ, **found, "ADB_MDNS": "0", "TMPDIR": str(folder)}
    run = {"env": environment, "check": True, "capture_output": True, "timeout": 30}
    subprocess.run([program, "start-server"], **run)  # type: ignore[call-overload]
    try:
        yield found
    finally:
        subprocess.run([program, "kill-server"], **run)  # type: ignore[call-overload]
