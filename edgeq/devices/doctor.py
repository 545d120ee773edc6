"""What works on this machine, what does not, and what to do about it.

Checks look at what `detect` found and at this Python; those that need the runtime (which kernel
is chosen, and why) are added by the command line. A check that cannot be made says so: its ``ok``
is None.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeq.core.cache import cache_home
from edgeq.core.cpu import available_cores
from edgeq.core.progress import Progress
from edgeq.devices.cpuinfo import rank, unsupported
from edgeq.devices.detect import Detected
from edgeq.devices.installed import EXTRAS, PURPOSES, REQUIRED, State, installed, unavailable

_HOT_C = 80.0
_OLDEST_PYTHON, _OLDEST_GLIBC = (3, 11), (2, 27)


@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: what.
        ok: True for no problem, False for a problem, None if unknown or irrelevant here.
        found: what was found.
        fix: what to do about it, or how to get more out of it; empty if nothing.
        needed: whether edgeq cannot be used without it.
    """

    name: str
    ok: bool | None
    found: str
    fix: str = ""
    needed: bool = False


def checks(
    detected: Detected,
    *,
    imports: bool = True,
    root: Path | str = "/",
    progress: Progress | None = None,
) -> list[Check]:
    """Every check that does not need the runtime.

    Args:
        detected: this machine, by `edgeq.devices.detect.detect`.
        imports: import every installed package, each in a process of its own, so that one built
            for another processor is distinguished from one that works; else look only whether they
            are there.
        root: where /proc and /sys are read.
        progress: called before each import.
    """
    root = Path(root)
    return [
        _system(detected),
        _python(),
        _glibc(),
        *_packages(installed(imports=imports, progress=progress)),
        _vectors(detected),
        _threads(detected, available_cores()),
        _governor(detected),
        *_throttling(detected),
        *_memory(detected),
        _huge_pages(root),
        _load(root, detected),
        _cache(cache_home()),
    ]


def usable(results: Iterable[Check]) -> bool:
    """Whether edgeq can be used at all."""
    return not any(check.needed and check.ok is False for check in results)


# the system


def _system(detected: Detected) -> Check:
    wide = sys.maxsize > 1 << 32
    arch = platform.machine() or detected.arch or "unknown"
    text = f"{platform.system()} {platform.release()}, {arch}, {64 if wide else 32}-bit Python"
    if wide:
        reason = unsupported(arch)
        return Check("system", reason is None, text, reason or "", needed=True)
    return Check(
        "system", False, text,
        "the kernels need a 64-bit system: install the 64-bit edition (of Raspberry Pi OS on a "
        "Pi 3, 4, 5 or Zero 2) and Python in it", needed=True,
    )  # fmt: skip


def _python() -> Check:
    ok = tuple(sys.version_info[:2]) >= _OLDEST_PYTHON
    fix = "" if ok else f"edgeq needs Python {_OLDEST_PYTHON[0]}.{_OLDEST_PYTHON[1]} or newer"
    return Check("python", ok, f"{platform.python_version()} at {sys.executable}", fix, True)


def _glibc() -> Check:
    library, version = platform.libc_ver()
    numbers = re.findall(r"\d+", version)
    if library != "glibc" or len(numbers) < 2:
        if platform.system() == "Linux":
            return Check(
                "glibc", None, library or "another C library",
                "most packages have no wheels for it; instead of Alpine, use a Debian image",
            )  # fmt: skip
        return Check("glibc", None, "not used by this system")
    ok = (int(numbers[0]), int(numbers[1])) >= _OLDEST_GLIBC
    fix = "" if ok else (
        f"wheels are built for glibc {_OLDEST_GLIBC[0]}.{_OLDEST_GLIBC[1]} or newer; "
        "upgrade the system, or run edgeq in a container of a newer one"
    )  # fmt: skip
    return Check("glibc", ok, version, fix)


# packages


