"""What this processor has, as far as the kernels care: ISA features, core count, caches."""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_AT_HWCAP, _AT_HWCAP2 = 16, 26
_HWCAP = {"fphp": 1 << 9, "asimdhp": 1 << 10, "dotprod": 1 << 20}
_HWCAP2 = {"i8mm": 1 << 13, "bf16": 1 << 14}
X86_FLAGS = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "avx_vnni": "avxvnni",
}
_NUMPY = {
    "AVX2": ("avx2",),
    "FMA3": ("fma",),
    "X86_V3": ("avx2", "fma", "f16c"),
    "AVX512_SKX": ("avx512f", "avx512bw", "avx512vl"),
    "X86_V4": ("avx512f", "avx512bw", "avx512vl"),
    "AVX512_ICL": ("avx512vnni",),
}


@dataclass(frozen=True)
class Cpu:
    """The processor of a machine.

    Attributes:
        arch: "x86_64", "aarch64", or what `platform.machine` says.
        name: marketing name or part, "" if it cannot be read.
        features: of avx2 fma f16c avx512f avx512bw avx512vl avx512vnni avxvnni (x86) and
            asimdhp dotprod i8mm bf16 (ARM).
        cores: how many this process may use (affinity, not hot-plug).
    """

    arch: str
    name: str
    features: frozenset[str]
    cores: int


@functools.cache
def this_cpu() -> Cpu:
    """The processor this process runs on."""
    arch = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    features = _arm_features() if arch == "aarch64" else _x86_features()
    return Cpu(arch, _name(), features, available_cores())


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cache_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that the data caches of this process's cores hold together; None if unknown.

    Of a cache that several cores share there is one; the largest level counts, as lower levels
    mostly hold copies of it.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    levels: dict[int, dict[str, int]] = {}
    for folder in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            texts = [(folder / name).read_text().strip()
                     for name in ("type", "level", "size", "shared_cpu_list")]  # fmt: skip
        except OSError:
            continue
        kind, level, size, shared = texts
        number = int(folder.parts[-3].removeprefix("cpu"))
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind == "Instruction" or not match or (allowed is not None and number not in allowed):
            continue
        nbytes = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
        levels.setdefault(int(level), {})[shared] = nbytes
    return max((sum(sizes.values()) for sizes in levels.values()), default=None)


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""


def _name() -> str:
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return match[1].strip() if match else platform.processor()


def _arm_features() -> frozenset[str]:
    """Features from the kernel's hardware capabilities; LLVM's list lacks the dot product."""
    if sys.platform == "darwin":  # every Apple silicon Mac has both
        return frozenset({"asimdhp", "dotprod"})
    import ctypes

    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return frozenset()
    getauxval.restype = ctypes.c_ulong
    getauxval.argtypes = [ctypes.c_ulong]
    first, second = getauxval(_AT_HWCAP), getauxval(_AT_HWCAP2)
    features = {name for name, bit in _HWCAP.items() if first & bit}
    features |= {name for name, bit in _HWCAP2.items() if second & bit}
    return frozenset(features)


def _x86_features() -> frozenset[str]:
    flags = re.search(r"^flags\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    if flags:
        words = set(flags[1].split())
        return frozenset(ours for theirs, ours in X86_FLAGS.items() if theirs in words)
    import numpy  # no /proc: ask what numpy found

    config: Any = numpy.show_config(mode="dicts")
    extensions = config["SIMD Extensions"]
    names = {*extensions.get("baseline", ()), *extensions.get("found", ())}
    features = {ours for theirs, group in _NUMPY.items() if theirs in names for ours in group}
    return frozenset(features)
