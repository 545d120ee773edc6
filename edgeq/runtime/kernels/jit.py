"""Compiles the matmul kernels to machine code: one small LLVM module per kind of weights.

They are compiled on their own, outside Numba's functions, and called by address. So each is
optimized once (Numba would optimize it again in every function that reaches it), only the kinds
a model uses are compiled at all, the object code is cached on disk, and the very same modules
can be cross-compiled and looked at for any processor (`assembly`).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from edgeq.core.errors import EdgeqError
from edgeq.formats.packing import LANE, TILE
from edgeq.formats.schemes import QuantScheme
from edgeq.runtime.kernels import vector_ops
from edgeq.runtime.kernels.abi import MATMUL_ARGS, PackedWeights
from edgeq.runtime.kernels.dispatch import ISA, cache_folder
from edgeq.runtime.kernels.microkernel import I64, VOID, Isa, Variant, add, build, const, loop

KEY_SCHEME = QuantScheme(8, symmetric=False, granularity="channel", group_size=None)
VALUE_SCHEME = QuantScheme(8, granularity="channel", group_size=None)
"""INT8 caches of keys and values are read as if they were weights of these schemes."""

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
_addresses: dict[str, int] = {}
_engines: list[Any] = []  # own the code that the addresses point to


def kernel_name(scheme: QuantScheme) -> str:
    """The name of the kernel for a scheme: one per bits, kind of codes, and groups of 16 or not."""
    half = "h" if scheme.group_size == 16 else ""
    kind = "p" if scheme.codebook else ("s" if scheme.symmetric else "a")
    return f"q{scheme.bits}{kind}{half}"


def kernel_address(scheme: QuantScheme, isa: Isa = ISA) -> int:
    """The address of the compiled kernel for a scheme, from the disk cache if it is there."""
    name = f"{isa.name}_{kernel_name(scheme)}"
    with _lock:
        if name not in _addresses:
            code = _object_code(name, lambda: module(scheme, isa))
            symbol = f"edgeq_{kernel_name(scheme)}"
            _addresses[name] = _load(name, code, [symbol])[symbol]
        return _addresses[name]


def register_vector_ops() -> dict[str, int]:
    """Compile the vector routines and let compiled functions find them by name."""
    with _lock:
        if "edgeq_read" not in _addresses:
            code = _object_code("vector_ops", lambda: vector_ops.module(ISA))
            routines = _load("vector_ops", code, list(vector_ops.SYMBOLS))
            for symbol, address in routines.items():
                llvm.add_symbol(symbol, address)
            _addresses.update(routines)
        return {symbol: _addresses[symbol] for symbol in vector_ops.SYMBOLS}


def entry_addresses(name: str) -> dict[str, int]:
    """Addresses of a module's compiled functions; Numba is imported only if they must be compiled.

    Args:
        name: a module of this folder whose ``TYPES`` says which functions, one of `ENTRIES`.
    """
    register_vector_ops()
    with _lock:
        symbols = ENTRIES[name]
        if symbols[0] not in _addresses:
            code = _cached(name, lambda: _compiled_entries(name))
            _addresses.update(_load(name, code, list(symbols)))
        return {symbol: _addresses[symbol] for symbol in symbols}


def _compiled_entries(name: str) -> bytes:
    """Numba's LLVM code for a module's functions as object code.

    Only the functions themselves are kept, without Numba's wrappers, so that the object code
    needs nothing of Numba to be loaded.
    """
    from numba import njit

    machine, whole = _machine(*_host()), None
    for function, signature in import_module(f"{__package__}.{name}").TYPES.items():
        compiled = njit(
            signature, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
        )(function)
        symbol = compiled.overloads[signature.args].fndesc.llvm_func_name
        parsed = llvm.parse_assembly(next(iter(compiled.inspect_llvm().values())))
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
    _optimize(whole, machine)
    needed = {f.name for f in whole.functions if f.is_declaration and "llvm." not in f.name}
    if unknown := needed - _EXTERNALS - set(vector_ops.SYMBOLS):
        raise EdgeqError(f"compiled functions of {name} need unknown ones: {sorted(unknown)}")
    return bytes(machine.emit_object(whole))


def module(scheme: QuantScheme, isa: Isa) -> ir.Module:
    """The LLVM module of one kernel: loops over tiles and tokens around the micro-kernels.

    The function takes the integers of `abi.MATMUL_ARGS`.
    """
    bits, asymmetric, half = scheme.bits, not scheme.symmetric, scheme.group_size == 16
    mod = ir.Module(kernel_name(scheme))
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64] * len(MATMUL_ARGS)), f"edgeq_{mod.name}")
    count = len(PackedWeights._fields)
    packed = PackedWeights(*fn.args[:count])
    acts, act_stride, tokens, out, out_stride, first, last = fn.args[count:]
    b = ir.IRBuilder(fn.append_basic_block())
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
            palette = scheme.codebook is not None
            kernel = build(b, isa, Variant(bits, asymmetric, half, step, palette))
            stop = b.add(done, b.mul(b.sdiv(b.sub(tokens, done), const(step)), const(step)))
            with loop(b, done, stop, step) as m:
                row = b.add(acts, b.mul(m, act_stride))
                to = b.add(target, b.mul(m, out_stride))
                for r in range(0, TILE, isa.rows(step)):
                    # bytes before row r: codes, scales, zero points (a palette serves all rows)
                    sizes = (LANE * r, _F16 * r, 0 if palette else r)
                    parts = [add(b, at, n) for at, n in zip(weights, sizes, strict=True)]
                    place = add(b, to, _F32 * r)
                    b.call(
                        kernel,
                        [*parts, row, packed.blocks, packed.shift, act_stride, place, out_stride],
                    )
            done = stop
    b.ret_void()
    return mod


def _machine(triple: str, cpu: str, features: str) -> Any:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3, reloc="default", codemodel="jitdefault", jit=True
    )


def _optimized(mod: ir.Module, machine: Any, triple: str) -> Any:
    mod.triple, mod.data_layout = triple, str(machine.target_data)
    parsed = llvm.parse_assembly(str(mod))
    parsed.verify()
    _optimize(parsed, machine)
    return parsed


def _optimize(parsed: Any, machine: Any) -> None:
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)


def assembly(scheme: QuantScheme, isa: Isa, triple: str, cpu: str) -> str:
    """The kernel's assembly for any processor, without running it."""
    machine = _machine(triple, cpu, isa.target_features)
    return str(machine.emit_assembly(_optimized(module(scheme, isa), machine, triple)))


