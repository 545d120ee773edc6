"""A run of quantized matmuls by edgeq's kernels alone, shared by threads as the decoder does it.

Every matmul quantizes its activations first, as a runtime has to that is given float32.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import cfunc, types
from numpy.typing import NDArray

from edgeq.packing import TILE
from edgeq.runtime.kernels.matmul import quant_matmul
from edgeq.runtime.kernels.native import kernel_address, register_routines
from edgeq.runtime.kernels.ops import barrier, next_tiles
from edgeq.runtime.kernels.plan import SYNC_BYTES, group_shift
from edgeq.runtime.kernels.tile import ACT_BLOCK
from edgeq.runtime.kernels.vector import ints, quantize_row
from edgeq.runtime.threads import Team
from edgeq.schemes import K_BLOCK, QuantScheme
from edgeq.shapes import random_tensor

ARGUMENTS = 19

register_routines()  # before anything that calls them is compiled


@cfunc(types.int32(*[types.int64] * 4))
def _run(_room, _error, args_at, tid):  # type: ignore[no-untyped-def]
    args = ints(args_at, ARGUMENTS)
    threads, count, codes, scales, tokens, tiles, blocks, sync = args[:8]
    x, x_stride, acts, act_stride, out, out_stride, out_step = args[8:15]
    kernel, code_step, scale_step, shift = args[15:19]
    code_at, scale_at = ints(codes, count), ints(scales, count)
    own = acts + (tid * act_stride if tokens == 1 else 0)
    for r in range(count):
        if tokens == 1:  # cheaper done by every thread than waited for
            quantize_row(x, own, blocks)
        else:
            for t in range(tid, tokens, threads):
                quantize_row(x + t * x_stride, acts + t * act_stride, blocks)
            barrier(sync, threads)
        while True:
            first, last = next_tiles(sync, tiles, threads)
            if first == last:
                break
            quant_matmul(
                kernel, code_at[r], code_step, scale_at[r], scale_step, 0, 0, blocks, shift,
                own, act_stride, tokens, out + r * out_step, out_stride, first, last,
            )  # fmt: skip
        barrier(sync, threads)
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
        self._args = [
            threads, copies, *(table.ctypes.data for table in self._tables), m, n // TILE,
            k // K_BLOCK, self._sync.ctypes.data, self.x.ctypes.data, self.x.strides[0],
            self._acts.ctypes.data, self._acts.strides[0], self.out.ctypes.data,
            self.out.strides[1], self.out.strides[0], kernel_address(scheme),
            self._codes[0].strides[0], self._scales[0].strides[0], group_shift(scheme),
        ]  # fmt: skip
        self._team = Team(threads)

    def run(self) -> float:
        """Run them all once; the seconds it took."""
        start = time.perf_counter()
        self._team.call(_run.address, self._args)
        return time.perf_counter() - start

    def error(self) -> float:
        """Relative error (2-norm) of the last product against float64."""
        want = self.x.astype(np.float64) @ self.weights[-1].numpy().T.astype(np.float64)
        return float(np.linalg.norm(self.out[-1] - want) / np.linalg.norm(want))

    def close(self) -> None:
        """End the threads."""
        self._team.close()


def _addresses(arrays: list[NDArray[Any]]) -> NDArray[np.int64]:
    return np.array([a.ctypes.data for a in arrays], np.int64)


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that starts at a cache line."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    copy: NDArray[Any] = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
