"""Reports: what is on the page, what is not and why, and that nothing of a file becomes markup."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.cli import main
from edgeq.core.errors import EdgeqError, FormatError, UsageError
from edgeq.devices.energy import TimeWindow
from edgeq.devices.meters import Absent, Trace, read_log
from edgeq.devices.meters.base import Sensor
from edgeq.devices.recorder import Recording
from edgeq.model.artifact import save
from edgeq.profiling import document as documents
from edgeq.profiling.document import IDLE, Document, Run
from edgeq.profiling.foreign import Named
from edgeq.profiling.operations import Operation, Operations, Phase
from edgeq.profiling.profile import profile
from edgeq.profiling.session import Round, Workload
from edgeq.reporting import Sources, page, read, write
from edgeq.reporting.axes import Axis, around, short
from edgeq.reporting.figures import Missing, latency, pareto_plots, roofline, speed
from edgeq.reporting.plot import POINTS, Line, Plot, thinned
from edgeq.reporting.sources import entries
from edgeq.reporting.timeline import timeline
from edgeq.sweeping import SweepResult
from tests.conftest import clear_settings, need
from tests.families import quantized, random_model, tiny_config

ABSENT = (
    Absent("rapl", "there is none in this test"),
    Absent("thermal", "it has no zones", "temperature"),
)
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"
SECOND = 10**9


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch, "EDGEQ_CACHE")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.edgeq"
    save(quantized(random_model(tiny_config("llama")), "w4-g32"), path)
    return path


@pytest.fixture(scope="module")
def made(artifact: Path) -> Document:
    """A real run, without sensors."""
    return profile([Named(artifact, None)], Workload(6, 8, repeats=3), threads=1, meters=ABSENT)


def trace(quantity: str, name: str, rate: float, seconds: float = 12, **values: float) -> Trace:
    """What a steady sensor would have said."""
    sensor = Sensor(
        name=name, quantity=quantity, provenance=f"/sys/{name}", rate_hz=rate, scope="board",
        covers="the board", total=tuple(values) if quantity in ("power", "energy") else (),
    )  # fmt: skip
    t_ns = np.arange(0, int(seconds * SECOND), int(SECOND / rate), np.int64)
    rising = t_ns / 1e9 if quantity == "energy" else np.ones(t_ns.size)
    return Trace(sensor, t_ns, {c: v * rising for c, v in values.items()})


def recorded(*traces: Trace, rounds: int = 3, seconds: float = 12.0) -> Document:
    """A sustained run of rounds of a second's prefill and two seconds' decode after an idle one."""
    each = int((seconds - 1) / rounds * SECOND)
    samples = tuple(Round(i, SECOND + i * each, each // 3, (each // 6,) * 4) for i in range(rounds))
    subject = {
        "name": "m.edgeq", "runtime": "edgeq", "unit": "token", "threads": 2,
        "bytes_per_token": 10**9, "macs_per_token": 10**9, "macs_prefill": 2 * 10**10,
    }  # fmt: skip
    rows = (
        Operation(0, "qkv", "", 1, (8 * 10**8,), 10**9),
        Operation(None, "head", "", 1, (10**8,), None),
    )
    phases = (Phase("prefill", 20, rows, (SECOND,), (SECOND,)),)
    recording = Recording(
        traces, ABSENT, (TimeWindow(IDLE, 0, SECOND),), (), 0, int(seconds * SECOND), 0, 0.0
    )
    return Document(
        Workload(20, 4, warmup=0, repeats=rounds, min_seconds=5.0),
        (Run(subject, samples, Operations("a clock", phases), 2**27),),
        {"cpu": "a cpu", "read_gb_s": {"2": 50.0}, "int8_gops": {"2": 200.0}},
        recording,
    )


def shown(*made: Document, rows: tuple[SweepResult, ...] = ()) -> str:
    return page(Sources(tuple((f"{i}.json", one) for i, one in enumerate(made)), rows))


class Seen(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.text += " "
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_inert(text: str) -> None:
    """No scripts, no handlers, no forms, nothing that is fetched."""
    seen = Seen(text)
    bad = {"script", "img", "iframe", "object", "embed", "form", "base", "audio", "video", "image"}
    assert not seen.tags & bad
    for name, value in seen.attributes:
        assert not name.startswith("on"), name
        if name in ("src", "href", "srcset", "xlink:href", "action"):
            assert value == "data:,"
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


# What is on the page


def test_a_real_run_is_on_the_page(made: Document) -> None:
    text = shown(made)
    assert_inert(text)
    seen = Seen(text).text
    for words in ("first token", "each token", "prefill", "GB/s", "GOPS", "gate_up", "time, %",
                  "read, KiB per token", "rate, GB/s", "Roofline", "not measured",
                  "there is none in this test", "it has no zones"):  # fmt: skip
        assert words in seen
    tpot = entries(Sources((("x", made),)))[0][0].figures["tpot_ms"]
    assert f"{short(tpot['p50'])} ms p50" in seen
    assert "nan" not in re.findall(r'd="([^"]*)"', text)


def test_what_was_not_measured_is_stated_and_not_drawn(made: Document) -> None:
    plots, missing = timeline("t", made)
    assert not plots
    reasons = {one.name: one.reason for one in missing}
    assert reasons["Power"] == "rapl: there is none in this test"
    assert reasons["Temperature"] == "thermal: it has no zones"
    assert set(reasons) == {"Power", "Temperature", "Clock", "Memory", "Throttling"}
    seen = Seen(shown(made)).text
    assert "energy not measured rapl: there is none in this test" in seen
    assert "J/token" not in seen
    assert " 0 W" not in seen


def test_energy_names_its_meter_and_its_window() -> None:
    steady = trace("power", "ina219", 20.0, board=8.0)
    watts = np.where(steady.t_ns <= SECOND, 3.0, 8.0)
    made = recorded(replace(steady, values={"board": watts}))
    energy = entries(Sources((("x", made),)))[0][0].figures["energy"]["decode"]
    each = 5 * (11 / 3 * 4 / 6) / 4  # W above idle, seconds of a round's decode, its tokens
    assert energy["joules_per_token"]["mean"] == pytest.approx(each, rel=0.02)
    text = " ".join(Seen(shown(made)).text.split())
    mean, std = (short(energy["joules_per_token"][key]) for key in ("mean", "std"))
    assert f"energy of decode {mean} ± {std} J/token at {short(energy['mean_watts'])} W "\
           "ina219: /sys/ina219, of the board; the decode of 3 of 3 timed rounds; "\
           f"{short(energy['idle_watts'])} W of the idle machine subtracted" in text  # fmt: skip


def test_an_estimate_is_labeled_so(made: Document) -> None:
    about = {
        "label": "estimate, not measured", "method": "watts times seconds", "device": "rpi5",
        "load_watts": 6.0, "source": "a page", "decode_joules_per_token": 0.5, "reason": None,
    }  # fmt: skip
    guessed = replace(made, runs=(replace(made.runs[0], estimate=about),))
    assert "energy, ESTIMATE 0.5 J/token, not measured watts times" in Seen(shown(guessed)).text


def test_several_runs_stand_beside_each_other(made: Document) -> None:
    seen = Seen(shown(made, recorded())).text
    assert "Runs beside each other" in seen
    assert "A · tiny.edgeq" in seen
    assert "B · m.edgeq" in seen
    assert "Runs beside each other" not in Seen(shown(made)).text


def test_real_traces_of_a_power_meter_are_drawn_and_integrated() -> None:
    folder = sorted(need("data/power_energy_traces_dev").glob("v0.5_*"))[0]
    (measured,) = read_log(folder)
    measured = measured.shifted(0, "monotonic")
    samples = tuple(
        Round(i, w.start_ns, None, (w.end_ns - w.start_ns,)) for i, w in enumerate(measured.windows)
    )
    subject = {"name": "kws.tflite", "runtime": "litert", "unit": "run", "threads": 1}
    recording = Recording((measured,), (), (), (), 0, int(measured.t_ns[-1]), 0, 0.0)
    environment = {"read_gb_s": {}, "int8_gops": {}}
    run = Document(Workload(0, 1, repeats=5), (Run(subject, samples),), environment, recording)
    (power,), _ = timeline("t", run)
    (line,) = power.lines
    mean = float(np.nanmean(line.y))
    joules = measured.energy(TimeWindow("all", 0, recording.end_ns)).joules
    assert joules is not None
    assert mean == pytest.approx(joules * 1e9 / recording.end_ns, rel=0.01)
    assert len(power.path(line)) < 30_000
    joules = sum(measured.energy(w).joules or math.nan for w in measured.windows) / 5
    text = Seen(shown(run)).text
    assert "J/token" not in text.replace("J/token or J/run", "")
    assert re.search(rf"energy of runs +{re.escape(short(joules))} ± \S+ J/run at ", text)
    assert "of 5 of 5 timed rounds" in text


def test_a_recording_that_is_empty_and_a_file_without_a_run() -> None:
    nothing = Recording((), (), (), (), 5, 5, 0, 0.0)
    empty = replace(recorded(), runs=(), recording=nothing)
    seen = Seen(shown(empty)).text
    assert "This file holds no run." in seen
    assert "no meter of it was asked" in seen
    run = replace(recorded(), recording=nothing)
    assert "each token" in Seen(shown(run)).text


def test_operations_that_are_missing_or_only_counted() -> None:
    run = recorded().runs[0]
    counted = Phase("run", 1, (Operation(None, "CONV_2D", "", 7, None),))
    for known, words in (
        (None, "operations were not asked for"),
        (Operations("nobody", (), "the NumPy backend has no clock"), "NumPy backend has no clock"),
        (Operations("the file", (counted,), "no profiler"), "operators only counted"),
    ):
        seen = Seen(shown(replace(recorded(), runs=(replace(run, operations=known),)))).text
        assert words in seen
    assert "CONV_2D 7" in seen


# Plots


def test_the_timeline_scales_sums_and_shades() -> None:
    clocks = {f"policy{i}": 1e9 + 1e8 * i for i in range(8)}
    run = recorded(
        trace("power", "pmic", 10.0, core=2.0, ddr=1.5),
        trace("energy", "rapl", 10.0, package=4.0),
        trace("frequency", "cpufreq", 2.0, **clocks),
        trace("memory", "rss", 2.0, rss=2.0**20 * 64),
    )
    plots, missing = timeline("t", run)
    assert [plot.title for plot in plots] == ["Power", "Clock", "Memory"]
    assert [one.name for one in missing] == ["Temperature", "Throttling"]
    power, clock, memory = plots
    drawn = {line.name: float(line.y.mean()) for line in power.lines}
    assert drawn == pytest.approx(
        {"pmic: the board": 3.5, "pmic: core": 2.0, "pmic: ddr": 1.5, "rapl: package": 4.0}
    )
    drawn = {line.name: float(line.y.mean()) for line in clock.lines}
    assert drawn == pytest.approx(
        {"cpufreq: least of 8": 1.0, "cpufreq: mean of 8": 1.35, "cpufreq: most of 8": 1.7}
    )
    assert memory.lines[0].y.tolist() == [64.0] * 24
    assert memory.y.low == 0
    shades = {shade.name: np.array(shade.stretches) for shade in power.shades}
    assert shades["idle"] == pytest.approx(np.array([[0.0, 1.0]]), abs=0.02)
    assert len(shades["prefill"]) == len(shades["decode"]) == 3
    lasting = {name: float(np.diff(s).sum()) for name, s in shades.items()}
    assert lasting == pytest.approx({"idle": 1, "prefill": 11 / 3, "decode": 22 / 3}, abs=0.05)


def test_rounds_too_many_to_tell_apart_share_a_shade() -> None:
    plots, _ = timeline("t", recorded(trace("memory", "rss", 2.0, rss=1.0), rounds=400))
    assert [(shade.kind, len(shade.stretches)) for shade in plots[0].shades] == [
        ("turns", 1), ("idle", 1),
    ]  # fmt: skip


def test_a_sensor_that_vanishes_leaves_a_gap() -> None:
    whole = trace("temperature", "thermal", 10.0, zone=50.0)
    there = (whole.t_ns < 3 * SECOND) | (whole.t_ns > 8 * SECOND)
    cut = replace(whole, t_ns=whole.t_ns[there], values={"zone": whole.values["zone"][there]},
                  problems={"read failed": 50})  # fmt: skip
    (plot,), _ = timeline("t", recorded(cut))
    assert plot.path(plot.lines[0]).count("M") == 2
    assert "read failed (50 times)" in Seen(shown(recorded(cut))).text
    dead = replace(whole, t_ns=whole.t_ns[:0], values={}, problems={"permission denied": 9})
    _, missing = timeline("t", recorded(dead))
    why = next(one.reason for one in missing if one.name == "Temperature")
    assert "permission denied" in why


def test_the_roofline_holds_the_run_and_the_limits() -> None:
    (group,) = entries(Sources((("x", recorded()),)))
    plot = roofline("r", group)
    assert isinstance(plot, Plot)
    # 4 tokens in 4/6 of 11/3 s; 20 tokens in a third of it; 2 operations a multiply-add
    rate = 4 / (11 / 3 * 4 / 6)
    prefill, decode = plot.dots
    assert (decode.x, decode.y) == pytest.approx((2.0, 2 * rate))
    assert (prefill.x, prefill.y) == pytest.approx((40.0, 2 * 20 / (11 / 9)), rel=1e-6)
    (line,) = plot.lines
    assert line.y[1:].tolist() == [200.0, 200.0]
    assert line.y[0] == pytest.approx(50 * line.x[0])
    assert line.x[1] == pytest.approx(4.0)
    unlimited = replace(recorded(), environment={"read_gb_s": {}, "int8_gops": {}})
    (group,) = entries(Sources((("x", unlimited),)))
    assert isinstance(roofline("r", group), Missing)


def test_latency_is_by_percentiles_of_all_tokens() -> None:
    run = recorded()
    steps = tuple(range(1_000_000, 2_000_000, 1000))
    sample = Round(0, 0, None, steps)
    run = replace(run, runs=(replace(run.runs[0], samples=(sample,)),))
    (group,) = entries(Sources((("x", run),)))
    (plot,) = latency(group)
    (line,) = plot.lines
    at = {part: float(np.interp(part, line.x, line.y)) for part in (0.5, 0.9, 0.99)}
    assert at == pytest.approx({0.5: 1.5, 0.9: 1.9, 0.99: 1.99}, rel=0.01)
    assert plot.x.kind == "tail"


def test_speed_over_time_is_drawn_of_sustained_runs_only() -> None:
    run = recorded(rounds=30)
    (group,) = entries(Sources((("x", run),)))
    (plot,) = speed(group)
    assert plot.y.low == 0
    assert plot.lines[0].y == pytest.approx(4 / (11 / 30 * 4 / 6))
    short_one = replace(run, workload=replace(run.workload, min_seconds=0.0))
    assert not speed(entries(Sources((("x", short_one),)))[0])


ROWS = (
    SweepResult("k1", "m", "w8", nbytes=30 * 10**6, kl=0.001, tokens_per_s=50.0),
    SweepResult("k2", "m", "w4", nbytes=15 * 10**6, kl=0.02, tokens_per_s=90.0),
    SweepResult("k3", "m", "bad", nbytes=31 * 10**6, kl=0.03),
    SweepResult("k4", "m", "none", error="matches no tensor"),
)


def test_a_sweep_is_drawn_with_its_front() -> None:
    size, rate = pareto_plots(ROWS)
    assert [dot.name for dot in size.dots if not dot.hollow] == ["1", "2"]
    assert [dot.name for dot in size.dots if dot.hollow] == ["3"]
    assert [dot.name for dot in rate.dots] == ["1", "2"]  # the third was not timed
    assert size.lines[0].x.tolist() == [15.0, 30.0]
    seen = Seen(shown(rows=ROWS)).text
    for words in ("KL from float, nats/token", "Size of the artifact, MB", "tokens/s", "1 w4 *",
                  "3 bad 31.00 0.03 not timed", "none on m matches no tensor"):  # fmt: skip
        assert words in seen


def test_names_of_dots_near_each_other_share_a_place() -> None:
    close = [SweepResult(f"r{i}", "m", f"r{i}", nbytes=10**7 + i, kl=0.01) for i in range(7)]
    plot = pareto_plots([*close, *ROWS])[0]
    assert [text for *_, text in plot.tags()] == ["1, 2, 3, 4 …", "8", "9", "10"]


def test_long_lines_are_thinned_and_keep_their_peaks() -> None:
    x = np.arange(100_000.0)
    y = np.sin(x / 5000)
    y[54_321] = 9.0
    y[70_000:70_010] = np.nan
    few_x, few_y = thinned(x, y)
    assert len(few_x) < 2 * POINTS + 20
    assert np.nanmax(few_y) == 9.0
    assert few_y[0] == y[0]
    assert np.isnan(few_y).any()
    axis = Axis("", 0, 1e5)
    plot = Plot("k", "t", "a", axis, Axis("", -1, 9))
    assert plot.path(Line("l", x, y, 0)).count("M") == 2


@pytest.mark.parametrize("kind", ["linear", "log", "zero"])
def test_ticks_lie_on_their_axis_and_are_few(kind: str) -> None:
    rng = random.Random(0)
    for _ in range(500):
        low = 10 ** rng.uniform(-6, 9)
        values = [low, low * (1 + 10 ** rng.uniform(-3, 6))]
        axis = around("x", values, log=kind == "log", zero=kind == "zero")
        assert axis is not None
        places = [place for place, _ in axis.ticks()]
        assert 2 <= len(places) <= 8, (values, axis.ticks())
        assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)
        assert places == sorted(places)
        assert all(0 <= place <= 1 for place in axis.at(values))
        assert len({text for _, text in axis.ticks()}) == len(places), (axis, axis.ticks())


def test_axes_of_little() -> None:
    assert around("x", []) is None
    assert around("x", [math.nan, math.inf]) is None
    assert around("x", [0.0, -1.0], log=True) is None
    for values in ([0.0], [5.0], [5.0, 5.0], [-3.0, -3.0]):
        for zero in (False, True):
            axis = around("x", values, zero=zero)
            assert axis is not None
            assert axis.low < axis.high
            assert axis.ticks()
    tail = Axis("x", 0.0, 0.999, "tail")
    assert [text for _, text in tail.ticks()] == ["0", "50", "90", "99", "99.9"]
    places = [place for place, _ in tail.ticks()]
    assert places[2:] == pytest.approx([1 / 3, 2 / 3, 1.0])


# What files may hold


def test_nothing_of_a_file_becomes_markup(made: Document, tmp_path: Path) -> None:
    held = json.dumps(made.to_json())
    held = held.replace("tiny.edgeq", "HOSTILE").replace("gate_up", "HOSTILE")
    held = held.replace("there is none in this test", "HOSTILE").replace('"rapl"', '"HOSTILE"')
    data = json.loads(held.replace("HOSTILE", json.dumps(HOSTILE)[1:-1]))
    data["environment"] |= {"cpu": HOSTILE, "os": HOSTILE + "\ud800"}
    data["created"] = data["tool"] = data["runs"][0]["subject"]["kernel"] = HOSTILE
    file = tmp_path / "<b>&.json"
    file.write_text(json.dumps(data))
    rows = tmp_path / "rows.json"
    hostile = [replace(row, name=HOSTILE, model=HOSTILE, error=row.error and HOSTILE)
               for row in ROWS]  # fmt: skip
    rows.write_text(json.dumps([row.to_dict() for row in hostile]))
    out = tmp_path / "r.html"
    write(read([file, rows]), out, title=HOSTILE)
    text = out.read_text("utf-8")
    assert_inert(text)
    assert "<b>" not in text
    seen = Seen(text)
    assert seen.text.count("alert(1)") > 10
    assert seen.tags == Seen(shown(made, rows=ROWS)).tags


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [found for key, inner in pairs for found in _leaves(inner, (*path, key))]
    return [path]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # means of nothing, where nothing is left
def test_damage_is_an_explained_error_or_a_page(made: Document, tmp_path: Path) -> None:
    whole = recorded(trace("power", "ina219", 2.0, board=5.0)).to_json()
    rng = random.Random(1)
    places = _leaves(whole)
    file = tmp_path / "d.json"
    refused = 0
    for place in rng.sample(places, 120):
        data = copy.deepcopy(whole)
        inner = data
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = rng.choice([None, "x", -1, 10**30, [], {}, math.nan, True])
        file.write_text(json.dumps(data))
        try:
            text = page(read([file]))
        except EdgeqError as err:
            text = str(err)
            refused += 1
        assert "d.json" in text
    assert 10 < refused < 110


def test_what_is_no_source_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for text, words in (
        ("{", "is not JSON"),
        ("{}", "neither a profile nor a result of a sweep"),
        ("[]", "neither a profile nor a result of a sweep"),
        ("3", "neither a profile nor a result of a sweep"),
        ('{"key": "k"}', "format version is None"),
        ('{"key": "k", "format_version": 1}', "sweep again"),
        ('{"key": "k", "format_version": 1, "model": "m", "name": 3}', "its name is 3"),
        ('{"key": "k", "format_version": 1, "model": "m", "name": "n", "kl": "x"}', "its kl is"),
        ('{"format": "edgeq-profile", "format_version": 9}', "upgrade edgeq"),
        ("[" * 100_000, "is not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(FormatError, match=words):
            read([file])
    with pytest.raises(FormatError, match="cannot be read"):
        read([tmp_path / "absent.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match=r"contains no \.json"):
        read([tmp_path / "empty"])
    with pytest.raises(UsageError, match="nothing to report"):
        page(Sources())


# The command line


def test_profile_writes_samples_and_page(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, shown_in = tmp_path / "run.json", tmp_path / "report.HTML"
    args = ["profile", str(artifact), "-p", "4", "-n", "4", "-r", "2", "--backend", "numpy"]
    assert main([*args, "-o", str(shown_in), "-o", str(kept)]) == 0
    assert len(documents.read(kept).runs[0].timed) == 2
    assert_inert(shown_in.read_text("utf-8"))
    capsys.readouterr()
    again = tmp_path / "again.html"
    assert main(["report", str(kept), str(kept), "-o", str(again), "--title", "two & two"]) == 0
    out, err = capsys.readouterr()
    assert not out
    assert str(again) in err
    seen = Seen(again.read_text("utf-8")).text
    assert seen.startswith("two & two")
    assert "B · tiny.edgeq" in seen


def test_a_folder_of_a_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    for row in ROWS:
        (folder / f"{row.key}.json").write_text(json.dumps(row.to_dict()))
    both = tmp_path / "both.json"
    both.write_text(json.dumps([{**row.to_dict(), "pareto": True} for row in ROWS]))
    out = tmp_path / "r.html"
    assert main(["report", str(folder), str(both), "-o", str(out)]) == 0
    assert Seen(out.read_text("utf-8")).text.count("1 w4 *") == 1


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (["profile", "m", "-o", "r.pdf"], "must end in .json for raw samples or in .html", 2),
        (["profile", "m", "-o", "r.json", "-o", "none/r.html"], "make it first", 2),
        (["report", "x.json", "-o", "r.pdf"], "its name must end in .html", 2),
        (["report", "x.json"], "Missing option '-o'", 2),
        (["report", "-o", "r.html"], "Missing argument", 2),
        (["report", "absent.json", "-o", "r.html"], "absent.json cannot be read", 1),
    ],
)
def test_commands_refuse_other_names_and_files(
    args: list[str], words: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(args) == code
    out, err = capsys.readouterr()
    assert words in err
    assert "Traceback" not in err
    assert not out
    assert not list(tmp_path.iterdir())
