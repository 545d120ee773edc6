"""How the driver talks to a runtime: one JSON object a line in, one out, over two pipes.

A runtime lives in a process of its own for as long as its cases last, so nothing that is timed
starts a process, loads a model or compiles a kernel. Standard library only: this file is used
by several virtual environments.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

SETTLE = 0.03
"""Seconds between two requests: threads of the runtime before that still spin for a while."""


_MOST = 10_000
clock = time.process_time if os.environ.get("PEERS_CLOCK") == "cpu" else time.perf_counter
"""What workers time by: wall time, or the processor time of all their threads. With one thread the
latter is what the work costs on a machine that others use too; with several it counts waiting."""


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answer requests until the pipe closes: ``{"do": NAME, ...}`` calls ``NAME(**rest)``."""
    # what libraries print must not end up between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": handlers[request.pop("do")](**request)}
        except Exception:  # noqa: BLE001 - the driver reports it
            answer = {"failed": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def repeat(work: Callable[[], float], budget: float) -> list[float]:
    """What ``work`` says it took, again and again until that is ``budget`` seconds in all."""
    seconds = [work()]
    while sum(seconds) < budget and len(seconds) < _MOST:
        seconds.append(work())
    return seconds


class WorkerError(Exception):
    """A runtime could not do what it was asked for."""


class Worker:
    """A runtime in its own process.

    Args:
        name: what to call it in errors.
        command: how to start it.
        log: where its standard error goes.
        env: environment variables to add.
    """

    def __init__(
        self, name: str, command: list[str], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name, self._log = name, log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(env or {})},
            )

    def ask(self, do: str, **request: Any) -> Any:
        """Send a request and wait for its answer.

        Raises:
            WorkerError: the runtime failed or died; has the end of what it said.
        """
        assert self._process.stdin
        assert self._process.stdout
        time.sleep(SETTLE)
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = self._log.read_text(errors="replace")[-2000:]
            raise WorkerError(f"{self.name} died with {self._process.wait()} at {do!r}:\n{said}")
        answer = json.loads(line)
        if "failed" in answer:
            raise WorkerError(f"{self.name} failed at {do!r} {request}:\n{answer['failed']}")
        return answer["ok"]

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
