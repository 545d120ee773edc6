"""This process's own memory over time: resident (RSS), and its fair share (PSS)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeq.core.errors import DeviceError
from edgeq.core.memory import pss_bytes, rss_bytes
from edgeq.devices.meters.base import Absent, Meter, Reading, Run
from edgeq.devices.meters.kind import MeterKind

HERE = Path("/")
"""The root of this machine's file system."""


@dataclass(frozen=True, kw_only=True)
class Memory(Meter):
    """A figure of this process, in bytes.

    Args:
        held: returns it, or None if the system does not report it.
    """

    held: Callable[[], int | None]

    def read(self) -> Reading:
        """Bytes now."""
        values = self.held()
        if values is None:
            raise DeviceError(f"{self.provenance} cannot be read")
        return Reading(time.monotonic_ns(), {self.name: float(values)})


def find(root: Path = HERE, run: Run | None = None) -> list[Meter | Absent]:
    """RSS ten times a second; PSS, for which the kernel walks every page, once.

    Only of this process, so there is none in the copy of another machine's file system.
    """
    if root != HERE:
        return []
    about = (
        ("rss", "/proc/self/status", 10.0, rss_bytes),
        ("pss", "/proc/self/smaps_rollup", 1.0, pss_bytes),
    )
    return [
        Memory(
            name=name,
            quantity="memory",
            provenance=path,
            rate_hz=rate,
            covers="this process",
            total=(name,),
            held=read_bytes,
        )
        if read_bytes() is not None
        else Absent(name, f"no {path} (Linux has it)", "memory")
        for name, path, rate, read_bytes in about
    ]


KIND = MeterKind(name="process", find=find)
