"""Gemma 4's layers in the engine: inputs from a table, keys and values of another layer, and sizes
that differ from layer to layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.model.artifact import load, save
from edgeq.model.block import K_PROJ, LAYER_TABLE, tensor_name
from edgeq.model.memory_layout import cache_length, kv_bytes, position_bytes
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.runtime.engine import Engine
from edgeq.runtime.shared_decoder import TokenRequest
from edgeq.runtime.weights import WeightArena
from tests.families import quantized, random_model, tiny_config

IDS = np.random.default_rng(5).integers(3, 101, 700)


def model_of(scheme: str | None = "w4-g32", **over: Any) -> Model:
    model = random_model(tiny_config("gemma4", **{"context": 1024, **over}))
    return model if scheme is None else quantized(model, scheme)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(want: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    p, q = log_softmax(want), log_softmax(got)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize("scheme", ["w4-g32", "w8-g32", "w4-g32-asym", "w8-channel"])
@pytest.mark.parametrize("kv_bits", [8, 16])
def test_the_engine_is_close_to_the_reference_on_the_same_integers(
    scheme: str, kv_bits: Any
) -> None:
    """Past the window of 5, the 256 positions of a chunk and the ring of a windowed layer."""
    model = model_of(scheme)
    want = Reference(model).forward(IDS)
    with Engine(model, threads=2, kv_bits=kv_bits) as engine:
        assert divergence(want, engine.forward(IDS, all_logits=True)) < 5e-3


def test_a_cache_of_4_bits() -> None:
    model = model_of()
    want = Reference(model).forward(IDS[:300])
    with Engine(model, threads=2, kv_bits=4) as engine:
        assert divergence(want, engine.forward(IDS[:300], all_logits=True)) < 5e-2


def test_floats_give_the_logits_of_the_reference() -> None:
    model = model_of(None)
    want = Reference(model).forward(IDS[:300])
    with Engine(model, threads=2, kv_bits=16) as engine:
        got = engine.forward(IDS[:300], all_logits=True)
    assert np.abs(got - want).max() < 5e-3 * np.abs(want).max()


def test_both_backends_agree() -> None:
    model = model_of()
    with Engine(model, backend="numpy") as slow, Engine(model, threads=2) as engine:
        want = slow.forward(IDS[:100], all_logits=True)
        assert divergence(want, engine.forward(IDS[:100], all_logits=True)) < 1e-4


def chunks(engine: Engine, size: int, n: int) -> NDArray[np.float32]:
    engine.reset()
    parts = [engine.forward(IDS[a : min(a + size, n)], all_logits=True) for a in range(0, n, size)]
    return np.concatenate(parts)


@pytest.mark.parametrize("kv_bits", [8, 4])
@pytest.mark.parametrize("scheme", [None, "w4-g32", "w8-channel"])
def test_bits_do_not_depend_on_chunks_or_threads(scheme: str | None, kv_bits: Any) -> None:
    model = model_of(scheme)
    want = None
    for threads in (1, 2, 3, 4):
        with Engine(model, threads=threads, kv_bits=kv_bits) as engine:
            for size in (150, 1, 37) if threads < 3 else (150, 37):
                got = chunks(engine, size, 150)
                want = got if want is None else want
                np.testing.assert_array_equal(got, want)


def test_widths_that_leave_a_rest_in_a_group() -> None:
    """A narrow layer after a wide one reads nothing that the wide one left in its rows."""
    model = model_of("w4-g128-asym")
    want = Reference(model).forward(IDS[:60])
    with Engine(model, threads=2) as engine:
        whole = chunks(engine, 60, 60)
        np.testing.assert_array_equal(whole, chunks(engine, 1, 60))
    assert divergence(want, whole) < 5e-3


def test_sequences_that_are_decoded_together() -> None:
    model = model_of()
    with Engine(model, threads=2) as engine:
        want = [engine.forward(IDS[:40])]
        want += [engine.forward([token]) for token in IDS[40:46]]
    engines = Engine.batch(model, 3, threads=2)
    try:
        decoder = engines[0]._run._decoder  # type: ignore[attr-defined]
        for engine in engines:
            engine.forward(IDS[:40])
        for place, token in enumerate(IDS[40:46]):
            requests = [TokenRequest(i, int(token), 40 + place) for i in range(3)]
            decoder.run_pass(requests)
            for request in requests:
                assert request.logits is not None
                np.testing.assert_array_equal(request.logits[0], want[place + 1])
    finally:
        for engine in engines:
            engine.close()


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
def test_states_snapshots_and_guesses_that_are_taken_back(tmp_path: Path, kv_bits: Any) -> None:
    model = model_of()
    n = 620  # the ring of a windowed layer has lost its beginning
    with Engine(model, threads=2, kv_bits=kv_bits) as engine:
        engine.forward(IDS[:n])
        engine.save_state(tmp_path / "state")
        kept = engine.snapshot()
        want = [engine.forward([token]) for token in IDS[n : n + 6]]
        engine.truncate(n)
        engine.forward(IDS[100:130])  # a guess
        engine.truncate(n)
        np.testing.assert_array_equal(engine.forward(IDS[n : n + 1]), want[0])
        engine.truncate(30)  # further back than the ring reaches
        engine.forward(IDS[30:n])
        np.testing.assert_array_equal(engine.forward(IDS[n : n + 1]), want[0])
    shared = [i for i, block in enumerate(model.config.blocks) if block.kv_from is not None]
    assert shared == [3, 4, 5]
    assert all(not kept.layers[i][1] for i in shared)  # the other layers hold all that there is
    for restore in (lambda e: e.load_state(tmp_path / "state"), lambda e: e.restore(kept)):
        with Engine(model, threads=1, kv_bits=kv_bits) as engine:
            restore(engine)
            for token, logits in zip(IDS[n : n + 6], want, strict=True):
                np.testing.assert_array_equal(engine.forward([token]), logits)
    with Engine(model, backend="numpy", kv_bits=kv_bits) as slow:
        slow.load_state(tmp_path / "state")
        assert divergence(want[0], slow.forward(IDS[n : n + 1])) < 1e-3


def test_greedy_tokens_are_those_of_single_steps() -> None:
    model = model_of()
    with Engine(model, threads=2) as engine:
        engine.forward(IDS[:9])
        want = engine.greedy(5, 20)
        engine.truncate(9)
        token, got = 5, []
        for _ in want:
            token = int(engine.forward([token]).argmax())
            got.append(token)
    assert got == want


def test_a_layer_that_reads_anothers_keys_takes_no_cache() -> None:
    config = tiny_config("gemma4", context=1024)
    own = [i for i, block in enumerate(config.blocks) if block.kv_from is None]
    assert own == [0, 1, 2]
    assert [position_bytes(config, 8, i) for i in (3, 4, 5)] == [0, 0, 0]
    assert position_bytes(config, 16, 2) > position_bytes(config, 16, 0)  # larger heads
    want = sum(cache_length(config.blocks[i], 700) * position_bytes(config, 8, i) for i in own)
    assert kv_bytes(config, 700) == want
    with Engine(model_of(), context=700, threads=1) as engine:
        assert engine.kv_bytes == want
    assert tensor_name(3, K_PROJ) not in dict(config.linears())


@pytest.mark.parametrize("scheme", [None, "w4-g32", "w8-g32"])
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_rows_of_tokens_that_do_not_occur_are_not_read(scheme: str | None, backend: str) -> None:
    """They are not numbers, and would make the logits so."""
    model = model_of(scheme)
    tokens = IDS[:40]
    others = np.setdiff1d(np.arange(model.config.vocab), tokens)
    assert others.size > 20
    table = model.tensors[LAYER_TABLE]
    if isinstance(table, QuantTensor):
        scales = table.scales.copy()  # [tiles, groups, 16]
        scales[others // 16, :, others % 16] = np.nan
        spoiled: Any = replace(table, scales=scales)
    else:
        rows = table.numpy().copy()
        rows[others] = np.nan
        spoiled = FloatTensor("float32", rows)
    damaged = replace(model, tensors={**model.tensors, LAYER_TABLE: spoiled})
    with Engine(model, threads=2, backend=backend) as engine:
        want = engine.forward(tokens, all_logits=True)
    with Engine(damaged, threads=2, backend=backend) as engine:
        np.testing.assert_array_equal(engine.forward(tokens, all_logits=True), want)


def test_the_table_stays_in_its_file(tmp_path: Path) -> None:
    """The copy of the weights in memory has no room for it, and both run alike."""
    model = model_of()
    save(model, tmp_path / "model.edgeq")
    stored = load(tmp_path / "model.edgeq")
    arena = WeightArena.of(stored)
    table = stored.tensors[LAYER_TABLE]
    assert arena.model.tensors[LAYER_TABLE] is table
    rest = sum(t.nbytes for n, t in stored.tensors.items() if n != LAYER_TABLE)
    assert arena.nbytes < rest + 64 * 4 * len(stored.tensors)
    with Engine(stored, mmap=True, threads=1) as mapped, Engine(stored, mmap=False) as copied:
        np.testing.assert_array_equal(mapped.forward(IDS[:20]), copied.forward(IDS[:20]))
