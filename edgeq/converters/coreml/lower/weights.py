"""Quantized constants in Core ML packages: packed, and read back to the same numbers.

    iOS 18      4, 8 bits   constexpr_blockwise_shift_scale(data, scale), data int4 / int8; one
                            scale, one for each index of an axis, or one a block of an axis
                palettes    constexpr_lut_to_dense(indices, lut), and the same on what it gives
    iOS 16, 17  8 bits      constexpr_affine_dequantize(quantized_data, zero_point, scale, axis)
                4 bits,     constexpr_lut_to_dense(indices, lut, shape), which has no scales: the
                palettes    product with the weight is multiplied with them

Blocks must divide their axis; a block that does not is held as the largest that divides both,
its scale repeated.

Scales are float32, or float16 where that is the very same number and the program is of float16.

Source: coremltools' definitions of these operators, ops/defs/iOS16/constexpr_ops.py and
iOS18/compression.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.blob import KINDS, Blob, pack_bits
from edgeq.converters.coreml.exec.load import MilTensor, Op
from edgeq.core.errors import FormatError
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import WEIGHTED, weight_of

Var = Any
"""coremltools' value in a graph."""
LEAST_BLOCK = 8
"""Levels that share a repeated scale; with fewer, the scales would take more than the levels."""
_INDEX_BITS = {"ios18": (1, 2, 3, 4, 6, 8), "ios17": (1, 2, 4, 6, 8), "ios16": (1, 2, 4, 6, 8)}


@dataclass(frozen=True)
class PackedWeight:
    """A quantized constant in the program.

    Args:
        var: what the operators take.
        scale: what the product with it is still to be multiplied with: [C], or one number; None
            if ``var`` has its scales.
    """

    var: Var
    scale: Var | None = None


def float16_exact(scales: NDArray[np.float32] | float) -> bool:
    """Whether float16 represents the numbers exactly, none of them subnormal."""
    values = np.asarray(scales, np.float32)
    half = values.astype(np.float16)
    tiny = float(np.finfo(np.float16).tiny)
    return bool(np.all((half.astype(np.float32) == values) & (np.abs(values) >= tiny)))


def refusal(graph: Graph, node: Node, name: str, target: str) -> str:
    """Why a system cannot hold a node's quantized constant; empty if it can."""
    weight = graph.constants[name]
    assert isinstance(weight, QuantWeight)
    if weight.bits == 32:
        return ""
    if target == "ios18":
        if weight.axis is not None and weight.block is not None:
            block = _block(weight.shape[weight.axis], weight.block)
            if block < min(LEAST_BLOCK, weight.shape[weight.axis]):
                return (
                    f"blocks of {weight.block} on {weight.shape[weight.axis]} entries of {name!r}, "
                    f"which Core ML would hold in blocks of {block}; nearest: blocks that divide "
                    "them, or a scale for each channel"
                )
        return ""
    if weight.block is not None:
        return f"blocks in {name!r}, which {target} has not; nearest: a scale for each channel"
    if weight.bits == 8 and weight.palette is None:
        return ""
    if (
        node.op not in WEIGHTED
        or weight.axis not in (None, weight_of(node).channels)
        or not _is_weight(node, name)
    ):
        return (
            f"{name!r} in {weight.bits} bits, which {target} multiplies with its scales behind the "
            "product; nearest: 8 bits, or ios18"
        )
    return ""


def _is_weight(node: Node, name: str) -> bool:
    """Whether the constant is the node's weight; a Gather's only along axis 0."""
    if node.op == "Gather" and node.attrs.get("axis", 0) != 0:
        return False
    return node.inputs[weight_of(node).input] == name


def _block(n: int, block: int) -> int:
    return n if block >= n else math.gcd(n, block)


def build(
    mb: Any, types: Any, name: str, scale_name: str, weight: QuantWeight, kind: str, target: str
) -> PackedWeight:
    """Build the operators that decode a constant.

    Args:
        mb: coremltools' builder.
        types: coremltools' types.
        name: of the result.
        scale_name: of its scales, if they are a constant of their own.
        held: the constant.
        kind: "fp16" or "fp32", of its scales and of the result.
        target: "ios16", "ios17" or "ios18".
    """

    def packed(values: NDArray[Any], type_name: str) -> NDArray[Any]:
        return values.astype(types.nptype_from_builtin(getattr(types, type_name)))

    if not weight.levels.ndim:  # no constexpr operator knows a constant without dimensions
        weight = replace(weight, levels=weight.levels.reshape(1))
    number = KINDS[kind].dtype
    if target == "ios18":
        scale = _scales18(weight).astype(number)
        if weight.palette is None:
            data = packed(weight.levels, f"int{weight.bits}")
        else:
            bits, table, indices = _palette(weight, target)
            lut = table.astype(np.float16).reshape([1] * weight.levels.ndim + [-1, 1])
            data = mb.constexpr_lut_to_dense(
                indices=packed(indices, f"uint{bits}"), lut=lut, name=f"{name}_levels"
            )
        return PackedWeight(mb.constexpr_blockwise_shift_scale(data=data, scale=scale, name=name))
    if weight.bits == 8 and weight.palette is None:
        # of no dimensions, a NumPy scalar and not an array
        scales = weight.scales.astype(number)
        var = mb.constexpr_affine_dequantize(
            quantized_data=weight.levels,
            zero_point=np.int8(0),
            scale=scales if scales.ndim else scales[()],
            axis=weight.axis or 0,
            name=name,
        )
        return PackedWeight(var)
    bits, table, indices = _palette(weight, target)
    var = mb.constexpr_lut_to_dense(
        indices=pack_bits(indices, bits) if bits < 8 else indices.reshape(-1),
        lut=table.astype(number),
        shape=np.array(weight.shape, np.uint32),
        name=name,
    )
    scales = weight.scales.astype(number)
    return PackedWeight(var, mb.const(val=scales if scales.ndim else scales[()], name=scale_name))


