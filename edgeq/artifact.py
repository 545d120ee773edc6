"""One model, one file: a safetensors container in the byte layout the kernels read.

    offset 0    u64 little-endian: length H of the header; 8 + H is a multiple of 64
    offset 8    JSON, padded with spaces to H bytes:
                  "__metadata__": {
                      "format": "edgeq",  "format_version": "1",
                      "config":     JSON text of the model's hyperparameters,
                      "tensors":    JSON text {NAME: {"scheme": "w4-g32", "shape": [N, K]}},
                      "provenance": JSON text: source, its sha256, recipe, SQNR of each tensor }
                  and dtype, shape and data_offsets of every array below
    offset 8+H  the arrays, each at a file offset that is a multiple of 64:

      quantized tensor   NAME.packed       U8   [tiles, blocks, bits*64]   see edgeq.packing
                         NAME.scales       F16  [tiles, groups, 16]
                         NAME.zero_points  U8   [tiles, groups, 16]        if asymmetric
                         NAME.palette      I8   [2**bits]                  if it has a codebook
      float tensor       NAME              F32, F16 or BF16, its own shape
      tokenizer file     file:tokenizer.json ...  U8 [length]
      filler             pad.0001 ...      U8 zeros, at most 63: safetensors allows no holes

Tensors come in the order a decoder reads them: embedding, layers, last norm, head; then files.
Loading maps the file and makes views: nothing is copied, and nothing is read before it is used.

A file is written beside its target as ``.NAME.PID-RANDOM.tmp``, synced and renamed: the target is
the old file or the whole new one at any moment, and a killed process leaves no more than that
temporary behind.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import EdgeqError, FormatError, SchemeError, UsageError
from edgeq.importers.safetensors_file import SafetensorsFile, open_safetensors
from edgeq.model import Model, ModelConfig
from edgeq.packing import TILE, round_up
from edgeq.schemes import FloatScheme, QuantScheme, Scheme, parse_scheme
from edgeq.tensor import FloatTensor, QuantTensor, part_shapes

FORMAT = "edgeq"
VERSION = 1
ALIGN = 64
"""Bytes; one cache line, and one vector of the widest kernels."""
_FILE, _PAD = "file:", "pad."
_SAVE_ROWS = 1 << 20
"""Weights written at a time by `save` where a tensor must be widened."""
_NAMES: dict[Any, str] = {np.uint8: "U8", np.int8: "I8", np.float16: "F16"}
_FLOATS: dict[str, tuple[Any, str]] = {
    "f32": (np.float32, "F32"), "f16": (np.float16, "F16"), "bf16": (np.uint16, "BF16"),
}  # fmt: skip


@dataclass(frozen=True)
class Held:
    """How the artifact holds one tensor.

    Args:
        scheme: quantized, or the float type.
        shape: its logical shape, without padding.
    """

    scheme: Scheme
    shape: tuple[int, ...]

    def arrays(self, name: str) -> Iterator[tuple[str, Any, str, tuple[int, ...]]]:
        """The arrays of the container: name, NumPy type, safetensors type, shape."""
        if isinstance(self.scheme, FloatScheme):
            kind, dtype = _FLOATS[self.scheme.dtype]
            yield name, kind, dtype, self.shape
            return
        if len(self.shape) != 2:
            raise SchemeError(
                f"tensor {name} has shape {list(self.shape)}; {self.scheme} is for matrices"
            )
        for part, (kind, shape) in part_shapes(self.scheme, (self.shape[0], self.shape[1])).items():
            yield f"{name}.{part}", kind, _NAMES[kind], shape

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(
            np.dtype(kind).itemsize * math.prod(shape) for _, kind, _, shape in self.arrays("")
        )


@dataclass(frozen=True)
class _Slot:
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def describe(self) -> dict[str, Any]:
        offsets = [self.start, self.start + self.nbytes]
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": offsets}


def file_order(names: Iterable[str]) -> list[str]:
    """Names in the order a decoder reads them: embedding, layers by number, norm, head."""

    def key(name: str) -> tuple[int, int, str]:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer:
            return 1, int(layer[1]), name
        first = name.startswith("model.embed_tokens")
        return (0 if first else 3 if name.startswith("lm_head") else 2), 0, name

    return sorted(names, key=key)


class ArtifactWriter:
    """Writes an artifact whose tensors arrive in pieces, in any order, from any thread.

    Used as a context: leaving it without `commit`, whatever the reason, removes the temporary
    file and leaves the target as it was.

    Args:
        path: the file to make or replace.
        config: the model's hyperparameters.
        tensors: name -> scheme and shape of everything that will be written.
        files: tokenizer files.
        provenance: what will be given to `commit`, or a stand-in at least as long as JSON.

    Raises:
        EdgeqError: the file cannot be written, as on a full disk; on leaving too.
        UsageError: the path is a folder, or its folder does not exist.
    """

    def __init__(
        self,
        path: str | Path,
        config: ModelConfig,
        tensors: Mapping[str, Held],
        files: Mapping[str, bytes],
        provenance: Mapping[str, Any],
    ) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise UsageError(f"{self.path} is a folder; give the name of a file, as model.edgeq")
        if not self.path.absolute().parent.is_dir():
            raise UsageError(f"the folder of {self.path} does not exist; make it first")
        self._config, self._files = config, files
        self._tensors = {name: tensors[name] for name in file_order(tensors)}
        self._slots = _layout(self._tensors, files)
        self._header_size = round_up(8 + len(self._header(provenance)), ALIGN)
        last = list(self._slots.values())[-1:]
        data = last[0].start + last[0].nbytes if last else 0
        self._size = self._header_size + data
        self._due = sum(held.nbytes for held in self._tensors.values())
        self._lock = threading.Lock()
        self._temporary = self.path.with_name(
            f".{self.path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        )
        self._fd = -1

    def __enter__(self) -> ArtifactWriter:
        try:
            with self._failures():
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
                self._fd = os.open(self._temporary, flags, 0o666)
                _reserve(self._fd, self._size)
                for name, content in self._files.items():
                    self._write(content, self._slots[_FILE + name].start)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, rows: QuantTensor | FloatTensor, first: int = 0) -> None:
        """Write some rows of a tensor.

        Args:
            name: the tensor.
            rows: the rows, of the scheme announced for it.
            first: which row they begin with; a multiple of 16 for a quantized tensor.

        Raises:
            EdgeqError: the disk is full or failed.
            SchemeError: the rows are of another scheme or size, or off the tile grid.
        """
        held = self._tensors[name]
        scheme: Scheme = (
            rows.scheme if isinstance(rows, QuantTensor) else FloatScheme(rows.dtype.lower())  # type: ignore[arg-type]
        )
        if scheme != held.scheme or rows.shape[1:] != held.shape[1:]:
            raise SchemeError(
                f"rows of {name} are {scheme} {list(rows.shape)}, "
                f"announced was {held.scheme} {list(held.shape)}"
            )
        stop = first + rows.shape[0]
        tiled = first % TILE == 0 and (stop == held.shape[0] or stop % TILE == 0)
        if stop > held.shape[0] or (isinstance(rows, QuantTensor) and not tiled):
            raise SchemeError(
                f"rows {first}:{stop} of {name} {list(held.shape)} are not whole tiles of {TILE}"
            )
        if isinstance(rows, FloatTensor):
            self._put(name, first, rows.data)
            return
        for part in part_shapes(rows.scheme, rows.shape):
            if part != "palette" or first == 0:
                self._put(f"{name}.{part}", first // TILE, getattr(rows, part))

    def commit(self, provenance: Mapping[str, Any]) -> int:
        """Complete the file and put it in the target's place.

        Args:
            provenance: where the model came from; JSON-ready.

        Returns:
            the size of the file in bytes.

        Raises:
            EdgeqError: the disk is full or failed.
        """
        if self._due:
            raise ValueError(f"{self._due} bytes of {self.path} were never written")
        header = self._header(provenance)
        room = self._header_size - 8
        if len(header) > room:
            raise ValueError(f"a header of {len(header)} bytes for {room}; announce it at first")
        with self._failures():
            self._write(room.to_bytes(8, "little") + header.ljust(room), -self._header_size)
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._temporary.replace(self.path)
            _sync_folder(self.path.absolute().parent)
        return self._size

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._temporary.unlink(missing_ok=True)

    def _header(self, provenance: Mapping[str, Any]) -> bytes:
        tensors = {
            name: {"scheme": str(held.scheme), "shape": list(held.shape)}
            for name, held in self._tensors.items()
        }
        metadata = {
            "format": FORMAT,
            "format_version": str(VERSION),
            "config": _json(self._config.to_dict()),
            "tensors": _json(tensors),
            "provenance": _json(dict(provenance)),
        }
        arrays = {name: slot.describe() for name, slot in self._slots.items()}
        return _json({"__metadata__": metadata, **arrays}).encode("ascii")

    def _put(self, array: str, first: int, data: NDArray[np.generic]) -> None:
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        start = self._slots[array].start + first * (raw.nbytes // len(data))
        with self._failures():
            self._write(raw.data, start)
        with self._lock:
            self._due -= raw.nbytes

    def _write(self, data: bytes | memoryview, start: int) -> None:
        """Write at an offset into the arrays; the header lies at negative ones."""
        view, position = memoryview(data), self._header_size + start
        while view:
            done = os.pwrite(self._fd, view, position)
            view, position = view[done:], position + done

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise EdgeqError(
                    f"no room for {self.path}: it takes {self._size / 1e6:.1f} MB "
                    f"({err.strerror}); free some space or write elsewhere"
                ) from err
            raise EdgeqError(f"{self.path} cannot be written: {err.strerror or err}") from err


def save(model: Model, path: str | Path) -> int:
    """Write a model as it is: quantized tensors as they are, float ones in their own type.

    Args:
        model: the model.
        path: the file to make or replace.

    Returns:
        the size of the file in bytes.

    Raises:
        EdgeqError: the file cannot be written.
        FormatError: a tensor is missing or has the wrong shape.
    """
    model.validate()
    tensors = {}
    for name, tensor in model.tensors.items():
        scheme: Scheme = FloatScheme("f32")
        if isinstance(tensor, QuantTensor):
            scheme = tensor.scheme
        elif isinstance(tensor, FloatTensor):
            scheme = FloatScheme(tensor.dtype.lower())  # type: ignore[arg-type]
        tensors[name] = Held(scheme, tuple(tensor.shape))
    with ArtifactWriter(path, model.config, tensors, model.files, model.provenance) as out:
        for name, tensor in model.tensors.items():
            if isinstance(tensor, QuantTensor | FloatTensor):
                out.write(name, tensor)
                continue
            step = max(1, _SAVE_ROWS // math.prod(tensor.shape[1:]))
            for first in range(0, tensor.shape[0], step):
                out.write(name, FloatTensor("F32", tensor.rows(first, first + step)), first)
        return out.commit(model.provenance)


def load(path: str | Path) -> Model:
    """Open an artifact; every tensor is a view of the mapped file.

    Raises:
        FormatError: the file is damaged, no edgeq artifact, made by a newer edgeq, or its arrays
            do not fit their schemes.
    """
    file = open_safetensors(path)
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"{file.path} is a safetensors file but no edgeq artifact; "
            "give the checkpoint folder it lies in, or quantize it first"
        )
    _check_version(file.path, metadata.get("format_version"))
    described = _table(file, "config")
    with _naming(file.path):
        config = ModelConfig.from_dict(described)
    tensors: dict[str, QuantTensor | FloatTensor] = {}
    known: set[str] = set()
    for name, entry in _table(file, "tensors").items():
        held = _held(file.path, name, entry)
        arrays = {array: _checked(file, array, dtype, shape)
                  for array, _, dtype, shape in held.arrays(name)}  # fmt: skip
        known.update(arrays)
        if isinstance(held.scheme, QuantScheme):
            parts = {array.removeprefix(name + "."): data for array, data in arrays.items()}
            tensors[name] = QuantTensor(held.scheme, held.shape, **parts)  # type: ignore[arg-type]
        else:
            tensors[name] = FloatTensor(held.scheme.dtype.upper(), arrays[name])  # type: ignore[arg-type]
    files = {}
    for array, place in file.tensors.items():
        if array.startswith(_FILE) and place.dtype == "U8":
            files[array.removeprefix(_FILE)] = file.array(array).tobytes()
        elif array not in known and not array.startswith(_PAD):
            raise FormatError(f"{file.path} holds {array}, which belongs to none of its tensors")
    model = Model(config, tensors, files, _table(file, "provenance"))
    with _naming(file.path):
        model.validate()
    return model


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file it is that a FormatError from the model speaks of."""
    try:
        yield
    except FormatError as err:
        raise FormatError(f"{path}: {err}") from err


