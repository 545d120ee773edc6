"""The native kernels one by one: every ISA this machine can run, every kind of weights."""

from __future__ import annotations

import ctypes
import itertools
import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.cpu import Cpu, this_cpu
from edgeq.core.errors import UnsupportedError
from edgeq.formats.schemes import BITS, QuantScheme, parse_scheme
from edgeq.formats.tensor import QuantTensor
from edgeq.formats.two_level import TwoLevelScales
from edgeq.runtime.kernels import dispatch, jit
from edgeq.runtime.kernels.abi import MatmulKernel, PackedWeights, Rows, group_shift
from edgeq.runtime.kernels.isa_arm import Dotprod, Neon
from edgeq.runtime.kernels.isa_x86 import Avx2, Avx512Vnni
from edgeq.runtime.kernels.microkernel import ACT_BLOCK, Isa

ISAS = [kernel() for kernel in dispatch.usable(this_cpu())]
SCHEMES = [
    QuantScheme(bits, symmetric, "group" if size else "channel", size)
    for bits, symmetric, size in itertools.product((2, 3, 4, 8), (True, False), (16, 32, 128, None))
]
SCHEMES += [
    QuantScheme(bits, group_size=size, codebook="palette")
    for bits, size in itertools.product((2, 3, 4), (16, 64))
]
SCHEMES += [
    parse_scheme(text)
    for text in (
        "w5-g32", "w5-g16", "w6-g32", "w6-g16", "w5-channel", "w5-g32-asym", "w6-g16-asym",
        "w2-g16-min", "w3-g32-min", "w4-g32-min", "w4-g64-min", "w5-g32-min", "w6-g128-min",
        "w8-g64-min", "w8-g16-min",
        "w3-g16x256", "w6-g16x256", "w4-g32x256", "w2-g16x256-min", "w4-g32x256-min",
        "w5-g32x256-min", "w4-g16x256-min", "w4-g32x256-palette",
    )
]  # fmt: skip


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    raw = np.zeros(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


def call(address: int, *args: int) -> None:
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(args))(address)(*args)


def random_tensor(scheme: QuantScheme, n: int, k: int, rng: np.random.Generator) -> QuantTensor:
    codes = rng.integers(0, scheme.n_codes, (n, k)).astype(np.uint8)
    groups = scheme.n_groups(k)
    scales = rng.uniform(0.01, 1, (n, groups)).astype(np.float16)
    zeros = rng.integers(0, scheme.n_codes, (n, groups)) if scheme.has_zero_points else None
    palette, minimums = None, None
    if scheme.codebook:
        palette = rng.integers(-128, 128, scheme.n_codes).astype(np.int8)
    if scheme.two_level:
        return QuantTensor.from_codes(scheme, codes, random_scales(scheme, n, groups, rng),
                                      palette=palette)  # fmt: skip
    if scheme.minimum:
        minimums = rng.uniform(-3, 1, (n, groups)).astype(np.float16)
    return QuantTensor.from_codes(scheme, codes, scales, zeros, palette, minimums)


