"""Recording beside a run: windows, meters that fail, hang or are absent, and what that costs."""

from __future__ import annotations

import array
import fcntl
import json
import os
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edgeq.core.errors import DeviceError, FormatError, UsageError
from edgeq.devices.energy import per_token
from edgeq.devices.meters import Meter, Reading, Sensor, Trace, meters_of, probe, serial_lines
from edgeq.devices.meters.base import Absent, read_number
from edgeq.devices.recorder import Recorder, Recording
from edgeq.profiling.document import Document
from edgeq.profiling.session import Workload


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may pause between samples; test_energy.py tests what is made of that."""
    monkeypatch.setattr("edgeq.devices.energy.UNSEEN", 0.95)


class Source:
    """A file with microwatts in it, and how often it was asked for."""

    def __init__(self, path: Path, watts: float) -> None:
        self.path, self.asked = path, 0
        self.set(watts)

    def set(self, watts: float) -> None:
        self.path.write_text(f"{watts * 1e6:.0f}\n")

    def __call__(self) -> float:
        self.asked += 1
        return read_number(self.path) * 1e-6

    def settle(self, times: int = 8) -> None:
        """Wait until it has been asked so often again."""
        wanted = self.asked + times
        limit = time.monotonic() + 20
        while self.asked < wanted and time.monotonic() < limit:
            time.sleep(0.002)
        assert self.asked >= wanted

    def spend(self, recorder: Recorder, label: str) -> None:
        with recorder.window(label):
            self.settle()


def pause(recorder: Recorder, seconds: float) -> None:
    with recorder.window("decode"):
        time.sleep(seconds)


@dataclass(frozen=True, kw_only=True)
class Made(Meter):
    """A meter of whatever a test wants."""

    made: Callable[[], float]

    def read(self) -> Reading:
        return Reading(time.monotonic_ns(), {"all": self.made()})


def made(of: Callable[[], float], quantity: str = "power", **more: Any) -> Made:
    about = {"name": "made", "rate_hz": 200, "scope": "board", "total": ("all",)} | more
    return Made(quantity=quantity, provenance="a test", made=of, **about)


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "power1_input", 2)


def test_power_over_windows(source: Source) -> None:
    with Recorder([made(source)]) as recorder:
        source.spend(recorder, "idle")
        source.settle(2)  # an edge is interpolated from the sample after it
        source.set(6)
        source.settle(2)
        for _ in range(3):
            source.spend(recorder, "decode")
        recorder.mark("done")
    recording = recorder.recording
    assert [w.label for w in recording.windows] == ["idle", "decode", "decode", "decode"]
    assert recording.marks[0][0] == "done"
    energies = [recording.energy(w, idle="idle") for w in recording.named("decode")]
    for energy in energies:
        assert energy.joules == pytest.approx(4 * energy.seconds)
        assert energy.meter == "made"
        assert energy.idle_watts == pytest.approx(2)
    told = per_token(energies, [10, 10, 10])
    assert told.mean is not None
    assert told.std is not None


def test_no_sensor_is_null_with_a_reason(tmp_path: Path) -> None:
    with Recorder(probe(tmp_path)) as recorder:
        pause(recorder, 0.05)
    energy = recorder.recording.energy("decode", idle=None)
    assert energy.joules is None
    assert energy.mean_watts is None
    assert energy.meter is None
    for name in ("pmic", "hwmon", "battery", "rapl"):
        assert f"{name}: " in str(energy.reason)
    assert "thermal" not in str(energy.reason)
    assert per_token([energy, energy], [5, 5]).mean is None
    held = json.loads(json.dumps(recorder.recording.to_json(), allow_nan=False))
    assert Recording.from_json(held).energy("decode") == energy
    del held["windows"]
    with pytest.raises(FormatError, match="not a recording"):
        Recording.from_json(held)


def test_this_machine_never_gives_a_zero() -> None:
    with Recorder(probe()) as recorder:
        pause(recorder, 0.5)
    energy = recorder.recording.energy("decode")
    assert (energy.joules is None) != (energy.reason is None)
    assert energy.joules is None or energy.joules > 0
    if not any(m.quantity in ("power", "energy") for m in meters_of(probe())):
        assert energy.joules is None


def test_memory_of_this_process() -> None:
    found = [m for m in probe() if m.name in ("rss", "pss")]
    if not meters_of(found):
        assert all(isinstance(m, Absent) for m in found)
        pytest.skip("no /proc here")
    with Recorder(found) as recorder:
        held = b"x" * 40_000_000
        pause(recorder, 0.25)
    trace = recorder.recording.trace("rss")
    assert trace is not None
    assert trace.sensor.unit == "B"
    assert trace.values["rss"].max() > len(held)
    pss = recorder.recording.trace("pss")
    assert pss is not None
    assert 0 < pss.values["pss"].max() <= trace.values["rss"].max() * 1.1


def test_sensor_that_vanishes_and_comes_back(source: Source) -> None:
    with Recorder([made(source)]) as recorder:
        source.spend(recorder, "before")
        source.settle(2)
        source.path.unlink()
        source.settle(2)
        source.spend(recorder, "during")
        source.set(2)
        source.settle(2)
        source.spend(recorder, "after")
    recording = recorder.recording
    for label in ("before", "after"):
        energy = recording.energy(label)
        assert energy.mean_watts == pytest.approx(2)
        assert "No such file" in energy.problems[0]
    lost = recording.energy("during")
    assert lost.joules is None
    assert "0 samples in" in str(lost.reason)
    assert "No such file" in str(lost.reason)


def test_sensor_that_turns_to_text(source: Source) -> None:
    with Recorder([made(source)]) as recorder:
        source.spend(recorder, "before")
        source.settle(2)
        source.path.write_text("<error>\n")
        source.settle(2)
        source.spend(recorder, "text")
    assert recorder.recording.energy("before").joules is not None
    reason = str(recorder.recording.energy("text").reason)
    assert "expected a number, got '<error>'" in reason


def test_the_next_best_meter_answers_and_tells_of_the_better(source: Source) -> None:
    def gone() -> float:
        raise DeviceError("unplugged")

    meters = [
        made(source, name="package", scope="package"),
        made(gone, name="board", scope="board"),
        made(lambda: 50.0, name="card", scope="part"),
    ]
    with Recorder(meters) as recorder:
        source.spend(recorder, "decode")
    energy = recorder.recording.energy("decode")
    assert energy.meter == "package"
    assert any(p.startswith("board: ") and "unplugged" in p for p in energy.problems)
    assert recorder.recording.energy("decode", meter="board").joules is None
    assert recorder.recording.energy("decode", meter="package", channel="all") == replace(
        energy, covers="all", problems=()
    )
    missing = recorder.recording.energy("decode", meter="other")
    assert missing.reason == "no meter of power or energy named 'other'"


def test_a_part_does_not_stand_for_the_run(source: Source) -> None:
    with Recorder([made(source, name="card", scope="part")]) as recorder:
        source.spend(recorder, "decode")
    assert recorder.recording.energy("decode").joules is None
    assert recorder.recording.energy("decode", meter="card").mean_watts == pytest.approx(2)


def test_meter_that_raises_anything_does_not_end_the_run() -> None:
    def broken() -> float:
        raise ZeroDivisionError("of its own making")

    with Recorder([made(broken)]) as recorder:
        pause(recorder, 0.05)
    assert "ZeroDivisionError: of its own making" in str(recorder.recording.energy("decode").reason)


def test_meter_that_hangs_is_left_behind(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.devices.recorder.FIRST_S", 0.05)
    monkeypatch.setattr("edgeq.devices.recorder.LAST_S", 0.05)
    release = threading.Event()

    def hang() -> float:
        release.wait(60)
        return 1.0

    with Recorder([made(hang, waits=True), made(source, name="good", scope="rail")]) as recorder:
        source.spend(recorder, "decode")
    energy = recorder.recording.energy("decode")
    release.set()
    assert energy.meter == "good"
    assert "did not answer when it was asked for the last sample" in str(energy.problems)


def test_a_costly_meter_is_asked_less_often() -> None:
    asked = []

    def costly() -> float:
        asked.append(1)
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return 1.0

    with Recorder([made(costly)]) as recorder:
        pause(recorder, 0.4)
    # 20 ms at half a percent of a core: every 4 s, and once when it ends
    assert len(asked) == 2
    assert recorder.recording.cpu_seconds >= 0.04


def waiting(pipe: int) -> int:
    """Bytes in a pipe that nobody has read yet."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def test_lines_that_a_meter_sends_by_itself() -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as stream:
        meter = serial_lines.live(stream, "a pipe")
        unplugged = threading.Event()

        def send() -> None:
            while not unplugged.wait(0.005):
                os.write(write, b"V=5 A=0.6\n")
            os.close(write)

        sender = threading.Thread(target=send)
        sender.start()
        with Recorder([meter]) as recorder:
            pause(recorder, 0.3)
            unplugged.set()
            sender.join()
            limit = time.monotonic() + 10
            while (waiting(read) or b"\n" in meter.pending) and time.monotonic() < limit:
                time.sleep(0.01)  # on a busy machine the recorder may be behind
            time.sleep(0.05)
    energy = recorder.recording.energy("decode")
    assert energy.mean_watts == pytest.approx(3)
    assert energy.samples > 3
    assert "has ended or was unplugged" in energy.problems[0]


