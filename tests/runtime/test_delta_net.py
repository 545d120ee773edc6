"""Gated delta nets in the engine: their state, and what takes tokens back from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.formats.safetensors_file import open_safetensors
from edgeq.model.block import BlockSpec, DeltaSpec
from edgeq.model.memory_layout import MAX_DRAFT, kv_bytes, scratch_bytes
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.runtime.engine import Engine
from tests.families import quantized, random_model, tiny_config
from tests.runtime.test_kv_state import Counted
from tests.runtime.test_short_conv import log_softmax

IDS = np.random.default_rng(5).integers(3, 101, 700)
TAPS = 4


def model_of(scheme: str = "w4-g32", **over: Any) -> Model:
    return quantized(random_model(tiny_config("qwen3_5", **{"context": 1024, **over})), scheme)


def delta_block(taps: int = TAPS, **over: int) -> BlockSpec:
    sizes = {"key_heads": 2, "value_heads": 4, "key_dim": 6, "value_dim": 10, **over}
    return BlockSpec(mixer="gated_delta_net", rope=None, window=taps, delta=DeltaSpec(**sizes))


@pytest.mark.parametrize("scheme", ["w4-g32", "w8-g32"])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_the_engine_is_close_to_the_reference_on_the_same_integers(
    scheme: str, backend: str
) -> None:
    """Activations and cache are rounded; the state of a gated delta net is not."""
    model = model_of(scheme)
    want = log_softmax(Reference(model).forward(IDS[:300]))
    with Engine(model, backend=backend, threads=2) as engine:
        got = log_softmax(engine.forward(IDS[:300], all_logits=True))
    assert (np.exp(want) * (want - got)).sum(axis=-1).mean() < 5e-3


@pytest.mark.parametrize(
    "block",
    [
        delta_block(1),
        delta_block(2, key_heads=1, value_heads=1),
        delta_block(7, key_heads=3, value_heads=3, key_dim=16, value_dim=16),
        delta_block(80),
        delta_block(key_heads=1, value_heads=20, key_dim=1, value_dim=1),
        delta_block(key_dim=33, value_dim=83),
    ],
    ids=str,
)
def test_any_sizes(block: BlockSpec) -> None:
    """Logits are the reference's, whatever the number of taps, heads and their sizes."""
    attention = tiny_config("qwen3_5").blocks[2]
    model = random_model(tiny_config("qwen3_5", blocks=(block, attention, block), context=512))
    want = Reference(model).forward(IDS[:200])
    with Engine(model, kv_bits=16, threads=3) as engine:
        rows = [engine.forward(IDS[a:b], all_logits=True) for a, b in ((0, 3), (3, 150))]
        rows += [engine.forward([token])[None] for token in IDS[150:200]]
        assert engine.kv_bytes == kv_bytes(model.config, 512, 16)
        assert engine.scratch_bytes == scratch_bytes(model.config, 512, 3)
    assert np.abs(np.concatenate(rows) - want).max() < 5e-3 * np.abs(want).max()


def test_gated_delta_nets_alone() -> None:
    """A model without any attention has no keys and values at all."""
    model = random_model(tiny_config("qwen3_5", blocks=(delta_block(),) * 2, context=256))
    want = Reference(model).forward(IDS[:140])
    with Engine(model, threads=2) as engine:
        got = engine.forward(IDS[:140], all_logits=True)
        ring, state = (TAPS + MAX_DRAFT) * (2 * 12 + 40 + 2 * 4), 4 * 6 * 16
        assert engine.kv_bytes == kv_bytes(model.config, 256) == 2 * 4 * (ring + 2 * state)
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()