def random_scales(
    scheme: QuantScheme, n: int, groups: int, rng: np.random.Generator
) -> TwoLevelScales:
    assert scheme.group_size is not None
    upper = (n, groups * scheme.group_size // 256)
    low, high = (0, 16) if scheme.packs_nibbles else (0, 64) if scheme.minimum else (-128, 128)
    scales = rng.integers(low, high, (n, groups), np.int8)
    if not scheme.minimum:
        return TwoLevelScales(scales, rng.uniform(-0.01, 0.01, upper).astype(np.float16))
    return TwoLevelScales(
        scales, rng.uniform(0.001, 0.01, upper).astype(np.float16),
        rng.integers(low, high, (n, groups), np.int8),
        rng.uniform(-0.1, 0.01, upper).astype(np.float16),
    )  # fmt: skip


def quantized_rows(x: NDArray[np.float32], blocks: int) -> NDArray[np.uint8]:
    padded = np.zeros((x.shape[0], blocks * 32), np.float32)
    padded[:, : x.shape[1]] = x
    out = np.zeros((x.shape[0], blocks * ACT_BLOCK), np.uint8)
    address = jit.register_vector_ops()["edgeq_quantize_row"]
    for source, target in zip(padded, out, strict=True):
        call(address, source.ctypes.data, target.ctypes.data, blocks)
    return out


def rows(array: NDArray[Any]) -> Rows:
    return Rows(array.ctypes.data, array.strides[0], len(array))


def multiply(w: QuantTensor, x: NDArray[np.float32], isa: Isa) -> NDArray[np.float32]:
    blocks = w.packed.shape[1]
    acts = quantized_rows(x, blocks)
    tiles = w.packed.shape[0]
    out = np.full((x.shape[0], tiles * 16), np.nan, np.float32)
    packed, scales = aligned(w.packed), aligned(w.scales)
    zeros, zero_step = aligned(np.zeros((1, 16), np.int8)), 0
    if w.zero_points is not None:
        zeros, zero_step = aligned(w.zero_points), w.zero_points.strides[0]
    elif w.minimums is not None:
        zeros, zero_step = aligned(w.minimums), w.minimums.strides[0]
    elif w.palette is not None:
        zeros[0, : w.palette.size] = w.palette
    weights = PackedWeights(
        codes=packed.ctypes.data, code_step=packed.strides[0], scales=scales.ctypes.data,
        scale_step=scales.strides[0], zeros=zeros.ctypes.data, zero_step=zero_step, blocks=blocks,
        shift=group_shift(w.scheme),
    )  # fmt: skip
    MatmulKernel(jit.kernel_address(w.scheme, isa))(weights, rows(acts), rows(out), 0, tiles)
    return out[:, : w.shape[0]]


def activation_values(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What quantized activations stand for, from the definition."""
    t, k = x.shape
    padded = np.zeros((t, -(-k // 32) * 32))
    padded[:, :k] = x
    runs = padded.reshape(t, -1, 32)
    top = np.abs(runs).max(-1, keepdims=True)
    scale = np.where(top > 0, top / 127, 1)
    return (np.rint(runs / scale) * scale).reshape(t, -1)[:, :k]


@pytest.mark.parametrize("isa", ISAS, ids=lambda d: d.name)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products_are_those_of_the_dequantized_weights(isa: Isa, scheme: QuantScheme) -> None:
    rng, inputs = np.random.default_rng(1), np.random.default_rng(3)
    for n, k, m in ((1, 1, 1), (3, 7, 2), (16, 32, 3), (17, 172, 7), (33, 300, 9), (48, 256, 17)):
        w = random_tensor(scheme, n, k, rng)
        x = inputs.standard_normal((m, k), np.float32)
        want = activation_values(x) @ w.numpy().T.astype(np.float64)
        got = multiply(w, x, isa)
        scale = np.abs(activation_values(x)) @ np.abs(w.numpy().T.astype(np.float64))
        assert np.all(np.abs(got - want) <= 1e-5 * scale + 1e-6), (n, k, m)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_isa_gives_the_same_bits(scheme: QuantScheme) -> None:
    rng = np.random.default_rng(2)
    w, x = random_tensor(scheme, 40, 200, rng), rng.standard_normal((5, 200), np.float32)
    first, *others = (multiply(w, x, isa) for isa in ISAS)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("isa", ISAS, ids=lambda d: d.name)
def test_extreme_codes_do_not_saturate(isa: Isa) -> None:
    """255 * 127 * 2 overflows 16 bits: the case vpmaddubsw is known for."""
    for bits, fill in itertools.product(BITS, (0, -1)):
        scheme = QuantScheme(bits, group_size=32)
        code = fill % scheme.n_codes
        w = QuantTensor.from_codes(
            scheme, np.full((16, 64), code, np.uint8), np.ones((16, 2), np.float16)
        )
        for sign in (1, -1):
            x = np.full((2, 64), sign * 127, np.float32)
            np.testing.assert_array_equal(
                multiply(w, x, isa), np.full((2, 16), 64 * 127 * sign * (code - scheme.mid))
            )


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    rng = np.random.default_rng(3)
    w, x = (
        random_tensor(QuantScheme(4), 32, 160, rng),
        rng.standard_normal((17, 160), np.float32),
    )
    together = multiply(w, x, dispatch.ISA)
    for m in range(17):
        alone = multiply(w, x[m : m + 1], dispatch.ISA)
        np.testing.assert_array_equal(together[m : m + 1], alone)


def test_quantized_rows_hold_codes_scale_and_negated_sums() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 96), np.float32)
    x[1, :32] = 0
    x[2, 32:64] = 1e-35  # 127 / max would overflow
    for row, block in zip(x, quantized_rows(x, 3), strict=True):
        for i in range(3):
            part = block[i * ACT_BLOCK : (i + 1) * ACT_BLOCK]
            codes = part[:32].view(np.int8)
            scale = float(part[32:36].view(np.float32)[0])
            sums = part[36:].view(np.int32)
            values = row[32 * i : 32 * i + 32]
            if np.abs(values).max() < 1e-30:
                assert not codes.any()
                assert scale == 0
            else:
                assert scale == pytest.approx(np.abs(values).max() / 127)
                assert np.abs(codes * scale - values).max() <= scale * 0.5001
                assert np.abs(codes).max() == 127
            whole = codes.astype(np.int32)
            assert list(sums) == [-whole[:16].sum(), -whole[16:].sum(), -whole.sum()]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 172])
def test_reductions(n: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n, np.float32) - np.float32(0.5)
    found = jit.register_vector_ops()

    def reduce(name: str) -> float:
        kind = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64, ctypes.c_int64)
        return float(kind(found[name])(x.ctypes.data, n))

    exact = x.astype(np.float64)
    assert reduce("edgeq_sumsq") == pytest.approx((exact**2).sum(), rel=1e-6)
    if n:
        assert reduce("edgeq_absmax") == np.abs(x).max()


def instructions(assembly: str, name: str) -> int:
    return len(re.findall(rf"^\s+{name}\s", assembly, re.MULTILINE))


def test_cross_compiled_for_arm_boards() -> None:
    """The same modules for a Pi 5 (dot product) and a Pi 4 or Zero 2 (none), looked at here."""
    scheme, triple = QuantScheme(4), "aarch64-unknown-linux-gnu"
    with_dot = jit.assembly(scheme, Dotprod(), triple, "cortex-a76")
    assert instructions(with_dot, "sdot") >= 32  # a block is 8 vectors of 4 registers
    assert re.search(r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]", with_dot)
    for cpu, isa in itertools.product(("cortex-a72", "cortex-a53", "generic"), (Neon(), Isa())):
        without = jit.assembly(scheme, isa, triple, cpu)
        assert instructions(without, "sdot") == 0
        assert instructions(without, "smlal2?") >= 56
        if isa.name == "neon":
            assert instructions(without, "smlal2") == instructions(without, "smlal")
            assert not re.search(r"(ld|st)[rp]\s+q\d+,.*\[sp", without)  # nothing spilled


def test_palettes_are_looked_up_by_table_instructions() -> None:
    scheme = QuantScheme(4, codebook="palette")
    arm = jit.assembly(scheme, Dotprod(), "aarch64-unknown-linux-gnu", "cortex-a76")
    assert instructions(arm, "tbl") >= 32
    x86 = jit.assembly(scheme, Avx2(), "x86_64-unknown-linux-gnu", "haswell")
    assert instructions(x86, "vpshufb") >= 16


def test_cross_compiled_for_older_x86() -> None:
    scheme, triple = QuantScheme(4), "x86_64-unknown-linux-gnu"
    plain = jit.assembly(scheme, Avx2(), triple, "haswell")
    assert instructions(plain, "vpmaddubsw") > 0
    assert instructions(plain, "vpdpbusd") == 0
    vnni = jit.assembly(scheme, Avx512Vnni(), triple, "icelake-server")
    assert instructions(vnni, "vpdpbusd") > 0


def machine(arch: str, *features: str) -> Cpu:
    return Cpu(arch, "", frozenset(features), 4)


@pytest.mark.parametrize(
    ("cpu", "kernel"),
    [
        (machine("x86_64", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512vnni"),
         "avx512vnni"),
        (machine("x86_64", "avx2", "fma", "avxvnni"), "avxvnni"),
        (machine("x86_64", "avx2", "fma"), "avx2"),
        (machine("x86_64"), "generic"),
        (machine("aarch64", "dotprod"), "dotprod"),
        (machine("aarch64"), "neon"),
        (machine("riscv64"), "generic"),
    ],
)  # fmt: skip
def test_the_best_usable_kernel_is_chosen(cpu: Cpu, kernel: str) -> None:
    assert dispatch.choose(cpu).name == kernel
    assert dispatch.choose(cpu, "generic").name == "generic"


def test_a_kernel_the_processor_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"dotprod needs instructions this aarch64.*generic"):
        dispatch.choose(machine("aarch64"), "dotprod")
    with pytest.raises(UnsupportedError, match="unknown kernel 'avx3'"):
        dispatch.choose(machine("x86_64"), "avx3")
