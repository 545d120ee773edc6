"""What a matmul kernel spends on a token: instructions, cycles, and bytes from each cache.

    python benchmarks/kernels/profile.py            prints the tables
    python benchmarks/kernels/profile.py -o docs/kernels.md

Counts come from the machine code that runs; cycles from the clock of this core: a chain of
dependent instructions of one cycle each (on x86-64), timed beside every measurement. One row of
activations, one thread. Anything else that runs meanwhile spoils it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from instructions import SCHEMES, instructions, scheme_named, section
from numba import njit

from edgeq.core.cpu import this_cpu
from edgeq.formats.packing import TILE
from edgeq.formats.schemes import K_BLOCK, QuantScheme
from edgeq.importers.shapes import random_tensor
from edgeq.runtime.kernels import KERNEL, read_bandwidth
from edgeq.runtime.kernels.abi import PackedWeights, Rows, group_shift
from edgeq.runtime.kernels.dispatch import ISA
from edgeq.runtime.kernels.jit import kernel_address, register_vector_ops
from edgeq.runtime.kernels.matmul import call_kernel
from edgeq.runtime.kernels.microkernel import ACT_BLOCK
from edgeq.runtime.kernels.primitives import quantize_row

register_vector_ops()

PLACES = {"L1": 16 << 10, "L2": 512 << 10, "L3": 12 << 20, "memory": 256 << 20}
"""Where weights come from -> how many bytes of them are gone through."""
K = 2048
REPEATS, SECONDS = 7, 0.1
_CHAIN = 4_000_000


@njit(nogil=True)
def _chain(x, n):  # type: ignore[no-untyped-def]
    for _ in range(n):
        x = (x ^ (x >> np.uint64(1))) + np.uint64(1)  # three steps that cannot overlap
    return x


@njit(nogil=True)
def _rounds(kernel, weights, acts, out, tiles, n):  # type: ignore[no-untyped-def]
    for _ in range(n):
        call_kernel(kernel, weights, acts, out, 0, tiles)


def gigahertz() -> float:
    """The core's clock now."""
    start = time.perf_counter()
    _chain(np.uint64(1), _CHAIN)
    return 3 * _CHAIN / (time.perf_counter() - start) / 1e9


def timed(scheme: QuantScheme, nbytes: int) -> tuple[float, float]:
    """(ns, cycles) a block of 16 rows x 32 columns, weights of ``nbytes``; medians."""
    blocks = K // K_BLOCK
    weight = random_tensor(np.random.default_rng(0), scheme, TILE, K)
    tile = weight.packed.nbytes + weight.scales.nbytes
    tiles = max(1, nbytes // tile)
    codes, scales = (
        _aligned(np.tile(part.reshape(-1), tiles)) for part in (weight.packed, weight.scales)
    )
    table = np.zeros(TILE, np.int8)
    if weight.palette is not None:
        table[: weight.palette.size] = weight.palette
    x, acts = _aligned(np.ones(K, np.float32)), _aligned(np.zeros(blocks * ACT_BLOCK, np.uint8))
    _quantize(x.ctypes.data, acts.ctypes.data, blocks)
    out = np.zeros(tiles * TILE, np.float32)
    packed = PackedWeights(
        codes=codes.ctypes.data, code_step=weight.packed.strides[0], scales=scales.ctypes.data,
        scale_step=weight.scales.strides[0], zeros=table.ctypes.data, zero_step=0, blocks=blocks,
        shift=group_shift(scheme),
    )  # fmt: skip
    one_row, results = Rows(acts.ctypes.data, acts.nbytes, 1), Rows(out.ctypes.data, out.nbytes, 1)

    def run(n: int) -> float:
        start = time.perf_counter()
        _rounds(kernel_address(scheme), packed, one_row, results, tiles, n)
        return (time.perf_counter() - start) / n / tiles / blocks * 1e9

    run(1)  # compiles
    n = max(1, int(SECONDS / (run(1) * 1e-9 * tiles * blocks)))
    run(n)
    found = [(run(n), gigahertz()) for _ in range(REPEATS)]
    ns = statistics.median(ns for ns, _ in found)
    return ns, statistics.median(ns * clock for ns, clock in found)


@njit
def _quantize(x, acts, blocks):  # type: ignore[no-untyped-def]
    quantize_row(x, acts, blocks)


def _aligned(array: Any) -> Any:
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy = raw[start : start + array.nbytes].view(array.dtype)
    copy[...] = array.reshape(-1)
    return copy


def tables() -> str:
    """The whole text."""
    clock = statistics.median(gigahertz() for _ in range(9))
    peak = read_bandwidth(1)
    lines = [
        "# What a kernel spends",
        "",
        "Written by `python benchmarks/kernels/profile.py -o docs/kernels.md`: one row of "
        "activations, one thread, weights gone through from L1, L2, L3 or memory. A block is "
        f"{TILE} rows x {K_BLOCK} columns; instructions are those of the inner loop's machine "
        "code; cycles are by the core's own clock, measured beside. GB/s count codes and scales.",
        "",
        f"{this_cpu().name}, kernel `{KERNEL}`, {clock:.2f} GHz; reading memory without "
        f"computing: {peak:.1f} GB/s.",
        "",
        "| weights | instructions a block | bytes | in | cycles | instructions a cycle | GB/s |",
        "| :--- | ---: | ---: | :--- | ---: | ---: | ---: |",
    ]
    here = (ISA, llvm.get_process_triple(), llvm.get_host_cpu_name())
    for name in SCHEMES:
        scheme = scheme_named(name)
        count = sum(instructions(scheme, *here).values())
        size = TILE * K_BLOCK * scheme.bits // 8
        size += 2 * TILE if scheme.group_size else 0
        for i, (place, nbytes) in enumerate(PLACES.items()):
            ns, cycles = timed(scheme, nbytes)
            head = [name, str(count), str(size)] if not i else ["", "", ""]
            cells = [*head, place, f"{cycles:.1f}", f"{count / cycles:.2f}", f"{size / ns:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    said = (
        "Where a block takes far more cycles from memory than from L1, the memory bounds the "
        "decoder, and no better code would make it faster: it waits for bytes."
    )
    return "\n".join([*lines, "", said, "", section()])


def main() -> None:
    """Measure and print, or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", type=Path, help="write here instead")
    args = parser.parse_args()
    text = tables()
    if args.o:
        args.o.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
