"""This process's memory: how much it holds, the most it has held, and memory of huge pages."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_UNLIMITED = 1 << 60
"""Limits of older control groups that are none: the largest multiple of a page."""
LARGE_BLOCK = 4 << 20
"""Bytes; see `return_large_blocks`. Above the logits of one token of the largest vocabularies."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
HUGE_PAGE = 1 << 21
"""Bytes; what Linux uses on x86-64 and on 64-bit ARM with 4 KiB pages."""


class Anonymous(mmap.mmap):
    """Memory of no file: pages given back to the system would be lost."""


def huge_buffer(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed anonymous memory of whole huge pages where the system gives them.

    A processor that streams gigabytes through pages of 4 KiB misses its address cache for every
    one. The memory begins at a huge page and is returned with the last view of it.
    """
    # private: shared memory, the default, has no huge pages
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    mapped = Anonymous(-1, max(nbytes, 1) + HUGE_PAGE, **private)
    advise_huge(mapped)
    whole = np.frombuffer(mapped, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE
    return whole[start : start + nbytes]


def sparse_zeros(shape: Sequence[int], dtype: Any) -> NDArray[Any]:
    """Zeros that take memory only where they are written, page by page.

    NumPy asks for huge pages, of which a row here and there takes them all.
    """
    kind = np.dtype(dtype)
    nbytes = max(math.prod(shape) * kind.itemsize, 1)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
    mapped = Anonymous(-1, nbytes, **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            mapped.madvise(mmap.MADV_NOHUGEPAGE)
    zeros: NDArray[Any] = np.frombuffer(mapped, kind, math.prod(shape)).reshape(tuple(shape))
    return zeros


def advise_huge(mapped: mmap.mmap) -> None:
    """Ask for huge pages under a mapping; a hint, no more."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            mapped.madvise(mmap.MADV_HUGEPAGE)


def rss_bytes() -> int | None:
    """The resident set now, file pages included, in bytes; None where it cannot be read."""
    return _status("VmRSS")


def pss_bytes() -> int | None:
    """The proportional set now, in bytes: pages shared by n processes count for 1/n of their size.

    The kernel walks all pages for it, which takes milliseconds for gigabytes. None where it
    cannot be read.
    """
    return _field(Path("/proc/self/smaps_rollup"), "Pss")


def peak_rss_bytes() -> int | None:
    """The peak resident memory of this process since the last `reset_peak_rss`, in bytes."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    counted = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return counted if sys.platform == "darwin" else counted * 1024


def available_bytes() -> int | None:
    """Memory that programs can still take without swapping, or None where it cannot be read.

    The smaller of what the system has and what is left of this process's control groups.
    """
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    left = [limit.nbytes - limit.used for limit in group_limits() if limit.used is not None]
    return min([*left, *([] if available is None else [available])], default=None)


@dataclass(frozen=True)
class GroupLimit:
    """A limit to memory that a control group sets.

    Args:
        nbytes: most that its processes may hold.
        used: what they hold; None if it cannot be read.
        path: the file that says so.
    """

    nbytes: int
    used: int | None
    path: str


def group_limits(root: Path | str = "/") -> list[GroupLimit]:
    """Limits of this process's control group and of those around it, of both versions.

    Args:
        root: the folder that holds ``proc`` and ``sys``.
    """
    root = Path(root)
    limits = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            folder, most, now = "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            folder = "sys/fs/cgroup/memory"
            most, now = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            at = "/".join([folder, *parts[:depth]])
            limit = _text(root / at / most).strip()
            if limit.isdigit() and 0 < int(limit) < _UNLIMITED:
                used = _text(root / at / now).strip()
                limits.append(
                    GroupLimit(int(limit), int(used) if used.isdigit() else None, f"/{at}/{most}")
                )
    return limits


def trim() -> None:
    """Give memory that the C library holds free back to the system, where it can do that (glibc).

    A library that has closed a model leaves holes in the heap, which count as this process's.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def return_large_blocks() -> None:
    """Let glibc give large blocks back to the system as soon as they are freed.

    glibc maps a block above a threshold by itself, and raises the threshold to the size of the
    largest such block that was freed, up to 32 MiB. From then on blocks of that size lie in the
    arenas of the threads, which keep them for later: in a server whose threads take turns with
    logits of tens of megabytes, more than a hundred megabytes stayed there. A threshold that is
    set stays as it is. It is for the whole process, so only programs may set it. Other C libraries
    are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 2 * LARGE_BLOCK)  # as glibc does with its own threshold


def reset_peak_rss() -> bool:
    """Restart `peak_rss_bytes` from the current memory; False if the system cannot do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    return _field(Path("/proc/self/status"), key)


def _text(path: Path) -> str:
    """A small file of the system's; "" if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _field(path: Path, key: str) -> int | None:
    """A field given in kB by one of the system's text files, in bytes."""
    lines = _text(path).splitlines()
    fields = (line.split() for line in lines if line.startswith(key + ":"))
    return next((int(words[1]) * 1024 for words in fields), None)
