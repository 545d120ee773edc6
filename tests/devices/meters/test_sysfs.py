"""Meters that read the kernel's files: small trees of our own, and real ones where there are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgeq.core.errors import DeviceError, UsageError
from edgeq.devices import meters
from edgeq.devices.meters import Absent, Meter, absent_of, meters_of, probe
from edgeq.devices.meters.base import read_number, run_here
from edgeq.devices.throttling import parse_throttled
from tests.conftest import need

RAPL = "sys/class/powercap/intel-rapl:0"
BATTERY = "sys/class/power_supply/BAT0"
HWMON = "sys/class/hwmon/hwmon0"
MODEL = "proc/device-tree/model"


def tree(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def one(found: Sequence[Meter | Absent], name: str) -> Meter:
    return next(m for m in meters_of(found) if m.name == name)


def why(found: Sequence[Meter | Absent], name: str) -> str:
    return next(a.reason for a in absent_of(found) if a.name == name)


def rapl(root: Path) -> Path:
    return tree(
        root,
        {
            f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": 240422366267,
            f"{RAPL}/max_energy_range_uj": 262143328850,
            f"{RAPL}:0/name": "core", f"{RAPL}:0/energy_uj": 118821284256,
            f"{RAPL}:0/max_energy_range_uj": 262143328850,
            f"{RAPL}:1/name": "dram", f"{RAPL}:1/energy_uj": 5_000_000,
            f"{RAPL}:1/max_energy_range_uj": 65712999613,
            "sys/class/powercap/intel-rapl:1/name": "psys",
            "sys/class/powercap/intel-rapl:1/energy_uj": 7_000_000,
            "sys/class/powercap/intel-rapl:1/max_energy_range_uj": 262143328850,
            "sys/class/powercap/intel-rapl-mmio:0/name": "package-0",
            "sys/class/powercap/intel-rapl-mmio:0/energy_uj": 240422366267,
        },
    )  # fmt: skip


def test_nothing_anywhere_says_why(tmp_path: Path) -> None:
    found = probe(tmp_path)
    assert not meters_of(found)
    assert {a.name for a in absent_of(found)} == {
        "pmic", "hwmon", "battery", "rapl", "thermal", "cpu-temperature", "cpufreq", "throttled",
        "throttle",
    }  # fmt: skip
    assert all(a.reason for a in absent_of(found))


def test_rapl_counts_packages_and_memory_once(tmp_path: Path) -> None:
    meter = one(probe(rapl(tmp_path)), "rapl")
    assert (meter.quantity, meter.unit, meter.scope) == ("energy", "J", "package")
    assert meter.read().values == {
        "package-0": pytest.approx(240422.366267),
        "package-0/core": pytest.approx(118821.284256),
        "package-0/dram": pytest.approx(5),
        "psys": pytest.approx(7),
    }
    assert meter.total == ("package-0", "package-0/dram")
    assert meter.wraps["package-0"] == pytest.approx(262143.32885)
    assert str(tmp_path / "sys/class/powercap") in meter.provenance


def test_rapl_zone_that_vanishes_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    meter = one(probe(rapl(tmp_path)), "rapl")
    (tmp_path / f"{RAPL}:1/energy_uj").unlink()
    sample = meter.read()
    assert "package-0" in sample.values
    assert "package-0/dram" not in sample.values
    assert "No such file" in sample.problems[0]
    for path in tmp_path.glob("sys/class/powercap/*/energy_uj"):
        path.unlink()
    with pytest.raises(DeviceError, match="No such file"):
        meter.read()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_rapl_that_only_root_may_read_says_how_to_mend_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = rapl(Path(folder))
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        for path in root.rglob("energy_uj"):
            path.chmod(0)
        with as_nobody():
            reason = why(probe(root), "rapl")
    assert "permission denied" in reason
    assert "since Linux 5.10 only root may read it: sudo chmod a+r" in reason


@pytest.mark.parametrize("text", ["", "nan", "abc", "inf", "12 34"])
def test_text_that_is_no_number(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(DeviceError, match="expected a number"):
        read_number(tmp_path / "x")


def test_ina219_gives_its_power(tmp_path: Path) -> None:
    files = {"name": "ina219", "in0_input": 12, "in1_input": 5064, "curr1_input": 812,
             "power1_input": 4_112_000}  # fmt: skip
    meter = one(probe(tree(tmp_path, {f"{HWMON}/{n}": v for n, v in files.items()})),
                "hwmon/hwmon0")  # fmt: skip
    assert meter.read().values == {"power1": pytest.approx(4.112)}
    assert (meter.total, meter.scope) == (("power1",), "rail")


def test_ina226_without_power_is_voltage_times_current(tmp_path: Path) -> None:
    files = {"name": "ina226", "in1_input": 5000, "curr1_input": 900}
    meter = one(probe(tree(tmp_path, {f"{HWMON}/{n}": v for n, v in files.items()})),
                "hwmon/hwmon0")  # fmt: skip
    assert meter.read().values == {"channel1": pytest.approx(4.5)}


def test_ina3221_of_a_jetson(tmp_path: Path) -> None:
    files = {
        "name": "ina3221",
        "in1_label": "VDD_IN", "in1_input": 5080, "curr1_input": 950,
        "in2_label": "VDD_CPU_GPU_CV", "in2_input": 5072, "curr2_input": 102,
        "in3_label": "VDD_SOC", "in3_input": 5072, "curr3_input": 290,
        # sums and shunt voltages, whose product would be nonsense
        "in4_input": 10, "curr4_input": 1342, "in7_input": 15,
    }  # fmt: skip
    meter = one(probe(tree(tmp_path, {f"{HWMON}/{n}": v for n, v in files.items()})),
                "hwmon/hwmon0")  # fmt: skip
    assert meter.read().values == {
        "VDD_IN": pytest.approx(5.08 * 0.95),
        "VDD_CPU_GPU_CV": pytest.approx(5.072 * 0.102),
        "VDD_SOC": pytest.approx(5.072 * 0.29),
    }
    assert (meter.total, meter.scope) == (("VDD_IN",), "board")  # not the sum, which counts twice


def test_ina3221_channels_that_are_off_or_not_connected(tmp_path: Path) -> None:
    files = {
        "name": "ina3221",
        "in1_label": "VDD_A", "in1_input": 5000, "curr1_input": 100,
        "in2_label": "NC", "in2_input": 0, "curr2_input": 0,
        "in3_label": "VDD_C", "in3_enable": 0, "in3_input": 0, "curr3_input": 0,
    }  # fmt: skip
    meter = one(probe(tree(tmp_path, {f"{HWMON}/{n}": v for n, v in files.items()})),
                "hwmon/hwmon0")  # fmt: skip
    assert set(meter.read().values) == {"VDD_A"}


def test_jetson_nano_by_the_old_driver(tmp_path: Path) -> None:
    chip = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    rails = [("POM_5V_IN", 2103), ("POM_5V_GPU", 80), ("POM_5V_CPU", 322)]
    files = {f"{chip}/rail_name_{n}": rail for n, (rail, _) in enumerate(rails)}
    files |= {f"{chip}/in_power{n}_input": mw for n, (_, mw) in enumerate(rails)}
    meter = one(probe(tree(tmp_path, files)), "hwmon/6-0040")
    assert meter.read().values == {rail: pytest.approx(mw / 1e3) for rail, mw in rails}
    assert meter.total == ("POM_5V_IN",)


def test_graphics_card_does_not_stand_for_the_run(tmp_path: Path) -> None:
    files = {"name": "amdgpu", "power1_average": 30_000_000, "power1_label": "PPT"}
    meter = one(probe(tree(tmp_path, {f"{HWMON}/{n}": v for n, v in files.items()})),
                "hwmon/hwmon0")  # fmt: skip
    assert meter.read().values == {"PPT": pytest.approx(30)}
    assert meter.scope == "part"


def test_hwmon_without_power(tmp_path: Path) -> None:
    tree(tmp_path, {f"{HWMON}/name": "coretemp", f"{HWMON}/temp1_input": 55000})
    assert "none of its 1 chips measures power" in why(probe(tmp_path), "hwmon")


def battery(root: Path, **files: object) -> Path:
    given = {"type": "Battery", "present": 1, "status": "Discharging"} | files
    return tree(root, {f"{BATTERY}/{name}": value for name, value in given.items()})


def test_battery_power(tmp_path: Path) -> None:
    meter = one(probe(battery(tmp_path, power_now=5_002_000)), "battery/BAT0")
    assert meter.read().values == {"battery": pytest.approx(5.002)}
    assert meter.scope == "board"


@pytest.mark.parametrize("microamps", [-430_000, 430_000])
def test_battery_current_has_either_sign(tmp_path: Path, microamps: int) -> None:
    battery(tmp_path, current_now=microamps, voltage_now=11_660_000)
    meter = one(probe(tmp_path), "battery/BAT0")
    assert meter.read().values == {"battery": pytest.approx(0.43 * 11.66)}


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging", "Unknown"])
def test_battery_that_does_not_discharge_measures_nothing(tmp_path: Path, status: str) -> None:
    reason = why(probe(battery(tmp_path, power_now=5_002_000, status=status)), "battery/BAT0")
    assert status.casefold() in reason
    assert "unplug the charger" in reason


def test_charger_plugged_in_while_measuring(tmp_path: Path) -> None:
    meter = one(probe(battery(tmp_path, power_now=5_002_000)), "battery/BAT0")
    battery(tmp_path, power_now=30_000_000, status="Charging")
    with pytest.raises(DeviceError, match="charging"):
        meter.read()


def test_batteries_that_do_not_count(tmp_path: Path) -> None:
    assert "neither power_now" in why(probe(battery(tmp_path)), "battery/BAT0")
    assert "not inserted" in why(probe(battery(tmp_path, present=0)), "battery/BAT0")
    battery(tmp_path, power_now=1, scope="Device")
    assert "no battery" in why(probe(tmp_path), "battery")


def test_temperatures_clock_and_throttle_counts(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu"
    tree(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone0/temp": 61500,
            "sys/class/thermal/thermal_zone1/type": "cpu-thermal",
            "sys/class/thermal/thermal_zone1/temp": 48000,
            f"{HWMON}/name": "k10temp", f"{HWMON}/temp1_input": 55125,
            f"{HWMON}/temp1_label": "Tctl",
            "sys/class/hwmon/hwmon1/name": "nvme", "sys/class/hwmon/hwmon1/temp1_input": 40000,
            f"{cpu}/cpufreq/policy0/scaling_cur_freq": 2400000,
            f"{cpu}/cpufreq/policy4/scaling_cur_freq": 1500000,
            f"{cpu}/cpu0/thermal_throttle/core_throttle_count": 5,
            f"{cpu}/cpu10/thermal_throttle/core_throttle_count": 7,
        },
    )  # fmt: skip
    found = probe(tmp_path)
    assert one(found, "thermal").read().values == {
        "cpu-thermal": 61.5, "cpu-thermal thermal_zone1": 48.0,
    }  # fmt: skip
    assert one(found, "cpu-temperature").read().values == {"k10temp Tctl": pytest.approx(55.125)}
    assert one(found, "cpufreq").read().values == {"policy0": 2.4e9, "policy4": 1.5e9}
    assert one(found, "throttle").read().values == {"cpu0 core": 5, "cpu10 core": 7}


def test_flags_of_a_raspberry_pi(tmp_path: Path) -> None:
    tree(tmp_path, {MODEL: "Raspberry Pi 4 Model B Rev 1.4\0"})
    asked = []

    def run(argv: Sequence[str]) -> str:
        asked.append(list(argv))
        return "throttled=0x50005\n"

    meter = one(probe(tmp_path, run=run), "throttled")
    assert meter.read().values == {
        "under-voltage": 1, "frequency capped": 0, "throttled": 1, "soft temperature limit": 0,
        "under-voltage since start": 1, "frequency capped since start": 0,
        "throttled since start": 1, "soft temperature limit since start": 0,
    }  # fmt: skip
    assert asked[-1] == ["vcgencmd", "get_throttled"]
    tree(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": "e0008"})
    from_file = one(probe(tmp_path), "throttled").read().values
    assert from_file["soft temperature limit"] == 1
    assert from_file["under-voltage"] == 0
    assert parse_throttled("throttled=0x0") == dict.fromkeys(from_file, False)
    with pytest.raises(DeviceError, match="expected throttled"):
        parse_throttled("VCHI initialization failed")


def test_command_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="not installed"):
        run_here(["edgeq-no-such-command"])
    with pytest.raises(DeviceError, match="exit code 3; no such camera"):
        run_here(["sh", "-c", "echo no such camera >&2; exit 3"])


def test_option_of_a_meter_is_checked() -> None:
    with pytest.raises(UsageError, match="expected serial:"):
        meters.from_option("usb:1")
    with pytest.raises(DeviceError, match="cannot be opened"):
        meters.from_option("serial:/nowhere/ttyACM0")


# The trees of Prometheus' node_exporter and procfs, text archives made by its "ttar".


def unpack(archive: Path, root: Path) -> Path:
    """The parts of a ttar archive that meters look at."""
    wanted = ("powercap", "power_supply", "hwmon", "thermal", "cpufreq", "cpu/cpu")
    entries = archive.read_text("utf-8", errors="replace").split(
        "# ttar - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - -\n"
    )
    for entry in entries:
        lines = entry.splitlines()
        named = next((line for line in lines if line.startswith("Path: ")), None)
        if named is None or not any(word in named for word in wanted):
            continue
        path = root / named.removeprefix("Path: ")
        path.parent.mkdir(parents=True, exist_ok=True)
        at = lines.index(named) + 1
        kind, _, value = lines[at].partition(": ")
        if kind == "SymlinkTo":
            path.symlink_to(value)
        else:
            path.write_text("".join(f"{x}\n" for x in lines[at + 1 : at + 1 + int(value)]))
    return root


@pytest.fixture(scope="module")
def node_exporter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = need("data/sysfs_fixtures/sys.ttar")
    return unpack(archive, tmp_path_factory.mktemp("node_exporter"))


@pytest.fixture(scope="module")
def procfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = need("data/sysfs_fixtures/fixtures.ttar")
    return unpack(archive, tmp_path_factory.mktemp("procfs")) / "fixtures"


def test_node_exporter_tree(node_exporter: Path) -> None:
    found = probe(node_exporter)
    assert one(found, "rapl").read().values == {
        "package-0": pytest.approx(240422.366267), "package-0/core": pytest.approx(118821.284256),
    }  # fmt: skip
    assert one(found, "battery/BAT0").read().values == {"battery": pytest.approx(5.002)}
    assert one(found, "thermal").read().values == {"cpu-thermal": pytest.approx(12.376)}
    heat = one(found, "cpu-temperature").read().values
    assert heat["coretemp Core 3"] == 50
    assert heat["coretemp Core 3 hwmon1"] == 50
    assert len(heat) == 10
    clock = one(found, "cpufreq").read().values
    assert clock == {"cpu0": 1699981e3, "cpu1": 1699981e3, "cpu2": 8e6, "cpu3": 8e6}
    assert one(found, "throttle").read().values["cpu3 core"] == 9
    assert "chips measures power" in why(found, "hwmon")


def test_procfs_tree(procfs: Path) -> None:
    found = probe(procfs)
    meter = one(found, "rapl")
    assert meter.total == ("package-0", "package-10")
    assert meter.read().values["package-10"] == pytest.approx(240422.366267)
    assert one(found, "battery/BAT0").read().values == {"battery": pytest.approx(4.83)}
    assert one(found, "thermal").read().values == {
        "bcm2835_thermal": pytest.approx(49.925), "acpitz": -44,
    }  # fmt: skip
    assert one(found, "cpufreq").read().values == {"policy0": 1219917e3}
    assert one(found, "throttle").read().values["cpu0 package"] == 34818
