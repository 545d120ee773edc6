"""A .tflite file in the making: graphs in a flatbuffer, weights streamed behind it.

    flatbuffer     graphs, signatures, short constants, scales of rows, places of the buffers
    buffers        weights and tables, each at a multiple of 64 bytes

A flatbuffer ends at 2 GB and is built in memory; weights that lie behind it are written a block at
a time and the file may be as long as it likes.

Source: the schema of LiteRT, ``tflite/schema.fbs``: ``Buffer.offset`` and ``Buffer.size``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.progress import Progress
from edgeq.formats.packing import round_up
from edgeq.graph.tflite import IDENTIFIER
from edgeq.graph.tflite.schema import schema

ALIGN = 64
"""Bytes: every streamed buffer begins at a multiple of a cache line."""
_INLINE = 4096
"""Bytes: longer constants are streamed."""


class SharedTable:
    """A table that many parents refer to and that is written once."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self._written: tuple[Any, int] = (None, 0)

    def Pack(self, builder: Any) -> int:  # noqa: N802 - the name that the schema's classes call
        """The offset of the table in what the builder has written."""
        if self._written[0] is not builder:
            self._written = builder, self._table.Pack(builder)
        return self._written[1]


@dataclass(frozen=True, eq=False)
class _RowScales:
    """The schema's QuantizationParameters of a weight; its zero points are all 0."""

    schema: Any
    scales: NDArray[np.float32]
    axis: int

    def Pack(self, builder: Any) -> int:  # noqa: N802 - the name that the schema's classes call
        s = self.schema
        zeros = builder.CreateNumpyVector(np.zeros(self.scales.size, np.int64))
        scales = builder.CreateNumpyVector(self.scales)
        s.QuantizationParametersStart(builder)
        s.QuantizationParametersAddScale(builder, scales)
        s.QuantizationParametersAddZeroPoint(builder, zeros)
        s.QuantizationParametersAddQuantizedDimension(builder, self.axis)
        return int(s.QuantizationParametersEnd(builder))


@dataclass
class _Late:
    index: int
    buffer: Any
    label: str
    nbytes: int
    blocks: Callable[[], Iterable[NDArray[np.generic]]]


