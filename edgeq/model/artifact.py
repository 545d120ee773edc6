"""Saving and loading a model as one file, laid out by `edgeq.model.artifact_layout`.

Loading maps the file and makes views: nothing is copied, and nothing is read before it is used.

A file is written next to its target as ``.NAME.PID-RANDOM.tmp``, synced and renamed: at any moment
the target is the old file or the complete new one, and a killed process leaves nothing but that
temporary file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError, FormatError, SchemeError, check_type
from edgeq.core.files import check_target, is_inside, sync_folder, temporary_name
from edgeq.formats.packing import TILE, round_up
from edgeq.formats.safetensors_file import SafetensorsFile, open_safetensors
from edgeq.formats.schemes import FloatScheme, QuantScheme, Scheme, parse_scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, part_shapes, row_blocks
from edgeq.model.artifact_layout import (
    ALIGN,
    FILE,
    FORMAT,
    PAD,
    VERSION,
    TensorLayout,
    file_order,
    header_bytes,
    layout,
)
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model


class ArtifactWriter:
    """Writes an artifact whose tensors arrive in pieces, in any order, from any thread.

    Used as a context manager: leaving it without `commit`, whatever the reason, removes the
    temporary file and does not change the target.

    Args:
        path: the file to create or replace.
        config: the model's hyperparameters.
        tensors: name -> scheme and shape of everything that will be written.
        files: tokenizer files.
        provenance: what will be passed to `commit`, or a placeholder at least as long as JSON.
        folder: of the temporary file, on the same file system; None for the target's.

    Attributes:
        size: of the file, in bytes.

    Raises:
        EdgeqError: the file cannot be written, as on a full disk; on leaving too.
        UsageError: the path is a folder, a device or a pipe, or its folder does not exist.
    """

    def __init__(
        self,
        path: str | Path,
        config: ModelConfig,
        tensors: Mapping[str, TensorLayout],
        files: Mapping[str, bytes],
        provenance: Mapping[str, Any],
        folder: Path | None = None,
    ) -> None:
        self.path = Path(path)
        check_target(self.path)
        self._config, self._files = config, files
        self._tensors = {name: tensors[name] for name in file_order(tensors)}
        self._spans = layout(self._tensors, files)
        self._header_size = round_up(8 + len(self._header(provenance)), ALIGN)
        self.size = self._header_size + sum(span.nbytes for span in self._spans.values())
        self._due = sum(tensor.nbytes for tensor in self._tensors.values())
        self._lock = threading.Lock()
        name = temporary_name(self.path)
        self._temporary = folder / name if folder else self.path.with_name(name)
        self._fd = -1
        self._mapped: mmap.mmap | None = None

    def __enter__(self) -> ArtifactWriter:
        try:
            with self._failures():
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
                self._fd = os.open(self._temporary, flags, 0o666)
                _reserve(self._fd, self.size)
                for name, content in self._files.items():
                    self._write(content, self._spans[FILE + name].start)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name: str, rows: QuantTensor | FloatTensor, first: int = 0) -> None:
        """Write some rows of a tensor.

        Args:
            name: the tensor.
            rows: the rows, of the scheme declared for it.
            first: which row they begin with; a multiple of 16 for a quantized tensor.

        Raises:
            EdgeqError: the disk is full or failed.
            SchemeError: the rows are of another scheme or size, or not whole tiles.
        """
        expected = self._tensors[name]
        scheme: Scheme = rows.scheme if isinstance(rows, QuantTensor) else FloatScheme(rows.dtype)
        if scheme != expected.scheme or rows.shape[1:] != expected.shape[1:]:
            raise SchemeError(
                f"rows of {name} are {scheme} {list(rows.shape)}, "
                f"declared was {expected.scheme} {list(expected.shape)}"
            )
        stop = first + rows.shape[0]
        tiled = first % TILE == 0 and (stop == expected.shape[0] or stop % TILE == 0)
        if stop > expected.shape[0] or (isinstance(rows, QuantTensor) and not tiled):
            raise SchemeError(
                f"rows {first}:{stop} of {name} {list(expected.shape)} are not whole tiles "
                f"of {TILE}"
            )
        if isinstance(rows, FloatTensor):
            self._put(name, first, rows.data)
            return
        for part in part_shapes(rows.scheme, rows.shape):
            if part != "palette" or first == 0:
                self._put(f"{name}.{part}", first // TILE, getattr(rows, part))

    def rewrite(self, name: str, tensor: QuantTensor | FloatTensor) -> None:
        """Replace a tensor that was written before.

        Raises:
            EdgeqError, SchemeError: as for `write`.
        """
        due = self._due
        self.write(name, tensor)
        self._due = due

    def tensor(self, name: str) -> QuantTensor | FloatTensor:
        """A view of a tensor in the temporary file, with what was written of it so far.

        Args:
            name: one of those declared.
        """
        if self._mapped is None:
            self._mapped = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        expected = self._tensors[name]
        arrays = {}
        for array, kind, _, shape in expected.arrays(name):
            start = self._header_size + self._spans[array].start
            flat = np.frombuffer(self._mapped, kind, math.prod(shape), start)
            arrays[array] = flat.reshape(shape)
        return _tensor(name, expected, arrays)

    def written(self) -> Model:
        """The model in the temporary file, to be evaluated before it is committed."""
        return Model(self._config, {name: self.tensor(name) for name in self._tensors}, self._files)

    def commit(self, provenance: Mapping[str, Any]) -> int:
        """Complete the file and move it to the target.

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
            raise ValueError(f"a header of {len(header)} bytes, declared were {room}")
        with self._failures():
            self._write(room.to_bytes(8, "little") + header.ljust(room), -self._header_size)
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1
            self._temporary.replace(self.path)
            sync_folder(self.path.absolute().parent)
        return self.size

    def __exit__(self, *_: object) -> None:
        self._discard()

    def _discard(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._temporary.unlink(missing_ok=True)

    def _header(self, provenance: Mapping[str, Any]) -> bytes:
        return header_bytes(self._config, self._tensors, self._spans, provenance)

    def _put(self, array: str, first: int, data: NDArray[np.generic]) -> None:
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        start = self._spans[array].start + first * (raw.nbytes // len(data))
        with self._failures():
            self._write(raw.data, start)
        with self._lock:
            self._due -= raw.nbytes

    def _write(self, data: bytes | memoryview, start: int) -> None:
        """Write at an offset from the first array; the header is at negative offsets."""
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
                    f"no room for {self.path}: it takes {self.size / 1e6:.1f} MB "
                    f"({err.strerror}); free some space or write elsewhere"
                ) from err
            raise EdgeqError(f"{self.path} cannot be written: {err.strerror or err}") from err


def save(model: Model, path: str | Path) -> int:
    """Write a model without changing its tensors.

    Args:
        model: the model.
        path: the file to create or replace.

    Returns:
        the size of the file in bytes.

    Raises:
        EdgeqError: the file cannot be written.
        FormatError: a tensor is missing or has the wrong shape.

    Example:
        >>> nbytes = edgeq.save(edgeq.load("model.edgeq"), "copy.edgeq")
        >>> edgeq.load("copy.edgeq").config == edgeq.load("model.edgeq").config
        True
    """
    check_type("model", model, Model)
    check_type("path", path, str, os.PathLike)
    model.validate()
    tensors = {}
    for name, tensor in model.tensors.items():
        scheme: Scheme = FloatScheme("float32")
        if isinstance(tensor, QuantTensor):
            scheme = tensor.scheme
        elif isinstance(tensor, FloatTensor):
            scheme = FloatScheme(tensor.dtype)
        tensors[name] = TensorLayout(scheme, tuple(tensor.shape))
    with ArtifactWriter(path, model.config, tensors, model.files, model.provenance) as out:
        for name, tensor in model.tensors.items():
            if isinstance(tensor, QuantTensor | FloatTensor):
                out.write(name, tensor)
                continue
            for part in row_blocks(tensor.shape):
                rows = tensor.rows(part.start, part.stop)
                out.write(name, FloatTensor("float32", rows), part.start)
        return out.commit(model.provenance)


def load(path: str | Path, *, headers_only: bool = False) -> Model:
    """Open an artifact; every tensor is a view of the mapped file.

    Args:
        path: the file.
        headers_only: leave the tokenizer files unread.

    Raises:
        FormatError: the file is damaged, no edgeq artifact, made by a newer edgeq, or its arrays
            do not fit their schemes.
    """
    file = open_safetensors(path)
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"{file.path} is a safetensors file that edgeq did not write; "
            "give the checkpoint folder that contains it, or quantize it first"
        )
    _check_version(file.path, metadata.get("format_version"))
    described = _table(file, "config")
    with _named_errors(file.path):
        config = ModelConfig.from_dict(described)
    tensors: dict[str, QuantTensor | FloatTensor] = {}
    known: set[str] = set()
    for name, entry in _table(file, "tensors").items():
        expected = _tensor_layout(file.path, name, entry)
        arrays = {array: _checked(file, array, dtype, shape)
                  for array, _, dtype, shape in expected.arrays(name)}  # fmt: skip
        known.update(arrays)
        tensors[name] = _tensor(name, expected, arrays)
    files = {}
    for array, place in file.tensors.items():
        if array.startswith(FILE) and place.dtype == "U8":
            name = array.removeprefix(FILE)
            if not is_inside(name):
                raise FormatError(
                    f"{file.path} holds the tokenizer file {name!r}, whose name leads out of any "
                    "folder; get the artifact again from where it was made"
                )
            if not headers_only:
                files[name] = file.array(array).tobytes()
        elif array not in known and not array.startswith(PAD):
            raise FormatError(f"{file.path} holds {array}, which belongs to none of its tensors")
    model = Model(config, tensors, files, _table(file, "provenance"))
    with _named_errors(file.path):
        model.validate()
    return model