def _host() -> tuple[str, str, str]:
    """Triple, CPU name and features of this machine."""
    features = ""
    with contextlib.suppress(RuntimeError):  # LLVM cannot list them on every platform
        features = llvm.get_host_cpu_features().flatten()
    extra = ISA.target_features
    return (
        llvm.get_process_triple(),
        llvm.get_host_cpu_name(),
        ",".join(part for part in (features, extra) if part),
    )


def _object_code(name: str, make: Callable[[], ir.Module]) -> bytes:
    def compile_it() -> bytes:
        machine = _machine(*_host())
        return bytes(machine.emit_object(_optimized(make(), machine, _host()[0])))

    return _cached(name, compile_it)


def _cached(name: str, make: Callable[[], bytes]) -> bytes:
    """Object code from the cache; compiled and stored there if it is missing."""
    path = cache_folder(*_host()) / f"{name}.o"
    try:
        return path.read_bytes()
    except OSError:
        code = make()
    with contextlib.suppress(OSError):  # without a cache it is compiled in every process
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, code)
    return code


def _write(path: Path, data: bytes) -> None:
    """Write a file all at once, so that a second process never reads half of it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(name: str, code: bytes, symbols: list[str]) -> dict[str, int]:
    """Link object code into this process; addresses of its symbols."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(*_host()))
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    addresses = {symbol: int(engine.get_function_address(symbol)) for symbol in symbols}
    if not all(addresses.values()):
        raise EdgeqError(f"kernel {name} could not be loaded; delete {cache_folder().parent}")
    return addresses
