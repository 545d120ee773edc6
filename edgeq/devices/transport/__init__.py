"""Transports: run something on another machine and bring its files back.

    base    the protocol, and its implementation with a POSIX shell
    local   this machine, in a fresh folder
    ssh     the user's own `ssh`
    adb     Android's `adb`

A transport owns one new folder on the other machine, made when it is entered and removed when it
is left:

    with open_transport("ssh://pi@raspberrypi") as there:
        there.push(Path("model.edgeq"), "model.edgeq")
        there.run(["sha256sum", "model.edgeq"], on_line=print)

The folder belongs to a process there that lives as long as the connection. When that ends,
whatever the reason, it kills what was started and removes the folder.
"""

from __future__ import annotations

from edgeq.core.errors import UsageError
from edgeq.devices.transport.adb import AdbTransport
from edgeq.devices.transport.base import Finished, Transport
from edgeq.devices.transport.local import LocalTransport
from edgeq.devices.transport.ssh import SshTransport

__all__ = ["Finished", "Transport", "open_transport"]

FORMS = "ssh://user@host, ssh://host:port/folder, adb://serial, local:"


def open_transport(where: str) -> Transport:
    """The transport to a place; nothing is connected before it is entered.

    Args:
        where: ``ssh://[user@]host[:port][/folder]``, ``adb://[serial][/folder]`` or
            ``local:[/folder]``. The folder is the one in which the fresh one is made; without it
            TMPDIR there, or else /var/tmp or /tmp.

    Raises:
        UsageError: it is none of these.
    """
    for kind in (SshTransport, AdbTransport, LocalTransport):
        if where.startswith(kind.scheme):
            return kind(where)
    raise UsageError(f"--on {where!r} names no place; write one of {FORMS}")
