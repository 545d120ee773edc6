"""The KV cache of a layer in the layout that the kernels read, and its contents in plain order.

The kernels want keys as a packed matrix [S, D] and values as a packed [D, S] for each head (see
`edgeq.runtime.kernels.attention_chunk`). Saved states hold the same numbers position by position
(`edgeq.runtime.kv_state.layer_parts`); everything here moves whole tiles of 16 positions, or of as
many as share a center.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.packing import TILE, round_up
from edgeq.model.config import ModelConfig
from edgeq.model.memory_layout import CHUNK, cache_arrays, center_span
from edgeq.runtime.kernels.abi import CACHE
from edgeq.runtime.kernels.jit import CACHE_SCHEMES, float_kernel_address, kernel_address
from edgeq.runtime.kv_state import Parts, layer_parts, paired, unpaired

Allocate = Callable[[int, Any], NDArray[Any]]
"""(count, dtype) -> a zeroed, 64-byte aligned vector."""


class PackedCache:
    """Keys and values of one layer.

    Args:
        config: of the model.
        layer: which of its layers.
        length: positions, a multiple of 256. Fewer than the context make a ring: position p lies
            at p modulo the length.
        kv_bits: 4, 8 or 16.
        allocate: allocates an array.

    Attributes:
        length: positions.
        span: positions that share a center.
        nbytes: of all its arrays.
        record: the `abi.CACHE` that the kernels read.
    """

    def __init__(
        self, config: ModelConfig, layer: int, length: int, kv_bits: int, allocate: Allocate
    ) -> None:
        self.length, self.span = length, center_span(kv_bits)
        self._config, self._layer, self._bits = config, layer, kv_bits
        self._head_dim = config.head_dim_of(layer)
        dim_k, dim_v = round_up(self._head_dim, 32), round_up(self._head_dim, TILE)
        self.record = np.zeros((), CACHE)
        self.record["bits"], self.record["length"] = kv_bits, length
        self.record["span"] = self.span
        self.record["dim"], self.record["dim_k"], self.record["dim_v"] = (
            self._head_dim, dim_k, dim_v,
        )  # fmt: skip
        # the axes in the order: tile (centers: chunk, span), position within it, head, dimension
        # (the middle and last may be two axes)
        layout: dict[str, tuple[int, ...]]
        if kv_bits == 16:
            layout = {"keys": (1, 2, 0, 3), "values": (2, 3, 0, 1)}
            kernel = float_kernel_address("float16")
            self.record["key_kernel"] = self.record["value_kernel"] = kernel
        else:
            for kind, scheme in zip(("key", "value"), CACHE_SCHEMES[kv_bits], strict=True):
                self.record[f"{kind}_kernel"] = kernel_address(scheme)
            layout = {
                "keys": (1, 3, 0, 2, 4), "key_scales": (1, 2, 0), "key_zeros": (1, 2, 0),
                "centers": (1, 3, 0, 2), "values": (2, 3, 5, 0, 1, 4), "value_scales": (1, 2, 0),
            }  # fmt: skip
        self._views: dict[str, NDArray[Any]] = {}
        self.nbytes = 0
        for name, (dtype, shape) in cache_arrays(config, layer, length, kv_bits).items():
            buffer = allocate(int(np.prod(shape)), dtype)
            self.nbytes += buffer.nbytes
            self.record[name] = buffer.ctypes.data
            self._views[name] = buffer.reshape(shape).transpose(layout[name])

    def read(self, start: int, stop: int) -> Parts:
        """Positions ``start:stop``, start a multiple of ``span``, as arrays of `layer_parts`."""
        parts = {}
        arrays = layer_parts(self._config, self._layer, self._bits, stop - start)
        for name, (dtype, shape) in arrays.items():
            tiles = self._views[name][self._where(name, start, stop)]
            if axis := self._halves(name):
                tiles = np.stack([tiles & 15, tiles >> 4], axis=axis)
            rows = tiles.reshape(self._rows(name, start, stop))[: shape[0]]
            if axis:
                parts[name] = paired(rows[..., : self._head_dim])
                continue
            rows = rows[..., : shape[2]] if len(shape) == 3 else rows[..., 0]
            # in the kernels' layout values of 8 bits are code + 128
            parts[name] = (rows ^ np.uint8(128)).view(np.int8) if dtype is np.int8 else rows
        return parts

    def write(self, start: int, parts: Parts) -> None:
        """Store what `read` gave, beginning at position ``start``, a multiple of ``span``."""
        stop = start + len(parts["keys"])
        for name, part in parts.items():
            view, where = self._views[name], self._where(name, start, stop)
            tiles = np.zeros(self._rows(name, start, stop), view.dtype)
            codes = part.view(np.uint8) ^ np.uint8(128) if part.dtype == np.int8 else part
            if axis := self._halves(name):
                codes = unpaired(part, self._head_dim)
            codes = codes.reshape(*part.shape[:2], -1)
            tiles[: len(codes), :, : codes.shape[2]] = codes
            if axis:
                shape = list(view[where].shape)
                halves = tiles.reshape(*shape[:axis], 2, *shape[axis:])
                low, high = np.moveaxis(halves, axis, 0)
                view[where] = low | (high << 4)
            else:
                view[where] = tiles.reshape(view[where].shape)

    def _where(self, name: str, start: int, stop: int) -> tuple[NDArray[np.int64], ...]:
        """The index into a view of the tiles that hold ``start:stop``."""
        size = self.span if name == "centers" else TILE
        tiles = np.arange(start // size, -(-stop // size)) % (self.length // size)
        return np.divmod(tiles, CHUNK // size) if name == "centers" else (tiles,)

    def _halves(self, name: str) -> int:
        """Axis of the tiles of an array along which the two halves of its bytes belong, or 0."""
        return {"keys": 4, "values": 2}.get(name, 0) if self._bits == 4 else 0

    def _rows(self, name: str, start: int, stop: int) -> tuple[int, int, int]:
        """Shape of those tiles as rows: [positions or tiles, heads, padded dimension or 1]."""
        size, per_row = (self.span, self.span) if name == "centers" else (TILE, 1)
        tiles = -(-stop // size) - start // size
        heads = self._config.kv_heads
        codes = 2 if self._halves(name) else 1
        dim = self._views[name].size * codes * per_row // (self.length * heads)
        return tiles * size // per_row, heads, dim