def _packages(states: Mapping[str, State]) -> list[Check]:
    there = [f"{name} {states[name].version}" for name in REQUIRED if states[name].version]
    bad = [name for name in REQUIRED if not states[name].works]
    faults = [f"{name}: {states[name].fault}" for name in bad if states[name].fault]
    fix = f"pip install --force-reinstall {' '.join(bad)}" if bad else ""
    required = Check(
        "required packages", not bad, "; ".join([", ".join(there), *faults]), fix, True
    )
    return [required, *(_extra(extra, states) for extra in EXTRAS)]


def _extra(extra: str, states: Mapping[str, State]) -> Check:
    name, packages = f"extra {extra}", EXTRAS[extra]
    there = ", ".join(f"{p} {states[p].version}" for p in packages if states[p].version)
    absent = [p for p in packages if not states[p].version]
    broken = [p for p in packages if states[p].fault]
    if broken:
        faults = "; ".join(f"{p} does not import: {states[p].fault}" for p in broken)
        fix = (
            f"pip install --force-reinstall {' '.join(broken)}, or remove it if it was not built "
            "for this processor"
        )
        return Check(name, False, f"{there}; {faults}", fix)
    if not absent:
        return Check(name, True, there)
    present = f"{there}; " if there else ""
    why_not = unavailable(extra, platform.system(), platform.machine(), sys.version_info[:2])
    if why_not:
        return Check(name, None, present + why_not)
    fix = f"pip install 'edgeq[{extra}]' to {PURPOSES[extra]}"
    return Check(name, None, f"{present}{', '.join(absent)} not installed", fix)


# the processor


def _vectors(detected: Detected) -> Check:
    isa = set(detected.isa)
    names, soc = " ".join(detected.isa), detected.soc or "unknown processor"
    text = f"{names or 'none that edgeq uses'} ({soc})"
    if isa & {"dotprod", "avx512vnni", "avxvnni"}:
        extra = "" if "i8mm" in isa or "neon" not in isa else "; no i8mm, which edgeq does not need"
        return Check("integer products", True, text + extra)
    if not detected.isa:
        return Check("integer products", None, text)
    missing = "dotprod" if "neon" in isa else "VNNI"
    return Check(
        "integer products", None, f"{text}; no {missing}",
        "no fix needed: this processor runs at a half to a quarter of the speed of one with "
        f"{missing}; prefer small models and 4 bits",
    )  # fmt: skip


def _threads(detected: Detected, allowed: int) -> Check:
    cores = detected.cores or allowed
    fast = [c for c in detected.clusters if rank(c.core)[0] >= 2] or list(detected.clusters)
    strong = sum(c.count for c in fast) or cores
    best = max(1, min(strong, allowed))
    kinds = " + ".join(
        f"{c.count} {c.core}" + (f" at {c.ghz:g} GHz" if c.ghz else "") for c in detected.clusters
    )
    text = f"{kinds or f'{cores} cores'}; this process may use {allowed}; use -t {best}"
    if detected.threads and allowed < detected.threads:
        return Check("threads", None, text,
                     f"{detected.threads} processors are online; taskset or the container limits "
                     f"edgeq to {allowed}")  # fmt: skip
    if strong < cores:
        return Check("threads", True, text,
                     f"more threads would be slower: the other {cores - strong} cores are "
                     "slow")  # fmt: skip
    return Check("threads", True, text)


def _governor(detected: Detected) -> Check:
    if not detected.governors:
        return Check("governor", None, "this system does not set the clock rate")
    kinds = sorted(set(detected.governors.values()))
    text = ", ".join(kinds)
    command = "echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
    if "powersave" in kinds:
        return Check("governor", False, text, f"cores may stay at their lowest clock: {command}")
    if kinds == ["performance"]:
        return Check("governor", True, text)
    return Check("governor", True, text, f"for steady measurements: {command}")


