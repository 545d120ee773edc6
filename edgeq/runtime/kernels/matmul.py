"""Matmul over a range of tiles, by whatever kernel the weights' record names.

A linear's `kind` code is one of `FLOAT_KINDS` (rows of floats, straight from the file) or
`quant_kind(scheme)`, with the address of its compiled kernel (`jit.kernel_address`).
Everything is passed by address: compiled once for every model.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeq.formats.packing import TILE
from edgeq.runtime.kernels.abi import FIRST_QUANT, MATMUL_ARGS
from edgeq.runtime.kernels.microkernel import I64, VOID
from edgeq.runtime.kernels.primitives import compiled, dot_bf16, dot_f16, dot_f32, floats, put_f32


@intrinsic
def quant_matmul(  # type: ignore[no-untyped-def]
    typingctx,
    kernel,
    codes,
    code_step,
    scales,
    scale_step,
    zeros,
    zero_step,
    blocks,
    shift,
    acts,
    act_stride,
    tokens,
    out,
    out_stride,
    first,
    last,
):
    """Call a native kernel by address: tiles ``first:last`` for rows of quantized activations."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kernel_type = ir.FunctionType(VOID, [I64] * len(MATMUL_ARGS)).as_pointer()
        builder.call(builder.inttoptr(args[0], kernel_type), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * (1 + len(MATMUL_ARGS))), codegen


@compiled
def matmul(lin, x, acts, out, first, last):  # type: ignore[no-untyped-def]
    """Tiles ``first:last`` of a linear: out[m, n] for every row m of x, bias added.

    ``lin`` is an `abi.LINEAR`; ``x`` the float32 rows (used by float weights), ``acts`` the same
    rows quantized (used by packed weights) and ``out`` the float32 results, each as `abi.Rows`.
    """
    kind = lin.kind
    if kind >= FIRST_QUANT:
        quant_matmul(
            lin.kernel,
            lin.codes,
            lin.code_step,
            lin.scales,
            lin.scale_step,
            lin.zeros,
            lin.zero_step,
            lin.blocks,
            lin.shift,
            acts.address,
            acts.stride,
            x.length,
            out.address,
            out.stride,
            first,
            last,
        )
    else:
        k = lin.k
        size = 4 if kind == 0 else 2
        for row in range(first * TILE, min(last * TILE, lin.n)):
            w = lin.codes + row * k * size
            for m in range(x.length):
                at = x.address + m * x.stride
                if kind == 0:
                    y = dot_f32(w, at, k)
                elif kind == 1:
                    y = dot_f16(w, at, k)
                else:
                    y = dot_bf16(w, at, k)
                put_f32(out.address + m * out.stride + row * 4, y)
    if lin.bias != 0:
        _add_bias(lin.bias, out, x.length, first * TILE, min(last * TILE, lin.n))


@compiled
def _add_bias(bias, out, rows, first, last):  # type: ignore[no-untyped-def]
    source = floats(bias, last)
    for m in range(rows):
        target = floats(out.address + m * out.stride, last)
        for i in range(first, last):
            target[i] += source[i]