def _scales18(weight: QuantWeight) -> NDArray[np.float32]:
    """Scales with the constant's rank, whose shape divides the constant's."""
    if weight.axis is None:
        return weight.scales.reshape([1] * weight.levels.ndim)
    if weight.block is None:
        return weight.wide_scales()
    n = weight.shape[weight.axis]
    block = _block(n, weight.block)
    first = np.arange(0, n, block) // weight.block
    return np.ascontiguousarray(np.take(weight.scales, first, weight.axis))


def _palette(weight: QuantWeight, target: str) -> tuple[int, NDArray[np.int8], NDArray[np.uint8]]:
    """Bits of an index, the table padded to 2**bits, and the index of each level."""
    table = np.arange(-8, 8, dtype=np.int8) if weight.palette is None else np.unique(weight.palette)
    bits = next(b for b in _INDEX_BITS[target] if 1 << b >= table.size)
    indices = np.searchsorted(table, weight.levels).astype(np.uint8)
    return bits, np.pad(table, (0, (1 << bits) - table.size)), indices


# --- reading back -----------------------------------------------------------------------------


def describe(weight: QuantWeight) -> dict[str, Any]:
    """What `read` needs to know about a constant besides its numbers."""
    palette = None if weight.palette is None else weight.palette.tolist()
    return {
        "shape": list(weight.shape),
        "bits": weight.bits,
        "axis": weight.axis,
        "block": weight.block,
        "palette": palette,
    }


def read(
    name: str, scale_name: str, about: Mapping[str, Any], ops: Mapping[str, Op]
) -> QuantWeight:
    """Read a constant from a program.

    Args:
        name: of the operator that gives it.
        scale_name: of its scales, if they are a constant of their own.
        about: what `describe` said of it.
        ops: the function's operators by the names of their results.

    Raises:
        FormatError: it is not there, or in a form that `build` does not write.
    """
    shape, axis, block = tuple(about["shape"]), about["axis"], about["block"]
    op = ops.get(name)
    if op is None:
        raise FormatError(f"the program has no operator {name!r}")
    if op.type == "constexpr_affine_dequantize":
        levels, scales = constant(op, "quantized_data", ops), constant(op, "scale", ops)
    elif op.type == "constexpr_blockwise_shift_scale":
        data = op.inputs["data"][0]
        levels = (
            _looked_up(ops[data], shape, ops)
            if isinstance(data, str) and ops[data].type == "constexpr_lut_to_dense"
            else constant(op, "data", ops)
        )
        scales = constant(op, "scale", ops)
        if axis is None:
            scales = scales.reshape(())
        elif block is None:
            scales = scales.reshape(-1)
        else:
            n = shape[axis]
            step = block // _block(n, block) if block < n else 1
            scales = np.take(scales, np.arange(0, scales.shape[axis], step), axis)
    elif op.type == "constexpr_lut_to_dense":
        levels, scales = _looked_up(op, shape, ops), _scales16(ops, scale_name)
    else:
        raise FormatError(f"the program holds {name!r} by {op.type}, which edgeq does not write")
    palette = about["palette"]
    return QuantWeight(
        np.asarray(levels).reshape(shape).astype(np.int8),
        np.asarray(scales, np.float32),
        about["bits"],
        axis,
        block,
        None if palette is None else np.array(palette, np.int8),
    )


def constant(op: Op, parameter: str, ops: Mapping[str, Op]) -> NDArray[Any]:
    """The numbers of a parameter, which is stored inline or as a constant.

    Raises:
        FormatError: it has none, or what is no constant.
    """
    given = op.inputs.get(parameter, [])
    value = given[0] if given else None
    if isinstance(value, str) and value in ops and ops[value].type == "const":
        value = ops[value].inputs["val"][0]
    if not isinstance(value, MilTensor):
        raise FormatError(f"{parameter} of the program's {op.name} is no constant")
    return np.asarray(value.get())


def _scales16(ops: Mapping[str, Op], name: str) -> NDArray[Any]:
    if name not in ops:
        raise FormatError(f"the program has no constant {name!r}")
    return constant(ops[name], "val", ops)


def bias_scales(
    scale: float, scales: NDArray[np.float32], shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Scales of an integer bias: the input's scale times the weight's scales."""
    return np.resize(np.float32(scale) * scales, shape).astype(np.float32)


def bias_levels(values: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.int64]:
    """Integers of a bias stored as floats; exact below 2**23."""
    return np.rint(values.astype(np.float64) / scales).astype(np.int64)


def _looked_up(op: Op, shape: tuple[int, ...], ops: Mapping[str, Op]) -> NDArray[Any]:
    """Look up the levels of a palette."""
    table = constant(op, "lut", ops).reshape(-1).astype(np.float32)
    indices = constant(op, "indices", ops)
    if "shape" in op.inputs:
        bits = int(table.size).bit_length() - 1
        indices = Blob(KINDS[f"uint{bits}"], math.prod(shape), indices.reshape(-1)).read()
    return table[indices.astype(np.intp)].reshape(shape)
