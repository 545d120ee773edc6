"""Experts in the engine: whose weights are read, and bits that nothing changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.formats.tensor import FloatTensor
from edgeq.model.block import ExpertsSpec
from edgeq.model.formulas import expert_weights
from edgeq.model.memory_layout import kv_bytes, scratch_bytes
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.runtime.engine import Engine
from tests.families import MIXTURES, quantized, random_model, tiny_config

IDS = np.random.default_rng(5).integers(3, 101, 300)
SPECS = {
    "softmax of the chosen": ExpertsSpec(count=6, chosen=2, ffn=20, normalize=True),
    "softmax of all": ExpertsSpec(count=6, chosen=3, ffn=20, scale=2.5),
    "sigmoids": ExpertsSpec(count=6, chosen=3, ffn=20, score="sigmoid"),
    "sigmoids by their sum": ExpertsSpec(
        count=6, chosen=3, ffn=20, score="sigmoid", normalize=True, scale=1.5
    ),
    "chosen with a bias": ExpertsSpec(count=6, chosen=2, ffn=20, score="sigmoid", choice_bias=True),
    "one of one": ExpertsSpec(count=1, chosen=1, ffn=20, normalize=True),
    "one of many": ExpertsSpec(count=40, chosen=1, ffn=20),
    "all": ExpertsSpec(count=5, chosen=5, ffn=20, normalize=True),
}


def model_of(family: str, scheme: str | None = "w4-g32", **over: Any) -> Model:
    model = random_model(tiny_config(family, **{"context": 512, **over}))
    return model if scheme is None else quantized(model, scheme)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("scheme", ["w4-g32", "w8-g32"])
def test_the_engine_is_close_to_the_reference_on_the_same_integers(
    family: str, scheme: str
) -> None:
    """Activations and cache are rounded, and near a tie that chooses another expert."""
    model = model_of(family, scheme)
    want = log_softmax(Reference(model).forward(IDS))
    with Engine(model, threads=2) as engine:
        got = log_softmax(engine.forward(IDS, all_logits=True))
    assert (np.exp(want) * (want - got)).sum(axis=-1).mean() < 5e-3


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_router(name: str) -> None:
    """Floats, so that what the engine computes is what the reference does."""
    model = model_of("qwen3_moe", None, experts=SPECS[name], dense_layers=0)
    want = Reference(model).forward(IDS[:70])
    with Engine(model, kv_bits=16, threads=2) as engine:
        rows = [engine.forward(IDS[:60], all_logits=True)]
        rows += [engine.forward([token])[None] for token in IDS[60:70]]
    far = np.abs(np.concatenate(rows) - want).max(axis=1) > 5e-3 * np.abs(want).max()
    assert far.mean() < 0.05  # a float16 cache moves a token or two past a tie


def chunks(engine: Engine, size: int, n: int = 150) -> NDArray[np.float32]:
    engine.reset()
    parts = [engine.forward(IDS[a : min(a + size, n)], all_logits=True) for a in range(0, n, size)]
    return np.concatenate(parts)


@pytest.mark.parametrize("scheme", [None, "w4-g32", "w8-channel"])
@pytest.mark.parametrize("family", MIXTURES)
def test_bits_do_not_depend_on_chunks_or_threads(family: str, scheme: str | None) -> None:
    model = model_of(family, scheme)
    want = None
    for threads in (1, 2, 3, 4):
        with Engine(model, threads=threads) as engine:
            for size in (150, 1, 37) if threads < 3 else (150, 37):
                got = chunks(engine, size)
                want = got if want is None else want
                np.testing.assert_array_equal(got, want)


def test_experts_of_different_types() -> None:
    """Gathered inputs are floats for some experts and quantized for others."""
    plain, model = model_of("granitemoe", None), model_of("granitemoe")
    kept = {n: t for n, t in plain.tensors.items() if ".experts.1." in n or ".4.down" in n}
    mixed = replace(model, tensors={**model.tensors, **kept})
    want = log_softmax(Reference(mixed).forward(IDS[:150]))
    with Engine(mixed, threads=2) as engine:
        whole, single = chunks(engine, 150), chunks(engine, 1)
    np.testing.assert_array_equal(whole, single)
    assert (np.exp(want) * (want - log_softmax(whole))).sum(axis=-1).mean() < 5e-3


@pytest.mark.parametrize("family", MIXTURES)
def test_sequences_together_and_states(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    with Engine(model, threads=2) as engine:
        want = [engine.forward(IDS[:40])]
        want += [engine.forward([token]) for token in IDS[40:46]]
    engines = Engine.batch(model, 3, threads=2)
    try:
        decoder = engines[0]._run._decoder  # type: ignore[attr-defined]
        for engine in engines:
            engine.forward(IDS[:40])
        from edgeq.runtime.shared_decoder import TokenRequest

        for place, token in enumerate(IDS[40:46]):
            requests = [TokenRequest(i, int(token), 40 + place) for i in range(3)]
            decoder.run_pass(requests)
            for request in requests:
                assert request.logits is not None
                np.testing.assert_array_equal(request.logits[0], want[place + 1])
    finally:
        for engine in engines:
            engine.close()
    with Engine(model, threads=1) as engine:
        engine.forward(IDS[:40])
        engine.save_state(tmp_path / "state")
        engine.forward(IDS[100:130])  # a guess that is taken back
        engine.truncate(40)
        np.testing.assert_array_equal(engine.forward(IDS[40:41]), want[1])
    with Engine(model, threads=3) as engine:
        engine.load_state(tmp_path / "state")
        np.testing.assert_array_equal(engine.forward(IDS[40:41]), want[1])


@pytest.mark.parametrize("threads", [1, 3])
def test_weights_of_experts_that_are_not_chosen_are_not_read(threads: int) -> None:
    """They are not numbers, and would make the logits so."""
    model = model_of("qwen3_moe", None, dense_layers=0)
    tokens = IDS[:3]
    chosen: dict[int, NDArray[np.bool_]] = {}

    class Watched(Reference):
        def route(self, name: str, layer: int, logits: Any) -> Any:
            weights = super().route(name, layer, logits)
            chosen[layer] = chosen.get(layer, np.zeros(6, bool)) | (weights != 0).any(axis=0)
            return weights

    Watched(model).forward(tokens)
    others = {
        name: FloatTensor("float32", np.full(shape, np.nan, np.float32))
        for name, shape in model.config.linears()
        if ".experts." in name and not chosen[int(name.split(".")[2])][int(name.split(".")[5])]
    }
    assert len(others) >= 9
    damaged = replace(model, tensors={**model.tensors, **others})
    with Engine(model, kv_bits=16, threads=threads) as engine:
        want = [engine.forward(tokens, all_logits=True)]
        engine.reset()
        want += [engine.forward([token]) for token in tokens]
    with Engine(damaged, kv_bits=16, threads=threads) as engine:
        got = [engine.forward(tokens, all_logits=True)]
        engine.reset()
        got += [engine.forward([token]) for token in tokens]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", MIXTURES)
def test_the_lowest_of_equal_experts_is_chosen(family: str) -> None:
    model = model_of(family, None)
    tensors = dict(model.tensors)
    config = model.config
    for name, shape in (*config.linears(), *config.choice_biases(), *config.expert_biases()):
        if name.endswith(("router.weight", "router.bias", "experts.bias")):
            tensors[name] = FloatTensor("float32", np.zeros(shape, np.float32))
        elif ".experts." in name and int(name.split(".")[5]) >= model.config.experts.chosen:  # type: ignore[union-attr]
            tensors[name] = FloatTensor("float32", np.full(shape, np.nan, np.float32))
    level = replace(model, tensors=tensors)
    want = Reference(level).forward(IDS[:20])
    assert np.isfinite(want).all()
    with Engine(level, kv_bits=16, threads=2) as engine:
        got = engine.forward(IDS[:20], all_logits=True)
        engine.reset()
        single = np.stack([engine.forward([token]) for token in IDS[:20]])
    assert np.abs(got - want).max() < 5e-3 * np.abs(want).max()
    np.testing.assert_array_equal(got, single)


def test_weights_of_experts() -> None:
    """By hand, and with torch's own top-k."""
    logits = np.log(np.array([[1, 4, 2, 3], [2, 2, 2, 2]], np.float32))
    both = expert_weights(logits, ExpertsSpec(count=4, chosen=2, ffn=1), None)
    np.testing.assert_allclose(both, [[0, 0.4, 0, 0.3], [0.25, 0.25, 0, 0]], rtol=1e-6)
    one = expert_weights(logits, ExpertsSpec(count=4, chosen=2, ffn=1, normalize=True), None)
    np.testing.assert_allclose(one, [[0, 4 / 7, 0, 3 / 7], [0.5, 0.5, 0, 0]], rtol=1e-6)
    spec = ExpertsSpec(count=4, chosen=1, ffn=1, score="sigmoid", choice_bias=True, scale=3.0)
    biased = expert_weights(logits, spec, np.array([1, 0, 0, 0], np.float32))
    np.testing.assert_allclose(biased, [[1.5, 0, 0, 0], [2, 0, 0, 0]], rtol=1e-6)