def test_rate_is_bounded() -> None:
    asked = []
    with Recorder([made(lambda: float(len(asked)), "memory")], rate_hz=5) as recorder:
        pause(recorder, 0.5)
    assert len(recorder.recording.traces[0].t_ns) <= 5
    with pytest.raises(UsageError, match="must be positive"):
        Recorder([], rate_hz=0)


def test_every_sample_lies_within_the_recording() -> None:
    with Recorder([made(lambda: 1.0)]) as recorder:
        pause(recorder, 0.1)
    recording = recorder.recording
    t_ns = recording.traces[0].t_ns
    assert recording.start_ns <= t_ns[0] <= recording.windows[0].start_ns
    assert recording.windows[0].end_ns <= t_ns[-1] <= recording.end_ns


def test_a_block_that_fails_leaves_no_window_and_no_thread() -> None:
    recorder = Recorder([made(lambda: 1.0)])
    with pytest.raises(RuntimeError, match="model"), recorder, recorder.window("decode"):
        raise RuntimeError("the model failed")
    assert recorder.recording.windows == ()
    assert not [t for t in threading.enumerate() if t.name == "meters made"]


def test_use_in_the_wrong_order() -> None:
    recorder = Recorder([])
    with pytest.raises(UsageError, match="not started"):
        recorder.stop()
    recorder.start()
    with pytest.raises(UsageError, match="still recording"):
        _ = recorder.recording
    with pytest.raises(UsageError, match="records once"):
        recorder.start()
    recorder.add_window("prefill", 5, 5)  # a clock that did not move
    recorder.add_window("decode", 5, 9)
    recorder.add_window("decode", 9, 12)
    recording = recorder.stop()
    assert recorder.stop() is recording
    with pytest.raises(UsageError, match="2 windows are called 'decode'"):
        recording.energy("decode")
    with pytest.raises(UsageError, match="did you mean 'prefill'"):
        recording.energy("prefil")