def _check_version(path: Path, version: str | None) -> None:
    if version == str(VERSION):
        return
    if version is not None and version.isdecimal() and int(version) > VERSION:
        raise FormatError(
            f"{path} was made by a newer edgeq (format {version}; this one reads {VERSION}): "
            "upgrade with pip install -U edgeq"
        )
    raise FormatError(f"{path} has format version {version!r}; known is {VERSION}")


def _table(file: SafetensorsFile, key: str) -> dict[str, Any]:
    try:
        table = json.loads(file.metadata[key])
    except KeyError:
        raise FormatError(f"{file.path} has no {key} in its metadata; it is damaged") from None
    except (json.JSONDecodeError, RecursionError) as err:
        raise FormatError(f"{file.path}: {key} in its metadata is not JSON ({err})") from err
    if not isinstance(table, dict):
        raise FormatError(f"{file.path}: {key} in its metadata is no JSON object")
    return table


def _held(path: Path, name: str, entry: Any) -> Held:
    try:
        shape = tuple(entry["shape"])
        if not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"shape {list(shape)}")
        held = Held(parse_scheme(entry["scheme"]), shape)
        list(held.arrays(name))
    except (KeyError, TypeError, ValueError, AttributeError, SchemeError) as err:
        raise FormatError(f"{path}: tensor {name} is described wrongly: {err}") from err
    return held


