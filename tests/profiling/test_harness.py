"""Workloads, measurements and what they are computed from."""

from __future__ import annotations

import mmap
import statistics

import pytest

from edgeq.core.errors import UsageError
from edgeq.core.memory import peak_rss_bytes, reset_peak_rss
from edgeq.formats.tensor import QuantTensor
from edgeq.model.memory_layout import position_bytes
from edgeq.profiling import (
    Measurement,
    Workload,
    bytes_read_per_token,
    measure,
    read_bandwidth,
)
from edgeq.runtime.engine import Engine
from tests.families import quantized, random_model, scheme_of, tiny_config


def test_names_are_llama_bench_s() -> None:
    assert Workload(512, 0).label == "pp512"
    assert Workload(0, 128).label == "tg128"
    assert Workload(0, 32, 1024).label == "tg32 @ d1024"
    assert Workload(0, 32, 1024).positions == 1056


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [((0, 0), "n_prompt and n_gen are both 0"), ((-1, 2), "no count may be negative")],
)
def test_a_workload_has_something_to_time(numbers: tuple[int, int], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Workload(*numbers)


def test_statistics_come_from_the_samples() -> None:
    m = Measurement(Workload(0, 10), 1, (10**9, 2 * 10**9), 5, 10**8, None)
    assert m.samples_ts == (10.0, 5.0)
    assert m.avg_ts == 7.5
    assert m.stddev_ts == statistics.stdev((10.0, 5.0))
    assert m.gb_per_s == 0.75
    alone = Measurement(Workload(10, 0), 1, (10**9,), 5, None, None)
    assert (alone.stddev_ts, alone.gb_per_s) == (0.0, None)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_read_per_token(tied: bool) -> None:
    config = tiny_config("llama", tied=tied)
    model = quantized(random_model(config), scheme_of("w4-g32"))
    weights = 0
    for name, tensor in model.tensors.items():
        if name == "model.embed_tokens.weight" and not tied:
            # one row of the table, or rather its share of the tile
            weights += tensor.nbytes // config.vocab
        else:
            weights += tensor.nbytes
    assert bytes_read_per_token(model, 0, 8) == weights
    longer = bytes_read_per_token(model, 10, 8) - weights
    assert longer == 10 * config.layers * position_bytes(config, 8)
    assert bytes_read_per_token(model, 10, 16) - weights == 10 * config.layers * position_bytes(
        config, 16
    )


@pytest.mark.parametrize("counts", [(5, 0), (0, 4), (0, 4, 7)])
def test_measure(counts: tuple[int, ...]) -> None:
    workload = Workload(*counts, repeats=3)
    model = quantized(random_model(tiny_config("llama")), scheme_of("w4-g32"))
    assert isinstance(model.tensors["model.embed_tokens.weight"], QuantTensor)
    told: list[tuple[str, int, int]] = []
    with Engine(model, context=16, threads=1, backend="numpy") as engine:
        m = measure(engine, workload, progress=lambda *args: told.append(args))
        assert engine.n_past == workload.positions
    assert len(m.samples_ns) == 3
    assert min(m.samples_ns) > 0
    assert (m.bytes_per_token is None) == bool(workload.n_prompt)
    assert told == [(workload.label, i, 3) for i in (1, 2, 3)]


def test_measure_refuses_what_cannot_be() -> None:
    model = random_model(tiny_config("llama"))
    with Engine(model, context=8, threads=1, backend="numpy") as engine:
        with pytest.raises(UsageError, match="needs a context of 9"):
            measure(engine, Workload(0, 9))
        with pytest.raises(UsageError, match="make exactly one of them positive"):
            measure(engine, Workload(1, 1))
        with pytest.raises(UsageError, match="at least 1"):
            measure(engine, Workload(0, 4, repeats=0))


def test_read_bandwidth_is_a_number_of_gigabytes() -> None:
    assert 0.1 < read_bandwidth(1) < 5000


def test_peak_memory_follows_what_is_held() -> None:
    if not reset_peak_rss():
        pytest.skip("this system cannot reset the peak")
    before = peak_rss_bytes()
    with mmap.mmap(-1, 64 << 20) as held:  # not from the heap, which may keep what is freed
        for _ in range(64):
            held.write(bytes(1 << 20))
        after = peak_rss_bytes()
    assert before is not None
    assert after is not None
    assert after - before > 0.9 * (64 << 20)
    reset_peak_rss()
    later = peak_rss_bytes()
    assert later is not None
    assert later < after - (32 << 20)
