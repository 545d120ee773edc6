"""The power of a run is that of the whole device, or there is no number and the reason is given."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeq.core.errors import DeviceError
from edgeq.devices.energy import TimeWindow
from edgeq.devices.meters import Sensor, Trace, absent_of, meters_of, probe, probe_android
from edgeq.devices.recorder import Recorder, Recording
from tests.devices.meters.test_sysfs import HWMON, one, rapl, tree, why

SUPPLIES = "sys/class/power_supply"


def supply(root: Path, name: str, **files: object) -> Path:
    return tree(root, {f"{SUPPLIES}/{name}/{key}": value for key, value in files.items()})


def battery(root: Path, name: str, **files: object) -> Path:
    return supply(root, name, **{"type": "Battery", "present": 1, "status": "Discharging"} | files)


def test_two_batteries_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.devices.energy.UNSEEN", 0.95)  # a busy machine may pause
    battery(tmp_path, "BAT0", power_now=10_000_000)
    battery(tmp_path, "BAT1", current_now=-500_000, voltage_now=12_000_000)
    with Recorder(probe(tmp_path), rate_hz=None) as recorder, recorder.window("run"):
        time.sleep(4.2)
    energy = recorder.recording.energy("run")
    assert energy.joules == pytest.approx(16 * energy.seconds)
    assert energy.meter == "battery/BAT0+BAT1"
    assert energy.covers == "the whole device, out of its 2 batteries"


@pytest.mark.parametrize("at_rest", ["Not charging", "Full", "Unknown"])
def test_a_battery_at_rest_adds_nothing_until_it_takes_over(tmp_path: Path, at_rest: str) -> None:
    battery(tmp_path, "BAT0", power_now=10_000_000)
    battery(tmp_path, "BAT1", power_now=0, status=at_rest)
    meter = one(probe(tmp_path), "battery/BAT0+BAT1")
    assert meter.read().values == {"BAT0": pytest.approx(10), "BAT1": 0}
    battery(tmp_path, "BAT0", power_now=0, status=at_rest)
    battery(tmp_path, "BAT1", power_now=9_000_000)
    assert meter.read().values == {"BAT0": 0, "BAT1": pytest.approx(9)}


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"power_now": 4_000_000, "status": "Charging"}, "battery BAT1 is charging"),
        ({"power_now": 4_000_000, "status": "Unknown"}, "battery BAT1 is unknown"),
        ({"energy_now": 4_000_000}, "BAT1 has neither power_now nor current_now"),
    ],
)
def test_a_second_battery_that_cannot_be_counted_leaves_no_number(
    tmp_path: Path, second: dict[str, object], words: str
) -> None:
    battery(tmp_path, "BAT0", power_now=10_000_000)
    battery(tmp_path, "BAT1", **second)
    assert words in why(probe(tmp_path), "battery/BAT0+BAT1")


def test_a_removed_battery_is_reported_and_the_other_is_read(tmp_path: Path) -> None:
    battery(tmp_path, "BAT0", power_now=10_000_000)
    battery(tmp_path, "BAT1", present=0)
    found = probe(tmp_path)
    assert one(found, "battery/BAT0").read().values == {"battery": pytest.approx(10)}
    assert "not inserted" in why(found, "battery/BAT1")


@pytest.mark.parametrize("kind", ["Mains", "USB", "Wireless", "USB_PD"])
@pytest.mark.parametrize("online", [1, 2])
def test_a_charger_beside_a_discharging_battery_leaves_no_number(
    tmp_path: Path, kind: str, online: int
) -> None:
    battery(tmp_path, "BAT0", power_now=10_000_000)
    supply(tmp_path, "ADP1", type=kind, online=0)
    meter = one(probe(tmp_path), "battery/BAT0")
    assert meter.read().values == {"battery": pytest.approx(10)}
    supply(tmp_path, "ADP1", online=online)
    with pytest.raises(DeviceError, match="charger ADP1 is connected"):
        meter.read()
    assert "gives only a part" in why(probe(tmp_path), "battery/BAT0")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("hidpp_battery_0", {"type": "Battery", "scope": "Device", "capacity": 80}),
        ("hid-00:1f-battery", {"type": "Battery", "capacity": 80}),
        ("wacom_battery_0", {"type": "Battery", "scope": "Device", "power_now": 300_000}),
        ("wacom_ac_0", {"type": "Mains", "scope": "Device", "online": 1}),
        ("ups0", {"type": "UPS", "online": 1, "power_now": 90_000_000}),
    ],
)
def test_supplies_that_do_not_feed_the_machine_do_not_count(
    tmp_path: Path, name: str, files: dict[str, object]
) -> None:
    battery(tmp_path, "BAT0", power_now=10_000_000)
    supply(tmp_path, name, **{"status": "Discharging", "present": 1} | files)
    meter = one(probe(tmp_path), "battery/BAT0")
    assert meter.read().values == {"battery": pytest.approx(10)}


def test_a_battery_that_reports_nothing_or_other_units_is_refused(tmp_path: Path) -> None:
    battery(tmp_path, "BAT0", power_now=0)
    assert "0 W while discharging" in why(probe(tmp_path), "battery/BAT0")
    # milliwatts where the kernel has microwatts
    battery(tmp_path, "BAT0", power_now=9_600, current_now=800_000, voltage_now=12_000_000)
    assert "not in the kernel's units" in why(probe(tmp_path), "battery/BAT0")
    battery(tmp_path, "BAT0", power_now=9_600_000)
    meter = one(probe(tmp_path), "battery/BAT0")
    assert meter.read().values == {"battery": pytest.approx(9.6)}


def test_the_chip_of_a_battery_is_no_second_meter(tmp_path: Path) -> None:
    battery(tmp_path, "BAT0", power_now=10_000_000)
    supply(tmp_path, "hidpp-battery-0", type="Battery", scope="Device", capacity=50)
    tree(tmp_path, {f"{HWMON}/name": "BAT0", f"{HWMON}/power1_input": 10_000_000})
    mouse = HWMON.replace("hwmon0", "hwmon1")
    tree(tmp_path, {f"{mouse}/name": "hidpp_battery_0", f"{mouse}/power1_input": 1})
    assert [m.name for m in meters_of(probe(tmp_path)) if m.quantity == "power"] == ["battery/BAT0"]


def test_one_of_two_input_meters_is_not_the_whole(tmp_path: Path) -> None:
    for n in (0, 1):
        chip = HWMON.replace("hwmon0", f"hwmon{n}")
        tree(tmp_path, {f"{chip}/name": "power_meter", f"{chip}/power1_average": 180_000_000})
        scopes = {m.scope for m in meters_of(probe(tmp_path)) if m.name.startswith("hwmon/")}
        assert scopes == {"part" if n else "board"}


def test_two_rails_of_one_label_are_both_there(tmp_path: Path) -> None:
    files = {"name": "pmbus", "power1_input": 1_000_000, "power1_label": "pout",
             "power2_input": 2_000_000, "power2_label": "pout"}  # fmt: skip
    tree(tmp_path, {f"{HWMON}/{name}": value for name, value in files.items()})
    meter = one(probe(tmp_path), "hwmon/hwmon0")
    assert meter.read().values == {"pout": pytest.approx(1), "pout power2": pytest.approx(2)}
    assert meter.scope == "part"


def test_a_package_that_cannot_be_read_leaves_no_total(tmp_path: Path) -> None:
    rapl(tmp_path)
    second = "sys/class/powercap/intel-rapl:2"
    tree(tmp_path, {f"{second}/name": "package-1", f"{second}/max_energy_range_uj": 10**11})
    assert "intel-rapl:2/energy_uj" in why(probe(tmp_path), "rapl")
    tree(tmp_path, {f"{second}/energy_uj": 3_000_000})
    meter = one(probe(tmp_path), "rapl")
    assert meter.total == ("package-0", "package-1", "package-0/dram")
    tree(tmp_path, {f"{second}:0/name": "dram", f"{second}:0/max_energy_range_uj": 10**11})
    assert one(probe(tmp_path), "rapl").total == ("package-0", "package-1")


def test_two_packages_of_one_name_are_both_counted(tmp_path: Path) -> None:
    rapl(tmp_path)
    second = "sys/class/powercap/intel-rapl:2"
    tree(tmp_path, {f"{second}/name": "package-0", f"{second}/max_energy_range_uj": 10**11,
                    f"{second}/energy_uj": 3_000_000})  # fmt: skip
    meter = one(probe(tmp_path), "rapl")
    values = meter.read().values
    packages = [values[c] for c in meter.total if not c.endswith("dram")]
    assert packages == [pytest.approx(240422.366267), pytest.approx(3)]


# What the samples say


def trace(name: str, scope: str, quantity: str, watts: Callable[[float], float]) -> Trace:
    seconds = np.arange(0, 40.5, 0.5)
    sensor = Sensor(
        name=name, quantity=quantity, provenance="a test", rate_hz=2, scope=scope, total=("all",)
    )
    values = {"all": np.array([watts(s) for s in seconds], np.float64)}
    return Trace(sensor, np.rint(seconds * 1e9).astype(np.int64), values)


IDLE, RUN = TimeWindow("idle", 0, 20 * 10**9), TimeWindow("run", 20 * 10**9, 40 * 10**9)


def recording(*traces: Trace) -> Recording:
    return Recording(traces, (), (IDLE, RUN), (), 0, 40 * 10**9, 0, 0.0)


def test_one_rail_of_several_does_not_stand_for_the_run() -> None:
    core, memory = (trace(n, "rail", "power", lambda s: 2.0) for n in ("core", "memory"))
    assert recording(core).energy("run").joules == pytest.approx(40)
    both = recording(core, memory)
    assert "core and memory each measure one supply rail" in str(both.energy("run").reason)
    assert both.energy("run", meter="memory").joules == pytest.approx(40)
    whole = recording(core, memory, trace("socket", "package", "power", lambda s: 5.0))
    assert whole.energy("run").joules == pytest.approx(100)


def test_a_meter_that_shows_no_load_is_no_measurement() -> None:
    stuck = recording(trace("stuck", "board", "power", lambda s: 5.1))
    assert stuck.energy("run").joules == pytest.approx(102)
    assert "does not tell the load from idle" in str(stuck.energy("run", idle="idle").reason)
    loaded = recording(trace("loaded", "board", "power", lambda s: 5.1 + (s >= 20)))
    assert loaded.energy("run", idle="idle").joules == pytest.approx(20, rel=0.02)


def test_a_counter_that_stands_still_is_no_measurement() -> None:
    still = recording(trace("still", "package", "energy", lambda s: 7.0))
    assert "the counter stood still" in str(still.energy("run").reason)


# Android

DUMPSYS = """\
  AC powered: false
  USB powered: false
  Wireless powered: false
  Charge counter: 1500000
  status: 3
  level: 50
  scale: 100
  voltage: 3900
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("1500000", "1500", "a battery of 3 mAh; the counter is not in microampere-hours"),
        ("1500000", "1500000000", "a battery of 3e+06 mAh"),
        ("3900", "4", "a voltage of 4 is not in millivolts"),
        ("3900", "3900000", "a voltage of 3.9e+06 is not in millivolts"),
    ],
)
def test_a_phone_that_counts_in_other_units_is_refused(old: str, new: str, words: str) -> None:
    (meter,) = meters_of(probe_android(lambda argv: DUMPSYS))
    assert meter.read().values == {"battery": 0}
    (absent,) = absent_of(probe_android(lambda argv: DUMPSYS.replace(old, new)))
    assert words in absent.reason
