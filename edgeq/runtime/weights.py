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
from edgeq.formats.kept import KeptTensor, Take, packed
from edgeq.formats.mapped_file import mapping_under, release
from edgeq.formats.packing import round_up
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor, part_nbytes, row_blocks
from edgeq.importers.lazy import GatheredRows
from edgeq.model.model import Model
from edgeq.model.mtp import mtp_linears

_LINE = 64
_PIECE = 1 << 23
_PARTS = ("packed", "scales", "zero_points", "minimums")


def worth_copying(model: Model) -> bool:
    """Whether to copy a model's matrices: they are in a mapped file, and the copy takes at most
    half of the free memory."""
    tensors = _matrices(model).values()
    free = available_bytes()
    return (
        free is not None
        and sum(sum(_sizes(tensor)) for tensor in tensors) <= free // 2
        and any(isinstance(tensor, KeptTensor) or _mappings(tensor) for tensor in tensors)
    )


def advise(model: Model) -> None:
    """Request huge pages for the mapped files of a model's matrices; a hint to the system.

    Not for a file that holds a table too, of which a huge page would bring in rows that are not
    read.
    """
    tables = {id(m) for name in model.config.tables for m in _mappings(model.tensors[name])}
    mappings = [m for tensor in _matrices(model).values() for m in _mappings(tensor)]
    for mapping in {id(mapping): mapping for mapping in mappings}.values():
        if isinstance(mapping, mmap.mmap) and id(mapping) not in tables:
            advise_huge(mapping)


def in_place(model: Model, take: Take) -> Model:
    """The model with every matrix as the kernels read it, copied only where that is needed.

    Quantized tensors and rows of floats stay where they are, perhaps in a mapped file. Kept tensors
    are packed, and what is computed when it is read becomes rows of floats.

    Args:
        model: any.
        take: allocates the copies.
    """

    def changed(tensor: Tensor) -> Tensor:
        if isinstance(tensor, QuantTensor | FloatTensor) or len(tensor.shape) != 2:
            return tensor
        return _copied(tensor, take)

    return model.replaced(changed)


class WeightArena:
    """Anonymous memory for all matrices of a model, with huge pages where the system allows.

    Args:
        original: the model whose matrices are copied.

    Attributes:
        nbytes: size of the memory.
    """

    @classmethod
    def of(cls, model: Model) -> WeightArena:
        """The copy that other engines of the same model object use already, or a new one."""
        with _MAKING:
            arena = _ARENAS.get(id(model))
            if arena is None or arena._matrices != _matrices(model):  # tensors may be exchanged
                arena = _ARENAS[id(model)] = cls(model)
            return arena

    def __init__(self, original: Model) -> None:
        self._original = original  # kept, so that no other model gets its id
        self._copying = threading.Lock()
        self._matrices = _matrices(original)
        sizes = [size for tensor in self._matrices.values() for size in _sizes(tensor)]
        self.nbytes = sum(round_up(nbytes, _LINE) for nbytes in sizes)
        self._bytes = huge_buffer(self.nbytes)
        self._next = 0
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """The model with its matrices in this memory, copied at the first call.

        The pages of its file are released.
        """
        with self._copying:
            if self._model is None:
                self._model = self._original.replaced(
                    lambda tensor: (
                        _copied(tensor, self._take) if id(tensor) in self._matrices else tensor
                    )
                )
            return self._model

    def _take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        place = self._bytes[self._next : self._next + nbytes]
        self._next += round_up(nbytes, _LINE)
        array: NDArray[Any] = place.view(dtype).reshape(shape)
        return array


_ARENAS: weakref.WeakValueDictionary[int, WeightArena] = weakref.WeakValueDictionary()
"""Arenas in use, by the identity of their model."""
_MAKING = threading.Lock()


def _matrices(model: Model) -> dict[int, Tensor]:
    """A model's matrices by their identity, but for tables that can stay in their file.

    Only a few rows of a table are ever read. One that the kernels cannot read is copied all the
    same.
    """
    config = model.config
    names = [name for name, _ in (*config.linears(), *mtp_linears(config))]
    return {
        id(tensor): tensor
        for name in names
        for tensor in [model.tensors[name]]
        if name not in config.tables or not isinstance(tensor, QuantTensor | FloatTensor)
    }


def _copied(tensor: Tensor, take: Take) -> Tensor:
    """A copy of a matrix as the kernels read it; the pages of its file are released."""
    if isinstance(tensor, KeptTensor):
        return packed(tensor, take)
    if isinstance(tensor, QuantTensor):
        parts: Any = {name: _copy(part, take) for name, part in _parts(tensor).items()}
        return replace(tensor, **parts)
    if isinstance(tensor, FloatTensor):
        return FloatTensor(tensor.dtype, _copy(tensor.data, take))
    # what is computed becomes float32; rows in another order keep their type
    source = _reordered(tensor)
    out = take(tensor.shape, _float_type(tensor))
    for piece in row_blocks(tensor.shape):
        if source is None:
            out[piece] = tensor.rows(piece.start, piece.stop)
        else:
            assert isinstance(tensor, GatheredRows)
            out[piece] = source.data[tensor.index[piece]]
        release(tensor)
    return FloatTensor("float32" if source is None else source.dtype, out)


def _copy(array: NDArray[Any], take: Take) -> NDArray[Any]:
    copy = take(array.shape, array.dtype)
    target = copy.reshape(-1).view(np.uint8)
    source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, array.nbytes, _PIECE):
        target[start : start + _PIECE] = source[start : start + _PIECE]
        release(array)  # otherwise file and copy would both be in memory for a moment
    return copy


def _sizes(tensor: Tensor) -> list[int]:
    """Bytes of each array of a tensor's copy."""
    if isinstance(tensor, KeptTensor):
        return part_nbytes(tensor.scheme, tensor.shape)
    if isinstance(tensor, QuantTensor):
        return [part.nbytes for part in _parts(tensor).values()]
    return [math.prod(tensor.shape) * _float_type(tensor).itemsize]


def _float_type(tensor: Tensor) -> np.dtype[Any]:
    """The type of the floats in a copy of a tensor that is not quantized."""
    source = tensor if isinstance(tensor, FloatTensor) else _reordered(tensor)
    return np.dtype(np.float32) if source is None else source.data.dtype


def _reordered(tensor: Tensor) -> FloatTensor | None:
    """The float tensor whose rows a tensor is in another order, if it is."""
    if isinstance(tensor, GatheredRows) and isinstance(tensor.data, FloatTensor):
        return tensor.data
    return None


def _parts(tensor: QuantTensor) -> dict[str, NDArray[Any]]:
    """The arrays of a quantized tensor with a row for each tile, by field."""
    parts = {name: getattr(tensor, name) for name in _PARTS}
    return {name: part for name, part in parts.items() if part is not None}


def _mappings(tensor: Tensor) -> list[Any]:
    """The mapped files that a tensor's arrays lie in."""
    source = _reordered(tensor) or tensor
    if isinstance(source, QuantTensor):
        arrays = list(_parts(source).values())
    else:
        arrays = [source.data] if isinstance(source, FloatTensor) else []
    return [m for m in map(mapping_under, arrays) if m is not None]
