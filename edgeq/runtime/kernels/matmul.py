"""Matmul over a range of tiles, by whatever kernel the weights' record names.

A linear's `kind` code is one of `FLOAT_KINDS` (rows of floats, straight from the file) or
`quant_kind(scheme)`, with the address of its compiled kernel (`jit.float_kernel_address` or
`jit.kernel_address`). Everything is passed by address: compiled once for every model.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgeq.compiler.llvm_ir import I64, VOID
from edgeq.formats.packing import TILE
from edgeq.runtime.kernels.abi import FIRST_QUANT, FloatWeights, PackedWeights
from edgeq.runtime.kernels.primitives import compiled, floats

_F32 = 4  # bytes


@intrinsic
def call_kernel(typingctx, kernel, weights, x, out, first, last):
    """Call a native kernel by address, as `abi.MatmulKernel` does from Python.

    ``weights`` is an `abi.PackedWeights` or `abi.FloatWeights`; ``x`` and ``out`` are `abi.Rows`.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def integers(kind: Any, value: Any) -> list[Any]:
            if not isinstance(kind, types.BaseTuple):
                return [context.cast(builder, value, kind, types.int64)]
            fields = zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True)
            return [integer for field in fields for integer in integers(*field)]

        address, matrix, inputs, results, *tiles = map(integers, sig.args, args)
        values = [*matrix, *inputs, *results[:2], *tiles[0], *tiles[1]]
        kernel_type = ir.FunctionType(VOID, [I64] * len(values)).as_pointer()
        builder.call(builder.inttoptr(address[0], kernel_type), values)
        return context.get_dummy_value()

    return types.void(kernel, weights, x, out, first, last), codegen


@compiled
def matmul(lin, x, acts, out, first, last):
    """Tiles ``first:last`` of a linear: out[m, n] for every row m of x, bias added.

    ``lin`` is an `abi.LINEAR`; ``x`` the float32 rows (used by float weights), ``acts`` the same
    rows quantized (used by packed weights) and ``out`` the float32 results, each as `abi.Rows`.
    """
    if lin.kind >= FIRST_QUANT:
        packed = PackedWeights(
            codes=lin.codes,
            code_step=lin.code_step,
            scales=lin.scales,
            scale_step=lin.scale_step,
            zeros=lin.zeros,
            zero_step=lin.zero_step,
            blocks=lin.blocks,
            shift=lin.shift,
        )
        call_kernel(lin.kernel, packed, acts, out, first, last)
    else:
        rows = FloatWeights(lin.codes, lin.code_step, lin.n, lin.k)
        call_kernel(lin.kernel, rows, x, out, first, last)
    if lin.bias != 0:
        _add_bias(lin.bias, out, x.length, first * TILE, min(last * TILE, lin.n))


@compiled
def _add_bias(bias, out, rows, first, last):
    source = floats(bias, last)
    for m in range(rows):
        target = floats(out.address + m * out.stride, last)
        for i in range(first, last):
            target[i] += source[i]
