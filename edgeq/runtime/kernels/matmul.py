"""Matmul over a range of tiles, by whatever kernel the weights' record names.

A linear's `kind` code is one of `FLOAT_KINDS` (rows of floats, straight from the file) or
`quant_kind(scheme)`, with the address of its compiled kernel (`native.kernel_address`).
Everything is passed by address: compiled once for every model.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeq.runtime.kernels.plan import (
    FIRST_QUANT,
    L_BIAS,
    L_BLOCKS,
    L_CODE_STEP,
    L_CODES,
    L_K,
    L_KERNEL,
    L_KIND,
    L_N,
    L_SCALE_STEP,
    L_SCALES,
    L_SHIFT,
    L_ZERO_STEP,
    L_ZEROS,
)
from edgeq.runtime.kernels.tile import I64, VOID
from edgeq.runtime.kernels.vector import compiled, dot_bf16, dot_f16, dot_f32, floats, put_f32


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
        kernel_type = ir.FunctionType(VOID, [I64] * 15).as_pointer()
        builder.call(builder.inttoptr(args[0], kernel_type), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 16), codegen


@compiled
def matmul(lin, x, x_stride, acts, act_stride, tokens, out, out_stride, first, last):  # type: ignore[no-untyped-def]
    """Tiles ``first:last`` of a linear: out[m, n] for every token m, bias added.

    ``lin`` is the linear's record; ``x`` the float32 rows (used by float weights) and ``acts``
    the same rows quantized (used by packed weights). Strides are in bytes.
    """
    kind = lin[L_KIND]
    if kind >= FIRST_QUANT:
        quant_matmul(
            lin[L_KERNEL],
            lin[L_CODES],
            lin[L_CODE_STEP],
            lin[L_SCALES],
            lin[L_SCALE_STEP],
            lin[L_ZEROS],
            lin[L_ZERO_STEP],
            lin[L_BLOCKS],
            lin[L_SHIFT],
            acts,
            act_stride,
            tokens,
            out,
            out_stride,
            first,
            last,
        )
    else:
        k = lin[L_K]
        size = 4 if kind == 0 else 2
        for row in range(first * 16, min(last * 16, lin[L_N])):
            w = lin[L_CODES] + row * k * size
            for m in range(tokens):
                at = x + m * x_stride
                if kind == 0:
                    y = dot_f32(w, at, k)
                elif kind == 1:
                    y = dot_f16(w, at, k)
                else:
                    y = dot_bf16(w, at, k)
                put_f32(out + m * out_stride + row * 4, y)
    if lin[L_BIAS] != 0:
        _add_bias(lin[L_BIAS], tokens, out, out_stride, first * 16, min(last * 16, lin[L_N]))


@compiled
def _add_bias(bias, tokens, out, out_stride, first, last):  # type: ignore[no-untyped-def]
    from_ = floats(bias, last)
    for m in range(tokens):
        to = floats(out + m * out_stride, last)
        for i in range(first, last):
            to[i] += from_[i]
