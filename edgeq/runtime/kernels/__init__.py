"""Compiled kernels of the engine: the only folder that imports numba.

    abi              records that compiled code and Python both read
    microkernel      one tile of packed weights times a few rows, written once over an `Isa`
    isa_x86, isa_arm what each instruction set does better; `microkernel.Isa` is portable
    dispatch         chooses the instruction set by what the processor really has
    vector_ops       quantizing rows, dot products, softmax, as LLVM code
    primitives       the same as Numba sees them, and loads, stores, atomics
    row_ops          norms, rotary embedding, embedding rows, the barrier
    float_matmul     rows of float weights times rows of floats, for every instruction set
    matmul           tiles x rows, by either kind of kernel
    attention        of a layer; `attention_chunk`: of 256 positions of the cache
    short_conv       gated short convolutions
    delta_net        gated delta nets, and the gate on the output of attention
    layer_inputs     inputs that layers have of their own, from a table read row by row
    program          the decoder: runs a program of steps
    thread_pool      how threads get work without Python
    jit              turns all of it into object code, cached on disk (`edgeq.compiler`)

The matmul kernels and vector operations are LLVM modules of their own; `program.decoder` and
`thread_pool` are compiled by Numba. The object code is cached in a folder keyed by the sources
(`jit.code_folder`): once it is there, Numba itself is not even imported.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np

from edgeq.core.errors import EdgeqError
from edgeq.core.progress import Progress
from edgeq.formats.schemes import BITS, FLOAT_TAGS, QuantScheme
from edgeq.runtime.kernels.dispatch import ISA

KERNEL = ISA.name
"""The name of the kernel in use, such as "avx512vnni"."""


@cache
def decoder() -> int:
    """The address of the compiled `program.decoder`, from the disk cache if it is there."""
    from edgeq.runtime.kernels.jit import entry_addresses

    return entry_addresses("program")["edgeq_decoder"]


@cache
def pool_functions() -> tuple[Callable[..., int], ...]:
    """`pool_init`, `pool_run` and `pool_worker` of `thread_pool`, compiled or from the disk cache.

    They take integers and release the interpreter lock.
    """
    from edgeq.runtime.kernels.jit import ENTRIES, entry_addresses

    addresses = entry_addresses("thread_pool")
    return tuple(
        _plain(addresses[symbol], count)
        for symbol, count in zip(ENTRIES["thread_pool"], (2, 2, 3), strict=True)
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


def warmup(progress: Progress | None = None) -> dict[str, float]:
    """Compile every kernel, or load it from the cache.

    Args:
        progress: called with (name, done, total) before each kernel and at the end.

    Returns:
        Seconds per kernel, in order.

    Example:
        >>> seconds = edgeq.warmup()
        >>> min(seconds.values()) >= 0
        True
    """
    from edgeq.runtime.kernels.jit import (
        float_kernel_address,
        kernel_address,
        register_vector_ops,
    )
    from edgeq.runtime.kernels.microkernel import kernel_name

    schemes = {
        kernel_name(scheme): scheme
        for bits in BITS
        for symmetric in (True, False)
        for size in (32, 16)
        for scheme in [QuantScheme(bits, symmetric, "group", size)]
    }
    work: dict[str, Callable[[], Any]] = {
        "vector_ops": register_vector_ops, "decoder": decoder, "thread_pool": pool_functions,
    }  # fmt: skip
    work.update({name: partial(kernel_address, scheme) for name, scheme in schemes.items()})
    work.update({tag: partial(float_kernel_address, kind) for kind, tag in FLOAT_TAGS.items()})
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


def read_bandwidth(threads: int) -> float:
    """Measured memory read bandwidth in GB/s (10**9 bytes), the median of several passes.

    Each thread streams through its own part of a buffer far larger than the caches.
    """
    from edgeq.runtime.kernels.jit import register_vector_ops

    if threads < 1:
        raise EdgeqError(f"threads is {threads}; use 1 or more")
    read = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(
        register_vector_ops()["edgeq_read"]
    )
    size, repeats = 256 << 20, 5
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
    from edgeq.formats.packing import TILE
    from edgeq.formats.schemes import K_BLOCK
    from edgeq.model.memory_layout import ACT_BLOCK, BATCH
    from edgeq.runtime.kernels.abi import MatmulKernel, PackedWeights, Rows
    from edgeq.runtime.kernels.jit import kernel_address

    if threads < 1:
        raise EdgeqError(f"threads is {threads}; use 1 or more")
    blocks, tiles, rounds = 16, 16, 20
    kernel = MatmulKernel(kernel_address(QuantScheme(4)))
    codes, scales = TILE * K_BLOCK // 2 * blocks, 2 * TILE * blocks  # bytes of a tile
    sizes = (codes * tiles, scales * tiles, ACT_BLOCK * blocks * BATCH, 4 * TILE * tiles * BATCH)
    room = [[np.zeros(size + 64, np.uint8) for size in sizes] for _ in range(threads)]

    def work(tid: int) -> None:
        w, s, x, y = (part.ctypes.data + -part.ctypes.data % 64 for part in room[tid])
        weights = PackedWeights(
            codes=w, code_step=codes, scales=s, scale_step=scales, zeros=0, zero_step=0,
            blocks=blocks, shift=0,
        )  # fmt: skip
        acts, out = Rows(x, ACT_BLOCK * blocks, BATCH), Rows(y, 4 * TILE * tiles, BATCH)
        for _ in range(rounds):
            kernel(weights, acts, out, 0, tiles)

    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            list(pool.map(work, range(threads)))
            seconds.append(time.perf_counter() - start)
    operations = 2 * TILE * tiles * K_BLOCK * blocks * BATCH * rounds * threads
    return operations / sorted(seconds[1:])[repeats // 2] / 1e9


__all__ = ["KERNEL", "decoder", "int8_throughput", "pool_functions", "read_bandwidth", "warmup"]