def _checked(file: SafetensorsFile, array: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    place = file.tensors.get(array)
    if place is None:
        raise FormatError(f"{file.path} lacks {array}")
    if (place.dtype, place.shape) != (dtype, shape):
        raise FormatError(
            f"{file.path}: {array} is {place.dtype} {list(place.shape)}; "
            f"its scheme asks for {dtype} {list(shape)}"
        )
    if place.start % ALIGN:
        raise FormatError(
            f"{file.path}: {array} starts at byte {place.start}, no multiple of {ALIGN}: "
            "another tool has rewritten the file; make it again with edgeq quantize"
        )
    return file.array(array)


def _layout(tensors: Mapping[str, Held], files: Mapping[str, bytes]) -> dict[str, _Slot]:
    slots: dict[str, _Slot] = {}
    position = 0
    pads = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal position, pads
        if position % ALIGN:
            pads += 1
            gap = -position % ALIGN
            slots[f"{_PAD}{pads:04}"] = _Slot("U8", (gap,), position, gap)
            position += gap
        slots[name] = _Slot(dtype, shape, position, nbytes)
        position += nbytes

    for name, held in tensors.items():
        if name.startswith((_FILE, _PAD)):
            raise SchemeError(f"a tensor cannot be named {name!r}: {_FILE} and {_PAD} are taken")
        for array, kind, dtype, shape in held.arrays(name):
            add(array, dtype, shape, np.dtype(kind).itemsize * math.prod(shape))
    for name, content in files.items():
        add(_FILE + name, "U8", (len(content),), len(content))
    return slots


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _reserve(fd: int, size: int) -> None:
    """Take the space now: a full disk is told of before the work, not after."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as err:
            if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, size)


def _sync_folder(folder: Path) -> None:
    """Make the rename last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
