"""An emulated board: the right kernel, no instruction it lacks, the same tokens as elsewhere.

`make test-arm` runs this under benchmarks/arm/armpy; anywhere else it is skipped.
"""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest

from edgeq.compiler.object_code import host
from edgeq.core.cpu import this_cpu
from edgeq.core.errors import UnsupportedError
from edgeq.formats.schemes import QuantScheme
from edgeq.runtime.kernels import dispatch, jit, vector_ops
from tests.arm.greedy import greedy_tokens

BOARD = os.environ.get("EDGEQ_BOARD", "")
TOKENS = Path(os.environ.get("EDGEQ_ARM_TOKENS", "."))
KERNELS = {"pi5": "dotprod", "pi4": "neon", "zero2": "neon", "generic": "dotprod"}
NAMES = {"pi5": "cortex-a76", "pi4": "cortex-a72", "zero2": "cortex-a53", "generic": "generic"}

pytestmark = pytest.mark.skipif(BOARD not in KERNELS, reason="no emulated board (make test-arm)")


def dot_products(code: bytes) -> int:
    """How many ``sdot`` and ``udot`` a piece of object code has."""
    words = np.frombuffer(code[: len(code) // 4 * 4], "<u4")
    vectors = (words & 0x9FE0FC00) == 0x0E809400
    by_lane = (words & 0x9FC0F400) == 0x0F80E000
    return int(np.count_nonzero(vectors | by_lane))


def test_the_board_is_seen_for_what_it_is() -> None:
    assert this_cpu().arch == "aarch64"
    assert llvm.get_host_cpu_name() == NAMES[BOARD]
    assert ("dotprod" in this_cpu().features) == (KERNELS[BOARD] == "dotprod")


def test_the_kernel_is_the_one_for_this_board() -> None:
    assert dispatch.ISA.name == KERNELS[BOARD]


def test_dot_products_are_used_only_where_the_board_has_them() -> None:
    jit.kernel_address(QuantScheme(4))
    jit.kernel_address(QuantScheme(8, granularity="channel", group_size=None))
    jit.register_vector_ops()
    folder = jit.code_folder()
    found = {path.stem: path.read_bytes() for path in folder.glob("*.o")}
    assert {"vector_ops", f"{KERNELS[BOARD]}_q4s", f"{KERNELS[BOARD]}_q8s"} <= set(found)
    count = sum(map(dot_products, found.values()))
    assert count >= 128 if KERNELS[BOARD] == "dotprod" else count == 0


@pytest.mark.skipif(KERNELS.get(BOARD) == "dotprod", reason="this board has dot products")
def test_a_kernel_the_board_lacks_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEQ_KERNEL", "dotprod")
    with pytest.raises(UnsupportedError, match=r"this aarch64 processor does not.*neon, generic"):
        runpy.run_path(str(dispatch.__file__))


@pytest.mark.parametrize("missing", ["name", "features", "both"])
def test_kernels_compile_for_a_processor_llvm_knows_nothing_of(
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    host.cache_clear()
    request.addfinalizer(host.cache_clear)

    def refuse() -> None:
        raise RuntimeError("not on this platform")

    if missing != "features":
        monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: "generic")
    if missing != "name":
        monkeypatch.setattr(llvm, "get_host_cpu_features", refuse)
    monkeypatch.setenv("EDGEQ_CACHE", str(tmp_path))
    monkeypatch.setattr(jit, "ADDRESSES", {})
    assert jit.kernel_address(QuantScheme(4))
    assert set(jit.register_vector_ops()) == set(vector_ops.SYMBOLS)


EXPECTED = json.loads((TOKENS / "tokens.json").read_text()) if Path() != TOKENS else {}


@pytest.mark.parametrize("chunks", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("name", EXPECTED)
def test_greedy_tokens_are_those_of_x86(name: str, chunks: bool) -> None:
    assert greedy_tokens(TOKENS / name, 2 if chunks else 1, chunks) == EXPECTED[name]
