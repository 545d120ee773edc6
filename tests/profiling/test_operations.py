"""The decoder's own clock: same answers, every step once, and never more than the whole."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.core.errors import UnsupportedError
from edgeq.model.memory_layout import position_bytes
from edgeq.model.model import Model
from edgeq.profiling.candidates import EngineCandidate
from edgeq.profiling.operations import Operations, Phase, engine_operations
from edgeq.profiling.session import Workload
from edgeq.profiling.summary import OUTSIDE, by_layer, by_operation
from edgeq.runtime.engine import Engine
from tests.families import quantized, random_model, tiny_config

LAYER_STEPS = ("norm_in", "qkv", "attention", "o_proj", "norm_ffn", "gate_up", "down_proj")
OTHER_STEPS = ("embed", "final_norm", "head", "argmax")


@pytest.fixture(scope="module")
def model() -> Model:
    return quantized(random_model(tiny_config("gemma3", layers=3)), "w4-g32", "w8-channel")


@pytest.fixture(scope="module")
def told(model: Model) -> Operations:
    with Engine(model, context=40, threads=1) as engine:
        return engine_operations(EngineCandidate(engine, model, "tiny"), Workload(7, 5, repeats=3))


def phase(told: Operations, name: str) -> Phase:
    return next(p for p in told.phases if p.name == name)


@pytest.mark.parametrize("threads", [1, 2])
def test_timing_changes_no_bit(model: Model, threads: int) -> None:
    prompt = np.arange(9)
    with Engine(model, context=40, threads=threads) as engine:
        plain = engine.forward(prompt, all_logits=True)
        said = engine.greedy(1, 6)
        engine.reset()
        with engine.timed_steps() as times:
            timed = engine.forward(prompt, all_logits=True)
            prefill = sum(times.ns.values())
            assert engine.greedy(1, 6) == said
        assert 0 < prefill < sum(times.ns.values())
        after = sum(times.ns.values())
        engine.forward([1])
        assert sum(times.ns.values()) == after, "the clock goes on after the block"
    assert np.array_equal(plain, timed)
    steps = [(layer, step) for layer in range(3) for step in LAYER_STEPS]
    assert list(times.ns) == [*steps, *((None, step) for step in OTHER_STEPS)]
    assert all(ns > 0 for ns in times.ns.values())


def test_every_step_of_every_layer_has_a_row(told: Operations) -> None:
    for name, others in (("prefill", OTHER_STEPS[:3]), ("decode", OTHER_STEPS)):
        rows = phase(told, name).rows
        steps = [(layer, step) for layer in range(3) for step in LAYER_STEPS]
        assert [(r.layer, r.op) for r in rows] == [*steps, *((None, step) for step in others)]


def test_steps_never_add_up_to_more_than_the_whole(told: Operations) -> None:
    for p in told.phases:
        assert len(p.wall_ns) == len(p.plain_ns) >= 3
        for i, wall in enumerate(p.wall_ns):
            assert 0 < sum(row.ns[i] for row in p.rows if row.ns) <= wall
        assert p.covered is not None
        assert 0 < p.covered <= 1


def test_bytes_are_those_of_the_tensors(told: Operations, model: Model) -> None:
    rows = {(r.layer, r.op): r for r in phase(told, "decode").rows}
    down = model.tensors["model.layers.1.mlp.down_proj.weight"].nbytes
    assert (rows[1, "down_proj"].calls, rows[1, "down_proj"].nbytes) == (5, 5 * down)
    assert rows[1, "norm_in"].nbytes is None
    cached = min(7 + 1 + 5 // 2, 10) * position_bytes(model.config, 8)
    assert rows[0, "attention"].nbytes is not None
    assert rows[0, "attention"].nbytes <= 5 * cached
    prompt = {(r.layer, r.op): r for r in phase(told, "prefill").rows}
    assert (prompt[1, "down_proj"].calls, prompt[1, "down_proj"].nbytes) == (1, down)
    assert prompt[0, "attention"].nbytes is None


@pytest.mark.parametrize("table", [by_operation, by_layer])
def test_tables_add_up_to_the_whole(told: Operations, table: object) -> None:
    for p in told.phases:
        rows = table(p)  # type: ignore[operator]
        assert rows[-1]["cumulative_percent"] == pytest.approx(100)
        assert p.middle is not None
        total = sum(row["ns_per_unit"] for row in rows) * p.units
        assert total == pytest.approx(p.wall_ns[p.middle])
        assert OUTSIDE in [next(iter(row.values())) for row in rows]


def test_speedup_is_the_other_s_time_by_this_one_s(told: Operations) -> None:
    p = phase(told, "decode")
    twice = Phase(p.name, 2 * p.units, p.rows, p.wall_ns, p.plain_ns)  # as many ns for two tokens
    speedups = {row["op"]: row["speedup"] for row in by_operation(p, twice)}
    assert speedups.pop(OUTSIDE) is None
    assert set(speedups.values()) == {0.5}


def test_they_come_back_from_json(told: Operations) -> None:
    assert Operations.from_json(told.to_json()) == told


def test_steps_of_a_short_convolution() -> None:
    model = quantized(random_model(tiny_config("lfm2")), "w4-g32")
    with Engine(model, context=40, threads=1) as engine:
        told = engine_operations(EngineCandidate(engine, model, "tiny"), Workload(7, 5, repeats=3))
    rows = {(r.layer, r.op): r for r in phase(told, "decode").rows}
    inputs = sum(model.tensors[f"model.layers.0.conv.{x}_proj.weight"].nbytes for x in "bcx")
    assert rows[0, "in_proj"].nbytes == 5 * inputs
    assert rows[0, "short_conv"].nbytes == 5 * 3 * 4 * model.config.hidden  # taps of float32
    assert (0, "attention") not in rows
    assert (1, "attention") in rows


def test_steps_of_layers_with_inputs_of_their_own() -> None:
    """Of a table one row is read for each token, and nothing by a layer without a cache."""
    model = quantized(random_model(tiny_config("gemma4")), "w4-g32")
    with Engine(model, context=40, threads=1) as engine:
        told = engine_operations(EngineCandidate(engine, model, "tiny"), Workload(7, 5, repeats=3))
    rows = {(r.layer, r.op): r for r in phase(told, "decode").rows}
    table = model.tensors["model.embed_tokens_per_layer.weight"].nbytes
    assert rows[None, "layer_inputs"].nbytes == table // model.config.vocab * 5
    gate = model.tensors["model.layers.3.per_layer_input_gate.weight"].nbytes
    assert rows[3, "input_gate"].nbytes == 5 * gate
    assert rows[3, "attention"].nbytes == 0
    assert (
        rows[3, "qkv"].nbytes == 5 * model.tensors["model.layers.3.self_attn.q_proj.weight"].nbytes
    )


def test_numpy_is_not_timed_inside(model: Model) -> None:
    with Engine(model, context=16, threads=1, backend="numpy") as engine:
        with pytest.raises(UnsupportedError, match="use the backend 'numba'"), engine.timed_steps():
            pass
        told = engine_operations(EngineCandidate(engine, model, "tiny"), Workload(4, 2))
    assert told.phases == ()
    assert told.reason is not None
    assert "NumPy" in told.reason


def test_kernel_throughput_is_a_number_of_operations() -> None:
    from edgeq.runtime.kernels import int8_throughput

    assert 0.05 < int8_throughput(1, repeats=2) < 100_000