def test_a_plan_counts_sinks_and_biases() -> None:
    model = model_of("gpt_oss", None)
    with Engine(model, kv_bits=16, threads=3) as engine:
        assert engine.kv_bytes == kv_bytes(model.config, engine.context, 16)
        assert engine.scratch_bytes == scratch_bytes(model.config, engine.context, 3)


def test_sinks_above_and_below_all_scores() -> None:
    """Attention that goes to no position almost as a whole, and attention without sinks."""
    model = model_of("gpt_oss", None)
    for level in (-200.0, 0.0, 30.0, 200.0):
        tensors = {
            name: FloatTensor("float32", np.full(t.shape, level, np.float32))
            if name.endswith("sinks")
            else t
            for name, t in model.tensors.items()
        }
        sunk = replace(model, tensors=tensors)
        want = Reference(sunk).forward(IDS[:40])
        with Engine(sunk, kv_bits=16, threads=2) as engine:
            got = engine.forward(IDS[:40], all_logits=True)
        assert np.isfinite(got).all()
        far = np.abs(got - want).max(axis=1) > 5e-3 * np.abs(want).max()
        assert far.mean() < 0.1  # a float16 cache moves a token or two past a tie
        if level == -200:
            blocks = tuple(replace(block, sinks=False) for block in model.config.blocks)
            left = {name: t for name, t in tensors.items() if not name.endswith("sinks")}
            plain = replace(model, config=replace(model.config, blocks=blocks), tensors=left)
            np.testing.assert_allclose(Reference(plain).forward(IDS[:40]), want, rtol=1e-5)
