"""The kernels of float weights: every float type, every ISA this machine can run, awkward sizes."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.cpu import this_cpu
from edgeq.formats.schemes import FLOAT_TAGS, FloatType
from edgeq.formats.tensor import bf16_to_float32, float32_to_bf16
from edgeq.runtime.kernels import dispatch, jit
from edgeq.runtime.kernels.abi import FloatWeights, MatmulKernel, Rows
from edgeq.runtime.kernels.float_matmul import BLOCK, LANES
from edgeq.runtime.kernels.isa_arm import Dotprod, Neon
from edgeq.runtime.kernels.isa_x86 import Avx2, Avx512Vnni
from edgeq.runtime.kernels.microkernel import Isa

ISAS = [kernel() for kernel in dispatch.usable(this_cpu())]
KINDS = list(FLOAT_TAGS)
LONG = BLOCK * LANES
SHAPES = [
    (1, 1, 1), (3, 7, 2), (5, 15, 3), (16, 16, 4), (15, 17, 5), (2, 31, 1), (31, 33, 17),
    (17, 172, 7), (33, 300, 9), (48, 256, 31), (20, LONG, 3), (7, LONG + 16, 15),
    (19, 2 * LONG + 5, 6),
]  # fmt: skip
"""N, K and tokens."""
SLACK = 37
"""Elements behind each row of activations and results, and behind the weights."""


def stored(kind: FloatType, values: NDArray[np.float32]) -> NDArray[Any]:
    if kind == "float32":
        return values
    return values.astype(np.float16) if kind == "float16" else float32_to_bf16(values)


def widened(kind: FloatType, weights: NDArray[Any]) -> NDArray[np.float64]:
    return (bf16_to_float32(weights) if kind == "bfloat16" else weights).astype(np.float64)


def random_weights(kind: FloatType, n: int, k: int, rng: np.random.Generator) -> NDArray[Any]:
    """Rows without gaps, and behind them what must not be read."""
    room = np.full(n * k + SLACK, np.nan, np.float32)
    room[: n * k] = rng.standard_normal(n * k, np.float32)
    return stored(kind, room)


def multiply(
    kind: FloatType, weights: NDArray[Any], n: int, k: int, x: NDArray[np.float32],
    isa: Isa = dispatch.ISA, pieces: tuple[int, ...] = (),
) -> NDArray[np.float32]:  # fmt: skip
    """The product, in as many calls as there are pieces of the range of tiles."""
    m, tiles = len(x), -(-n // 16)
    acts = np.full((m, k + SLACK), np.nan, np.float32)
    acts[:, :k] = x
    out = np.full((m, tiles * 16 + SLACK), np.nan, np.float32)
    matrix = FloatWeights(weights.ctypes.data, k * weights.itemsize, n, k)
    kernel = MatmulKernel(jit.float_kernel_address(kind, isa))
    edges = [0, *pieces, tiles]
    for first, last in pairwise(edges):
        kernel(matrix, Rows(acts.ctypes.data, acts.strides[0], m),
               Rows(out.ctypes.data, out.strides[0], m), first, last)  # fmt: skip
    assert np.isnan(out[:, tiles * 16 :]).all(), "written past the last tile"
    beside = out[:, n : tiles * 16]
    assert (np.isnan(beside) | (beside == 0)).all(), "rows that are not there are not 0"
    return out[:, :n].copy()


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_widened_weights(isa: Isa, kind: FloatType) -> None:
    rng = np.random.default_rng(1)
    for n, k, m in SHAPES:
        w, x = random_weights(kind, n, k, rng), rng.standard_normal((m, k), np.float32)
        values = widened(kind, w[: n * k]).reshape(n, k)
        want = x.astype(np.float64) @ values.T
        scale = np.abs(x.astype(np.float64)) @ np.abs(values).T
        got = multiply(kind, w, n, k, x, isa)
        # a chain of K / 16 roundings in each of the lanes, and the few of the tree
        bound = (k / LANES + LANES) * 2.0**-24
        assert np.all(np.abs(got - want) <= bound * scale), (n, k, m)


@pytest.mark.parametrize("kind", KINDS)
def test_every_isa_gives_the_same_bits(kind: FloatType) -> None:
    rng = np.random.default_rng(2)
    for n, k, m in SHAPES:
        w, x = random_weights(kind, n, k, rng), rng.standard_normal((m, k), np.float32)
        first, *others = (multiply(kind, w, n, k, x, isa) for isa in ISAS)
        for other in others:
            np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_number_or_on_threads(isa: Isa, kind: FloatType) -> None:
    rng = np.random.default_rng(3)
    for n, k in ((70, 172), (64, 96), (37, LONG + 40)):
        w, x = random_weights(kind, n, k, rng), rng.standard_normal((17, k), np.float32)
        together = multiply(kind, w, n, k, x, isa)
        for count in (1, 2, 3, 4, 5, 6, 16):
            part = multiply(kind, w, n, k, x[17 - count :], isa)
            np.testing.assert_array_equal(together[17 - count :], part)
        for count, pieces in ((17, (1, 2)), (17, (2,)), (1, (1, 2)), (2, (1,))):
            part = multiply(kind, w, n, k, x[:count], isa, pieces)
            np.testing.assert_array_equal(together[:count], part)


def test_sums_are_in_the_documented_order() -> None:
    """With weights of 1 each addition rounds as NumPy's does, so that the order can be redone."""
    rng = np.random.default_rng(4)
    k = LONG + 16 + 3  # two blocks of unequal length, and three columns
    x = rng.standard_normal((4, k), np.float32) * 10.0 ** rng.integers(-3, 4, (4, k))
    x = x.astype(np.float32)
    steps = k // LANES
    length = -(-steps // 2)
    total = np.zeros(4, np.float32)
    for start in (0, length):
        lanes = np.zeros((4, LANES), np.float32)
        for step in range(start, min(start + length, steps)):
            lanes += x[:, LANES * step : LANES * (step + 1)]
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        total = lanes[:, 0] if start == 0 else total + lanes[:, 0]
    for column in range(steps * LANES, k):
        total = total + x[:, column]
    for kind in KINDS:
        ones = stored(kind, np.ones(5 * k, np.float32))
        np.testing.assert_array_equal(
            multiply(kind, ones, 5, k, x), np.repeat(total[:, None], 5, 1)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_values_at_the_edges_of_a_type(kind: FloatType) -> None:
    """Subnormal weights count, and weights that are no numbers show."""
    least = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}[kind]
    w = stored(kind, np.full((16, 32), least, np.float32))
    x = np.zeros((4, 32), np.float32)
    x[:, 5] = 2.0**20
    for tokens in (1, 4):
        got = multiply(kind, w.reshape(-1), 16, 32, x[:tokens])
        np.testing.assert_array_equal(got, np.full((tokens, 16), least * 2.0**20, np.float32))
    broken = stored(kind, np.array([[np.inf] * 32, [np.nan] * 32], np.float32))
    for tokens in (1, 4):
        got = multiply(kind, broken.reshape(-1), 2, 32, np.ones((tokens, 32), np.float32))
        assert np.isinf(got[:, 0]).all()
        assert np.isnan(got[:, 1]).all()


def inner_loops(assembly: str, function: str) -> list[str]:
    """The machine code between a label and a later jump to it that multiplies."""
    body = re.search(rf"^edgeq_\w+_{function}:\n(.*?)^\t\.size", assembly, re.DOTALL | re.MULTILINE)
    assert body
    lines, labels, found = body[1].split("\n"), {}, []
    for number, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = number
        jump = re.search(r"\s(?:j\w+|b\.?\w*)\s+(\.L\w+)", line)
        if jump and jump[1] in labels:
            found.append("\n".join(lines[labels[jump[1]] : number + 1]))
    return [code for code in found if re.search(r"\sv?fml?a", code)]


@pytest.mark.parametrize(
    ("isa", "triple", "cpu", "widen"),
    [
        (Avx2(), "x86_64-unknown-linux-gnu", "haswell", "vcvtph2ps"),
        (Avx512Vnni(), "x86_64-unknown-linux-gnu", "cascadelake", "vcvtph2ps"),
        (Avx512Vnni(), "x86_64-unknown-linux-gnu", "sapphirerapids", "vcvtph2psx"),
        (Dotprod(), "aarch64-unknown-linux-gnu", "cortex-a76", "fcvtl2?"),
        (Neon(), "aarch64-unknown-linux-gnu", "cortex-a53", "fcvtl2?"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", None),
)
def test_tiles_stay_in_registers(isa: Isa, triple: str, cpu: str, widen: str) -> None:
    """One multiplication for each sum, no sum in memory, and weights widened by instructions."""
    code = jit.assembly("float16", isa, triple, cpu)
    tokens = max(isa.float_tokens)
    loops = inner_loops(code, f"tile{tokens}")
    assert len(loops) == LANES // isa.float_lanes
    for inner in loops:
        assert len(re.findall(r"\sv?fml?a", inner)) == 4 * tokens
        assert not re.search(r"\(%rsp\)|\[sp", inner)
    shortest = min(inner_loops(code, "product"), key=len)
    assert len(re.findall(rf"\s{widen}\s", shortest)) == 4 * LANES // isa.float_lanes
