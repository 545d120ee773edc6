"""Compiled kernels: the only folder that imports numba.

    tile       the micro-kernel, written once over a dialect of byte dot products
    x86, arm   the dialects; `tile.Dialect` is the portable one
    table      chooses the dialect by real CPU features
    matmul     tiles x tokens; attention over a packed cache; step: the whole decoder

The matmul kernels and vector routines are LLVM modules of their own; all the rest is Numba's:
`step.decoder`, and `desks`, where threads get their work. `native` turns all of it into object
code, cached on disk in a folder keyed by the sources (`table.cache_folder`): once it is there,
Numba itself is not even imported.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np

from edgeq.errors import EdgeqError
from edgeq.runtime.kernels.table import DIALECT
from edgeq.schemes import BITS, QuantScheme

KERNEL = DIALECT.name
"""The name of the kernel in use, such as "avx512vnni"."""


@cache
def decoder() -> int:
    """The address of the compiled decoder (`step.decoder`), from the disk cache if it is there."""
    from edgeq.runtime.kernels.native import entry_addresses

    return entry_addresses("step")["edgeq_decoder"]


@cache
def crew() -> tuple[Callable[..., int], ...]:
    """`desks.hire`, `desks.lead` and `desks.serve`, from the disk cache if they are there.

    They take integers and release the interpreter lock.
    """
    from edgeq.runtime.kernels.native import ENTRIES, entry_addresses

    addresses = entry_addresses("desks")
    return tuple(
        _plain(addresses[symbol], count)
        for symbol, count in zip(ENTRIES["desks"], (2, 2, 3), strict=True)
    )


def _plain(address: int, count: int) -> Callable[..., int]:
    """A function compiled by Numba as one of ``count`` integers that returns one."""
    # its convention: addresses for a result and for an error first; it raises nothing
    call = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * (2 + count))(address)

    def run(*args: int) -> int:
        result, error = ctypes.c_int64(), ctypes.c_int64()
        call(ctypes.addressof(result), ctypes.addressof(error), *args)
        return result.value

    return run


def warmup(progress: Callable[[str, int, int], None] | None = None) -> dict[str, float]:
    """Compile every kernel, or load it from the cache.

    Args:
        progress: called with (name, done, total) before each kernel and at the end.

    Returns:
        Seconds per kernel, in order.
    """
    from edgeq.runtime.kernels.native import kernel_address, kernel_name, register_routines

    schemes = {
        kernel_name(scheme): scheme
        for bits in BITS
        for symmetric in (True, False)
        for size in (32, 16)
        for scheme in [QuantScheme(bits, symmetric, "group", size)]
    }
    work: dict[str, Callable[[], Any]] = {
        "routines": register_routines, "decoder": decoder, "desks": crew,
    }  # fmt: skip
    work.update({name: partial(kernel_address, scheme) for name, scheme in schemes.items()})
    seconds = {}
    for i, (name, compile_it) in enumerate(work.items()):
        if progress:
            progress(name, i, len(work))
        start = time.perf_counter()
        compile_it()
        seconds[name] = time.perf_counter() - start
    if progress:
        progress("done", len(work), len(work))
    return seconds


def read_bandwidth(threads: int, megabytes: int = 256, repeats: int = 5) -> float:
    """Measured memory read bandwidth in GB/s (10**9 bytes), the median of several passes.

    Each thread streams through its own part of a buffer far larger than the caches.
    """
    from edgeq.runtime.kernels.native import register_routines

    if threads < 1:
        raise EdgeqError(f"threads is {threads}; use 1 or more")
    read = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(
        register_routines()["edgeq_read"]
    )
    size = megabytes << 20
    raw = np.ones(size + 64, np.uint8)
    base = raw.ctypes.data + (-raw.ctypes.data % 64)
    share = size // threads // 4096 * 4096
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            list(pool.map(lambda tid: read(base + tid * share, share), range(threads)))
            seconds.append(time.perf_counter() - start)
    return share * threads / sorted(seconds[1:])[repeats // 2] / 1e9


def int8_throughput(threads: int, repeats: int = 5) -> float:
    """Measured byte products of the matmul kernel in 1e9 operations/s, the median of several.

    A multiplication and an addition are two operations. Each thread multiplies 4-bit weights
    that stay in its cache by 128 rows: what prefill could do if nothing else took time.
    """
    from edgeq.footprint import ACT_BLOCK, BATCH
    from edgeq.packing import TILE
    from edgeq.runtime.kernels.native import kernel_address
    from edgeq.schemes import K_BLOCK

    if threads < 1:
        raise EdgeqError(f"threads is {threads}; use 1 or more")
    blocks, tiles, rounds = 16, 16, 20
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 15)(kernel_address(QuantScheme(4)))
    codes, scales = TILE * K_BLOCK // 2 * blocks, 2 * TILE * blocks  # bytes of a tile
    sizes = (codes * tiles, scales * tiles, ACT_BLOCK * blocks * BATCH, 4 * TILE * tiles * BATCH)
    room = [[np.zeros(size + 64, np.uint8) for size in sizes] for _ in range(threads)]

    def work(tid: int) -> None:
        w, s, x, y = (part.ctypes.data + -part.ctypes.data % 64 for part in room[tid])
        for _ in range(rounds):
            call(w, codes, s, scales, 0, 0, blocks, 0, x, ACT_BLOCK * blocks,
                 BATCH, y, 4 * TILE * tiles, 0, tiles)  # fmt: skip

    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            list(pool.map(work, range(threads)))
            seconds.append(time.perf_counter() - start)
    operations = 2 * TILE * tiles * K_BLOCK * blocks * BATCH * rounds * threads
    return operations / sorted(seconds[1:])[repeats // 2] / 1e9


__all__ = ["KERNEL", "crew", "decoder", "int8_throughput", "read_bandwidth", "warmup"]
