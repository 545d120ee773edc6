"""Reading a .tflite file that edgeq wrote: its settings and its integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.metadata_blob import read_blob
from edgeq.converters.stored import StoredConstant, StoredWeight
from edgeq.converters.tflite.builder import row_blocks
from edgeq.converters.tflite.file import ALIGN, packed
from edgeq.converters.validate.constants import operator
from edgeq.core.errors import EdgeqError, FormatError
from edgeq.formats.packing import round_up
from edgeq.graph.tflite.schema import mapped_flatbuffer, schema
from edgeq.model.decoder import OUTER_STEPS

METADATA = "edgeq"
"""The file's metadata entry that is ours: JSON."""
VERSION = 1
"""Of that entry."""
_PIECE = 1 << 22


@dataclass(frozen=True)
class Header:
    """A file's flatbuffer, and the file itself mapped.

    Args:
        path: the file, or what it is a part of.
        start: where in ``path`` it begins.
        model: the schema's objects.
        data: the whole file.
        settings: our metadata.
    """

    path: Path
    start: int
    model: Any
    data: NDArray[np.uint8]
    settings: Mapping[str, Any]

    def bytes_of(self, buffer: int) -> NDArray[np.uint8]:
        """A buffer's content, wherever it lies."""
        entry = self.model.buffers[buffer]
        if entry.data is not None and len(entry.data):
            return np.asarray(entry.data, np.uint8)
        return self.data[entry.offset : entry.offset + entry.size]


def read(
    path: str | Path, start: int = 0, stop: int | None = None, *, entry: str = METADATA
) -> Header:
    """Read the flatbuffer of a file that `write` made; weights are only mapped.

    Args:
        path: the file.
        start, stop: the part of it that is the .tflite file, if not all.
        entry: the metadata that it must have.

    Raises:
        FormatError: it is no such file.
        MissingDependencyError: LiteRT is not installed.
    """
    path, s = Path(path), schema()
    data = mapped_flatbuffer(path, start, stop)
    try:
        model = s.ModelT.InitFromPackedBuf(data)
        ours = next(m for m in model.metadata or [] if m.name == entry.encode())
        settings = read_blob(bytes(model.buffers[ours.buffer].data))
    except StopIteration:
        raise FormatError(
            f"{path} was not made by edgeq (it has no metadata {entry!r}), "
            "so edgeq cannot tell which tensor is which"
        ) from None
    except Exception as err:  # flatbuffers has no error of its own for bad bytes
        raise FormatError(f"{path} is damaged or cut short: {err}") from err
    if settings.get("format_version") != VERSION:
        raise FormatError(
            f"{path} has format version {settings.get('format_version')}; this edgeq reads "
            f"{VERSION}: upgrade edgeq or convert again"
        )
    end = max(buffer.offset + buffer.size for buffer in model.buffers)
    if end > data.size:
        raise FormatError(f"{path} is cut short: {end} bytes expected, {data.size} found")
    return Header(path, start, model, data, settings)


def has_metadata(path: Path, entry: str) -> bool:
    """Whether a .tflite file has an entry of metadata; nothing else is read.

    Raises:
        FormatError: it cannot be read, or is no .tflite file.
        MissingDependencyError: LiteRT is not installed.
    """
    s = schema()
    data = mapped_flatbuffer(path)
    try:
        model = s.Model.GetRootAs(data, 0)
        names = [model.Metadata(i).Name() for i in range(model.MetadataLength())]
    except Exception as err:  # flatbuffers has no error of its own for bad bytes
        raise FormatError(f"{path} is damaged or cut short: {err}") from err
    return entry.encode() in names


def stored(header: Header) -> Iterator[StoredWeight]:
    """The integers of each matrix, some rows at a time, in the order of the decoder."""
    graph = _graph(header, "decode")
    tensors = {_plain(tensor): tensor for tensor in graph.tensors}
    for name, k in header.settings["columns"].items():
        if name not in tensors:
            raise FormatError(f"{header.path} lacks {name}, which its metadata lists")
        yield from _stored(header, graph, tensors[name], name, k)


def _stored(header: Header, graph: Any, tensor: Any, name: str, k: int) -> Iterator[StoredWeight]:
    n, width = (int(size) for size in tensor.shape)
    types = schema().TensorType
    if tensor.type not in (types.INT4, types.INT8):
        raise FormatError(f"{header.path}: {name} holds neither 4 nor 8 bits")
    raw = header.bytes_of(tensor.buffer).view(np.int8).reshape(n, -1)
    scales = _scales(header, graph, tensor.quantization, n)
    for a, b in row_blocks(n, width):
        rows = raw[a:b]
        if tensor.type == types.INT4:
            # shifts of signed bytes carry the sign along
            rows = np.stack([(rows << 4) >> 4, rows >> 4], axis=-1).reshape(b - a, width)
        yield StoredWeight(
            name, rows[:, :k].astype(np.int16), scales[a:b].astype(np.float32), first=a
        )


