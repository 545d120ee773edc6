"""Profiles as documents: what is measured, what is not, and what is derived."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeq.core.errors import FormatError
from edgeq.devices.energy import TimeWindow
from edgeq.devices.meters import Absent, Trace
from edgeq.devices.meters.base import FileMeter
from edgeq.devices.profile import DeviceProfile
from edgeq.devices.recorder import Recording
from edgeq.model.artifact import save
from edgeq.profiling import document as documents
from edgeq.profiling.document import IDLE, Document, Run
from edgeq.profiling.foreign import Named
from edgeq.profiling.operations import Operation, Operations, Phase
from edgeq.profiling.profile import profile
from edgeq.profiling.session import Round, Workload
from edgeq.profiling.summary import by_operation, decay, spread, summary
from tests.families import quantized, random_model, tiny_config

ABSENT = Absent("rapl", "there is none in this test")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.edgeq"
    save(quantized(random_model(tiny_config("llama")), "w4-g32"), path)
    return path


@pytest.fixture(scope="module")
def made(artifact: Path) -> Document:
    return profile(
        [Named(artifact, None)], Workload(6, 4, repeats=3), threads=1, backend="numpy",
        meters=[ABSENT],
    )  # fmt: skip


def power_meter(folder: Path, watts: float) -> FileMeter:
    file = folder / "power1_input"
    file.write_text(str(round(watts * 1e6)))
    return FileMeter(
        name="hwmon", quantity="power", provenance=str(file), rate_hz=200.0, covers="the board",
        scope="board", total=("board",), files={"board": (file,)}, scale=1e-6,
    )  # fmt: skip


def handmade(step_ms: list[list[int]], prefill_ms: int = 40) -> Document:
    """A document of rounds with these times, a millisecond between them."""
    samples, now = [], 1_000_000_000
    for i, steps in enumerate(step_ms):
        sample = Round(i - 1, now, prefill_ms * 10**6, tuple(ms * 10**6 for ms in steps))
        samples.append(sample)
        now = sample.end_ns + 10**6
    subject = {
        "name": "m", "runtime": "r", "unit": "token", "threads": 2, "bytes_per_token": 10**9,
        "macs_per_token": 10**9, "macs_prefill": 2 * 10**9,
    }  # fmt: skip
    limits = {"read_gb_s": {"2": 50.0}, "int8_gops": {"2": 200.0}}
    nothing = Recording((), (ABSENT,), (), (), 0, now, 0, 0.0)
    workload = Workload(20, len(step_ms[0]), warmup=1, repeats=len(step_ms) - 1)
    return Document(workload, (Run(subject, tuple(samples)),), limits, nothing)


def test_a_document_comes_back_from_its_file(made: Document, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    documents.write(made, path)
    assert documents.read(path).to_json() == made.to_json()
    assert list(tmp_path.iterdir()) == [path]
    held = json.loads(path.read_text())
    assert (held["format"], held["format_version"]) == ("edgeq-profile", 1)
    assert len(held["runs"][0]["samples"]) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "x"}, "not a profile of edgeq"),
        ({"format_version": 2}, "upgrade edgeq"),
        ({"runs": [{}]}, "is damaged"),
        ({"workload": {"n_prompt": -1}}, "is damaged"),
        ({"recording": {}}, "is damaged"),
    ],
)
def test_what_is_no_document_is_refused(
    made: Document, change: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(made.to_json() | change))
    with pytest.raises(FormatError, match=words):
        documents.read(path)
    path.write_text(path.read_text()[:-3])
    with pytest.raises(FormatError, match="is not JSON"):
        documents.read(path)
    with pytest.raises(FormatError, match="cannot be read"):
        documents.read(tmp_path / "absent.json")


def test_without_a_sensor_every_energy_is_null_and_says_why(made: Document) -> None:
    for part in ("prefill", "decode"):
        energy = summary(made, made.runs[0])["energy"][part]
        each = energy["joules_per_token"]
        assert (each["mean"], each["std"], energy["mean_watts"]) == (None, None, None)
        assert each["samples"] == (None, None, None)
        assert "there is none in this test" in each["reason"]
    assert '"joules_per_token": 0' not in json.dumps(summary(made, made.runs[0]))


def test_meters_are_recorded_while_it_runs(artifact: Path, tmp_path: Path) -> None:
    measured = profile(
        [Named(artifact, None)], Workload(4, 4, repeats=2), threads=1, backend="numpy",
        meters=[power_meter(tmp_path, 5.0), ABSENT], operations=False, idle_seconds=0.05,
    )  # fmt: skip
    (trace,) = measured.recording.traces
    samples = measured.runs[0].samples
    assert trace.t_ns[0] <= samples[0].start_ns
    assert trace.t_ns[-1] >= samples[-1].end_ns
    assert set(trace.values["board"]) == {5.0}
    (idle,) = measured.recording.named(IDLE)
    assert idle.seconds >= 0.05
    assert idle.end_ns <= samples[0].start_ns
    assert measured.recording.absent == (ABSENT,)


@pytest.mark.parametrize("idle", [True, False])
def test_energy_is_of_the_measured_window_only(idle: bool, tmp_path: Path) -> None:
    """9 W while the prompt is read and between rounds, 6 W while tokens come, 2 W before."""
    made = handmade([[100, 100], [100, 100], [100, 300]], prefill_ms=100)
    samples = made.runs[0].samples
    times = np.arange(0, samples[-1].end_ns + 10**9, 10**6)
    watts = np.full(times.shape, 9.0)
    watts[times < samples[0].start_ns] = 2.0
    for sample in samples:
        watts[(times >= sample.decode_start_ns) & (times <= sample.end_ns)] = 6.0
    meter = power_meter(tmp_path, 1.0)
    trace = Trace(replace(meter.described(), rate_hz=1000.0), times, {"board": watts})
    windows = (TimeWindow(IDLE, 0, samples[0].start_ns - 10**7),) if idle else ()
    made = replace(made, recording=replace(made.recording, traces=(trace,), windows=windows))
    energy = summary(made, made.runs[0])["energy"]["decode"]
    above = 4.0 if idle else 6.0
    assert energy["joules_per_token"]["samples"] == pytest.approx([above * 0.1, above * 0.2])
    assert energy["joules_per_token"]["mean"] == pytest.approx(above * 0.15)
    assert energy["joules_per_token"]["std"] == pytest.approx(above * 0.1 / np.sqrt(2))
    assert energy["mean_watts"] == pytest.approx(above)
    assert energy["idle_watts"] == (pytest.approx(2.0) if idle else None)
    assert energy["covers"] == "the board"


def test_rounds_shorter_than_the_meter_are_reported_together(tmp_path: Path) -> None:
    made = handmade([[10, 10]] * 41, prefill_ms=10)  # the first warms up
    end = made.runs[0].timed[-1].end_ns
    times = np.arange(0, end + 10**9, 200 * 10**6)
    meter = power_meter(tmp_path, 1.0)
    watts = {"board": np.full(times.shape, 7.0)}
    trace = Trace(replace(meter.described(), rate_hz=5.0), times, watts)
    made = replace(made, recording=replace(made.recording, traces=(trace,)))
    energy = summary(made, made.runs[0])["energy"]
    assert energy["decode"]["joules_per_token"]["mean"] is None
    took = (end - made.runs[0].timed[0].start_ns) / 1e9
    assert energy["rounds"]["joules_per_token"]["mean"] == pytest.approx(7.0 * took / 40)
    both = replace(made, runs=(*made.runs, *made.runs))
    assert summary(both, both.runs[0])["energy"]["rounds"]["joules_per_token"]["samples"] == ()


def test_an_estimate_is_labeled_and_apart(artifact: Path) -> None:
    sources = {"load_watts": "estimate: a test"}
    board = DeviceProfile("b", "Board", "sbc", load_watts=8.0, sources=sources)
    run = profile(
        [Named(artifact, None)], Workload(0, 4, repeats=2), threads=1, backend="numpy",
        meters=[ABSENT], estimate=board,
    )  # fmt: skip
    told = summary(run, run.runs[0])
    assert told["energy"]["decode"]["joules_per_token"]["mean"] is None
    rate = told["decode_tokens_per_s"]["mean"]
    assert told["estimate"]["decode_joules_per_token"] == pytest.approx(8.0 / rate)
    assert told["estimate"]["label"] == "estimate, not measured"
    unknown = replace(board, load_watts=None, sources={})
    run = profile(
        [Named(artifact, None)], Workload(0, 2, repeats=1), threads=1, backend="numpy",
        meters=[ABSENT], estimate=unknown,
    )  # fmt: skip
    estimate = run.runs[0].estimate
    assert estimate is not None
    assert estimate["decode_joules_per_token"] is None
    assert "no load_watts" in estimate["reason"]


def test_numbers_are_derived_from_the_samples() -> None:
    made = handmade([[900, 900], [10, 30], [20, 40]])
    told = summary(made, made.runs[0])
    assert told["rounds"] == 2
    assert told["tpot_ms"]["p50"] == 25.0
    assert told["tpot_ms"]["p90"] == pytest.approx(np.percentile([10, 30, 20, 40], 90))
    assert told["ttft_ms"]["p99"] == 40.0
    assert told["prefill_tokens_per_s"]["mean"] == pytest.approx(500.0)
    rate = told["decode_tokens_per_s"]["mean"]
    assert rate == pytest.approx((2 / 0.04 + 2 / 0.06) / 2)
    assert told["gb_per_s"] == pytest.approx(rate)
    assert told["bandwidth_percent"] == pytest.approx(100 * rate / 50)
    assert told["int8_gops"]["decode"] == pytest.approx(2 * rate)
    assert told["int8_percent"]["prefill"] == pytest.approx(100 * 2 * 2 / 0.04 / 200)
    assert told["runs_per_s"] is None
    assert spread([]) is None


def test_unknown_limits_stay_unknown() -> None:
    made = replace(handmade([[1], [1]]), environment={"read_gb_s": {}, "int8_gops": {}})
    told = summary(made, made.runs[0])
    assert told["gb_per_s"] is not None
    assert told["bandwidth_percent"] is None
    assert told["int8_percent"] == {"prefill": None, "decode": None}


def test_decay_shows_the_slowing(tmp_path: Path) -> None:
    made = handmade([[5] * 10] + [[10] * 10] * 5 + [[20] * 10] * 5, prefill_ms=1)
    rows = decay(made, made.runs[0], parts=4)
    assert rows[0]["per_s"] == pytest.approx(100)
    assert rows[-1]["per_s"] == pytest.approx(50)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_what_was_only_counted_has_no_times() -> None:
    rows = tuple(Operation(None, op, "", n, None) for op, n in (("mul", 3), ("add", 5)))
    counted = Phase("run", 1, rows)
    assert (counted.covered, counted.cost, counted.middle) == (None, None, None)
    table = by_operation(counted)
    assert [(row["op"], row["calls"], row["percent"]) for row in table] == [
        ("add", 5, None),
        ("mul", 3, None),
    ]
    told = Operations("a file", (counted,), "only counted")
    assert Operations.from_json(json.loads(json.dumps(told.to_json()))) == told
