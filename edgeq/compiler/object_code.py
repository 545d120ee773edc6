"""LLVM modules to machine code for a processor, kept in a cache on disk, and loaded from there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llvmlite
import llvmlite.binding as llvm

from edgeq.core.cache import cache_home
from edgeq.core.errors import EdgeqError

if TYPE_CHECKING:
    from llvmlite import ir

_engines: list[Any] = []  # own the code that the addresses point to
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class CompileTarget:
    """A processor as LLVM describes it.

    Args:
        triple: architecture and operating system.
        cpu: the model.
        features: added to (+) or taken from (-) those of the model, separated by commas.
    """

    triple: str
    cpu: str
    features: str = ""

    def machine(self) -> Any:
        """LLVM's code generator for it, without any mode that changes floating-point results."""
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        return llvm.Target.from_triple(self.triple).create_target_machine(
            cpu=self.cpu, features=self.features, opt=3, reloc="default",
            codemodel="jitdefault", jit=True,
        )  # fmt: skip


@cache
def host(extra_features: str = "") -> CompileTarget:
    """This machine's processor, which LLVM is asked for once.

    Args:
        extra_features: features besides those that LLVM detects.
    """
    features = ""
    with contextlib.suppress(RuntimeError):  # LLVM cannot list them on every platform
        features = llvm.get_host_cpu_features().flatten()
    joined = ",".join(part for part in (features, extra_features) if part)
    return CompileTarget(llvm.get_process_triple(), llvm.get_host_cpu_name(), joined)


def optimized(mod: ir.Module, target: CompileTarget) -> Any:
    """A module, checked and optimized for a processor."""
    machine = target.machine()
    mod.triple, mod.data_layout = target.triple, str(machine.target_data)
    parsed = llvm.parse_assembly(str(mod))
    parsed.verify()
    optimize(parsed, machine)
    return parsed


def optimize(parsed: Any, machine: Any) -> None:
    """Run LLVM's passes on a parsed module."""
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)


def compiled(mod: ir.Module, target: CompileTarget) -> bytes:
    """A module as object code."""
    return bytes(target.machine().emit_object(optimized(mod, target)))


def cache_folder(kernel: str, target: CompileTarget, sources: Iterable[Path]) -> Path:
    """Where object code is kept: one folder per kernel, compiler, sources and target.

    Args:
        kernel: a name that the folder's begins with.
        target: the processor.
        sources: files that the code is made from, besides those of this package.
    """
    digest = _digest(tuple(sources)).copy()
    digest.update("|".join(astuple(target)).encode())
    return cache_home() / "kernels" / f"{kernel}-{digest.hexdigest()[:16]}"


@cache
def _digest(sources: tuple[Path, ...]) -> Any:
    """A digest of the compilers' versions, this package and further sources, which do not change
    while a process runs."""
    digest = hashlib.sha256(f"{_numba_version()}|{llvmlite.__version__}".encode())
    for source in (*sorted(Path(__file__).parent.glob("*.py")), *sources):
        digest.update(source.read_bytes())
    return digest


def _numba_version() -> str:
    """The version of Numba, which is not imported: with a full cache it is not needed.

    Read from Numba's own file where that states it, as importing `importlib.metadata` takes longer
    than all else that finding a kernel in the cache takes.
    """
    spec = find_spec("numba")
    if spec is not None and spec.origin is not None:
        with contextlib.suppress(OSError):
            text = Path(spec.origin).with_name("_version.py").read_text("utf-8")
            if stated := re.search(r'"version": "([^"]+)"', text):
                return stated[1]
    from importlib.metadata import version

    return version("numba")


def cached(path: Path, make: Callable[[], bytes]) -> bytes:
    """Object code from the cache; made and stored there if it is missing or damaged.

    A file begins with the SHA-256 of the code, as linking damaged code ends the process.
    """
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        code = content[_DIGEST_BYTES:]
        if hashlib.sha256(code).digest() == content[:_DIGEST_BYTES]:
            return code
    code = make()
    with contextlib.suppress(OSError):  # without a cache it is compiled in every process
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, hashlib.sha256(code).digest() + code)
    return code


def load_code(name: str, code: bytes, symbols: Sequence[str]) -> dict[str, int]:
    """Link object code into this process.

    Args:
        name: for the message.
        code: from `compiled`.
        symbols: its functions.

    Returns:
        The address of each symbol.

    Raises:
        EdgeqError: the code lacks one of them.
    """
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host().machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    addresses = {symbol: int(engine.get_function_address(symbol)) for symbol in symbols}
    if not all(addresses.values()):
        folder = cache_home() / "kernels"
        raise EdgeqError(f"kernel {name} could not be loaded; delete {folder}")
    return addresses


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