def _scales(header: Header, graph: Any, quantization: Any, n: int) -> NDArray[np.floating]:
    if quantization.detailsType == schema().QuantizationDetails.BlockwiseQuantization:
        raw = header.bytes_of(graph.tensors[quantization.details.scales].buffer)
        return raw.view(np.float16).reshape(n, -1)
    return np.asarray(quantization.scale, np.float32).reshape(n, 1)


def _plain(tensor: Any) -> str:
    """A tensor's name without the prefix of its graph."""
    return str(tensor.name.decode().rpartition("/")[2])


def constants(header: Header) -> Iterator[StoredConstant]:
    """Every constant of every graph, with the scales of rows that the flatbuffer holds."""
    types = {
        number: np.dtype(name.lower())
        for name, number in vars(schema().TensorType).items()
        if name in ("FLOAT32", "FLOAT16", "INT32", "INT64", "INT8", "UINT8", "INT16")
    }
    for graph in header.model.subgraphs:
        for tensor in graph.tensors:
            name = tensor.name.decode()
            raw = header.bytes_of(tensor.buffer)
            if not raw.size:
                continue
            kind = types.get(tensor.type)
            shape = tuple(int(n) for n in tensor.shape)
            if kind is None or raw.size != kind.itemsize * int(np.prod(shape)):
                yield StoredConstant(name, raw)
            else:
                yield StoredConstant(name, raw.view(kind).reshape(shape))
            if tensor.quantization is not None and tensor.quantization.scale is not None:
                scales = np.asarray(tensor.quantization.scale, np.float32)
                yield StoredConstant(f"{name}.row_scales", scales)
        yield from _operators(header.model, graph)
    signatures = [
        (s.signatureKey, s.subgraphIndex, *([(m.name, m.tensorIndex) for m in part]
                                            for part in (s.inputs, s.outputs)))
        for s in header.model.signatureDefs or []
    ]  # fmt: skip
    yield operator("signatures", signatures)


def _operators(model: Any, graph: Any) -> Iterator[StoredConstant]:
    """Every operator of a graph, with the names, types and shapes of its tensors."""

    def described(index: int) -> object:
        if index < 0:
            return None
        tensor = graph.tensors[index]
        return tensor.name, tensor.type, [int(n) for n in tensor.shape]

    for i, op in enumerate(graph.operators):
        code = model.operatorCodes[op.opcodeIndex]
        options = {} if op.builtinOptions is None else vars(op.builtinOptions)
        settings = {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in sorted(options.items())
        }
        tensors = [[described(int(t)) for t in part] for part in (op.inputs, op.outputs)]
        name = graph.tensors[int(op.outputs[0])].name.decode() if len(op.outputs) else str(i)
        yield operator(name, (code.builtinCode, code.version, tensors, settings))


def _graph(header: Header, signature: str) -> Any:
    for entry in header.model.signatureDefs or []:
        if entry.signatureKey == signature.encode():
            return header.model.subgraphs[entry.subgraphIndex]
    raise FormatError(f"{header.path} has no signature {signature!r}")


def with_results(header: Header, out: Path) -> None:
    """Copy a file so that every named result of the decoder is an output of its signatures.

    Raises:
        EdgeqError: the copy cannot be written.
    """
    s, model = schema(), header.model
    for signature in model.signatureDefs:
        graph = model.subgraphs[signature.subgraphIndex]
        outputs = set(graph.outputs)
        for op in graph.operators:
            for index in op.outputs:
                name = _plain(graph.tensors[index])
                named = name in OUTER_STEPS or name.startswith("layers.")
                if named and index not in outputs:
                    entry = s.TensorMapT()
                    entry.name, entry.tensorIndex = name, index
                    signature.outputs.append(entry)
                    graph.outputs = [*graph.outputs, index]
    late = [buffer for buffer in model.buffers if buffer.offset]
    start = min((buffer.offset for buffer in late), default=header.data.size)
    # the buffers move together, behind a flatbuffer that has grown
    shift = round_up(len(packed(model)), ALIGN) - start
    for buffer in late:
        buffer.offset += shift
    head = packed(model)
    try:
        with out.open("xb") as file, header.path.open("rb") as source:
            file.write(head + bytes(start + shift - len(head)))
            source.seek(header.start + start)
            rest = header.data.size - start
            while rest > 0:
                rest -= file.write(source.read(min(rest, _PIECE)))
    except OSError as err:
        raise EdgeqError(f"{out} cannot be written: {err.strerror or err}") from err