@pytest.mark.parametrize("back", [1, 2, 3, MAX_DRAFT])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_rejected_draft_leaves_no_trace(
    back: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tokens are run and taken back: the state is what it was before them, bit for bit.

    As a draft is verified: with one token that stays, and perhaps some of the others.
    """
    model = model_of()
    for n in (1, 70, 131, 256):
        with Engine(model, threads=threads) as engine:
            engine.forward(IDS[:n])
            want = np.stack([engine.forward([token]) for token in IDS[n : n + 6]])
        for kept in {1, min(3, back + 1)}:
            with Engine(model, threads=threads) as engine:
                engine.forward(IDS[:n])
                counted = Counted(monkeypatch)
                drafted = [*IDS[n : n + kept], *IDS[400 : 401 + back - kept]]
                engine.forward(drafted)
                engine.truncate(n + kept)
                got = np.stack([engine.forward([token]) for token in IDS[n + kept : n + 6]])
                assert counted.tokens == len(drafted) + 6 - kept  # nothing was run again
            np.testing.assert_array_equal(got, want[kept:])
            monkeypatch.undo()


def test_tokens_are_taken_back_again_and_again() -> None:
    """Drafts of random lengths, of which random parts stay; between them single tokens."""
    model, chance = model_of(), np.random.default_rng(3)
    with Engine(model, threads=2) as engine:
        want = engine.forward(IDS[:400], all_logits=True)
        engine.reset()
        engine.forward(IDS[:5])
        while engine.n_past < 300:
            n = engine.n_past
            if chance.random() < 0.3:
                got = engine.forward([IDS[n]])[None]
            else:
                kept = int(chance.integers(1, 20))
                drafted = int(chance.integers(0, MAX_DRAFT - kept))
                rows = engine.forward([*IDS[n : n + kept], *IDS[500 : 500 + drafted]], True)
                engine.truncate(n + kept)
                got = rows[:kept]
            np.testing.assert_array_equal(got, want[n : n + len(got)])
        n = engine.n_past
        engine.truncate(n - 1)  # perhaps of a token that cannot be taken back: it is run again
        np.testing.assert_array_equal(engine.forward([IDS[n - 1]]), want[n - 1])


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_what_the_state_has_forgotten_is_run_again(backend: str) -> None:
    model = model_of()
    with Engine(model, backend=backend, threads=2) as engine:
        want = engine.forward(IDS[:400], all_logits=True)
        for n in (399 - MAX_DRAFT, 200, 2, 0, 123):
            engine.truncate(min(n, engine.n_past))
            rest = IDS[engine.n_past : 400]
            got = engine.forward(rest, all_logits=True)
            assert np.median(np.abs(got - want[-len(rest) :])) < 1e-3 * want.std()
            if backend == "numba":
                np.testing.assert_array_equal(got, want[-len(rest) :])


def test_only_the_state_and_the_last_inputs_are_saved(tmp_path: Path) -> None:
    model, path = model_of(), tmp_path / "state"
    delta = model.config.blocks[0].delta
    assert delta is not None
    with Engine(model, threads=1) as engine:
        engine.forward(IDS[:300])
        engine.save_state(path)
    file = open_safetensors(path)
    assert file.metadata["starts"] == f"[{300 - TAPS}, {300 - TAPS}, 0]"
    width = delta.channels + 2 * delta.value_heads
    assert file.tensors["layers.0.inputs"].shape == (TAPS, width)
    assert file.tensors["layers.0.state"].shape == (6, 5, 9)
    assert "layers.0.keys" not in file.tensors
    file.close()


@pytest.mark.parametrize("back", [0, 1, 20, 61, 200])
def test_states_go_between_backends_and_snapshots_between_engines(
    back: int, tmp_path: Path
) -> None:
    """Also where tokens have been taken back before: the copy is of the sequence that is left."""
    model = model_of()
    with Engine(model, threads=2) as engine, Engine(model, threads=1, context=500) as other:
        engine.forward(IDS[:240])
        engine.forward(IDS[240:302])
        engine.truncate(302 - back)
        n = engine.n_past
        engine.save_state(tmp_path / "state")
        snapshot = engine.snapshot()
        want = engine.forward(IDS[n : n + 20], all_logits=True)
        other.forward(IDS[400:450])
        other.restore(snapshot)
        np.testing.assert_array_equal(other.forward(IDS[n : n + 20], all_logits=True), want)
        with Engine(model, backend="numpy") as plain:
            plain.load_state(tmp_path / "state")
            got = plain.forward(IDS[n : n + 20], all_logits=True)
            assert np.median(np.abs(got - want)) < 1e-2 * want.std()
            plain.truncate(n)
            plain.save_state(tmp_path / "again")
        engine.load_state(tmp_path / "again")
        np.testing.assert_array_equal(engine.forward(IDS[n : n + 20], all_logits=True), want)
        engine.truncate(n - 1)
        other.reset()
        rest = IDS[n - 1 : n + 20]
        other.forward(IDS[: n - 1])
        np.testing.assert_array_equal(
            engine.forward(rest, all_logits=True), other.forward(rest, all_logits=True)
        )


def test_numbers_that_are_none_show() -> None:
    """A damaged vector of a gated delta net is noticed, as damaged matrices are."""
    model = random_model(tiny_config("qwen3_5"))
    for part in ("A_log", "dt_bias", "norm.weight", "conv1d.weight", "in_proj_a.weight"):
        name = f"model.layers.0.linear_attn.{part}"
        tensor = model.tensors[name]
        bad = np.full(tensor.shape, np.nan, np.float32)
        damaged = replace(model, tensors={**model.tensors, name: replace(tensor, data=bad)})
        with Engine(damaged, threads=1) as engine:
            assert np.isnan(engine.forward(IDS[:9])).all()
