"""An Android device by Android's own ``adb``, in the shell of its developer user."""

from __future__ import annotations

import re
import shlex

from edgeq.core.errors import UsageError
from edgeq.devices.transport.base import Finished, ShellTransport, split_folder


class AdbTransport(ShellTransport):
    """``adb://[serial][/folder]``; without a serial the only device there is.

    Android 7 or later, whose shell passes bytes and exit codes as they are.
    """

    scheme = "adb://"
    _lost_code = 1
    no_python = (
        "Android has no Python, and adb's user may not use that of Termux; run the SSH server of "
        "Termux instead (pkg install openssh python python-numpy; sshd; here: adb forward "
        "tcp:8022 tcp:8022) and use --on ssh://localhost:8022, or name a Python that adb's user "
        "may run with --on-python"
    )

    def __init__(self, where: str) -> None:
        self._serial, folder = split_folder(where.removeprefix(self.scheme))
        if not re.fullmatch(r"(?:[\w.\[][\w.:()\[\]-]*)?", self._serial):
            raise UsageError(f"--on {where!r}: write adb://serial, as `adb devices` shows it")
        super().__init__(where, folder)

    def _argv(self, script: str, *, first: bool) -> list[str]:
        chosen = ["-s", self._serial] if self._serial else []
        return ["adb", *chosen, "shell", "-T", f"exec sh -c {shlex.quote(script)}"]

    def _explain(self, finished: Finished) -> str:
        for words, text in (
            ("unauthorized", "the device has not allowed this computer; unlock it and accept the "
             "question it shows"),
            ("offline", "the device is offline; plug it in again, or adb reconnect"),
            ("more than one", "there are several devices; name one, as adb://serial, from "
             "`adb devices`"),
            ("not found", "there is no such device; `adb devices` shows them"),
            ("no devices", "there is no device; allow USB debugging on it, plug it in and look "
             "with `adb devices`"),
        ):  # fmt: skip
            if words in finished.errors:
                return f"{self.where}: {text} (adb: {finished.last_words})"
        return f"{self.where}: adb failed: {finished.last_words or f'exit code {finished.code}'}"

    def _example(self) -> str:
        return f"adb://{self._serial}/folder"