_MENDS = {
    "under-voltage": "use the maker's power supply and a short cable",
    "frequency capped": "cool the board, or give it a stronger power supply",
    "throttled": "cool the board: a heat sink or a fan",
    "soft temperature limit": "cool the board: a heat sink or a fan",
}


def _throttling(detected: Detected) -> list[Check]:
    hot = {name: t for name, t in detected.temperatures_c.items() if t >= _HOT_C}
    warmest = max(detected.temperatures_c.items(), key=lambda item: item[1], default=None)
    results = []
    if warmest is None:
        results.append(Check("temperature", None, "no sensor"))
    else:
        text = f"{warmest[1]:.1f} °C ({warmest[0]})"
        results.append(Check("temperature", not hot, text, _MENDS["throttled"] if hot else ""))
    if detected.throttle is None:
        results.append(Check("throttling", None, "cannot be determined on this system"))
        return results
    for name, kinds in (("throttling now", detected.throttle.now),
                        ("throttling since boot", detected.throttle.since_boot)):  # fmt: skip
        mends = "; ".join(dict.fromkeys(_MENDS[kind] for kind in kinds))
        results.append(Check(name, not kinds, ", ".join(kinds) or "none", mends))
    return results


# memory


def _memory(detected: Detected) -> list[Check]:
    gib = 1 << 30
    results = []
    if detected.ram_bytes is None or detected.available_bytes is None:
        results.append(Check("memory", None, "cannot be determined"))
    else:
        text = f"{detected.available_bytes / gib:.2f} of {detected.ram_bytes / gib:.2f} GiB free"
        ok = detected.available_bytes >= gib // 2
        fix = "" if ok else "close other programs; `edgeq plan` shows what fits"
        results.append(Check("memory", ok, text, fix))
    if detected.swap_bytes is None:
        results.append(Check("swap", None, "cannot be determined"))
    elif detected.swap_bytes:
        fix = "a model that needs swap is very slow; `edgeq plan` shows what fits"
        results.append(Check("swap", True, f"{detected.swap_bytes / gib:.2f} GiB", fix))
    else:
        fix = ""
        if (detected.ram_bytes or 0) < 2 * gib:
            fix = (
                "quantizing needs more memory than running: add zram or a swap file, or "
                "quantize elsewhere"
            )
        results.append(Check("swap", None, "none", fix))
    if detected.cgroup_bytes is None:
        results.append(Check("control group", True, "no memory limit"))
    else:
        ok = detected.cgroup_bytes >= gib // 2
        text = f"at most {detected.cgroup_bytes / gib:.2f} GiB ({detected.sources['cgroup_bytes']})"
        results.append(
            Check("control group", ok, text, "" if ok else "raise the container's memory limit")
        )
    return results


def _huge_pages(root: Path) -> Check:
    path = root / "sys/kernel/mm/transparent_hugepage/enabled"
    try:
        chosen = re.search(r"\[(\w+)\]", path.read_text())
    except OSError:
        chosen = None
    if chosen is None:
        return Check("huge pages", None, "not available in this kernel")
    if chosen[1] == "never":
        return Check("huge pages", False, "never",
                     "decoding is 10 to 30 % faster with them: echo madvise | sudo tee "
                     "/sys/kernel/mm/transparent_hugepage/enabled")  # fmt: skip
    return Check("huge pages", True, chosen[1])


def _load(root: Path, detected: Detected) -> Check:
    try:
        load = float((root / "proc/loadavg").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return Check("load", None, "cannot be determined")
    busy = load > 0.5 * (detected.threads or 1)
    fix = "other programs use the processor: measurements will be too slow" if busy else ""
    return Check("load", not busy, f"load average {load:.2f} in the last minute", fix)


def _cache(folder: Path) -> Check:
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK):
        return Check("cache of kernels", True, str(folder))
    return Check("cache of kernels", False, f"{folder} cannot be written",
                 "kernels are compiled anew at every start: set EDGEQ_CACHE to a folder of "
                 "your own")  # fmt: skip
