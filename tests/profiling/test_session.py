"""Sessions: whose turn it is, what is timed, and what is kept of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from edgeq.core.errors import UsageError
from edgeq.formats.tensor import Tensor
from edgeq.model.reference import Reference
from edgeq.profiling.candidates import EngineCandidate, GraphCandidate, macs
from edgeq.profiling.session import Round, Workload, random_tokens, run
from edgeq.runtime.engine import Engine
from tests.families import quantized, random_model, tiny_config


def subject(kv_bits: int = 8) -> EngineCandidate:
    model = quantized(random_model(tiny_config("llama")), "w4-g32")
    engine = Engine(model, context=40, threads=1, kv_bits=kv_bits, backend="numpy")  # type: ignore[arg-type]
    return EngineCandidate(engine, model, "tiny")


@pytest.mark.parametrize(
    "numbers", [{"n_prompt": -1}, {"n_prompt": 0, "n_gen": 0}, {"repeats": 0}, {"warmup": -1}]
)
def test_impossible_workloads_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Workload(**numbers)


def test_every_token_of_every_round_is_kept() -> None:
    one = subject()
    (samples,) = run([one], Workload(6, 3, n_depth=2, warmup=2, repeats=4))
    assert [s.round for s in samples] == [-2, -1, 0, 1, 2, 3]
    for before, after in pairwise(samples):
        assert before.end_ns <= after.start_ns
    for sample in samples:
        assert sample.prefill_ns
        assert sample.prefill_ns > 0
        assert len(sample.step_ns) == 3
        assert min(sample.step_ns) > 0
        assert sample.end_ns == sample.start_ns + sample.prefill_ns + sum(sample.step_ns)
        assert Round.from_json(sample.to_json()) == sample
    assert one.engine.n_past == 2 + 6 + 3


def test_generation_without_a_prompt_has_no_time_to_first_token() -> None:
    one = subject()
    (samples,) = run([one], Workload(0, 4, warmup=0, repeats=1))
    assert samples[0].prefill_ns is None
    assert samples[0].decode_start_ns == samples[0].start_ns
    assert one.engine.n_past == 4


def test_the_depth_is_read_once_and_kept() -> None:
    one, workload = subject(), Workload(4, 2, n_depth=5)
    tokens = random_tokens(one, workload)
    one.begin(tokens[:5])
    first = one.read(tokens[5:])
    one.begin(tokens[:5])
    assert one.engine.tokens == tokens[:5].tolist()
    assert one.read(tokens[5:]) == first
    one.begin(tokens[:0])
    assert one.engine.n_past == 0


def test_subjects_take_turns_in_opposite_orders() -> None:
    said: list[str] = []
    graphs = [
        GraphCandidate(lambda name=name: said.append(name), {}, lambda: None)  # type: ignore[misc]
        for name in "abc"
    ]
    run(graphs, Workload(0, 1, warmup=1, repeats=3))
    assert "".join(said) == "abccbaabccba"


def test_rounds_go_on_for_the_time_asked() -> None:
    told: list[tuple[str, int, int]] = []
    graph = GraphCandidate(lambda: None, {}, lambda: None)
    (samples,) = run(
        [graph],
        Workload(0, 1, warmup=0, repeats=1, min_seconds=0.05),
        lambda *args: told.append(args),
    )
    assert samples[-1].end_ns - samples[0].start_ns >= 0.04e9
    assert len(told) == len(samples) > 1


def test_a_graph_reads_no_prompt() -> None:
    graph = GraphCandidate(lambda: None, {}, lambda: None)
    with pytest.raises(UsageError, match="--n-gen"):
        graph.facts(Workload(4, 0))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_multiply_adds_are_those_that_the_reference_does(family: str) -> None:
    config = tiny_config(family)
    model, counted = random_model(config), 0

    def counting(name: str, x: np.ndarray, weight: Tensor) -> np.ndarray:
        nonlocal counted
        counted += x.shape[0] * weight.shape[0] * weight.shape[1]
        return x @ weight.numpy().T

    reference = Reference(model, linear=counting)
    cache = reference.new_cache()
    reference.forward(list(range(9)), cache, all_logits=False)
    pairs = sum(
        min(t + 1, block.window) if block.window else t + 1
        for block in config.blocks
        for t in range(9)
    )
    assert macs(config, 9, 0) == counted + 2 * pairs * config.heads * config.head_dim
    assert macs(config, 0, 5) == 0
    assert macs(config, 1, 8) < macs(config, 9, 0)


def test_facts_split_memory() -> None:
    one = subject()
    facts = one.facts(Workload(6, 3))
    assert facts["weights_bytes"] == one.model.nbytes
    assert facts["kv_bytes"] == one.engine.kv_bytes > 0
    assert facts["kernel"] is None
    assert Path(facts["name"]).name == "tiny"
