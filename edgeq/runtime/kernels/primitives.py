"""Functions that compiled code calls: native routines by name, loads, stores and atomics."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, njit, types
from numba.extending import intrinsic

from edgeq.compiler.llvm_ir import F16, F32, I8, I16, I32, I64, VOID, const, declare, load, store
from edgeq.runtime.kernels.vector_ops import SYMBOLS

compiled = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Marks functions that only compiled code calls: no wrappers for Python, no checks for x / 0."""


def _external(name: str) -> Any:
    """A native routine; its symbol must be registered first (`jit.register_vector_ops`)."""
    ret, count = SYMBOLS[name]
    result = {VOID: types.void, F32: types.float32, I64: types.int64}[ret]
    return types.ExternalFunction(name, result(*[types.int64] * count))


quantize_row = _external("edgeq_quantize_row")
vector_sumsq = _external("edgeq_sumsq")
vector_absmax = _external("edgeq_absmax")
softmax = _external("edgeq_softmax")
merge = _external("edgeq_merge")
gate = _external("edgeq_gate")
softcap = _external("edgeq_softcap")
silu = _external("edgeq_silu")
sigmoid_gate = _external("edgeq_sigmoid_gate")
delta_gates = _external("edgeq_delta_gates")
delta_rule = _external("edgeq_delta_rule")
center_scores = _external("edgeq_center_scores")
center_scores_4 = _external("edgeq_center_scores_4")


def _caster(element: Any) -> Any:
    @intrinsic
    def pointer(typingctx, address):
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

        return types.CPointer(element)(types.int64), codegen

    return pointer


def _viewer(element: Any) -> Any:
    pointer = _caster(element)

    @compiled
    def view(address, n):
        return carray(pointer(address), (n,))

    return view


def records(record: np.dtype[Any]) -> Any:
    """records(RECORD)(address, n): n records at an address, as an array without a copy."""
    return _viewer(from_dtype(record))


floats = _viewer(types.float32)
"""floats(address, n): n float32 at an address, as an array without a copy."""
ints = _viewer(types.int64)
"""ints(address, n): n int64 at an address, as an array without a copy."""
bytes_at = _viewer(types.uint8)
"""bytes_at(address, n): n bytes at an address, as an array without a copy."""
signed_bytes_at = _viewer(types.int8)
"""signed_bytes_at(address, n): n int8 at an address, as an array without a copy."""


def _intrinsic(result: Any, arguments: tuple[Any, ...], emit: Any) -> Any:
    """An intrinsic that emits a few instructions: emit(builder, *arguments) -> value or None."""
    names = ", ".join(f"a{i}" for i in range(len(arguments)))

    def typing(typingctx: Any, *_: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if value is None else value

        return result(*arguments), codegen

    scope = {"typing": typing}
    # numba takes the number of arguments from the function's signature
    source = f"def call(typingctx{', ' + names if names else ''}):\n    return typing(typingctx)\n"
    exec(source, scope)
    return intrinsic(scope["call"])


def _put_f16(b: ir.IRBuilder, address: ir.Value, value: ir.Value) -> ir.Value:
    short = b.fptrunc(value, F16)
    store(b, short, address, 2)
    return b.fpext(short, F32)


def _bf16(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.bitcast(b.shl(b.zext(load(b, address, I16, 2), I32), const(16, I32)), F32)


def _pause(b: ir.IRBuilder) -> None:
    triple = b.module.triple
    if triple.startswith(("x86_64", "amd64")):
        b.call(declare(b, "llvm.x86.sse2.pause", VOID, []), [])
    elif triple.startswith(("aarch64", "arm64")):
        # the YIELD hint does nothing on most cores; a barrier costs what x86's PAUSE does
        b.call(declare(b, "llvm.aarch64.isb", VOID, [I32]), [const(15, I32)])


def _pointer(b: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return b.inttoptr(address, I64.as_pointer())


_I, _F = types.int64, types.float32
put_f32 = _intrinsic(types.void, (_I, _F), lambda b, at, v: store(b, v, at, 4))
"""put_f32(address, value): store a float32."""
put_f16 = _intrinsic(_F, (_I, _F), _put_f16)
"""put_f16(address, value): store a value rounded to float16; returns it rounded."""
put_u8 = _intrinsic(types.void, (_I, _I), lambda b, at, v: store(b, b.trunc(v, I8), at))
"""put_u8(address, value): store a byte."""
get_f16 = _intrinsic(_F, (_I,), lambda b, at: b.fpext(load(b, at, F16, 2), F32))
"""get_f16(address): the float16 there, as float32."""
get_bf16 = _intrinsic(_F, (_I,), _bf16)
"""get_bf16(address): the bfloat16 there, as float32."""
atomic_add = _intrinsic(
    _I, (_I, _I), lambda b, at, v: b.atomic_rmw("add", _pointer(b, at), v, "seq_cst")
)
"""atomic_add(address, value): add to an int64, return what was there; in one order with `swap`."""
swap = _intrinsic(
    _I, (_I, _I), lambda b, at, v: b.atomic_rmw("xchg", _pointer(b, at), v, "seq_cst")
)
"""swap(address, value): write an int64, return what was there."""
atomic_load = _intrinsic(_I, (_I,), lambda b, at: b.load_atomic(_pointer(b, at), "acquire", 8))
"""atomic_load(address): an int64, acquire."""
atomic_store = _intrinsic(
    types.void,
    (_I, _I),
    lambda b, at, v: b.store_atomic(v, _pointer(b, at), "release", 8) and None,
)
"""atomic_store(address, value): an int64, release."""
pause = _intrinsic(types.void, (), _pause)
"""pause(): tell the core that this is a spin loop."""
usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
"""usleep(microseconds): give the core away for a while."""
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
"""clock_gettime(clock, address): seconds and nanoseconds, two int64, to the address."""


def _posix(name: str, count: int) -> Any:
    return types.ExternalFunction(f"pthread_{name}", types.int32(*[types.int64] * count))


mutex_init, mutex_lock, mutex_unlock = (
    _posix(f"mutex_{name}", count) for name, count in (("init", 2), ("lock", 1), ("unlock", 1))
)
cond_init, cond_wait, cond_signal = (
    _posix(f"cond_{name}", count) for name, count in (("init", 2), ("wait", 2), ("signal", 1))
)
