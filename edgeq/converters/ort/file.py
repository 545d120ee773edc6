"""The ONNX file of a decoder: how each matrix is encoded, its bytes, and the versions they need.

Codes are unsigned, low bits first, ``[N, blocks, block * bits / 8]``, K padded to whole blocks
with levels of zero; zero points are packed likewise, row by row. Weights lie in a file of their
own, each at a multiple of 64 bytes, or of a page if it is large, so that it can be mapped.

Source: onnxruntime's docs/ContribOperators.md. The least versions in `FEATURES` were found by
running each operator in the published wheels of 1.20 to 1.31.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.encoding import Container, Encoding, encode, levels, spread
from edgeq.formats.packing import round_up
from edgeq.formats.schemes import GROUP_SIZES
from edgeq.formats.tensor import QuantTensor
from edgeq.model.model import Model

FEATURES = {
    "4-bit MatMulNBits and GroupQueryAttention": "1.20",
    "8-bit MatMulNBits": "1.23",
    "GatherBlockQuantized on uint8": "1.23",
    "2-bit MatMulNBits": "1.24",
    # until 1.23 a window of n saw n + 1 positions
    "sliding windows": "1.24",
    # until 1.26 an odd number of packed zero points a row was read askew, without an error
    "4-bit GatherBlockQuantized with zero points, odd blocks": "1.27",
    "2-bit GatherBlockQuantized": "1.27",
    "int8 cache": "1.27",
}
"""What a graph may need -> the least onnxruntime that computes it rightly on the CPU."""
_ALIGN, _PAGE, _LARGE = 64, 4096, 1 << 20
STEP = 1 << 20
"""Weights in memory at once."""


@dataclass(frozen=True)
class OrtSettings:
    """How a graph is made.

    Args:
        context: positions of the rotary tables, which is the longest sequence.
        kv: type of the cache.
        compute: "float" or "int8", MatMulNBits' accuracy_level 0 or 4.
        last_only: make logits of the last position only.
    """

    context: int
    kv: Literal["float32", "float16", "int8"]
    compute: Literal["float", "int8"]
    last_only: bool


def encodings(model: Model) -> dict[str, Encoding]:
    """How each quantized matrix is encoded; ONNX Runtime has a container for every scheme.

    A row's only scale is repeated for blocks, so that any block will do: the one that pads K
    least, and of these the longest.
    """
    encoding_of = {}
    for name, (_, k) in model.config.linears():
        tensor = model.tensors[name]
        if not isinstance(tensor, QuantTensor):
            continue
        size = tensor.scheme.group_size
        if size is None or size >= k:
            size = min(reversed(GROUP_SIZES), key=lambda g: round_up(k, g))
        containers = tuple(Container(b, groups=(size,), asymmetric=True) for b in (2, 4, 8))
        encoding_of[name] = encode(name, tensor.scheme, k, containers, "onnxruntime")
    return encoding_of


def features(model: Model, settings: OrtSettings) -> dict[str, str]:
    """The entries of `FEATURES` that the model's graph needs."""
    encoding_of = encodings(model)
    needs = ["4-bit MatMulNBits and GroupQueryAttention"]
    needs += [
        f"{b}-bit MatMulNBits" for b in (2, 8) if any(e.bits == b for e in encoding_of.values())
    ]
    table = "model.embed_tokens.weight"
    if table in encoding_of:
        needs.append("GatherBlockQuantized on uint8")
        if encoding_of[table].bits == 2:
            needs.append("2-bit GatherBlockQuantized")
        asymmetric = cast(QuantTensor, model.tensors[table]).zero_points is not None
        blocks = -(-model.config.hidden // cast(int, encoding_of[table].group_size))
        if encoding_of[table].bits == 4 and asymmetric and blocks % 2:
            needs.append("4-bit GatherBlockQuantized with zero points, odd blocks")
    if any(block.window for block in model.config.blocks if block.mixer == "attention"):
        needs.append("sliding windows")
    if settings.kv == "int8":
        needs.append("int8 cache")
    return {name: FEATURES[name] for name in needs}


def pack_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [R, n] as bytes [R, ceil(n * bits / 8)], the first code in the lowest bits."""
    per = 8 // bits
    rows, n = codes.shape
    padded = np.zeros((rows, round_up(n, per)), np.uint8)
    padded[:, :n] = codes
    out = padded[:, ::per].copy()
    for i in range(1, per):
        out |= padded[:, i::per] << np.uint8(i * bits)
    return out


def unpack_rows(packed: NDArray[np.uint8], bits: int, n: int) -> NDArray[np.uint8]:
    """The first n codes of each row of `pack_rows`' bytes: uint8 [R, n]."""
    per = 8 // bits
    out = np.empty((packed.shape[0], packed.shape[1] * per), np.uint8)
    for i in range(per):
        out[:, i::per] = packed >> np.uint8(i * bits) & np.uint8((1 << bits) - 1)
    return out[:, :n]


@dataclass
class OnnxGraphWriter:
    """Nodes and weights of an ONNX graph while it is made.

    Args:
        data: the file of the weights, written in order.
        location: its name, as the graph refers to it.
    """

    data: BinaryIO
    location: str
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    known: set[str] = field(default_factory=set)

    def node(
        self,
        op: str,
        inputs: Iterable[str],
        outputs: str | list[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add an operator; returns its first output."""
        from onnx import helper

        outputs = [outputs] if isinstance(outputs, str) else outputs
        node = helper.make_node(
            op, list(inputs), outputs, name=f"{op}:{outputs[0]}", domain=domain, **attributes
        )
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A small constant inside the graph itself; the same name is made once."""
        from onnx import numpy_helper

        if name not in self.known:
            self.known.add(name)
            self.initializers.append(numpy_helper.from_array(value, name))
        return name

    def weight(
        self, name: str, kind: int, shape: tuple[int, ...], pieces: Iterable[NDArray[Any]]
    ) -> str:
        """A tensor in the weights' file, at a multiple of 64 bytes, or of a page if it is large.

        Args:
            name: of the tensor.
            kind: its type, of TensorProto's.
            shape: its shape.
            pieces: its bytes in order, as arrays.
        """
        from onnx import TensorProto, helper

        size = math.prod(shape) * helper.tensor_dtype_to_np_dtype(kind).itemsize
        step = _PAGE if size >= _LARGE else _ALIGN
        self.data.write(bytes(-self.data.tell() % step))
        start = self.data.tell()
        for piece in pieces:
            self.data.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        tensor = TensorProto(
            name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL
        )
        where = (
            ("location", self.location),
            ("offset", str(start)),
            ("length", str(self.data.tell() - start)),
        )
        for key, value in where:
            tensor.external_data.add(key=key, value=value)
        self.initializers.append(tensor)
        return name

    def alias(self, name: str, of: str, shape: tuple[int, ...]) -> str:
        """The same bytes of the weights' file under another shape."""
        from onnx import TensorProto

        source = next(t for t in self.initializers if t.name == of)
        tensor = TensorProto()
        tensor.CopyFrom(source)
        tensor.name = name
        tensor.ClearField("dims")
        tensor.dims.extend(shape)
        self.initializers.append(tensor)
        return name


def steps(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a matrix, each small enough to be in memory at once."""
    n, rest = shape[0], math.prod(shape[1:])
    rows = max(16, STEP // rest // 16 * 16)
    for a in range(0, n, rows):
        yield a, min(a + rows, n)


def packed_codes(
    tensor: QuantTensor, encoding: Encoding, start: int, stop: int
) -> NDArray[np.uint8]:
    """Rows of a matrix as MatMulNBits holds them: uint8 [rows, blocks * block * bits / 8]."""
    k = tensor.shape[1]
    size = encoding.group_size or k
    values, _, zeros = levels(tensor, start, stop)
    codes = np.empty((stop - start, round_up(k, size)), np.uint8)
    if zeros is None:
        mid = 1 << (encoding.bits - 1)
        codes[:, :k] = values + np.int16(mid)
        codes[:, k:] = mid
    else:
        codes[:, :k] = values
        codes[:, k:] = spread(zeros, k, tensor.scheme.group_size, encoding.group_size)[:, -1:]
    return pack_rows(codes, encoding.bits)