def _tensor(
    name: str, expected: TensorLayout, arrays: Mapping[str, NDArray[Any]]
) -> QuantTensor | FloatTensor:
    if isinstance(expected.scheme, QuantScheme):
        parts = {array.removeprefix(name + "."): data for array, data in arrays.items()}
        return QuantTensor(expected.scheme, expected.shape, **parts)  # type: ignore[arg-type]
    return FloatTensor(expected.scheme.dtype, arrays[name])


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Put the name of the file before the message of a FormatError."""
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
    raise FormatError(f"{path} has format version {version!r}; this edgeq reads version {VERSION}")


def _table(file: SafetensorsFile, key: str) -> dict[str, Any]:
    try:
        table = json.loads(file.metadata[key])
    except KeyError:
        raise FormatError(f"{file.path} has no {key} in its metadata; it is damaged") from None
    except (json.JSONDecodeError, RecursionError) as err:
        raise FormatError(f"{file.path}: {key} in its metadata is not JSON ({err})") from err
    if not isinstance(table, dict):
        raise FormatError(f"{file.path}: {key} in its metadata is not a JSON object")
    return table


def _tensor_layout(path: Path, name: str, entry: Any) -> TensorLayout:
    try:
        shape = tuple(entry["shape"])
        if not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"shape {list(shape)}")
        expected = TensorLayout(parse_scheme(entry["scheme"]), shape)
        list(expected.arrays(name))
    except (KeyError, TypeError, ValueError, AttributeError, SchemeError) as err:
        raise FormatError(f"{path}: tensor {name} is described wrongly: {err}") from err
    return expected


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


def _reserve(fd: int, size: int) -> None:
    """Allocate the space now, so that a full disk is noticed before the work."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as err:
            if err.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, size)
