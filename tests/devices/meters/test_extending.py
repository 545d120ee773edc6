"""A meter is added by the steps of docs/extending.md alone: one file, and one row."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from edgeq.core.errors import UsageError
from edgeq.devices import meters
from edgeq.devices.energy import TimeWindow
from edgeq.devices.meters import Absent, Meter, Sensor, Trace, meters_of
from edgeq.devices.recorder import Recorder

TOY = '''
"""A toy meter: a file that holds milliwatts, and logs of its readings."""

import time
from dataclasses import dataclass
from pathlib import Path

from edgeq.core.errors import DeviceError
from edgeq.devices.meters.base import Absent, Meter, Reading, Sensor, number, read_text
from edgeq.devices.meters.kind import MeterKind
from edgeq.devices.meters.trace import Trace


@dataclass(frozen=True, kw_only=True)
class ToyMeter(Meter):
    path: Path

    def read(self):
        milliwatts = number(read_text(self.path), str(self.path))
        return Reading(time.monotonic_ns(), {"input": milliwatts / 1000})


def meter(path):
    return ToyMeter(
        name="toy", quantity="power", provenance=str(path), rate_hz=50, covers="the toy",
        scope="board", total=("input",), path=path,
    )


def find(root, run):
    path = root / "sys/class/toy/power"
    if not path.exists():
        return [Absent("toy", f"no {path}: this machine has no toy")]
    return [meter(path)]


def open_option(where):
    path = Path(where)
    if not path.exists():
        raise DeviceError(f"meter 'toy:{where}': there is no such file")
    return meter(path)


def read_log(path):
    sensor = Sensor(name="toy", quantity="power", provenance=str(path), rate_hz=1, covers="the toy",
                    scope="board", total=("input",))
    lines = path.read_text("utf-8").splitlines()[1:]
    readings = [Reading(i * 10**9, {"input": float(line)}) for i, line in enumerate(lines)]
    return [Trace.of(sensor, readings, {}, "own")]


KIND = MeterKind(
    name="toy",
    find=find,
    open=open_option,
    usage="toy:PATH",
    recognizes=lambda path, head: head.startswith(b"# toy"),
    read_log=read_log,
)
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Step 1: a file with the kind. Step 2: its row."""
    path = tmp_path / "toy.py"
    path.write_text(TOY, "utf-8")
    spec = importlib.util.spec_from_file_location("toy_meter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "toy_meter", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(meters, "KINDS", (module.KIND, *meters.KINDS))
    return module


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine's file system with a toy in it."""
    root = tmp_path / "root"
    (root / "sys/class/toy").mkdir(parents=True)
    (root / "sys/class/toy/power").write_text("2500\n")
    return root


@pytest.mark.usefixtures("toy")
def test_it_is_found_recorded_and_counted(machine: Path) -> None:
    (meter,) = (one for one in meters_of(meters.probe(machine)) if one.name == "toy")
    with Recorder([meter]) as recorder, recorder.window("run"):
        time.sleep(0.1)
    assert [trace.sensor.name for trace in recorder.recording.traces] == ["toy"]
    # what a busy machine leaves of the samples is not for a test: times of our own
    readings = [replace(meter.read(), t_ns=i * 10**8) for i in range(11)]
    trace = replace(Trace.of(meter.described(), readings), sensor=slow(meter.described()))
    energy = trace.energy(TimeWindow("run", 0, 10**9))
    assert (energy.meter, energy.covers, energy.reason) == ("toy", "the toy", None)
    assert energy.joules == pytest.approx(2.5)


def slow(sensor: Sensor) -> Sensor:
    """The sensor with the rate of the readings above."""
    return replace(sensor, rate_hz=10)


@pytest.mark.usefixtures("toy")
def test_a_machine_without_it_says_why(tmp_path: Path) -> None:
    (absent,) = (
        one for one in meters.probe(tmp_path) if isinstance(one, Absent) and one.name == "toy"
    )
    assert "this machine has no toy" in absent.reason


@pytest.mark.usefixtures("toy")
def test_a_user_names_it(machine: Path) -> None:
    meter = meters.from_option(f"toy:{machine}/sys/class/toy/power")
    assert isinstance(meter, Meter)
    assert meter.read().values == {"input": 2.5}
    with pytest.raises(UsageError, match="or adb:SERIAL or toy:PATH"):
        meters.from_option("tea")


@pytest.mark.usefixtures("toy")
def test_its_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("# toy\n1.5\n1.5\n1.5\n")
    (trace,) = meters.read_log(log)
    assert (trace.sensor.name, trace.sensor.quantity) == ("toy", "power")
    assert [*trace.series("input")[1]] == [1.5, 1.5, 1.5]


def test_without_its_row_nothing_knows_it(machine: Path) -> None:
    assert not any(one.name == "toy" for one in meters.probe(machine))
