"""Another machine by the user's own ``ssh``, with its configuration, keys and agent."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from pathlib import Path

from edgeq.core.errors import UsageError
from edgeq.devices.transport.base import Finished, ShellTransport, split_folder

OPTIONS = "EDGEQ_SSH_OPTIONS"
"""The environment variable of options for ``ssh``, as "-i key -o ProxyJump=gate"."""

_SHORT = 104 - 17 - len("/edgeq-12345678/s") - 1
_PLACE = re.compile(
    r"(?:(?P<user>[^@:\s-][^@:\s]*)@)?(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^@:\[\]\s-][^@:\[\]\s]*)"
    r"(?::(?P<port>\d{1,5}))?"
)


class SshTransport(ShellTransport):
    """``ssh://[user@]host[:port][/folder]``.

    One connection is opened and shared by all commands. Nothing is ever asked: a password or an
    unknown host key is an error.
    """

    scheme = "ssh://"

    def __init__(self, where: str) -> None:
        place, folder = split_folder(where.removeprefix(self.scheme))
        match = _PLACE.fullmatch(place)
        if not match:
            raise UsageError(
                f"--on {where!r}: write ssh://user@host, ssh://user@host:port or "
                "ssh://host/folder; passwords are not taken, use a key"
            )
        super().__init__(where, folder)
        self._place = place
        self._user, self._port = match["user"], match["port"]
        self._host = match["host"].strip("[]")
        self._name = f"{self._user}@{self._host}" if self._user else self._host
        self._control: Path | None = None

    def _argv(self, script: str, *, first: bool) -> list[str]:
        if self._control is None:
            # a socket's path has at most 104 bytes, of which ssh wants 17 for a name of its own
            short = None if len(tempfile.gettempdir()) <= _SHORT else "/tmp"
            self._control = Path(tempfile.mkdtemp(prefix="edgeq-", dir=short))
        chosen = shlex.split(os.environ.get(OPTIONS, ""))  # first: ssh keeps what comes first
        settings = {
            "BatchMode": "yes",
            "ConnectTimeout": "10",
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "4",
            "ClearAllForwardings": "yes",
            "ForwardAgent": "no",
            "ControlMaster": "yes" if first else "no",
            "ControlPath": str(self._control / "s"),
            "ControlPersist": "no",
        }
        options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        if self._port:
            options += ["-p", self._port]
        if self._user:
            options += ["-l", self._user]
        command = f"exec sh -c {shlex.quote(script)}"
        return ["ssh", *chosen, "-T", "-x", *options, "--", self._host, command]

    def _disconnect(self) -> None:
        if self._control is not None:
            shutil.rmtree(self._control, ignore_errors=True)
            self._control = None

    def _explain(self, finished: Finished) -> str:
        errors = finished.errors
        port = f" -p {self._port}" if self._port else ""
        login = f"ssh{port} {self._name}"
        for words, text in (
            ("Could not resolve hostname", f"the host {self._host!r} is unknown; check its name, "
             "or give its address"),
            ("Connection refused", f"{self._host} refuses the connection; start its SSH server "
             "(Raspberry Pi: sudo systemctl enable --now ssh) and check the port"),
            ("IDENTIFICATION HAS CHANGED", f"the host key of {self._host} has changed: it was set "
             "up anew, or it is another machine; if you know why, forget the old key with "
             f"ssh-keygen -R {self._known_as()}, then log in once with {login}"),
            ("Host key verification failed", f"the host key of {self._host} is not known yet; log "
             f"in once with {login} and accept it"),
            ("Permission denied", f"{self._host} does not accept the key; bring it there with "
             f"ssh-copy-id{port} {self._name}, load it with ssh-add, or name it with "
             f"{OPTIONS}='-i FILE'"),
            ("timed out", f"{self._host} does not answer; is it on, and in this network?"),
            ("No route to host", f"{self._host} cannot be reached; is it on, and in this network?"),
            ("Network is unreachable", f"{self._host} cannot be reached; is there a network?"),
        ):  # fmt: skip
            if words.lower() in errors.lower():
                return f"{self.where}: {text} (ssh: {finished.last_words})"
        return f"{self.where}: ssh failed: {finished.last_words or f'exit code {finished.code}'}"

    def _known_as(self) -> str:
        return f"'[{self._host}]:{self._port}'" if self._port else self._host

    def _example(self) -> str:
        return f"ssh://{self._place}/folder"