def test_a_log_of_another_program_is_laid_on_the_clock() -> None:
    with Recorder([]) as recorder:
        pause(recorder, 0.3)
    recording = recorder.recording
    sensor = Sensor(name="log", quantity="power", provenance="power.log", rate_hz=100,
                    scope="board", total=("all",))  # fmt: skip
    began = recording.start_ns + recording.unix_ns
    samples = [Reading(began + i * 10_000_000, {"all": 7.0}) for i in range(-20, 100)]
    joined = recording.joined([Trace.of(sensor, samples, None, "unix")])
    energy = joined.energy("decode")
    assert energy.joules == pytest.approx(7 * energy.seconds)
    with pytest.raises(DeviceError, match="do not say when it"):
        recording.align(Trace.of(sensor, samples, None, "own"))
    assert recording.align(joined.traces[0]) is joined.traces[0]


@pytest.mark.parametrize("hours", [-9, -1, 1])
def test_a_log_of_another_time_is_refused(hours: int) -> None:
    with Recorder([]) as recorder:
        pause(recorder, 0.2)
    recording = recorder.recording
    sensor = Sensor(name="log", quantity="power", provenance="power.log", rate_hz=100,
                    scope="board", total=("all",))  # fmt: skip
    began = recording.start_ns + recording.unix_ns + hours * 3600 * 10**9
    samples = [Reading(began + i * 10_000_000, {"all": 7.0}) for i in range(100)]
    with pytest.raises(DeviceError, match=r"was recorded from 20.* and the run lasted from 20"):
        recording.joined([Trace.of(sensor, samples, None, "unix")])
    with pytest.raises(DeviceError, match="without a single sample"):
        recording.joined([Trace.of(sensor, [], None, "unix")])


def test_a_log_of_another_machine_is_refused() -> None:
    with Recorder([]) as recorder:
        pause(recorder, 0.2)
    recording = recorder.recording
    began = recording.start_ns + recording.unix_ns

    def log(name: str) -> Trace:
        sensor = Sensor(name=name, quantity="power", provenance=f"{name}.log", rate_hz=100,
                        scope="board", total=("all",))  # fmt: skip
        samples = [Reading(began + i * 10_000_000, {"all": 7.0}) for i in range(20)]
        return Trace.of(sensor, samples, None, "unix")

    def document(os: str, arch: str) -> Document:
        return Document(Workload(1, 1, 0, 0, 1, 0), (), {"os": os, "arch": arch}, recording)

    jetson = document("Linux-5.15.136-tegra-aarch64", "aarch64")
    mac = document("macOS-14.5-arm64-arm-64bit", "arm64")
    pc = document("Linux-6.8-x86_64", "x86_64")
    assert jetson.with_logs([log("tegrastats")]).recording.energy("decode").joules
    assert mac.with_logs([log("powermetrics")]).recording.energy("decode").joules
    for one in (jetson, mac, pc):
        assert one.with_logs([log("serial")]).recording.energy("decode").joules
    for one, name in ((pc, "tegrastats"), (pc, "powermetrics"), (jetson, "powermetrics")):
        with pytest.raises(DeviceError, match=f"a log of {name}, which runs on a.*another machine"):
            one.with_logs([log(name)])
