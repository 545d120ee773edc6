"""safetensors files: a strict reader with one read-only mapping and no copy, and their header.

    u64 little-endian   N, the length of the header
    N bytes             JSON {"__metadata__": {str: str}, NAME: {"dtype", "shape", "data_offsets"}}
    the rest            the tensors' bytes; offsets count from here and must cover all of it

Nothing but the header is read when a file is opened. Pages that a conversion has touched stay in
its resident set until `SafetensorsFile.release` gives them back.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.core.files import STAND_IN_BYTES, stand_in, write_whole
from edgeq.formats.mapped_file import MappedFile
from edgeq.formats.schemes import FLOAT_TAGS, FloatType
from edgeq.formats.tensor import FloatTensor

MAX_HEADER = 100_000_000
"""The longest header the format allows, in bytes."""

_NUMPY: dict[str, Any] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
TYPE_NAMES: dict[Any, str] = {
    np.uint8: "U8", np.int8: "I8", np.float16: "F16", np.float32: "F32", np.float64: "F64",
}  # fmt: skip
"""NumPy's scalar types -> the format's names of them, of what edgeq writes."""
_FLOATS: dict[str, FloatType] = {tag.upper(): dtype for dtype, tag in FLOAT_TAGS.items()}
_OTHER_SIZES = {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
_SIZES = {name: np.dtype(code).itemsize for name, code in _NUMPY.items()} | _OTHER_SIZES


@dataclass(frozen=True)
class SafetensorsEntry:
    """Where a tensor lies.

    Args:
        dtype: the format's name of the type, as "BF16".
        shape: its dimensions.
        start, stop: byte positions in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An open safetensors file.

    Args:
        path: the file.
        content: its bytes, if they have been read; they are used in place of the file.

    Attributes:
        path: the file.
        mapping: its bytes.
        metadata: the header's ``__metadata__``.
        tensors: name -> where it lies.
    """

    def __init__(self, path: str | Path, content: bytes | None = None) -> None:
        self.path = Path(path)
        try:
            self.mapping = MappedFile(self.path) if content is None else _Content(content)
        except OSError as err:
            raise FormatError(f"{self.path} cannot be read: {err.strerror or err}") from err
        try:
            self.metadata, self.tensors = _read_header(self.path, self.mapping)
        except BaseException:
            self.mapping.close()
            raise

    def array(self, name: str) -> NDArray[Any]:
        """The tensor as a read-only view; BF16 as its uint16 bit patterns.

        Raises:
            FormatError: there is no such tensor.
            UnsupportedError: a type NumPy cannot show.
        """
        entry = self._entry(name)
        if entry.dtype not in _NUMPY:
            raise UnsupportedError(
                f"{self.path}: tensor {name} has type {entry.dtype}; "
                f"readable types are {', '.join(_NUMPY)}"
            )
        return self.mapping.array(_NUMPY[entry.dtype], entry.shape, entry.start)

    def tensor(self, name: str) -> FloatTensor:
        """The tensor as a lazy floating-point tensor.

        Raises:
            FormatError: there is no such tensor.
            UnsupportedError: it is not F32, F16 or BF16.
        """
        dtype = self._entry(name).dtype
        kind = _FLOATS.get(dtype)
        if kind is None:
            raise UnsupportedError(
                f"{self.path}: tensor {name} has type {dtype}; weights must be F32, F16 or BF16"
            )
        return FloatTensor(kind, self.array(name))

    def release(self) -> None:
        """Give the file's resident pages back to the system; views stay valid."""
        self.mapping.release()

    def close(self) -> None:
        """Unmap the file as soon as no view of it is left."""
        self.mapping.close()

    def _entry(self, name: str) -> SafetensorsEntry:
        try:
            return self.tensors[name]
        except KeyError:
            raise FormatError(f"{self.path} holds no tensor {name}") from None


class _Content:
    """Bytes in memory, in place of a `MappedFile`."""

    def __init__(self, content: bytes) -> None:
        self.size, self._content = len(content), content

    def bytes(self, start: int, stop: int) -> bytes:
        """Some of the bytes."""
        return self._content[start:stop]

    def array(self, dtype: Any, shape: tuple[int, ...], start: int) -> NDArray[Any]:
        """A read-only view as ``dtype``, C order, from byte ``start`` on."""
        return np.frombuffer(self._content, dtype, math.prod(shape), start).reshape(shape)

    def release(self) -> None:
        """Nothing: the bytes are in no file."""

    def close(self) -> None:
        """Nothing: the bytes go with the object."""


