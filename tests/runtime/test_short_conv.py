"""Short convolutions in the engine: their state, and what takes tokens back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.formats.safetensors_file import open_safetensors
from edgeq.model.block import BlockSpec
from edgeq.model.memory_layout import MAX_DRAFT, cache_length, kv_bytes
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.runtime.engine import Engine
from tests.families import quantized, random_model, tiny_config
from tests.runtime.test_kv_state import Counted

IDS = np.random.default_rng(5).integers(3, 101, 700)
TAPS = 3
RING = TAPS + MAX_DRAFT
"""Positions whose inputs a short convolution keeps."""


def model_of(scheme: str = "w4-g32", **over: Any) -> Model:
    return quantized(random_model(tiny_config("lfm2", **{"context": 1024, **over})), scheme)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@pytest.mark.parametrize("scheme", ["w4-g32", "w8-g32"])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_the_engine_is_close_to_the_reference_on_the_same_integers(
    scheme: str, backend: str
) -> None:
    """Activations and cache are rounded; the state of a convolution is not."""
    model = model_of(scheme)
    want = log_softmax(Reference(model).forward(IDS[:300]))
    with Engine(model, backend=backend, threads=2) as engine:
        got = log_softmax(engine.forward(IDS[:300], all_logits=True))
    assert (np.exp(want) * (want - got)).sum(axis=-1).mean() < 5e-3


@pytest.mark.parametrize("taps", [1, 2, 7, 80])
def test_any_number_of_taps(taps: int) -> None:
    convolution = BlockSpec(mixer="short_conv", rope=None, window=taps)
    attention = tiny_config("lfm2").blocks[1]
    config = tiny_config("lfm2", blocks=(convolution, attention, convolution), context=512)
    model = random_model(config)
    want = Reference(model).forward(IDS[:200])
    with Engine(model, kv_bits=16, threads=3) as engine:
        rows = [engine.forward(IDS[a:b], all_logits=True) for a, b in ((0, 3), (3, 150))]
        rows += [engine.forward([token])[None] for token in IDS[150:200]]
    assert np.abs(np.concatenate(rows) - want).max() < 5e-3 * np.abs(want).max()


def test_convolutions_alone() -> None:
    """A model without any attention has no keys and values at all."""
    convolution = BlockSpec(mixer="short_conv", rope=None, window=TAPS)
    config = tiny_config("lfm2", blocks=(convolution,) * 2, context=256)
    model = random_model(config)
    want = Reference(model).forward(IDS[:140])
    with Engine(model, threads=2) as engine:
        got = engine.forward(IDS[:140], all_logits=True)
        assert engine.kv_bytes == kv_bytes(config, 256) == 2 * RING * config.hidden * 4
    assert np.abs(got - want).max() < 1e-3 * np.abs(want).max()


@pytest.mark.parametrize("context", [1, 2, 50, 300])
def test_the_state_is_never_longer_than_the_context(context: int) -> None:
    config = tiny_config("lfm2", context=1024)
    assert cache_length(config.blocks[0], context) == min(context, RING)
    with Engine(model_of(), context=context, threads=2) as engine:
        want = engine.forward(IDS[:context], all_logits=True)
        engine.reset()
        got = np.stack([engine.forward([token]) for token in IDS[:context]])
        np.testing.assert_array_equal(got, want)
        assert engine.kv_bytes == kv_bytes(config, context)


@pytest.mark.parametrize("back", [1, 2, 3, MAX_DRAFT])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_rejected_draft_leaves_no_trace(
    back: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tokens are run and taken back: the state is what it was before them, bit for bit."""
    model = model_of()
    for n in (1, 70, 131, 256):
        with Engine(model, threads=threads) as engine:
            engine.forward(IDS[:n])
            want = np.stack([engine.forward([token]) for token in IDS[n : n + 6]])
        with Engine(model, threads=threads) as engine:
            engine.forward(IDS[:n])
            counted = Counted(monkeypatch)
            engine.forward(IDS[400 : 400 + back])
            engine.truncate(n)
            got = np.stack([engine.forward([token]) for token in IDS[n : n + 6]])
            assert counted.tokens == back + 6  # nothing was run again
        np.testing.assert_array_equal(got, want)
        monkeypatch.undo()


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


def test_only_the_state_of_the_last_positions_is_saved(tmp_path: Path) -> None:
    model, path = model_of(), tmp_path / "state"
    hidden = model.config.hidden
    with Engine(model, threads=1) as engine:
        engine.forward(IDS[:300])
        engine.save_state(path)
    file = open_safetensors(path)
    assert file.metadata["starts"] == f"[{300 - RING}, 0, {300 - RING}]"
    assert file.tensors["layers.0.inputs"].shape == (RING, hidden)
    assert "layers.0.keys" not in file.tensors
    file.close()


def test_states_go_between_backends_and_snapshots_between_engines(tmp_path: Path) -> None:
    model = model_of()
    with Engine(model, threads=2) as engine, Engine(model, threads=1, context=500) as other:
        engine.forward(IDS[:300])
        engine.save_state(tmp_path / "state")
        snapshot = engine.snapshot()
        want = engine.forward(IDS[300:320], all_logits=True)
        other.forward(IDS[400:450])
        other.restore(snapshot)
        np.testing.assert_array_equal(other.forward(IDS[300:320], all_logits=True), want)
        with Engine(model, backend="numpy") as plain:
            plain.load_state(tmp_path / "state")
            got = plain.forward(IDS[300:320], all_logits=True)
            assert np.median(np.abs(got - want)) < 1e-2 * want.std()
            plain.truncate(300)
            plain.save_state(tmp_path / "again")
        engine.load_state(tmp_path / "again")
        np.testing.assert_array_equal(engine.forward(IDS[300:320], all_logits=True), want)
