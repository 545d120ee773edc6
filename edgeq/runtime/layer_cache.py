"""The cache of a layer of the compiled engine: keys and values, a short convolution's inputs, the
state of a gated delta net, or the cache of another layer."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.packing import TILE, round_up
from edgeq.model.config import ModelConfig
from edgeq.model.memory_layout import cache_length, input_width, state_shape
from edgeq.runtime.kernels.abi import CACHE
from edgeq.runtime.kv_state import Parts
from edgeq.runtime.packed_cache import Allocate, PackedCache


class LayerCache(Protocol):
    """What a layer keeps of the positions before.

    Attributes:
        length: positions it holds; position p lies at p modulo this.
        span: positions that are stored and dropped together.
        nbytes: of all its arrays.
        record: the `abi.CACHE` that the kernels read.
    """

    length: int
    span: int
    nbytes: int
    record: NDArray[Any]

    def read(self, start: int, stop: int) -> Parts:
        """Positions ``start:stop``, start a multiple of ``span``, as saved states hold them."""

    def write(self, start: int, parts: Parts) -> None:
        """Store what `read` gave, beginning at position ``start``, a multiple of ``span``."""


class InputCache:
    """Inputs of a short convolution, float32 [length, width]; a `LayerCache`.

    Args:
        width: floats of a position.
        length: positions.
        allocate: allocates an array.
    """

    def __init__(self, width: int, length: int, allocate: Allocate) -> None:
        self.length, self.span = length, 1
        self._inputs = allocate(length * width, np.float32).reshape(length, width)
        self.nbytes = self._inputs.nbytes
        self.record = np.zeros((), CACHE)
        self.record["length"], self.record["span"] = length, self.span
        self.record["inputs"] = self._inputs.ctypes.data

    def read(self, start: int, stop: int) -> Parts:
        """Positions ``start:stop`` in order."""
        return {"inputs": self._inputs[np.arange(start, stop) % self.length]}

    def write(self, start: int, parts: Parts) -> None:
        """Store inputs, beginning at position ``start``."""
        inputs = parts["inputs"]
        self._inputs[np.arange(start, start + len(inputs)) % self.length] = inputs


class DeltaCache:
    """The state of a gated delta net; a `LayerCache`.

    Beside the state it has the inputs of its last positions, and a copy of the state from before
    some of them, so that positions can be taken back (`edgeq.runtime.kernels.delta_net`).

    Args:
        config: of the model.
        layer: which of its layers.
        length: positions whose inputs are kept.
        allocate: allocates an array.
    """

    def __init__(self, config: ModelConfig, layer: int, length: int, allocate: Allocate) -> None:
        self._kept = InputCache(input_width(config, layer), length, allocate)
        self.length, self.span, self.record = length, 1, self._kept.record
        taps = config.blocks[layer].window
        assert taps is not None  # checked by the block
        self._taps = taps
        heads, keys, self._values = state_shape(config, layer)
        shape = (heads, keys, round_up(self._values, TILE))
        count = heads * keys * shape[2]
        self._state, self._saved = (allocate(count, np.float32).reshape(shape) for _ in "12")
        self._marks = allocate(2, np.int64)
        self._marks[1] = -1
        self.nbytes = self._kept.nbytes + self._state.nbytes + self._saved.nbytes
        self.record["state"], self.record["saved"] = (
            self._state.ctypes.data,
            self._saved.ctypes.data,
        )
        self.record["marks"] = self._marks.ctypes.data

    @property
    def first(self) -> int:
        """The first position whose inputs a saved state holds."""
        return max(0, int(self._marks[0]) - self._taps)

    def resumes(self, position: int) -> bool:
        """Whether a pass may begin at a position."""
        now, before = (int(mark) for mark in self._marks)
        return position in (0, now) or 0 <= before <= position <= now

    def settle(self, position: int) -> bool:
        """Make the state that after ``position`` tokens, if it or its copy is; whether it is."""
        if self._marks[0] != position and self._marks[1] == position:
            self._state[:] = self._saved
            self._marks[0] = position
        return bool(self._marks[0] == position)

    def read(self, start: int, stop: int) -> Parts:
        """Inputs of positions ``start:stop``, and the state after the last."""
        assert self._marks[0] == stop
        return {**self._kept.read(start, stop), "state": self._state[..., : self._values]}

    def write(self, start: int, parts: Parts) -> None:
        """Store what `read` gave, beginning at position ``start``."""
        inputs = parts["inputs"]
        stop = start + len(inputs)
        kept = inputs[-self.length :]
        self._kept.write(stop - len(kept), {"inputs": kept})
        self._state[..., : self._values] = parts["state"]
        self._marks[:] = stop, -1


class BorrowedCache:
    """The cache of a layer that reads the keys and values of another; a `LayerCache`.

    It has nothing of its own to save, and is never short of a position that its source has.

    Args:
        source: the cache of that other layer.
    """

    def __init__(self, source: LayerCache) -> None:
        self.length, self.span, self.nbytes = source.length, source.span, 0
        self.record = source.record

    def read(self, start: int, stop: int) -> Parts:
        """Nothing: the source saves what there is."""
        return {}

    def write(self, start: int, parts: Parts) -> None:
        """Nothing, as `read` gives nothing."""


def layer_caches(
    config: ModelConfig, context: int, kv_bits: int, allocate: Allocate
) -> list[LayerCache]:
    """The empty caches of all layers for a context."""
    caches: list[LayerCache] = []
    for layer, block in enumerate(config.blocks):
        if block.kv_from is not None:
            caches.append(BorrowedCache(caches[block.kv_from]))
        else:
            caches.append(layer_cache(config, layer, context, kv_bits, allocate))
    return caches


def layer_cache(
    config: ModelConfig, layer: int, context: int, kv_bits: int, allocate: Allocate
) -> LayerCache:
    """The empty cache for a context of a layer that has one of its own."""
    block = config.blocks[layer]
    length = cache_length(block, context, kv_bits)
    if block.mixer == "short_conv":
        return InputCache(config.hidden, length, allocate)
    if block.delta:
        return DeltaCache(config, layer, length, allocate)
    return PackedCache(config, layer, length, kv_bits, allocate)
