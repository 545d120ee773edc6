"""One layer's KV cache in the layout the kernels read, and its contents in plain order.

The kernels want keys as a packed matrix [S, D] and values as a packed [D, S] for each head (see
`edgeq.runtime.kernels.attention_chunk`). Saved states hold the same numbers position by position
(`edgeq.runtime.kv_state.layer_parts`); everything here moves whole tiles of 16 positions, as those
share a center.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.packing import TILE, round_up
from edgeq.model.config import ModelConfig
from edgeq.model.memory_layout import CHUNK, cache_arrays
from edgeq.runtime.kernels.abi import CACHE
from edgeq.runtime.kernels.jit import KEY_SCHEME, VALUE_SCHEME, kernel_address
from edgeq.runtime.kv_state import Parts, layer_parts

Allocate = Callable[[int, Any], NDArray[Any]]
"""(count, dtype) -> a zeroed, 64-byte aligned vector."""


class PackedCache:
    """Keys and values of one layer.

    Args:
        config: of the model.
        length: positions, a multiple of 256. Fewer than the context make a ring: position p lies
            at p modulo the length.
        kv_bits: 8 or 16.
        allocate: allocates an array.

    Attributes:
        length: positions.
        nbytes: of all its arrays.
        record: the `abi.CACHE` that the kernels read.
    """

    def __init__(self, config: ModelConfig, length: int, kv_bits: int, allocate: Allocate) -> None:
        self.length = length
        self._config, self._bits = config, kv_bits
        dim_k, dim_v = round_up(config.head_dim, 32), round_up(config.head_dim, TILE)
        self.record = np.zeros((), CACHE)
        self.record["bits"], self.record["length"] = kv_bits, length
        self.record["dim"], self.record["dim_k"], self.record["dim_v"] = (
            config.head_dim, dim_k, dim_v,
        )  # fmt: skip
        # the axes in the order: tile (centers: chunk, tile), position within it, head, dimension
        # (the middle and last may be two axes)
        layout: dict[str, tuple[int, ...]]
        if kv_bits == 16:
            layout = {"keys": (1, 2, 0, 3), "values": (2, 3, 0, 1)}
        else:
            self.record["key_kernel"] = kernel_address(KEY_SCHEME)
            self.record["value_kernel"] = kernel_address(VALUE_SCHEME)
            layout = {
                "keys": (1, 3, 0, 2, 4), "key_scales": (1, 2, 0), "key_zeros": (1, 2, 0),
                "centers": (1, 3, 0, 2), "values": (2, 3, 5, 0, 1, 4), "value_scales": (1, 2, 0),
            }  # fmt: skip
        self._views: dict[str, NDArray[Any]] = {}
        self.nbytes = 0
        for name, (dtype, shape) in cache_arrays(config, length, kv_bits).items():
            buffer = allocate(int(np.prod(shape)), dtype)
            self.nbytes += buffer.nbytes
            self.record[name] = buffer.ctypes.data
            self._views[name] = buffer.reshape(shape).transpose(layout[name])

    def read(self, start: int, stop: int) -> Parts:
        """Positions ``start:stop``, start a multiple of 16, in the arrays of `layer_parts`."""
        parts = {}
        for name, (dtype, shape) in layer_parts(self._config, self._bits, stop - start).items():
            tiles = self._views[name][self._where(name, start, stop)]
            rows = tiles.reshape(self._rows(name, start, stop))[: shape[0]]
            rows = rows[..., : shape[2]] if len(shape) == 3 else rows[..., 0]
            # in the kernels' layout values are code + 128
            parts[name] = (rows ^ np.uint8(128)).view(np.int8) if dtype is np.int8 else rows
        return parts

    def write(self, start: int, parts: Parts) -> None:
        """Store what `read` gave, beginning at position ``start``, a multiple of 16."""
        stop = start + len(parts["keys"])
        for name, part in parts.items():
            view, where = self._views[name], self._where(name, start, stop)
            tiles = np.zeros(self._rows(name, start, stop), view.dtype)
            codes = part.view(np.uint8) ^ np.uint8(128) if part.dtype == np.int8 else part
            codes = codes.reshape(*part.shape[:2], -1)
            tiles[: len(codes), :, : codes.shape[2]] = codes
            view[where] = tiles.reshape(view[where].shape)

    def _where(self, name: str, start: int, stop: int) -> tuple[NDArray[np.int64], ...]:
        """The index into a view of the tiles that hold ``start:stop``."""
        tiles = np.arange(start // TILE, -(-stop // TILE)) % (self.length // TILE)
        return np.divmod(tiles, CHUNK // TILE) if name == "centers" else (tiles,)

    def _rows(self, name: str, start: int, stop: int) -> tuple[int, int, int]:
        """Shape of those tiles as rows: [positions or tiles, heads, padded dimension or 1]."""
        per_row = TILE if name == "centers" else 1
        tiles = -(-stop // TILE) - start // TILE
        heads = self._config.kv_heads
        dim = self._views[name].size * per_row // (self.length * heads)
        return tiles * TILE // per_row, heads, dim
