"""A run of quantized matmuls by edgeq's kernels alone, shared by threads as the decoder does it.

Every matmul quantizes its activations first, as a runtime has to that is given float32.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import cfunc, types
from numpy.typing import NDArray

from edgeq.formats.packing import TILE
from edgeq.formats.schemes import K_BLOCK, QuantScheme
from edgeq.importers.shapes import random_tensor
from edgeq.runtime.kernels.abi import SYNC_BYTES, group_shift
from edgeq.runtime.kernels.jit import kernel_address, register_vector_ops
from edgeq.runtime.kernels.matmul import call_kernel
from edgeq.runtime.kernels.microkernel import ACT_BLOCK
from edgeq.runtime.kernels.primitives import ints, quantize_row, records
from edgeq.runtime.kernels.row_ops import barrier, next_tiles
from edgeq.runtime.thread_pool import ThreadPool

CHAIN = np.dtype([(name, "i8") for name in (
    "threads", "count", "codes", "scales", "tokens", "tiles", "blocks", "sync", "x", "x_stride",
    "acts", "act_stride", "out", "out_stride", "out_step", "kernel", "code_step", "scale_step",
    "shift",
)])  # fmt: skip
"""What the threads are told; ``codes`` and ``scales`` are tables of addresses."""

register_vector_ops()  # before anything that calls them is compiled
_chains = records(CHAIN)


@cfunc(types.int32(*[types.int64] * 4))
def _run(_result, _error, args_at, tid):  # type: ignore[no-untyped-def]
    c = _chains(args_at, 1)[0]
    codes, scales = ints(c.codes, c.count), ints(c.scales, c.count)
    own = c.acts + (tid * c.act_stride if c.tokens == 1 else 0)
    for r in range(c.count):
        if c.tokens == 1:  # cheaper done by every thread than waited for
            quantize_row(c.x, own, c.blocks)
        else:
            for t in range(tid, c.tokens, c.threads):
                quantize_row(c.x + t * c.x_stride, c.acts + t * c.act_stride, c.blocks)
            barrier(c.sync, c.threads)
        while True:
            first, last = next_tiles(c.sync, c.tiles, c.threads)
            if first == last:
                break
            call_kernel(
                c.kernel, codes[r], c.code_step, scales[r], c.scale_step, 0, 0, c.blocks, c.shift,
                own, c.act_stride, c.tokens, c.out + r * c.out_step, c.out_stride, first, last,
            )  # fmt: skip
        barrier(c.sync, c.threads)
    return np.int32(0)


class Chain:
    """Matmuls [M, K] x [N, K].T one after the other, each with weights of its own.

    Args:
        scheme: symmetric, of the weights.
        n, k, m: the shape; N a multiple of 16 and K of 32.
        copies: how many matmuls.
        threads: how many share each of them.
    """

    def __init__(
        self, scheme: QuantScheme, n: int, k: int, m: int, copies: int, threads: int
    ) -> None:
        rng = np.random.default_rng(0)
        self.weights = [random_tensor(rng, scheme, n, k) for _ in range(copies)]
        self.x = _aligned(rng.standard_normal((m, k), np.float32))
        self.out = _aligned(np.zeros((copies, m, n), np.float32))
        self._acts = _aligned(np.zeros((max(m, threads), k // K_BLOCK * ACT_BLOCK), np.uint8))
        self._sync = _aligned(np.zeros(SYNC_BYTES, np.uint8))
        self._codes = [_aligned(w.packed) for w in self.weights]
        self._scales = [_aligned(w.scales) for w in self.weights]
        self._tables = [_addresses(arrays) for arrays in (self._codes, self._scales)]
        codes, scales = (table.ctypes.data for table in self._tables)
        self._args = np.zeros(1, CHAIN)
        for name, value in {
            "threads": threads, "count": copies, "codes": codes, "scales": scales, "tokens": m,
            "tiles": n // TILE, "blocks": k // K_BLOCK, "sync": self._sync.ctypes.data,
            "x": self.x.ctypes.data, "x_stride": self.x.strides[0],
            "acts": self._acts.ctypes.data, "act_stride": self._acts.strides[0],
            "out": self.out.ctypes.data, "out_stride": self.out.strides[1],
            "out_step": self.out.strides[0], "kernel": kernel_address(scheme),
            "code_step": self._codes[0].strides[0], "scale_step": self._scales[0].strides[0],
            "shift": group_shift(scheme),
        }.items():  # fmt: skip
            self._args[name] = value
        self._pool = ThreadPool(threads)

    def run(self) -> float:
        """Run them all once; the seconds it took."""
        start = time.perf_counter()
        self._pool.call(_run.address, self._args.ctypes.data)
        return time.perf_counter() - start

    def error(self) -> float:
        """Relative error (2-norm) of the last product against float64."""
        want = self.x.astype(np.float64) @ self.weights[-1].numpy().T.astype(np.float64)
        return float(np.linalg.norm(self.out[-1] - want) / np.linalg.norm(want))

    def close(self) -> None:
        """End the threads."""
        self._pool.close()


def _addresses(arrays: list[NDArray[Any]]) -> NDArray[np.int64]:
    return np.array([a.ctypes.data for a in arrays], np.int64)


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that starts at a cache line."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy: NDArray[Any] = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
