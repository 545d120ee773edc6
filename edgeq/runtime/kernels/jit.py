"""Compiles the matmul kernels to machine code: one small LLVM module per kind of weights.

They are compiled on their own, outside Numba's functions, and called by address. So each is
optimized once (Numba would optimize it again in every function that reaches it), only the kinds
a model uses are compiled at all, the object code is cached on disk, and the very same modules
can be cross-compiled and looked at for any processor (`assembly`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import llvmlite.binding as llvm
from llvmlite import ir

from edgeq.compiler.llvm_ir import I64, VOID, add, const, loop
from edgeq.compiler.object_code import (
    CompileTarget,
    cache_folder,
    cached,
    compiled,
    host,
    load_code,
    optimize,
    optimized,
)
from edgeq.core.errors import EdgeqError
from edgeq.formats.packing import LANE, TILE
from edgeq.formats.schemes import FloatType, QuantScheme
from edgeq.runtime.kernels import float_matmul, vector_ops
from edgeq.runtime.kernels.abi import MATMUL_ARGS, PackedWeights
from edgeq.runtime.kernels.dispatch import ISA, KERNEL_SOURCES
from edgeq.runtime.kernels.microkernel import Isa, Variant, build, kernel_name

CACHE_SCHEMES = {
    bits: (
        QuantScheme(bits, symmetric=False, granularity="channel", group_size=None),
        QuantScheme(bits, granularity="channel", group_size=None),
    )
    for bits in (4, 8)
}
"""Caches of keys and values with so many bits are read as if they were weights of these schemes."""

ENTRIES = {
    "program": ("edgeq_decoder",),
    "thread_pool": ("edgeq_pool_init", "edgeq_pool_run", "edgeq_pool_worker"),
}
"""Modules written for Numba -> the symbols of their entry points."""
_EXTERNALS = frozenset(
    {"usleep", "clock_gettime", "sqrtf", "memset", "memcpy"}
    | {f"pthread_mutex_{name}" for name in ("init", "lock", "unlock")}
    | {f"pthread_cond_{name}" for name in ("init", "wait", "signal")}
)
_F32, _F16 = 4, 2  # bytes
_lock = threading.Lock()
ADDRESSES: dict[str, int] = {}


def kernel_address(scheme: QuantScheme, isa: Isa = ISA) -> int:
    """The address of the compiled kernel for a scheme, from the disk cache if it is there."""
    name = kernel_name(scheme)
    return _kernel(f"{isa.name}_{name}", f"edgeq_{name}", lambda: module(scheme, isa))


def float_kernel_address(kind: FloatType, isa: Isa = ISA) -> int:
    """The address of the compiled kernel for a float type, from the disk cache if it is there."""
    symbol = float_matmul.kernel_symbol(kind)
    return _kernel(f"{isa.name}_{kind}", symbol, lambda: float_matmul.module(kind, isa))


def _kernel(name: str, symbol: str, make: Callable[[], ir.Module]) -> int:
    with _lock:
        if name not in ADDRESSES:
            ADDRESSES[name] = load_code(name, _object_code(name, make), [symbol])[symbol]
        return ADDRESSES[name]


def register_vector_ops() -> dict[str, int]:
    """Compile the vector routines and let compiled functions find them by name."""
    with _lock:
        if "edgeq_read" not in ADDRESSES:
            code = _object_code("vector_ops", lambda: vector_ops.module(ISA))
            routines = load_code("vector_ops", code, list(vector_ops.SYMBOLS))
            for symbol, address in routines.items():
                llvm.add_symbol(symbol, address)
            ADDRESSES.update(routines)
        return {symbol: ADDRESSES[symbol] for symbol in vector_ops.SYMBOLS}


def entry_addresses(name: str) -> dict[str, int]:
    """Addresses of a module's compiled functions; Numba is imported only if they must be compiled.

    Args:
        name: a module of this folder whose ``TYPES`` says which functions, one of `ENTRIES`.
    """
    register_vector_ops()
    with _lock:
        symbols = ENTRIES[name]
        if symbols[0] not in ADDRESSES:
            code = cached(code_folder() / f"{name}.o", lambda: _compiled_entries(name))
            ADDRESSES.update(load_code(name, code, list(symbols)))
        return {symbol: ADDRESSES[symbol] for symbol in symbols}


def _compiled_entries(name: str) -> bytes:
    """Numba's LLVM code for a module's functions as object code.

    Only the functions themselves are kept, without Numba's wrappers, so that the object code
    needs nothing of Numba to be loaded.
    """
    from numba import njit

    target, whole = host(ISA.target_features), None
    for function, signature in import_module(f"{__package__}.{name}").TYPES.items():
        function_code = njit(
            signature, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
        )(function)
        symbol = function_code.overloads[signature.args].fndesc.llvm_func_name
        parsed = llvm.parse_assembly(next(iter(function_code.inspect_llvm().values())))
        for part in parsed.functions:
            if part.name == symbol:
                part.name = f"edgeq_{function.__name__}"
            elif not part.is_declaration:
                part.linkage = llvm.Linkage.internal
        if whole is None:
            whole = parsed
        else:
            whole.link_in(parsed)
    assert whole is not None
    machine = target.machine()
    optimize(whole, machine)
    needed = {f.name for f in whole.functions if f.is_declaration and "llvm." not in f.name}
    if unknown := needed - _EXTERNALS - set(vector_ops.SYMBOLS):
        raise EdgeqError(f"compiled functions of {name} need unknown ones: {sorted(unknown)}")
    return bytes(machine.emit_object(whole))


def module(scheme: QuantScheme, isa: Isa) -> ir.Module:
    """The LLVM module of one kernel: loops over tiles and tokens around the micro-kernels.

    The function takes the integers of `abi.MATMUL_ARGS`.
    """
    mod = ir.Module(kernel_name(scheme))
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * len(MATMUL_ARGS)), f"edgeq_{mod.name}")
    count = len(PackedWeights._fields)
    packed = PackedWeights(*fn.args[:count])
    acts, act_stride, tokens, out, out_stride, first, last = fn.args[count:]
    b = ir.IRBuilder(fn.append_basic_block())
    # bytes of a row; a palette serves all rows, and two-level scales are found by the row's number
    zeros_size = 0 if scheme.codebook or scheme.two_level else _F16 if scheme.minimum else 1
    sizes = (LANE, 0 if scheme.two_level else _F16, zeros_size)
    with loop(b, first, last, 1) as tile:
        weights = [
            b.add(base, b.mul(tile, step))
            for base, step in (
                (packed.codes, packed.code_step), (packed.scales, packed.scale_step),
                (packed.zeros, packed.zero_step),
            )
        ]  # fmt: skip
        target = b.add(out, b.mul(tile, const(TILE * _F32)))
        done: ir.Value = const(0)
        for step in sorted(isa.tokens, reverse=True):
            kernel = build(b, isa, Variant(scheme, step))
            stop = b.add(done, b.mul(b.sdiv(b.sub(tokens, done), const(step)), const(step)))
            with loop(b, done, stop, step) as m:
                row = b.add(acts, b.mul(m, act_stride))
                # the rows after the first find the tile in the caches
                is_first = b.icmp_signed("==", m, const(0))
                ahead = b.select(is_first, const(isa.prefetch), const(0))
                to = b.add(target, b.mul(m, out_stride))
                for r in range(0, TILE, isa.rows(step)):
                    # bytes before row r: codes, scales, zero points or minimums
                    parts = [add(b, at, size * r) for at, size in zip(weights, sizes, strict=True)]
                    place = add(b, to, _F32 * r)
                    shift = const(r) if scheme.two_level else packed.shift
                    b.call(
                        kernel,
                        [*parts, row, packed.blocks, shift, act_stride, place, out_stride, ahead],
                    )
            done = stop
    b.ret_void()
    return mod


def assembly(scheme: QuantScheme | FloatType, isa: Isa, triple: str, cpu: str) -> str:
    """The assembly of a scheme's or a float type's kernel for any processor, without running it."""
    target = CompileTarget(triple, cpu, isa.target_features)
    if isinstance(scheme, QuantScheme):
        code = module(scheme, isa)
    else:
        code = float_matmul.module(scheme, isa)
    return str(target.machine().emit_assembly(optimized(code, target)))


def _object_code(name: str, make: Callable[[], ir.Module]) -> bytes:
    target = host(ISA.target_features)
    return cached(code_folder() / f"{name}.o", lambda: compiled(make(), target))


def code_folder() -> Path:
    """Where object code of this process's kernel is kept."""
    return cache_folder(ISA.name, host(ISA.target_features), KERNEL_SOURCES)
