"""Bits within a budget: optimal against brute force, never past the budget, and of use."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.core.errors import DoesNotFitError, UsageError
from edgeq.formats.schemes import FloatScheme, parse_scheme
from edgeq.model.artifact_layout import TensorLayout
from edgeq.quant.decoder import allocate as module
from edgeq.quant.decoder.allocate import allocate, uniform
from edgeq.quant.decoder.sensitivity import Sensitivity

TEXTS = ("w2-g32", "w3-g32", "w4-g32", "w8-channel", "f16")


def made(shapes: dict[str, tuple[int, int]], seed: int) -> Sensitivity:
    """Losses that mostly, but not always, fall with the bytes."""
    rng = np.random.default_rng(seed)
    losses = {
        name: {
            text: float(rng.uniform(0.2, 2) * 4.0 ** -min(i * 2, 6)) for i, text in enumerate(TEXTS)
        }
        for name in shapes
    }
    return Sensitivity("kl", "mse", 100, "", "", losses)


def nbytes(text: str, shape: tuple[int, ...]) -> int:
    return TensorLayout(parse_scheme(text), shape).nbytes


def brute(sensitivity: Sensitivity, shapes: dict[str, tuple[int, int]], budget: int) -> float:
    best = math.inf
    for choice in itertools.product(TEXTS, repeat=len(shapes)):
        size = sum(nbytes(t, s) for t, s in zip(choice, shapes.values(), strict=True))
        if size <= budget:
            found = zip(choice, sensitivity.losses.values(), strict=True)
            best = min(best, sum(losses[text] for text, losses in found))
    return best


@given(st.integers(0, 10_000), st.floats(0.02, 1.0))
@settings(max_examples=40, deadline=None)
def test_no_other_choice_within_the_budget_is_better(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    shapes = {f"t{i}": (int(rng.integers(1, 90)), int(rng.integers(33, 200))) for i in range(4)}
    found = made(shapes, seed)
    least = sum(nbytes("w2-g32", s) for s in shapes.values())
    most = sum(nbytes("f16", s) for s in shapes.values())
    budget = int(least + share * (most - least))
    allocation = allocate(found, shapes, {}, nbytes=budget)
    assert allocation.chosen.nbytes <= budget
    assert allocation.chosen.loss == pytest.approx(brute(found, shapes, budget))
    held = sum(TensorLayout(s, shapes[name]).nbytes for name, s in allocation.schemes.items())
    assert held == allocation.chosen.nbytes


def test_a_coarse_grid_never_passes_the_budget_and_loses_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = {f"t{i}": (64 + 16 * i, 64) for i in range(5)}
    found = made(shapes, 1)
    budget = sum(nbytes("w4-g32", s) for s in shapes.values())
    exact = allocate(found, shapes, {}, nbytes=budget).chosen
    monkeypatch.setattr(module, "UNITS", 40)
    coarse = allocate(found, shapes, {}, nbytes=budget).chosen
    assert coarse.nbytes <= budget
    assert exact.loss <= coarse.loss <= 1.5 * exact.loss


def test_bits_per_weight_count_every_tensor() -> None:
    shapes: dict[str, tuple[int, ...]] = {"norm": (64,), "a": (64, 64), "b": (64, 64)}
    found = made({"a": (64, 64), "b": (64, 64)}, 2)
    fixed = {"norm": FloatScheme("float32")}
    allocation = allocate(found, shapes, fixed, bpw=6.0)
    total = 64 + 2 * 64 * 64
    assert allocation.chosen.bpw == pytest.approx(8 * allocation.chosen.nbytes / total)
    assert allocation.chosen.bpw <= 6.0
    assert set(allocation.schemes) == {"a", "b"}


def test_the_front_falls_and_the_choice_lies_on_or_above_it() -> None:
    shapes = {f"t{i}": (64, 64 + 32 * i) for i in range(6)}
    found = made(shapes, 3)
    budget = sum(nbytes("w4-g32", s) for s in shapes.values())
    allocation = allocate(found, shapes, {}, nbytes=budget)
    sizes = [p.nbytes for p in allocation.front]
    losses = [p.loss for p in allocation.front]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    for a, b in itertools.pairwise(allocation.front):
        if a.nbytes <= allocation.chosen.nbytes <= b.nbytes and b.nbytes > a.nbytes:
            part = (allocation.chosen.nbytes - a.nbytes) / (b.nbytes - a.nbytes)
            assert allocation.chosen.loss >= a.loss + part * (b.loss - a.loss) - 1e-12
    # a corner of the front is the optimum of its own size
    corner = allocation.front[len(allocation.front) // 2]
    again = allocate(found, shapes, {}, nbytes=corner.nbytes)
    assert again.chosen.loss == pytest.approx(corner.loss)


def test_the_uniform_recipe_is_the_best_pair_that_fits() -> None:
    embedding = "model.embed_tokens.weight"
    shapes: dict[str, tuple[int, ...]] = {
        embedding: (96, 64), "a": (64, 64), "b": (48, 96), "norm": (64,),
    }  # fmt: skip
    fixed = {"norm": FloatScheme("float32")}
    matrices: dict[str, tuple[int, int]] = {embedding: (96, 64), "a": (64, 64), "b": (48, 96)}
    found = made(matrices, 6)
    losses = {name: dict(table) for name, table in found.losses.items()}
    losses["b"]["w4-g64"] = 0.0  # best of all, but not for a
    found = replace(found, losses=losses)
    for room in ("w2-g32", "w4-g32", "f16"):
        budget = 256 + sum(nbytes(room, shape) for shape in matrices.values())
        best = uniform(found, shapes, fixed, nbytes=budget)
        assert best is not None
        chosen = best.allocation.chosen
        assert chosen.nbytes <= budget
        sums = {
            (inner, outer): losses[embedding][outer] + losses["a"][inner] + losses["b"][inner]
            for inner, outer in itertools.product(TEXTS, repeat=2)
            if nbytes(outer, shapes[embedding]) + sum(nbytes(inner, shapes[n]) for n in "ab")
            <= budget - 256
        }
        inner, outer = min(sums, key=lambda pair: sums[pair])
        assert best.allocation.schemes == {
            embedding: parse_scheme(outer), "a": parse_scheme(inner), "b": parse_scheme(inner),
        }  # fmt: skip
        assert str(best) == f"{inner} with embedding and head in {outer}"
        assert chosen.loss == pytest.approx(sums[inner, outer])
        allocation = allocate(found, shapes, fixed, nbytes=budget)
        assert allocation.chosen.loss <= chosen.loss * (1 + 1e-12)
    assert uniform(found, shapes, fixed, nbytes=300) is None
    # where the user gave embedding and head a scheme, the layers' alone is chosen
    own = fixed | {embedding: parse_scheme("w8-channel")}
    budget = 256 + nbytes("w8-channel", shapes[embedding])
    budget += sum(nbytes("w3-g32", shapes[name]) for name in "ab")
    best = uniform(found, shapes, own, nbytes=budget)
    assert best is not None
    assert best.outer is None
    assert set(best.allocation.schemes) == {"a", "b"}
    assert best.allocation.chosen.nbytes <= budget
    every = dict.fromkeys(("a", "b", embedding), parse_scheme("w4-g32"))
    assert uniform(found, shapes, fixed | every, nbytes=budget) is None


def test_rules_hold_for_just_one_tensor_each() -> None:
    shapes = {"layers.1.up": (64, 64), "layers.11.up": (64, 64)}
    allocation = allocate(made(shapes, 4), shapes, {}, bpw=8.0)
    for name, scheme in allocation.schemes.items():
        matching = [rule for rule in allocation.rules() if rule.matches(name)]
        assert [rule.scheme for rule in matching] == [scheme]


def test_targets_out_of_reach_are_refused() -> None:
    shapes = {"a": (64, 64)}
    found = made(shapes, 5)
    with pytest.raises(DoesNotFitError, match=r"smallest schemes need \d+ bytes"):
        allocate(found, shapes, {}, nbytes=100)
    with pytest.raises(UsageError, match="one budget"):
        allocate(found, shapes, {}, nbytes=1000, bpw=4.0)
    with pytest.raises(UsageError, match="has no entry for b"):
        allocate(found, {"a": (64, 64), "b": (64, 64)}, {}, bpw=4.0)
