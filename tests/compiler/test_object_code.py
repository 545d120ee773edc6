"""LLVM modules as machine code: compiled once, kept on disk, and linked into the process."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from llvmlite import ir

from edgeq.compiler.llvm_ir import F32, I64, VOID, const, load, loop, store
from edgeq.compiler.object_code import (
    CompileTarget,
    cache_folder,
    cached,
    compiled,
    host,
    load_code,
)
from edgeq.core.errors import EdgeqError


def doubled(name: str) -> ir.Module:
    """A function of (address, n) that doubles n float32 numbers in place."""
    mod = ir.Module("test")
    fn = ir.Function(mod, ir.FunctionType(VOID, [I64, I64]), name)
    b = ir.IRBuilder(fn.append_basic_block())
    with loop(b, const(0), fn.args[1], 1) as i:
        place = b.add(fn.args[0], b.shl(i, const(2)))
        value = load(b, place, F32, 4)
        store(b, b.fadd(value, value), place, 4)
    b.ret_void()
    return mod


@pytest.mark.parametrize("n", [0, 1, 17])
def test_compiled_code_runs(n: int) -> None:
    code = compiled(doubled("edgeq_test_doubled"), host())
    address = load_code("doubled", code, ["edgeq_test_doubled"])["edgeq_test_doubled"]
    values = np.arange(n + 1, dtype=np.float32)
    ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(address)(values.ctypes.data, n)
    want = np.arange(n + 1, dtype=np.float32)
    want[:n] *= 2
    np.testing.assert_array_equal(values, want)


def test_a_function_that_is_missing_is_named() -> None:
    code = compiled(doubled("edgeq_test_present"), host())
    with pytest.raises(EdgeqError, match="kernel doubled could not be loaded; delete"):
        load_code("doubled", code, ["edgeq_test_present", "edgeq_test_absent"])


def test_code_is_made_once(tmp_path: Path) -> None:
    calls = []

    def make() -> bytes:
        calls.append(1)
        return b"code"

    path = tmp_path / "new" / "kernel.o"
    assert cached(path, make) == cached(path, make) == b"code"
    assert len(calls) == 1
    assert [file.name for file in path.parent.iterdir()] == ["kernel.o"]


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "flipped"])
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path) -> None:
    """As after a power cut; LLVM would end the process."""
    path = tmp_path / "kernel.o"
    code = compiled(doubled("edgeq_test_repaired"), host())
    assert cached(path, lambda: code) == code
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-9] ^= 1
    path.write_bytes(
        {
            "cut": whole[: len(whole) // 2],
            "zeros": bytes(len(whole)),
            "empty": b"",
            "flipped": bytes(flipped),
        }[damage]
    )
    assert cached(path, lambda: code) == code
    assert path.read_bytes() == whole


def test_without_a_place_to_write_code_is_made_each_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cached(tmp_path / "file" / "kernel.o", lambda: b"code") == b"code"


def test_the_place_depends_on_sources_and_processor(tmp_path: Path) -> None:
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("1")
    other.write_text("2")
    target = host()
    folders = {
        cache_folder("k", target, [one]),
        cache_folder("k", target, [other]),
        cache_folder("k", CompileTarget(target.triple, target.cpu, "+fancy"), [one]),
        cache_folder("l", target, [one]),
    }
    assert len(folders) == 4
    assert cache_folder("k", target, [one]) in folders
