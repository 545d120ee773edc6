"""How Core ML holds one weight matrix, packed: the constants of it, written and read back.

    iOS 18   4, 8 bits    constexpr_blockwise_shift_scale(data, scale, offset)
                            data    int4 / int8 [N, Kp]; uint4 / uint8 with zero points
                            scale   [N, G];  offset  of data's type [N, G]
             2, 3 bits,   constexpr_lut_to_dense(indices, lut), and the same on what it gives
             palettes       indices uint2 / uint3 / uint4 [N, Kp];  lut [1, 1, 2**bits, 1]
    iOS 16   8 bits       constexpr_affine_dequantize(quantized_data, zero_point, scale)
                            int8 / uint8 [N, K], a scale for each row
             2, 4 bits,   constexpr_lut_to_dense(indices, lut, shape), which has no scales:
             palettes       each row's is multiplied with the row's product

Kp is K rounded up to whole groups; what is added is never read, as activations are zero there.
No constant is held in memory as a whole. The program is built over `stand_in`s, arrays of the
right type and shape that take no memory, and `Constant.pieces` gives the numbers when the file
is written.

Source: coremltools' definitions of these operators, ops/defs/iOS16/constexpr_ops.py and
iOS18/compression.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.blob import KINDS, Blob, pack_bits
from edgeq.converters.coreml.exec.load import MilTensor, Op
from edgeq.converters.coreml.exec.weights import Packed
from edgeq.converters.encoding import Container, Encoding, encode, levels, spread
from edgeq.converters.stored import StoredWeight
from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.packing import round_up
from edgeq.formats.schemes import GROUP_SIZES
from edgeq.formats.tensor import QuantTensor
from edgeq.formats.tensor import Tensor as ModelTensor
from edgeq.model.model import Model

CONTAINERS = {
    "ios18": (
        *(Container(bits, GROUP_SIZES, channel=True, asymmetric=True) for bits in (2, 3, 4, 8)),
        *(Container(bits, GROUP_SIZES, channel=True, palette=True) for bits in (2, 3, 4)),
    ),
    "ios16": (
        *(Container(bits, channel=True) for bits in (2, 4)),
        *(Container(bits, channel=True, palette=True) for bits in (2, 4)),
        Container(8, channel=True, asymmetric=True),
    ),
}
"""What each system holds. iOS 16 has one scale a row, and zero points only for 8 bits."""
_PIECE = 1 << 20
"""Weights written at a time."""


@dataclass(frozen=True)
class BlobConstant:
    """A constant that goes to weight.bin.

    Args:
        name: of the constant in the program.
        kind: MIL's name of its type.
        shape: of it.
        pieces: gives its numbers, row after row.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[NDArray[Any]]]

    def stand_in(self, types: Any) -> NDArray[Any]:
        """Zeros of its shape that take no memory, in the type coremltools knows it by."""
        zero = np.zeros((), KINDS[self.kind].dtype)
        if KINDS[self.kind].bits < 8:
            zero = zero.astype(types.nptype_from_builtin(getattr(types, self.kind)))
        return np.broadcast_to(zero, self.shape)


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [N, K] in the program.

    Args:
        name: ours.
        op: of the operator that gives it.
        shape: (N, K).
        padded: K as it is stored.
        data: the numbers, or the indices into ``lut``, or the floats themselves.
        scale: of the groups, or None for floats.
        offset: zero points, or None.
        lut: the table as it is stored, or None.
        row_scale: [N, 1], where a row's scale is applied to its product; else None.
    """

    name: str
    op: str
    shape: tuple[int, int]
    padded: int
    data: BlobConstant
    scale: BlobConstant | None = None
    offset: BlobConstant | None = None
    lut: NDArray[Any] | None = None
    row_scale: NDArray[np.float32] | None = None

    @property
    def constants(self) -> Iterator[BlobConstant]:
        """The constants that are written to weight.bin, by name."""
        for constant in (self.data, self.scale, self.offset):
            if constant is not None:
                yield constant


def identifier(name: str) -> str:
    """A name as MIL allows it: dots become underscores."""
    return name.replace(".", "_")


def matrices(model: Model, target: str, float_kind: str) -> dict[str, Matrix]:
    """The matrices of a model as Core ML stores them, by edgeq's names.

    Args:
        model: the model.
        target: "ios16" or "ios18".
        float_kind: "fp16" or "fp32": of scales, and of matrices that are not quantized.

    Raises:
        UnsupportedError: a scheme that the system cannot hold.
    """
    return {
        name: _matrix(name, model.tensors[name], (n, k), target, float_kind)
        for name, (n, k) in model.config.linears()
    }


def _matrix(
    name: str, tensor: ModelTensor, shape: tuple[int, int], target: str, float_kind: str
) -> Matrix:
    op = identifier(name)
    if not isinstance(tensor, QuantTensor):
        floats = BlobConstant(
            op,
            float_kind,
            shape,
            lambda: _blocks(tensor, lambda a, b: narrowed(name, tensor.rows(a, b), float_kind)),
        )
        return Matrix(name, op, shape, shape[1], floats)
    encoding = encode(name, tensor.scheme, shape[1], CONTAINERS[target], f"Core ML on {target}")
    build = _ios18 if target == "ios18" else _ios16
    return build(name, op, tensor, encoding, float_kind)


def narrowed(name: str, values: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Floats in a type of MIL.

    Raises:
        UnsupportedError: they are past its range.
    """
    if kind == "fp16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise UnsupportedError(
            f"{name} has the value {np.abs(values).max():.4g}, which is out of range for float16; "
            "set precision to float32"
        )
    return values.astype(KINDS[kind].dtype)


