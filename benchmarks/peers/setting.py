"""What the comparison runs in: the peers' virtual environment, the machine, a busy neighbor."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeq.core.cpu import available_cores, this_cpu

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def home() -> Path:
    """Where the peers, their models and their logs are kept; made if it is not there."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache) / "edgeq-peers"
    (folder / "models").mkdir(parents=True, exist_ok=True)
    return folder


def peers_python() -> str:
    """The interpreter of the peers' virtual environment, which is made first if need be."""
    venv, wanted = home() / "venv", HERE / "requirements.txt"
    python, stamp = venv / "bin" / "python", venv / ".installed"
    if stamp.exists() and stamp.read_text() == wanted.read_text():
        return str(python)
    print(
        f"building the peers in {venv}; llama.cpp is compiled for this machine, which takes "
        "some minutes ...",
        flush=True,
    )
    log = home() / "build.log"
    flags = os.environ.get("CMAKE_ARGS", "")
    env = {
        **os.environ,
        "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "2"),
        "CMAKE_ARGS": f"-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF {flags}".strip(),
    }
    commands = [
        [sys.executable, "-m", "venv", str(venv)],
        ["nice", "-n", "19", str(python), "-m", "pip", "install", "--verbose",
         "--disable-pip-version-check", "--no-binary", "llama-cpp-python",
         "--requirement", str(wanted)],
    ]  # fmt: skip
    with log.open("wb") as out:
        for command in commands:
            if subprocess.run(command, env=env, stdout=out, stderr=subprocess.STDOUT).returncode:
                end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise SystemExit(f"the peers could not be built:\n{end}\nall of it is in {log}")
    stamp.write_text(wanted.read_text())
    return str(python)


def last_cache_bytes() -> int:
    """Size of the largest processor cache; 32 MiB where it cannot be read."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes[1:] or sizes)


def machine() -> dict[str, Any]:
    """What a table of speeds has to name."""
    memory = None
    with contextlib.suppress(OSError):
        found = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
        memory = int(found[1]) << 10 if found else None
    virtual = "hypervisor" in Path("/proc/cpuinfo").read_text() if os.name == "posix" else None
    return {
        "cpu": _cpu_name(),
        "features": sorted(this_cpu().features),
        "cores": available_cores(),
        "virtual": virtual,
        "last_cache_bytes": last_cache_bytes(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "load_at_start": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    """The name, and family and model too: virtual machines often give a name that says little."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = dict(re.findall(r"^(.+?)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE))
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return this_cpu().name + (f" ({', '.join(numbers)})" if numbers else "")


class Others:
    """How much of the machine everybody else takes, this driver and its workers aside."""

    def __init__(self) -> None:
        self._before: tuple[float, float] | None = None

    def start(self, pids: list[int]) -> None:
        """Count from here."""
        self._before = self._seconds(pids)

    def cores(self, pids: list[int]) -> float | None:
        """Cores others kept busy since `start`, on average; None where the system does not say.

        Time that a hypervisor gave to other machines counts as theirs.
        """
        now = self._seconds(pids)
        if now is None or self._before is None:
            return None
        return max(0.0, (now[1] - self._before[1]) / (now[0] - self._before[0]))

    @staticmethod
    def _seconds(pids: list[int]) -> tuple[float, float] | None:
        """The clock, and processor seconds that others have used."""
        try:
            total = Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]
            user, nice, system, _idle, _wait, irq, soft, steal = map(int, total)
            ours = 0
            for pid in pids:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ours += int(fields[11]) + int(fields[12])
        except (OSError, ValueError):
            return None
        used = user + nice + system + irq + soft + steal - ours
        return time.monotonic(), used / os.sysconf("SC_CLK_TCK")


_BUSY = """
import os, select
while os.read(0, 1):
    while not select.select([0], [], [], 0)[0]:
        for _ in range(10_000):
            pass
    if not os.read(0, 1):
        break
"""


class Neighbor:
    """A process that does nothing but keep the last core busy, between one byte and the next.

    It ends with the pipe, so none is left behind that would spoil what is measured next.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _BUSY], stdin=subprocess.PIPE, bufsize=0
        )
        os.sched_setaffinity(self._process.pid, {max(os.sched_getaffinity(0))})

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keep the core busy inside."""
        assert self._process.stdin
        self._process.stdin.write(b".")
        try:
            yield
        finally:
            self._process.stdin.write(b".")

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
