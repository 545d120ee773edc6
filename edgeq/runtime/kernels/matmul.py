"""Matmul over a range of tiles, by whatever kernel the weights' record names.

A linear's `kind` code is one of `FLOAT_KINDS` (rows of floats, straight from the file) or
`quant_kind(scheme)`, with the address of its compiled kernel (`jit.kernel_address`).
Everything is passed by address: compiled once for every model.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgeq.compiler.llvm_ir import I64, VOID
from edgeq.formats.packing import TILE
from edgeq.runtime.kernels.abi import FIRST_QUANT, MATMUL_ARGS, PackedWeights
from edgeq.runtime.kernels.primitives import compiled, dot_bf16, dot_f16, dot_f32, floats, put_f32
from edgeq.runtime.kernels.vector_ops import FLOAT_KINDS

_KIND_F32, _KIND_F16 = FLOAT_KINDS["float32"], FLOAT_KINDS["float16"]
_F32, _F16 = 4, 2  # bytes


@intrinsic
def quant_matmul(typingctx, kernel, weights, acts, out, first, last):
    """Call a native kernel by address, as `abi.MatmulKernel` does from Python.

    ``weights`` is an `abi.PackedWeights`; ``acts`` and ``out`` are `abi.Rows`.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        def integers(kind: Any, value: Any) -> list[Any]:
            if not isinstance(kind, types.BaseTuple):
                return [context.cast(builder, value, kind, types.int64)]
            fields = zip(kind.types, cgutils.unpack_tuple(builder, value), strict=True)
            return [integer for field in fields for integer in integers(*field)]

        address, packed, quantized, results, *tiles = map(integers, sig.args, args)
        kernel_type = ir.FunctionType(VOID, [I64] * len(MATMUL_ARGS)).as_pointer()
        values = [*packed, *quantized, *results[:2], *tiles[0], *tiles[1]]
        builder.call(builder.inttoptr(address[0], kernel_type), values)
        return context.get_dummy_value()

    return types.void(kernel, weights, acts, out, first, last), codegen


@compiled
def matmul(lin, x, acts, out, first, last):
    """Tiles ``first:last`` of a linear: out[m, n] for every row m of x, bias added.

    ``lin`` is an `abi.LINEAR`; ``x`` the float32 rows (used by float weights), ``acts`` the same
    rows quantized (used by packed weights) and ``out`` the float32 results, each as `abi.Rows`.
    """
    kind = lin.kind
    if kind >= FIRST_QUANT:
        weights = PackedWeights(
            codes=lin.codes,
            code_step=lin.code_step,
            scales=lin.scales,
            scale_step=lin.scale_step,
            zeros=lin.zeros,
            zero_step=lin.zero_step,
            blocks=lin.blocks,
            shift=lin.shift,
        )
        quant_matmul(lin.kernel, weights, acts, out, first, last)
    else:
        k = lin.k
        size = _F32 if kind == _KIND_F32 else _F16
        for row in range(first * TILE, min(last * TILE, lin.n)):
            w = lin.codes + row * k * size
            for m in range(x.length):
                at = x.address + m * x.stride
                if kind == _KIND_F32:
                    y = dot_f32(w, at, k)
                elif kind == _KIND_F16:
                    y = dot_f16(w, at, k)
                else:
                    y = dot_bf16(w, at, k)
                put_f32(out.address + m * out.stride + row * _F32, y)
    if lin.bias != 0:
        _add_bias(lin.bias, out, x.length, first * TILE, min(last * TILE, lin.n))


@compiled
def _add_bias(bias, out, rows, first, last):
    source = floats(bias, last)
    for m in range(rows):
        target = floats(out.address + m * out.stride, last)
        for i in range(first, last):
            target[i] += source[i]
