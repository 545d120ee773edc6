"""What else used the processor while something was measured here.

Other programs, a hypervisor that gives the processor to another machine, and a container's CPU
limit all make a measurement too slow without a trace in it. `Watch` compares the kernel's counters
before and after.

Source: proc_stat(5) of Linux, whose counters are in ticks of `SC_CLK_TCK`, and `guest` is a part
of `user`; Documentation/admin-guide/cgroup-v2.rst, `cpu.stat`. Where /proc/stat is missing only the
load average from before is known.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgeq.core.cpu import available_cores

SHORTEST_S = 0.2
"""Seconds below which the kernel's ticks of mostly 10 ms say nothing."""

BUSY_CORES = 0.25
"""Cores taken by others that matter: less is the background of a machine at rest."""

BUSY_SHARE = 0.25
"""Part of the cores taken by others that matters even where enough cores are left: memory and
caches are shared."""

STOLEN_SHARE = 0.02
"""Part of the time taken by the hypervisor, or lost to a CPU limit, that matters."""

HIGH_LOAD = 0.5
"""Load average per core that matters, where nothing else is known."""


@dataclass(frozen=True)
class Contention:
    """What competed with this process for its cores over a stretch of time.

    Args:
        seconds: length of the stretch.
        cores: that this process may use.
        other_cores: mean number of these that other processes used; None if unknown.
        stolen_cores: mean number of these that the hypervisor took away; None if unknown.
        paused_share: part of the time in which the CPU limit of a control group paused processes;
            None if unknown.
        load_before: load average of the minute before; None if unknown.
    """

    seconds: float
    cores: int
    other_cores: float | None = None
    stolen_cores: float | None = None
    paused_share: float | None = None
    load_before: float | None = None

    def reasons(self, threads: int | None = None) -> list[str]:
        """What disturbed a measurement, a phrase each; empty if nothing did.

        Args:
            threads: that the measured program ran on; all cores if None.
        """
        causes = []
        threads = self.cores if threads is None else threads
        others = self.other_cores
        if others is not None and others >= BUSY_CORES:
            crowded = threads + others > self.cores
            if crowded or others >= BUSY_SHARE * self.cores:
                causes.append(f"other programs used {others:.1f} of {_cores(self.cores)}")
        if self.stolen_cores is not None and self.stolen_cores >= STOLEN_SHARE * self.cores:
            causes.append(f"the hypervisor took {100 * self.stolen_cores / self.cores:.0f} % of "
                         "the processor time")  # fmt: skip
        if self.paused_share is not None and self.paused_share >= STOLEN_SHARE:
            causes.append(
                f"the container's CPU limit paused it {100 * self.paused_share:.0f} % of the time"
            )
        if others is None and (self.load_before or 0.0) >= HIGH_LOAD * self.cores:
            causes.append(
                f"the load average before was {self.load_before:.1f} on {_cores(self.cores)}"
            )
        return causes

    def warning(self, threads: int | None = None) -> str | None:
        """One sentence for the user, or None if the machine was quiet."""
        causes = self.reasons(threads)
        if not causes:
            return None
        return (
            f"This machine was busy during the measurement: {' and '.join(causes)}. "
            "The speeds are too low; measure again when it is idle."
        )

    def to_json(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Contention:
        """What `to_json` wrote; keys of a later version are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


class Watch:
    """Compares the processor's counters at two moments.

    Args:
        root: where /proc and /sys are read.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._load = _load_average(root)
        self._start = time.monotonic()
        self._own = _own_seconds()
        self._used = _processor_seconds(root)
        self._paused = _paused_seconds(root)

    def stop(self) -> Contention:
        """What competed for the processor since the watch was started; may be called repeatedly."""
        seconds = time.monotonic() - self._start
        own = _own_seconds() - self._own
        used, paused = _processor_seconds(self._root), _paused_seconds(self._root)
        cores = available_cores()
        if seconds < SHORTEST_S:
            return Contention(seconds, cores)
        others = stolen = share = None
        if used is not None and self._used is not None:
            busy = used[0] - self._used[0]
            others = max(busy - own, 0.0) / seconds
            stolen = max(used[1] - self._used[1], 0.0) / seconds
        if paused is not None and self._paused is not None:
            share = min(max(paused - self._paused, 0.0) / seconds, 1.0)
        return Contention(seconds, cores, others, stolen, share, self._load)


def _cores(count: int) -> str:
    return f"{count} core{'s' * (count != 1)}"


def _own_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _processor_seconds(root: Path) -> tuple[float, float] | None:
    """Seconds that the cores of this process were busy, and that a hypervisor took from them."""
    try:
        text = (root / "proc/stat").read_text()
        tick = 1 / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    busy = stolen = 0
    seen = False
    for line in text.splitlines():
        name, *numbers = line.split()
        core = name.removeprefix("cpu")
        if not name.startswith("cpu") or not core.isdigit():
            continue
        if allowed is not None and int(core) not in allowed:
            continue
        user, nice, system, _, _, irq, softirq, steal = ([int(n) for n in numbers] + [0] * 8)[:8]
        busy += user + nice + system + irq + softirq
        stolen += steal
        seen = True
    return (busy * tick, stolen * tick) if seen else None


def _paused_seconds(root: Path) -> float | None:
    """Seconds that the CPU limit of this control group has paused its processes."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    own = next((line[3:] for line in groups if line.startswith("0::")), "/")
    base = root / "sys/fs/cgroup"
    # in a container the path may be the host's, and its own group is mounted at the base
    for folder in (base / own.lstrip("/"), base, base / "cpu"):
        try:
            lines = (folder / "cpu.stat").read_text().splitlines()
        except OSError:
            continue
        data = dict(line.split()[:2] for line in lines if len(line.split()) > 1)
        for key, unit in (("throttled_usec", 1e-6), ("throttled_time", 1e-9)):
            if data.get(key, "").isdigit():
                return int(data[key]) * unit
    return None


def _load_average(root: Path) -> float | None:
    try:
        return float((root / "proc/loadavg").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