def _ios18(name: str, op: str, tensor: QuantTensor, encoding: Encoding, float_kind: str) -> Matrix:
    n, k = tensor.shape
    bits, group = encoding.bits, encoding.group_size
    padded = round_up(k, group or 1)
    groups = padded // group if group else 1
    scale = BlobConstant(f"{op}_scale", float_kind, (n, groups), lambda: _params(tensor, 0, group))
    table, lut = encoding.container.palette or bits < 4, None
    kind = ("int" if tensor.zero_points is None and not table else "uint") + str(bits)
    if table:
        entries = _table(tensor, bits)
        # zero points are of the type of what they are subtracted from
        lut = entries.astype(np.float16 if tensor.zero_points is None else np.uint8)
    offset = None
    if tensor.zero_points is not None:
        offset_kind = "uint8" if table else kind
        offset = BlobConstant(
            f"{op}_offset", offset_kind, (n, groups), lambda: _params(tensor, 1, group)
        )
    data = BlobConstant(
        f"{op}_data",
        kind,
        (n, padded),
        lambda: _blocks(tensor, lambda a, b: _codes(tensor, a, b, padded, table, bits)),
    )
    return Matrix(name, op, (n, k), padded, data, scale, offset, lut)


def _ios16(name: str, op: str, tensor: QuantTensor, encoding: Encoding, float_kind: str) -> Matrix:
    n, k = tensor.shape
    bits = encoding.bits
    table = bits < 8
    data = BlobConstant(
        f"{op}_data",
        "uint8" if table or tensor.zero_points is not None else "int8",
        (-(-n * k * bits // 8),) if table else (n, k),
        lambda: _blocks(
            tensor,
            lambda a, b: _packed(_codes(tensor, a, b, k, table, bits), bits),
        ),
    )
    if table:
        lut = _table(tensor, bits).astype(KINDS[float_kind].dtype)
        return Matrix(name, op, (n, k), k, data, lut=lut, row_scale=tensor.row_params()[0])
    scale = BlobConstant(f"{op}_scale", float_kind, (n,), lambda: _params(tensor, 0, None))
    offset = None
    if tensor.zero_points is not None:
        offset = BlobConstant(f"{op}_offset", "uint8", (n,), lambda: _params(tensor, 1, None))
    return Matrix(name, op, (n, k), k, data, scale, offset)


def _table(tensor: QuantTensor, bits: int) -> NDArray[np.int16]:
    """The level that each index of ``bits`` bits denotes."""
    if tensor.palette is not None:
        table = np.zeros(1 << bits, np.int16)
        table[: tensor.palette.size] = tensor.palette
        return table
    first = 0 if tensor.zero_points is not None else 1 << (bits - 1)
    return np.arange(1 << bits, dtype=np.int16) - np.int16(first)


def _codes(
    tensor: QuantTensor, start: int, stop: int, padded: int, indices: bool, bits: int
) -> NDArray[np.int16]:
    """Rows as they are stored, with columns added up to ``padded``."""
    if indices:
        values = tensor.codes(start, stop).astype(np.int16)
        if tensor.palette is None and tensor.zero_points is None:
            values += np.int16((1 << (bits - 1)) - tensor.scheme.mid)
    else:
        values, _, _ = levels(tensor, start, stop)
    return np.pad(values, ((0, 0), (0, padded - values.shape[1])))


def _params(tensor: QuantTensor, which: int, group: int | None) -> Iterator[NDArray[Any]]:
    """Scales (0) or zero points (1) of all rows, for groups of ``group``."""
    params, have, k = tensor.row_params()[which], tensor.scheme.group_size, tensor.shape[1]
    if have is not None and have >= k:  # one group is one a row
        params, have = params[:, :1], None
    yield spread(params, k, have, group)


def _packed(values: NDArray[np.int16], bits: int) -> NDArray[Any]:
    return pack_bits(values.astype(np.uint8), bits) if bits < 8 else values


def _blocks(
    tensor: ModelTensor, rows: Callable[[int, int], NDArray[Any]]
) -> Iterator[NDArray[Any]]:
    """Blocks of rows, all but the last a multiple of 16 so that they end with whole bytes."""
    n, k = tensor.shape
    step = max(16, _PIECE // k // 16 * 16)
    for start in range(0, n, step):
        yield rows(start, min(start + step, n))


# --- reading back -----------------------------------------------------------------------------


def read_matrix(name: str, shape: tuple[int, int], ops: Mapping[str, Op]) -> Iterator[StoredWeight]:
    """The integers of a matrix as the program holds them, some rows at a time.

    Args:
        name: ours.
        shape: (N, K), unpadded.
        ops: the function's operators, by the names of their results.

    Raises:
        FormatError: they are not there, or of another form than `_ios18` and `_ios16` write.
    """
    label = identifier(name)
    op = ops[label]
    data: str | MilTensor | Packed
    if op.type == "constexpr_blockwise_shift_scale":
        data, offset = op.inputs["data"][0], _constant(op, "offset")
        scale = _constant(op, "scale")
    elif op.type == "constexpr_affine_dequantize":
        data, scale = op.inputs["quantized_data"][0], _constant(op, "scale")
        offset = _constant(op, "zero_point")
    else:
        data = label
        offset = None
        scale = _constant(ops[f"{label}_scale"], "val") if f"{label}_scale" in ops else None
    lut = None
    if isinstance(data, str):
        lut, data = _looked_up(ops[data], shape)
    if scale is None or not isinstance(data, MilTensor | Packed):
        raise FormatError(f"the program stores {name} in a form that edgeq does not write")
    n, k = shape
    scales = np.asarray(scale.get(), np.float32).reshape(n, -1)
    zeros = _zero_points(offset, n)
    step = max(1, _PIECE // k)
    for start in range(0, n, step):
        stop = min(start + step, n)
        values = data.rows(start, stop)[:, :k].astype(np.int16)
        levels_ = values if lut is None else lut[values]
        offsets = None if zeros is None else zeros[start:stop]
        yield StoredWeight(name, levels_, scales[start:stop], offsets, first=start)


def _constant(op: Op, parameter: str) -> MilTensor | None:
    """A parameter that is a constant of its own."""
    values = op.inputs.get(parameter, [])
    return values[0] if values and isinstance(values[0], MilTensor) else None


def _looked_up(op: Op, shape: tuple[int, int]) -> tuple[NDArray[np.int16], MilTensor | Packed]:
    """The table of a palette, and the indices into it."""
    lut, indices = _constant(op, "lut"), _constant(op, "indices")
    if op.type != "constexpr_lut_to_dense" or lut is None or indices is None:
        raise FormatError(f"{op.name} in the program is not a palette as edgeq writes it")
    table = np.asarray(lut.get()).reshape(-1).astype(np.int16)
    if "shape" not in op.inputs:
        return table, indices
    bits = int(table.size).bit_length() - 1
    n, k = shape
    blob = Blob(KINDS[f"uint{bits}"], n * k, np.asarray(indices.get()))
    return table, Packed(shape, np.uint8, lambda a, b: blob.read(a * k, b * k).reshape(-1, k))


def _zero_points(offset: MilTensor | None, n: int) -> NDArray[np.int16] | None:
    if offset is None:
        return None
    values = np.asarray(offset.get(), np.int16)
    # of a symmetric scheme in iOS 16's operator there is one, which is 0
    return values.reshape(n, -1) if values.ndim else None
