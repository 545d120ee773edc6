from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.formats.tensor import QuantTensor
from edgeq.quant import quantize_tensor
from edgeq.quant.rounders import palette as module
from edgeq.quant.rounders.palette import find_palette
from edgeq.quant.rounders.qparams import HALVES, group_view, half_steps

TEXTS = [f"w{b}-{g}-palette" for b in (2, 3, 4) for g in ("g16", "g32", "channel", "tensor")]


def scheme_of(text: str) -> QuantScheme:
    scheme = parse_scheme(text)
    assert isinstance(scheme, QuantScheme)
    return scheme


def weights(n: int, k: int, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((n, k)) * 0.02).astype(np.float32)


def error(w: NDArray[np.float32], tensor: QuantTensor) -> float:
    return float(((tensor.numpy() - w.astype(np.float64)) ** 2).sum())


def table_of(tensor: QuantTensor) -> NDArray[np.int8]:
    assert tensor.palette is not None
    return tensor.palette


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, HALVES - 1), min_size=4, max_size=9),
    st.integers(2, 4), st.integers(0, 2**31),
)  # fmt: skip
def test_the_table_is_the_best_of_all_clusterings(halves: list[int], n: int, seed: int) -> None:
    where = np.array(sorted(halves), np.intp)
    rng = np.random.default_rng(seed)
    positions = (where - HALVES // 2 + rng.uniform(0.01, 0.49, where.size)) / 2
    order = np.argsort(positions)
    where, positions = where[order], positions[order]
    costs = rng.uniform(0.1, 3, where.size)

    def spread(part: slice) -> float:
        p, c = positions[part], costs[part]
        return float((c * (p - np.average(p, weights=c)) ** 2).sum()) if p.size else 0.0

    best = np.inf
    for cuts in itertools.combinations_with_replacement(range(where.size + 1), n - 1):
        ends = (0, *cuts, where.size)
        if all(where[c - 1] != where[c] for c in cuts if 0 < c < where.size):
            best = min(best, sum(spread(slice(*pair)) for pair in itertools.pairwise(ends)))
    table = module._clustered(where, positions, costs, n)
    assert table.shape == (n,)
    assert (np.diff(table) >= 0).all()
    got = (costs * np.abs(positions[:, None] - table).min(axis=1) ** 2).sum()
    assert got <= best * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("method", ["rtn", "mse", "imatrix"])
def test_tables_are_full_and_better_than_even_ones(text: str, method: str) -> None:
    w, scheme = weights(48, 172), scheme_of(text)
    known = {"importance": np.linspace(0.1, 3, 172).astype(np.float32)}
    got = quantize_tensor(w, scheme, method, **(known if method == "imatrix" else {}))
    table = table_of(got).astype(int)
    assert table.shape == (scheme.n_codes,)
    assert (np.diff(table) > 0).all()
    assert np.abs(table).max() == 127
    # numbers lie closer where weights are dense
    assert np.diff(table)[scheme.n_codes // 2 - 1] < np.diff(table)[[0, -1]].mean()
    even = scheme_of(text.replace("-palette", "-sym"))
    if method == "mse":
        assert error(w, got) < error(w, quantize_tensor(w, even, "mse"))


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.86), (3, 0.90), (2, 0.80)])
def test_the_gain_on_normal_weights(bits: int, gain: float) -> None:
    """Max 1960: the best 16, 8 and 4 levels for a normal density, against the best even ones."""
    w = weights(64, 2048)
    got = error(w, quantize_tensor(w, scheme_of(f"w{bits}-channel-palette"), "mse"))
    even = error(w, quantize_tensor(w, scheme_of(f"w{bits}-channel-sym"), "mse"))
    best = {4: 0.009497, 3: 0.03454, 2: 0.1175}[bits]
    assert got == pytest.approx(best * float((w.astype(np.float64) ** 2).sum()), rel=0.04)
    assert got < gain * even


@pytest.mark.parametrize("text", TEXTS)
def test_few_values_are_kept(text: str) -> None:
    scheme = scheme_of(text)
    values = np.array([-0.127, -0.031, 0.008, 0.1], np.float32)
    w = values[np.random.default_rng(0).integers(0, 4, (40, 64))]
    w[:, ::16] = values[0]  # every group has the same range
    got = quantize_tensor(w, scheme, "mse")
    assert np.abs(got.numpy() - w).max() <= 0.6 * 2**-7 * 0.127


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("value", [0.0, 0.5, -1e-12])
def test_constant_weights(text: str, value: float) -> None:
    w = np.full((5, 40), value, np.float32)
    got = quantize_tensor(w, scheme_of(text), "mse")
    assert np.abs(got.numpy() - w).max() <= max(2**-7 * abs(value), 1e-5)


def test_weights_that_matter_more_err_less() -> None:
    w, scheme = weights(64, 128), scheme_of("w3-g32-palette")
    importance = np.where(np.arange(128) % 8 == 0, 30, 1).astype(np.float32)
    w[:, ::8] *= np.float32(1.5)
    plain = quantize_tensor(w, scheme, "mse").numpy() - w
    seen = quantize_tensor(w, scheme, "imatrix", importance=importance).numpy() - w
    assert (seen**2 * importance).sum() < 0.8 * (plain**2 * importance).sum()


def test_padding_draws_no_number_to_zero() -> None:
    w = (np.sign(weights(64, 40)) * (1 + 0.1 * np.abs(weights(64, 40, 1)) / 0.02)).astype(
        np.float32
    )
    table = table_of(quantize_tensor(w, scheme_of("w2-g32-palette"), "mse"))
    assert np.abs(table).min() > 60


def test_a_sample_is_enough_and_does_not_depend_on_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    w, scheme = weights(256, 256), scheme_of("w4-g32-palette")
    whole = find_palette([group_view(w, scheme)], scheme, "w", None)
    monkeypatch.setattr(module, "SAMPLE", 1 << 12)
    tables = [
        find_palette(
            [group_view(w[a : a + n], scheme) for a in range(0, 256, n)], scheme, "w", None
        )
        for n in (256, 64, 48, 1)
    ]
    assert all(np.array_equal(tables[0], table) for table in tables)
    assert np.abs(tables[0].astype(int) - whole).max() <= 12


def test_half_steps_cover_the_table() -> None:
    steps = np.array([-1e9, -127, -126.75, 0, 0.49, 0.5, 126.9, 127, 1e9], np.float32)
    inside = [0, 0, 254, 254, 255, 507]
    assert half_steps(steps)[1:-2].tolist() == inside
    assert half_steps(steps)[0] < 0
    assert (half_steps(steps)[-2:] >= HALVES).all()