def safetensors_header(
    metadata: Mapping[str, str], arrays: Mapping[str, tuple[str, Sequence[int], int]]
) -> bytes:
    """Everything before the arrays' bytes, a multiple of 8 bytes long.

    Args:
        metadata: texts by name.
        arrays: name -> the format's name of the type, the shape and the bytes, in the order in
            which the arrays follow.

    Returns:
        the header's length and the header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, (dtype, shape, nbytes) in arrays.items():
        offsets = [start, start + nbytes]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        start += nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def write_arrays(
    path: Path, metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]], what: str
) -> int:
    """Write arrays to a safetensors file, which is there whole or not at all.

    Args:
        path: the file to make or replace.
        metadata: texts by name.
        arrays: name -> array of one of `TYPE_NAMES`.
        what: the file's purpose, for the message, as "the calibration".

    Returns:
        the bytes of the file.

    Raises:
        EdgeqError: it cannot be written.
    """
    # largest item size first, so that every array is aligned
    ordered = dict(sorted(arrays.items(), key=lambda item: (-item[1].itemsize, item[0])))
    described = {
        name: (TYPE_NAMES[array.dtype.type], array.shape, array.nbytes)
        for name, array in ordered.items()
    }
    pieces = [safetensors_header(metadata, described)]
    pieces += [array.astype(array.dtype.newbyteorder("<")).tobytes() for array in ordered.values()]
    write_whole(path, pieces, what)
    return sum(map(len, pieces))


def open_safetensors(path: str | Path) -> SafetensorsFile:
    """Open a safetensors file and check its whole header.

    Raises:
        FormatError: the file cannot be read, is truncated, or its header is not JSON, names a
            tensor twice, or gives offsets that leave the file, overlap, leave holes or do not
            fit the type and shape.
    """
    return SafetensorsFile(path)


def _read_header(
    path: Path, mapping: MappedFile | _Content
) -> tuple[dict[str, str], dict[str, SafetensorsEntry]]:
    if mapping.size < 8:
        raise FormatError(
            f"{path} is {mapping.size} bytes long, too short for safetensors; fetch it again"
        )
    length = int.from_bytes(mapping.bytes(0, 8), "little")
    if words := stand_in(mapping.bytes(0, min(STAND_IN_BYTES, mapping.size))):
        raise FormatError(f"{path} {words}")
    if length > MAX_HEADER:
        raise FormatError(
            f"{path} is not a safetensors file: it claims a header of {length} bytes "
            f"(at most {MAX_HEADER} are allowed)"
        )
    if 8 + length > mapping.size:
        raise FormatError(
            f"{path} is truncated: its header takes {length} bytes "
            f"and the file has {mapping.size}; fetch it again"
        )
    try:
        header = json.loads(
            mapping.bytes(8, 8 + length).decode("utf-8"), object_pairs_hook=_no_duplicates
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as err:
        raise FormatError(f"{path}: the safetensors header is not JSON ({err})") from err
    except _DuplicateNameError as err:
        raise FormatError(f"{path}: the safetensors header names {err} twice") from err
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the safetensors header is a {type(header).__name__}, no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map names to strings")
    base = 8 + length
    tensors = {
        name: _entry(path, name, value, base, mapping.size) for name, value in header.items()
    }
    _check_cover(path, tensors, base, mapping.size)
    return metadata, tensors


class _DuplicateNameError(ValueError):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _DuplicateNameError(name)
            seen.add(name)
    return result


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> SafetensorsEntry:
    where = f"{path}: tensor {name}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} must be described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise FormatError(f"{where} has the unknown type {dtype!r} (known: {', '.join(_SIZES)})")
    if not _is_sizes(shape) or len(shape) > 32:
        raise FormatError(f"{where} has the shape {shape!r}; it must be a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{where} has the offsets {offsets!r}; they must be [start, stop]")
    start, stop = base + offsets[0], base + offsets[1]
    if stop > size:
        raise FormatError(
            f"{where} ends at byte {stop} of a file of {size}: "
            "the file is truncated or its offsets are out of range; fetch it again"
        )
    want = math.prod(shape) * _SIZES[dtype]
    if stop - start != want:
        raise FormatError(
            f"{where} {dtype} {shape} takes {want} bytes, its offsets give {stop - start}"
        )
    return SafetensorsEntry(dtype, tuple(shape), start, stop)


def _check_cover(path: Path, tensors: dict[str, SafetensorsEntry], base: int, size: int) -> None:
    """The format wants every byte after the header in exactly one tensor."""
    position = base
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start < position:
            raise FormatError(
                f"{path}: tensor {name} starts at byte {entry.start}, inside the tensor "
                f"that ends at {position}: offsets overlap"
            )
        if entry.start > position:
            raise FormatError(
                f"{path}: {entry.start - position} bytes before tensor {name} "
                "belong to no tensor; safetensors allows no holes"
            )
        position = entry.stop
    if position != size:
        raise FormatError(
            f"{path}: {size - position} bytes at the end belong to no tensor; "
            "safetensors allows no holes"
        )