class TfliteFile:
    """A file in the making: its graphs, and buffers that are written when it is saved."""

    def __init__(self) -> None:
        self.schema = schema()
        self._model = self.schema.ModelT()
        self._model.version = 3
        self._model.description = "edgeq"
        self._model.buffers = [self.schema.BufferT()]  # the first means "no data"
        self._model.operatorCodes = []
        self._model.subgraphs = []
        self._model.signatureDefs = []
        self._model.metadata = []
        self._codes: dict[tuple[int, int], int] = {}
        self._constants: dict[bytes, int] = {}
        self._late: dict[str, _Late] = {}
        self._per_tensor: dict[tuple[float, int], SharedTable] = {}

    @property
    def model(self) -> Any:
        """The schema's object of it all."""
        return self._model

    def constant(self, array: NDArray[np.generic]) -> int:
        """A buffer with an array's bytes; equal bytes are stored once."""
        raw = np.ascontiguousarray(array).tobytes()
        if raw not in self._constants:
            if len(raw) <= _INLINE:
                self._constants[raw] = self._buffer(raw)
            else:
                label = f"constant {len(self._constants)}"
                block = np.frombuffer(raw, np.uint8)
                self._constants[raw] = self.streamed(label, len(raw), lambda: [block])
        return self._constants[raw]

    def streamed(
        self, label: str, nbytes: int, blocks: Callable[[], Iterable[NDArray[np.generic]]]
    ) -> int:
        """A buffer behind the flatbuffer; buffers of one label are stored once.

        Args:
            label: what it is, for the callback of `save`.
            nbytes: its size.
            blocks: gives its bytes, a block at a time, once the file is saved.
        """
        if label not in self._late:
            index = self._buffer(None)
            self._late[label] = _Late(index, self._model.buffers[index], label, nbytes, blocks)
        return self._late[label].index

    def metadata(self, name: str, content: bytes) -> None:
        """Named bytes that the runtime passes over."""
        entry = self.schema.MetadataT()
        entry.name, entry.buffer = name, self._buffer(content)
        self._model.metadata.append(entry)

    def per_row(self, scales: NDArray[np.float32], axis: int = 0) -> SharedTable:
        """The quantization of a weight with one scale a row, or an index of another axis.

        Give the same one to every graph.
        """
        flat = np.ascontiguousarray(scales, np.float32).reshape(-1)
        return SharedTable(_RowScales(self.schema, flat, axis))

    def per_tensor(self, scale: float, zero_point: int) -> SharedTable:
        """The quantization of values with one scale and zero point; equal ones are one table."""
        if (scale, zero_point) not in self._per_tensor:
            table = self.schema.QuantizationParametersT()
            table.scale = np.array([scale], np.float32)
            table.zeroPoint = np.array([zero_point], np.int64)
            self._per_tensor[scale, zero_point] = SharedTable(table)
        return self._per_tensor[scale, zero_point]

    def opcode(self, code: int, version: int) -> int:
        """The index of an operator at a version."""
        if (code, version) not in self._codes:
            entry = self.schema.OperatorCodeT()
            entry.builtinCode, entry.version = code, version
            entry.deprecatedBuiltinCode = min(code, 127)
            self._codes[code, version] = len(self._model.operatorCodes)
            self._model.operatorCodes.append(entry)
        return self._codes[code, version]

    def add(
        self, graph: Any, key: str, inputs: Mapping[str, int], outputs: Mapping[str, int]
    ) -> None:
        """Take in a finished graph under the name that callers run it by."""
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = key, len(self._model.subgraphs)
        signature.inputs = [self._named(*pair) for pair in inputs.items()]
        signature.outputs = [self._named(*pair) for pair in outputs.items()]
        self._model.subgraphs.append(graph)
        self._model.signatureDefs.append(signature)

    def save(self, path: Path, progress: Progress | None = None) -> None:
        """Write the file.

        Args:
            path: the file to make.
            progress: called with what is written, bytes done, and of how many.
        """
        late = list(self._late.values())
        # the flatbuffer's length does not depend on where the buffers lie, as long as none is at 0
        end = round_up(len(self._place(late, ALIGN)), ALIGN)
        head = self._place(late, end)
        total = end + sum(round_up(entry.nbytes, ALIGN) for entry in late)
        with path.open("xb") as file:
            _write(file, head, late, total, progress)

    def _place(self, late: list[_Late], start: int) -> bytes:
        for entry in late:
            entry.buffer.offset, entry.buffer.size = start, entry.nbytes
            start += round_up(entry.nbytes, ALIGN)
        return packed(self._model)

    def _buffer(self, raw: bytes | None) -> int:
        buffer = self.schema.BufferT()
        if raw is not None:
            buffer.data = np.frombuffer(raw, np.uint8)
        self._model.buffers.append(buffer)
        return len(self._model.buffers) - 1

    def _named(self, name: str, index: int) -> Any:
        entry = self.schema.TensorMapT()
        entry.name, entry.tensorIndex = name, index
        return entry


def packed(model: Any) -> bytes:
    """A model's flatbuffer; equal vectors and strings are stored once."""
    builder = _sharing_builder()
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


def _sharing_builder() -> Any:
    """A builder that writes shapes, zero points, scales and texts which are equal once."""
    import flatbuffers

    class Sharing(flatbuffers.Builder):  # type: ignore[misc]  # flatbuffers has no types
        def __init__(self) -> None:
            super().__init__(1 << 16)
            self._written: dict[tuple[str, bytes], int] = {}

        def CreateNumpyVector(self, x: NDArray[Any]) -> int:  # noqa: N802 - flatbuffers' name
            key = (x.dtype.str, x.tobytes())
            if key not in self._written:
                self._written[key] = super().CreateNumpyVector(x)
            return self._written[key]

        def CreateString(self, s: str | bytes, *about: str) -> int:  # noqa: N802 - the same
            key = ("text", s if isinstance(s, bytes) else s.encode())
            if key not in self._written:
                self._written[key] = super().CreateString(s, *about)
            return self._written[key]

    return Sharing()


def _write(
    file: Any, head: bytes, late: list[_Late], total: int, progress: Progress | None
) -> None:
    file.write(head)
    at = len(head)
    for entry in late:
        file.write(bytes(-at % ALIGN))
        at += -at % ALIGN
        stop = at + entry.nbytes
        for block in entry.blocks():
            at += file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
            if progress:
                progress(entry.label, at, total)
        if at != stop:
            raise ValueError(
                f"{entry.label} has {at - stop + entry.nbytes} bytes of {entry.nbytes}"
            )
    file.write(bytes(-at % ALIGN))
