"""A real sshd on the loopback interface, and a wire to it that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgeq.devices.transport.ssh import OPTIONS


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def eventually(what: Callable[[], bool], seconds: float = 15.0) -> bool:
    limit = time.monotonic() + seconds
    while not what():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Sshd:
    """A running server. Its sessions make their folders in `parent`."""

    port: int
    folder: Path
    parent: Path
    process: subprocess.Popen[bytes]

    @property
    def where(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    @property
    def left(self) -> list[Path]:
        """What sessions have left behind."""
        return sorted(self.parent.iterdir())

    def pids(self) -> list[int]:
        """Numbers of what runs there by our doing."""
        return [int(f.name.rpartition(".")[2]) for f in self.parent.glob("*/.run.*")]

    def options(self, **changed: str) -> str:
        """For ``ssh``: no file of the user's is read, and none is written."""
        settings = {
            "IdentityFile": str(self.folder / "key"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.folder / "known"),
            "GlobalKnownHostsFile": "/dev/null",
            "HostKeyAlias": "loopback",
            "IdentityAgent": "none",
            **changed,
        }
        return "-F none " + " ".join(f"-o {key}={value}" for key, value in settings.items())


@contextlib.contextmanager
def sshd(
    folder: Path, environment: Mapping[str, str], *extra: str, parent: Path | None = None
) -> Iterator[Sshd]:
    """A server for the user who runs the tests.

    Args:
        folder: for its keys and configuration.
        environment: of its sessions.
        extra: lines of its configuration.
        parent: TMPDIR of its sessions; a folder of its own if None.
    """
    program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None or shutil.which("ssh") is None:
        pytest.skip("sshd or ssh is absent: apt-get install openssh-server")
    if os.getuid() == 0:  # what a service script would have made
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    folder.mkdir(exist_ok=True)
    for name in ("key", "host"):
        if not (folder / name).exists():
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)],
                check=True,
            )
    shutil.copy(folder / "key.pub", folder / "authorized")
    kind, key, *_ = (folder / "host.pub").read_text().split()
    (folder / "known").write_text(f"loopback {kind} {key}\n")
    if parent is None:
        parent = folder / "tmp"
        parent.mkdir(exist_ok=True)
    port = free_port()
    variables = {"TMPDIR": str(parent), **environment}
    (folder / "config").write_text(
        "\n".join(
            [
                f"ListenAddress 127.0.0.1:{port}",
                f"HostKey {folder / 'host'}",
                f"AuthorizedKeysFile {folder / 'authorized'}",
                f"PidFile {folder / 'pid'}",
                "StrictModes no",
                "UsePAM no",
                "PermitRootLogin yes",
                "PasswordAuthentication no",
                "KbdInteractiveAuthentication no",
                "SetEnv " + " ".join(f'{key}="{value}"' for key, value in variables.items()),
                *extra,
                "",
            ]
        )
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "-f", str(folder / "config"), "-D", "-e"], stderr=log)
    try:
        assert eventually(lambda: _listens(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield Sshd(port, folder, parent, process)
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@dataclass
class Wire:
    """A port that leads to another, until it is cut."""

    to: int
    port: int = 0
    ends: list[socket.socket] = field(default_factory=list)
    flow: threading.Event = field(default_factory=threading.Event)
    """Cleared, nothing passes, and neither side is told."""

    def __enter__(self) -> Wire:
        self.flow.set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Reset all connections, both ways."""
        self.flow.set()
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
        for end in self.ends:
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self.to))
                self.ends += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := a.recv(1 << 16):
                self.flow.wait()
                b.sendall(piece)
            b.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of so few bytes; skips the test where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "edgeq-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


__all__ = ["OPTIONS", "Sshd", "Wire", "alive", "eventually", "free_port", "small_disk", "sshd"]
