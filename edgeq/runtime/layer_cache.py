"""The cache of a layer of the compiled engine: keys and values, or a short convolution's inputs."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.model.config import ModelConfig
from edgeq.model.memory_layout import cache_length
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
    """Inputs of a short convolution, float32 [length, hidden]; a `LayerCache`.

    Args:
        hidden: channels.
        length: positions.
        allocate: allocates an array.
    """

    def __init__(self, hidden: int, length: int, allocate: Allocate) -> None:
        self.length, self.span = length, 1
        self._inputs = allocate(length * hidden, np.float32).reshape(length, hidden)
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


def layer_cache(
    config: ModelConfig, layer: int, context: int, kv_bits: int, allocate: Allocate
) -> LayerCache:
    """The empty cache of a layer for a context."""
    block = config.blocks[layer]
    length = cache_length(block, context, kv_bits)
    if block.mixer == "short_conv":
        return InputCache(config.hidden, length, allocate)
    return PackedCache(config, length, kv_bits, allocate)
