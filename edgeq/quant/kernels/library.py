"""The compiled functions of this package, for this processor or from the cache on disk."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from edgeq.core.cpu import this_cpu
from edgeq.core.errors import UnsupportedError
from edgeq.quant.kernels.shapes import Registers, Tile

Function = Callable[..., None]
_lock = threading.Lock()


@cache
def registers() -> Registers:
    """The choice for this process; `EDGEQ_KERNEL` limits it as it does for the engine."""
    wanted = os.environ.get("EDGEQ_KERNEL")
    cpu = this_cpu()
    if cpu.arch == "x86_64":
        if wanted == "generic":
            return Registers("generic", "x86-64", Tile(6, 1), 2)
        if {"avx512f", "avx512vl"} <= cpu.features and wanted not in ("avx2", "avxvnni"):
            return Registers("avx512", None, Tile(12, 2), 8)
        if wanted in ("avx2", "avxvnni") and "avx2" not in cpu.features:
            raise UnsupportedError(
                f"EDGEQ_KERNEL={wanted} needs AVX2, which this processor does not have; use generic"
            )
        return Registers("avx2", "x86-64-v3" if "avx2" in cpu.features else None, Tile(6, 1), 4)
    return Registers(platform.machine() or "generic", None, Tile(6, 1), 4)


@cache
def function(symbol: str) -> Function:
    """A compiled function: it takes integers and releases the interpreter lock."""
    count, address = _addresses()[symbol]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count)(address)


def load_kernels() -> None:
    """Compile the functions, or load them from the cache, now rather than at their first use."""
    _addresses()


def _addresses() -> dict[str, tuple[int, int]]:
    with _lock:
        return _loaded()


@cache
def _loaded() -> dict[str, tuple[int, int]]:
    from edgeq.compiler.object_code import (
        CompileTarget,
        cache_folder,
        cached,
        compiled,
        host,
        load_code,
    )

    chosen = registers()
    target = host()
    if chosen.cpu is not None:
        target = CompileTarget(target.triple, chosen.cpu)
    folder = cache_folder(
        f"quant-{chosen.name}", target, sorted(Path(__file__).parent.glob("*.py"))
    )

    def make() -> bytes:
        from edgeq.quant.kernels.module import module

        return compiled(module(chosen), target)

    from edgeq.quant.kernels.shapes import SYMBOLS

    addresses = load_code("quantization", cached(folder / "quant.o", make), list(SYMBOLS))
    return {symbol: (SYMBOLS[symbol], addresses[symbol]) for symbol in SYMBOLS}
