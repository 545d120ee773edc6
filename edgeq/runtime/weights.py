"""Huge pages for weights: requested for a mapped file, or by copying to anonymous memory.

The pages of a mapped file can be reclaimed at any time, and it is ready at once; but with pages of
4 KiB, a processor that streams gigabytes misses its TLB at every page. New systems can map a file
in pages of 2 MiB when advised to; elsewhere, anonymous memory can have pages of that size.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.memory import advise_huge, available_bytes, huge_buffer
from edgeq.formats.kept import KeptTensor, Take, packed, packed_nbytes
from edgeq.formats.mapped_file import mapping_under, release
from edgeq.formats.packing import round_up
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor, part_nbytes, row_blocks
from edgeq.importers.lazy import GatheredRows
from edgeq.model.model import Model

_LINE = 64
_PIECE = 1 << 23
_PARTS = ("packed", "scales", "zero_points", "minimums", "data")


def worth_copying(model: Model) -> bool:
    """Whether to copy a model's matrices: they are in a mapped file, and the copy takes at most
    half of the free memory."""
    tensors = [model.tensors[name] for name, _ in model.config.linears()]
    parts = [part for tensor in tensors for part in _parts(tensor).values()]
    kept = [tensor for tensor in tensors if isinstance(tensor, KeptTensor)]
    free = available_bytes()
    return (
        free is not None
        and sum(part.nbytes for part in parts) + sum(map(packed_nbytes, kept)) <= free // 2
        and (bool(kept) or any(mapping_under(part) is not None for part in parts))
    )


def float_copy(tensor: Tensor, take: Take) -> FloatTensor:
    """A matrix as rows of floats in memory, as the kernels read them.

    A float tensor is returned as it is. Rows of one in another order are copied and keep their
    type; what is computed when it is read becomes float32.

    Args:
        tensor: not quantized.
        take: allocates the copy.
    """
    if isinstance(tensor, FloatTensor):
        return tensor
    source = _reordered(tensor)
    dtype = "float32" if source is None else source.dtype
    out = take(tensor.shape, np.float32 if source is None else source.data.dtype)
    for piece in row_blocks(tensor.shape):
        if source is None:
            out[piece] = tensor.rows(piece.start, piece.stop)
        else:
            assert isinstance(tensor, GatheredRows)
            out[piece] = source.data[tensor.index[piece]]
        release(tensor)
    return FloatTensor(dtype, out)


def _reordered(tensor: Tensor) -> FloatTensor | None:
    """The float tensor whose rows a tensor is in another order, if it is."""
    if isinstance(tensor, GatheredRows) and isinstance(tensor.data, FloatTensor):
        return tensor.data
    return None


def advise(model: Model) -> None:
    """Request huge pages for the mapped files of a model's matrices; a hint to the system."""
    arrays = (p for name, _ in model.config.linears() for p in _parts(model.tensors[name]).values())
    for mapped in {id(mapping): mapping for mapping in map(mapping_under, arrays)}.values():
        if isinstance(mapped, mmap.mmap):
            advise_huge(mapped)


class WeightArena:
    """Anonymous memory for all matrices of a model, with huge pages where the system allows.

    Args:
        model: whose matrices will be copied.

    Attributes:
        nbytes: size of the memory.
    """

    @classmethod
    def of(cls, model: Model) -> WeightArena:
        """The copy that other engines of the same model object use already, or a new one."""
        with _MAKING:
            arena = _ARENAS.get(id(model))
            if arena is None or arena._sources != _sources(model):  # tensors may be exchanged
                arena = _ARENAS[id(model)] = cls(model)
            return arena

    def __init__(self, model: Model) -> None:
        self._model = model  # kept, so that no other model gets its id
        self._copying = threading.Lock()
        tensors = self._sources = _sources(model)
        self.nbytes = sum(round_up(nbytes, _LINE) for t in tensors.values() for nbytes in _sizes(t))
        self._bytes = huge_buffer(self.nbytes)
        self._next = 0
        self._copies: dict[int, Tensor] = {}

    def copied(self, tensor: Tensor) -> Tensor:
        """The tensor's copy in this memory, made at the first call.

        The pages of its file are released. A kept tensor is packed here; one that is computed when
        it is read is not copied.
        """
        with self._copying:
            if id(tensor) not in self._copies and isinstance(tensor, KeptTensor):
                self._copies[id(tensor)] = packed(tensor, self._take)
            elif id(tensor) not in self._copies and _reordered(tensor) is not None:
                self._copies[id(tensor)] = float_copy(tensor, self._take)
            elif id(tensor) not in self._copies:
                parts = {name: self._copy(part) for name, part in _parts(tensor).items()}
                self._copies[id(tensor)] = replace(tensor, **parts) if parts else tensor  # type: ignore[type-var]
            return self._copies[id(tensor)]

    def _take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        place = self._bytes[self._next : self._next + nbytes]
        self._next += round_up(nbytes, _LINE)
        array: NDArray[Any] = place.view(dtype).reshape(shape)
        return array

    def _copy(self, array: NDArray[Any]) -> NDArray[Any]:
        place = self._take((array.nbytes,), np.uint8)
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, array.nbytes, _PIECE):
            place[start : start + _PIECE] = source[start : start + _PIECE]
            release(array)  # otherwise file and copy would both be in memory for a moment
        copy: NDArray[Any] = place.view(array.dtype).reshape(array.shape)
        return copy


_ARENAS: weakref.WeakValueDictionary[int, WeightArena] = weakref.WeakValueDictionary()
"""Arenas in use, by the identity of their model."""
_MAKING = threading.Lock()


def _sources(model: Model) -> dict[int, Tensor]:
    """A model's matrices by their identity."""
    return {id(t): t for t in (model.tensors[name] for name, _ in model.config.linears())}


def _sizes(tensor: Tensor) -> list[int]:
    """Bytes of each array of a tensor's copy."""
    if isinstance(tensor, KeptTensor):
        return part_nbytes(tensor.scheme, tensor.shape)
    return [part.nbytes for part in _parts(tensor).values()]


def _parts(tensor: Tensor) -> dict[str, NDArray[Any]]:
    """The arrays of a tensor, or of the one it is a reordering of, by field."""
    tensor = _reordered(tensor) or tensor
    if not isinstance(tensor, QuantTensor | FloatTensor):
        return {}
    parts = {name: getattr(tensor, name, None) for name in _PARTS}
    return {name: part for name, part in parts.items() if part is not None}
