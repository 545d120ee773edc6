"""Meters that read text: commands' output, logs of other programs, traces, serial lines."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.core.errors import DeviceError, FormatError, UsageError
from edgeq.devices.energy import TimeWindow
from edgeq.devices.meters import (
    Absent,
    from_option,
    meters_of,
    powermetrics,
    probe,
    probe_android,
    read_log,
    serial_lines,
    tegrastats,
    traces,
)
from edgeq.devices.meters.android import charge
from edgeq.devices.meters.pmic import input_watts, rail_watts
from edgeq.devices.meters.serial_lines import Lines
from edgeq.devices.throttling import parse_throttled
from tests.conftest import need

# Raspberry Pi 5

PMIC = """\
   3V3_SYS_A current(1)=0.08000000A
  VDD_CORE_A current(7)=1.50000000A
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.80000000V
     EXT5V_V volt(24)=5.08530000V
      BATT_V volt(25)=0.00000000V
"""


def pi5(root: Path) -> Path:
    model = root / "proc/device-tree/model"
    model.parent.mkdir(parents=True)
    model.write_text("Raspberry Pi 5 Model B Rev 1.0\0")
    return root


def pmic(root: Path, answers: Sequence[str]) -> tuple[list[str], object]:
    left = list(answers)

    def run(argv: Sequence[str]) -> str:
        if list(argv) == ["vcgencmd", "get_throttled"]:
            return "throttled=0x0\n"
        assert list(argv) == ["vcgencmd", "pmic_read_adc"]
        if not left:
            raise DeviceError("vcgencmd pmic_read_adc: exit code 255; Can't open /dev/vcio")
        return left.pop(0)

    return left, next(m for m in probe(pi5(root), run=run) if m.name == "pmic")


def test_pmic_rails_and_the_correction_to_the_input(tmp_path: Path) -> None:
    _, meter = pmic(tmp_path, [PMIC, PMIC])
    rails = 0.08 * 3.3 + 1.5 * 0.8
    assert meter.read().values == {
        "3V3_SYS": pytest.approx(0.264),
        "VDD_CORE": pytest.approx(1.2),
        "rails": pytest.approx(rails),
        "input": pytest.approx(1.1451 * rails + 0.5879),
    }
    assert meter.total == ("input",)
    assert "jfikar/RPi5-power" in meter.provenance
    with pytest.raises(DeviceError, match="vcio"):
        meter.read()


def test_pmic_of_a_real_board() -> None:
    text = need("data/power_text_dev/rpi5_pmic_read_adc_a.txt").read_text()
    # current * voltage of the twelve rails, in the order of the dump
    by_hand = (
        0.09466522 * 3.62925200  # 3V7_WL_SW
        + 0.08197812 * 3.31652900  # 3V3_SYS
        + 0.15029320 * 1.79877700  # 1V8_SYS
        + 0.00390372 * 1.10146400  # DDR_VDD2
        + 0.00000000 * 0.60622650  # DDR_VDDQ
        + 0.20299340 * 1.10402800  # 1V1_SYS
        + 0.30546610 * 0.79853400  # 0V8_SW
        + 1.11625000 * 0.74944980  # VDD_CORE
        + 0.00000000 * 3.31043600  # 3V3_DAC
        + 0.00018315 * 3.31684600  # 3V3_ADC
        + 0.00274725 * 0.79794790  # 0V8_AON
        + 0.01660560 * 5.10138000  # HDMI
    )
    rails = rail_watts(text)
    assert len(rails) == 12
    assert sum(rails.values()) == pytest.approx(by_hand, rel=1e-12)
    assert input_watts(by_hand) == pytest.approx(1.1451 * by_hand + 0.5879)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("VCHI initialization failed", "no rails"),
        ("", "no rails"),
        (PMIC.replace("VDD_CORE_V", "VDD_COLD_V"), "no voltage for VDD_CORE"),
        (PMIC.replace("1.50000000A", "nanA"), "VDD_CORE_A: expected a number"),
        (PMIC.replace("0.80000000V", "--V"), "VDD_CORE_V: expected a number"),
    ],
)
def test_pmic_nonsense(text: str, complaint: str) -> None:
    with pytest.raises(DeviceError, match=complaint):
        rail_watts(text)


def test_pmic_that_may_not_be_read_says_how_to_mend_it(tmp_path: Path) -> None:
    _, found = pmic(tmp_path, [])
    assert isinstance(found, Absent)
    assert "usermod -aG video" in found.reason


def test_pmic_of_a_copied_tree_is_not_asked(tmp_path: Path) -> None:
    found = next(m for m in probe(pi5(tmp_path)) if m.name == "pmic")
    assert isinstance(found, Absent)
    assert "not a running system" in found.reason


# Android

DUMPSYS = """\
Current Battery Service state:
  AC powered: false
  USB powered: false
  Wireless powered: false
  Max charging current: 0
  Charge counter: 3270000
  status: 3
  present: true
  level: 100
  voltage: 4000
  temperature: 274
  technology: Li-ion
"""


def test_android_counts_what_left_the_battery() -> None:
    dumps = [DUMPSYS, *(DUMPSYS.replace("3270000", str(n)) for n in (3270000, 3269000, 3267000))]
    dumps[-1] = dumps[-1].replace("4000", "3900")
    (meter,) = meters_of(probe_android(lambda argv: dumps.pop(0)))
    drawn = [meter.read().values["battery"] for _ in range(3)]
    # 1 mAh at 4 V is 14.4 J; 2 mAh at 3.95 V, the mean of before and after, 28.44 J
    assert drawn == [0, pytest.approx(14.4), pytest.approx(14.4 + 28.44)]
    assert (meter.quantity, meter.scope) == ("energy", "board")


def test_android_counter_that_rises_is_not_counted() -> None:
    dumps = [DUMPSYS.replace("3270000", str(n)) for n in (3000100, 3000100, 3000300, 3000200)]
    (meter,) = meters_of(probe_android(lambda argv: dumps.pop(0)))
    assert meter.read().values == {"battery": 0}
    with pytest.raises(DeviceError, match="rose by"):
        meter.read()
    assert meter.read().values == {"battery": pytest.approx(100 * 3.6e-3 * 4)}


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("USB powered: false", "USB powered: true", "USB powered.*adb over Wi-Fi"),
        ("status: 3", "status: 2", "the battery is charging"),
        ("status: 3", "status: 5", "the battery is full"),
        ("status: 3", "status: 77", "in no known state"),
        ("Charge counter: 3270000", "", "Charge counter: expected a number, got ''"),
        ("Charge counter: 3270000", "Charge counter: 0", "does not report its charge"),
        ("voltage: 4000", "voltage: ?", "voltage: expected a number"),
        ("state:", "state:\n (UPDATES STOPPED -- use 'reset' to restart)", "frozen by a test"),
        (DUMPSYS, "Can't find service: battery", "in no known state"),
    ],
)
def test_android_refuses(old: str, new: str, complaint: str) -> None:
    (found,) = probe_android(lambda argv: DUMPSYS.replace(old, new))
    assert isinstance(found, Absent)
    assert re.search(complaint, found.reason)


def test_android_that_is_plugged_in_for_real() -> None:
    text = need("data/power_text_dev/android_dumpsys_battery_usb.txt").read_text()
    with pytest.raises(DeviceError, match="USB powered"):
        charge(text)
    unplugged = text.replace("USB powered: true", "USB powered: false")
    assert charge(unplugged.replace("status: 5", "status: 3")) == (
        pytest.approx(3270000 * 3.6e-3),
        4.352,
    )


# Jetson

TEGRA = (
    "{stamp} RAM 6185/7620MB (lfb 8x2MB) SWAP 851/3810MB (cached 1MB) "
    "CPU [15%@729,off,14%@1420] EMC_FREQ 43%@2133 GR3D_FREQ 63%@[621] VIC off APE 200 "
    "cpu@53.968C tj@54.5C PMIC@100C VDD_IN {mw}mW/12479mW VDD_SOC 2817mW/2817mW"
)


def test_tegrastats_line() -> None:
    found = tegrastats.parse_line(TEGRA.format(stamp="11-15-2024 08:38:09", mw=12479))
    assert found["power"] == {"VDD_IN": 12.479, "VDD_SOC": 2.817}
    assert found["temperature"] == {"cpu": 53.968, "tj": 54.5}
    assert found["frequency"] == {"EMC": 2133e6, "GR3D": 621e6, "cpu0": 729e6, "cpu2": 1420e6}
    with pytest.raises(DeviceError, match="not a line of tegrastats"):
        tegrastats.parse_line("VDD_IN 5mW/5mW")


def test_tegrastats_of_a_jetson_nano_has_no_units() -> None:
    line = "RAM 1/3964MB (lfb 1x4MB) CPU [2%@102] POM_5V_IN 2103/2100 POM_5V_CPU 322/300"
    assert tegrastats.parse_line(line)["power"] == {"POM_5V_IN": 2.103, "POM_5V_CPU": 0.322}


def test_tegrastats_log(tmp_path: Path) -> None:
    lines = [TEGRA.format(stamp=f"11-15-2024 08:38:{i:02}", mw=5000 + 100 * i) for i in range(31)]
    lines.insert(7, "tegrastats: interrupted")
    path = tmp_path / "tegra.log"
    path.write_text("\n".join(lines))
    power, heat, clock = read_log(path)
    start = datetime(2024, 11, 15, 8, 38).timestamp()
    assert power.clock == "unix"
    window = TimeWindow("run", round((start + 5) * 1e9), round((start + 25) * 1e9))
    found = power.energy(window)
    assert found.joules == pytest.approx(20 * 6.5)
    assert found.covers == "Jetson, VDD_IN"
    assert "not a line of tegrastats" in found.problems[0]
    assert heat.values["tj"].tolist() == [54.5] * 31
    assert clock.values["cpu2"][0] == 1.42e9


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="this system has one time zone")
@pytest.mark.parametrize(("zone", "hours"), [("UTC", 0), ("JST-9", -9), ("EST5", 5)])
def test_local_times_are_those_of_this_machine_s_zone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zone: str, hours: int
) -> None:
    """A log of hours earlier, taken as UTC, would lie on a run of now."""
    tegra, analyzer = tmp_path / "tegra.log", tmp_path / "spl.txt"
    lines = [TEGRA.format(stamp=f"11-15-2024 08:38:{i:02}", mw=5000) for i in range(9)]
    tegra.write_text("\n".join(lines))
    analyzer.write_text("Time,11-15-2024 08:38:00.000,Watts,3.0,Mark,run\n")
    utc = datetime(2024, 11, 15, 8, 38, tzinfo=UTC).timestamp()
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        found = [read_log(path)[0].t_ns[0] / 1e9 for path in (tegra, analyzer)]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert found == [utc + 3600 * hours] * 2


def test_tegrastats_faster_than_its_stamps(tmp_path: Path) -> None:
    path = tmp_path / "tegra.log"
    path.write_text("\n".join([TEGRA.format(stamp="11-15-2024 08:38:00", mw=4000)] * 5))
    trace = tegrastats.read(path, interval_s=0.1)[0]
    assert trace.clock == "own"
    assert trace.t_ns.tolist() == [0, 100_000_000, 200_000_000, 300_000_000, 400_000_000]


def test_tegrastats_of_a_real_board() -> None:
    power = read_log(need("data/power_text_dev/tegrastats_orin_nano.txt"))[0]
    assert {c: v.tolist() for c, v in power.values.items()} == {
        "VDD_IN": [12.479, 4.824],
        "VDD_CPU_GPU_CV": [4.667, 0.518],
        "VDD_SOC": [2.817, 1.475],
    }
    assert power.problems == {}


# macOS

SAMPLED = """\
*** Sampled system activity ({when}) ({ms}ms elapsed) ***

E-Cluster HW active frequency: 983 MHz
P0-Cluster HW active frequency: 3117 MHz
CPU 0 frequency: 980 MHz

CPU Power: {cpu} mW
GPU Power: 3 mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): {both} mW

Current pressure level: Nominal

GPU HW active frequency: 396 MHz
GPU Power: 3 mW
"""


def test_powermetrics_log(tmp_path: Path) -> None:
    began = datetime(2025, 6, 29, 23, 31, 20, tzinfo=UTC).timestamp() + 0.9
    text, ended = "Machine model: MacBookAir10,1\n", began
    for i in range(40):
        ended += 0.51
        when = datetime.fromtimestamp(int(ended), UTC).strftime("%a %b %d %H:%M:%S %Y +0000")
        text += SAMPLED.format(when=when, ms="510.00", cpu=1000 + 100 * i, both=1003 + 100 * i)
    text += "*** Sampled system activity (Sun Jun 29 23:31:41 2025 +0000) (510ms elapsed) ***\nCPU"
    path = tmp_path / "power.log"
    path.write_text(text)
    power, clock, pressure = read_log(path)
    assert power.clock == "unix"
    # stamps are whole seconds; all of them together place the log to within a few samples' part
    assert power.t_ns[0] / 1e9 == pytest.approx(began, abs=0.1)
    # each sample is a mean over its time, so whole samples give exact energy
    window = TimeWindow("run", int(power.t_ns[10]), int(power.t_ns[30]))
    expected = sum(1.003 + 0.1 * i for i in range(10, 30)) * 0.51
    assert power.energy(window).joules == pytest.approx(expected)
    assert power.energy(window, channel="gpu").joules == pytest.approx(0.003 * 20 * 0.51)
    (problem,) = power.energy(window).problems
    assert problem == "sample without all its powers; the log was read up to there"
    assert clock.values.keys() == {"E-Cluster", "P0-Cluster", "GPU"}
    assert clock.values["P0-Cluster"][0] == 3117e6
    assert pressure.values["pressure"].tolist() == [0.0] * 40


def test_powermetrics_of_an_intel_mac(tmp_path: Path) -> None:
    head = "*** Sampled system activity (Sun Jun 29 19:31:{:02} 2025 -0400) (1000ms elapsed) ***\n"
    body = "Intel energy model derived package power (CPUs+GT+SA): 5.25W\n"
    path = tmp_path / "power.log"
    path.write_text("".join(head.format(i) + body for i in range(10)))
    (power,) = powermetrics.read(path)
    window = TimeWindow("run", int(power.t_ns[2]), int(power.t_ns[8]))
    assert power.energy(window).joules == pytest.approx(6 * 5.25)
    assert power.energy(window).covers == "processor package"


def test_powermetrics_of_a_mac_that_slept(tmp_path: Path) -> None:
    head = "*** Sampled system activity (Sun Jun 29 19:{}:00 2025 -0400) (1000ms elapsed) ***\n"
    path = tmp_path / "power.log"
    path.write_text("".join(head.format(m) + "CPU Power: 5 mW\n" for m in (31, 32, 40)))
    (power,) = powermetrics.read(path)
    assert power.problems == {"its stamps and elapsed times disagree by 538 s; it slept": 1}
    assert power.sensor.total == ()


def test_powermetrics_without_power(tmp_path: Path) -> None:
    path = tmp_path / "power.log"
    path.write_text("*** Sampled system activity (now) (1000ms elapsed) ***\n")
    with pytest.raises(FormatError, match="cpu_power"):
        read_log(path)


def test_powermetrics_of_real_macs() -> None:
    for path in sorted(need("data/power_powermetrics_dev").glob("*.power")):
        text = path.read_text()
        power, clock, _ = read_log(path)
        elapsed = [float(ms) / 1e3 for ms in re.findall(r"\(([\d.]+)ms elapsed\)", text)]
        watts = [float(mw) / 1e3 for mw in re.findall(r"^Combined Power.*: (\d+) mW", text, re.M)]
        by_hand = sum(w * s for w, s in zip(watts, elapsed, strict=True))
        whole = TimeWindow("log", int(power.t_ns[0]), int(power.t_ns[-1]))
        found = power.energy(whole)
        assert found.joules == pytest.approx(by_hand, rel=1e-9)
        assert found.problems == ()
        assert whole.seconds == pytest.approx(sum(elapsed), abs=1e-6)
        assert clock.values.keys() == {"E-Cluster", "P-Cluster", "GPU"}
        stamp = re.search(r"activity \(([^()]+)\)", text)
        assert stamp
        first = datetime.strptime(stamp[1], "%a %b %d %H:%M:%S %Y %z").timestamp()
        assert 0 <= power.t_ns[1] / 1e9 - first < 1


# EEMBC and MLPerf


def eembc(path: Path, microjoules: Sequence[float], rate: float = 1000, head: int = 0xF1) -> Path:
    data = np.asarray(microjoules, "<f4").tobytes()
    path.write_bytes(bytes([head]) + struct.pack("<f", rate) + data)
    return path


def test_eembc_trace(tmp_path: Path) -> None:
    each = np.where(np.arange(10_000) // 2000 % 2, 40.0, 10.0)  # 40 mW and 10 mW, 2 s each
    eembc(tmp_path / "trace1-energy.bin", each)
    (tmp_path / "trace1-timestamps.json").write_text("[0.018, 2.0, 4.0, 6.0, 8.0]")
    (trace,) = read_log(tmp_path)
    assert [(w.start_ns, w.end_ns) for w in trace.windows] == [
        (2_000_000_000, 4_000_000_000),
        (6_000_000_000, 8_000_000_000),
    ]
    for window in trace.windows:
        found = trace.energy(window, idle=TimeWindow("idle", 0, 2_000_000_000))
        assert trace.energy(window).joules == pytest.approx(0.08, rel=1e-6)
        assert found.joules == pytest.approx(0.06, rel=1e-6)
    assert read_log(tmp_path / "trace1-energy.bin")[0].windows == trace.windows


def test_eembc_trace_gives_the_published_joules() -> None:
    folders = sorted(need("data/power_energy_traces_dev").glob("v0.5_*"))
    assert len(folders) == 3
    for folder in folders:
        (trace,) = read_log(folder)
        text = (folder / "results.txt").read_text()
        published = [float(uj) / 1e6 for uj in re.findall(r"Energy  +: +([\d.]+) uJ", text)]
        found = [trace.energy(window).joules for window in trace.windows]
        assert len(found) == 5
        assert found == pytest.approx(published, rel=0.005)
        # and over the repeats, where the rounding of one sample at the edges averages out
        assert sum(x or 0 for x in found) == pytest.approx(sum(published), rel=0.001)


def test_eembc_few_bad_samples_are_reported_and_many_refused(tmp_path: Path) -> None:
    each = np.full(1000, 40.0)
    each[100:103] = [np.nan, -5, np.inf]
    trace = traces.read_eembc(eembc(tmp_path / "trace1-energy.bin", each))
    found = trace.energy(TimeWindow("run", 0, 1_000_000_000))
    assert found.joules == pytest.approx(0.04)
    assert "the mean of its neighbors (3 times)" in found.problems[0]
    each[:500] = np.nan
    with pytest.raises(FormatError, match="500 of 1000 samples"):
        traces.read_eembc(eembc(tmp_path / "trace1-energy.bin", each))


def test_eembc_damage(tmp_path: Path) -> None:
    path = tmp_path / "trace1-energy.bin"
    with pytest.raises(FormatError, match="the first f2"):
        traces.read_eembc(eembc(path, [1.0] * 9, head=0xF2))
    with pytest.raises(FormatError, match="sample rate of nan"):
        traces.read_eembc(eembc(path, [1.0] * 9, rate=float("nan")))
    eembc(path, [1.0] * 9)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FormatError, match="not a whole EEMBC"):
        read_log(path)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="missing"):
        traces.read_eembc(path)
    eembc(path, [1.0] * 9)
    stamps = tmp_path / "trace1-timestamps.json"
    for text in ("[1, 3, 2]", "[1, null]", "[1, NaN]", "[1, Infinity]", "[1, 1e300]", "{", '["x"]'):
        stamps.write_text(text)
        with pytest.raises(FormatError, match="timestamps"):
            traces.read_eembc(path)
    stamps.unlink()
    assert traces.read_eembc(path).windows == ()
    with pytest.raises(FormatError, match="cannot be read"):
        traces.read_eembc(tmp_path / "absent.bin")
    (tmp_path / "trace2-energy.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="holds 2"):
        read_log(tmp_path)


def test_ptd_log_of_mlperf_power(tmp_path: Path) -> None:
    line = "Time,03-03-2021 00:42:{:02}.170,Watts,{},Volts,248.95,Amps,0.03,PF,0.41,Mark,{}_ranging"
    lines = [line.format(i, 3 + 0.1 * i, "run" if i > 9 else "idle") for i in range(40)]
    lines.insert(3, "Notes,something else")
    lines.insert(20, line.format(20, "-NaN", "run"))
    path = tmp_path / "spl.txt"
    path.write_text("\n".join(lines))
    (trace,) = read_log(path)
    assert [w.label for w in trace.windows] == ["idle_ranging", "run_ranging"]
    found = trace.energy(trace.windows[1])
    assert found.joules == pytest.approx((4.0 + 6.9) / 2 * 29)
    assert len(found.problems) == 2
    assert trace.clock == "unix"
    began = datetime(2021, 3, 3, 0, 42, 0, 170_000).timestamp()
    assert trace.t_ns[0] / 1e9 == pytest.approx(began)
    path.write_text("Time,yesterday,Watts,3")
    with pytest.raises(FormatError, match="no line like"):
        read_log(path)


# Serial lines


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("W=5.12", {"power": 5.12}),
        ("mW=5120;t=3.5", {"power": 5.12, "t": 3.5}),
        ("V=5.09, A=1.006 C=31", None),
        ("V=5.09,A=1.006", {"power": 5.09 * 1.006}),
        ("mV=5000\tmA=200", {"power": 1.0}),
        ("V=230 A=0.1 PF=0.5", {"power": 11.5}),  # of mains
        ("V=230 A=0.1 W=11.5 PF=0.5", {"power": 11.5}),
        ("V=230 A=0.1 Wh=2", {"energy": 7200.0}),
        ("Wh=0.5 W=3", {"energy": 1800.0, "power": 3.0}),
        ("# a comment", {}),
        ("  \r", {}),
    ],
)
def test_serial_line(line: str, values: dict[str, float] | None) -> None:
    found = serial_lines.Lines().values(line)
    if values is None:  # fields that are not known are passed over
        values = {"power": 5.09 * 1.006}
    assert found == pytest.approx(values)


@pytest.mark.parametrize(
    "line", ["hello", "5.1", "W=nan", "W=", "W=1e999", "V=5", "t=3", "W 5", "W=1 t=1e300",
             "V=230 A=0.1", "V=120,mA=90", "V=5 A=1 PF=1.5", "PF=0.5"]
)  # fmt: skip
def test_serial_nonsense(line: str) -> None:
    with pytest.raises(DeviceError):
        serial_lines.Lines().values(line)


def test_serial_columns() -> None:
    lines = serial_lines.Lines()
    assert lines.values("t, V, mA") == {}
    assert lines.values("1.5, 5.0, 300") == {"t": 1.5, "power": 1.5}
    with pytest.raises(DeviceError, match="neither"):
        lines.values("1.5, 5.0")


def test_serial_file(tmp_path: Path) -> None:
    path = tmp_path / "meter.csv"
    rows = [f"{i / 20},5,{i / 100}" for i in range(101)]
    rows[50] = "#### lost"
    rows[60] = "3.0,5,?"
    path.write_text("\n".join(["# a meter", "t,V,A", *rows]))
    (trace,) = read_log(path)
    assert trace.clock == "own"
    found = trace.energy(TimeWindow("run", 1_000_000_000, 4_000_000_000))
    assert found.joules == pytest.approx(sum(5 * 0.5 for _ in range(3)))
    assert "expected a number" in found.problems[0]
    path.write_text("\n".join(f"unix={1e9 + i} J={7 * i}" for i in range(9)))
    (counter,) = read_log(path)
    assert (counter.clock, counter.sensor.quantity) == ("unix", "energy")
    assert counter.energy(TimeWindow("run", 10**18 + 10**9, 10**18 + 6 * 10**9)).joules == 35


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("W=5\nW=6\n", "each needs its time"),
        ("W=5 t=1\nW=6\n", "each needs its time"),
        ("once upon a time\n", "0 lines of a power meter"),
        ("", "0 lines of a power meter"),
    ],
)
def test_serial_file_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "meter.txt"
    path.write_text(text)
    with pytest.raises(FormatError, match=complaint):
        read_log(path)


def test_serial_file_absent(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_log(tmp_path / "absent.txt")


@pytest.fixture
def pipe() -> Iterator[tuple[serial_lines.Stream, int]]:
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as stream:
        yield stream, write
        try:
            os.close(write)
        except OSError:  # a test has closed it
            return


def test_lines_as_they_arrive(pipe: tuple[serial_lines.Stream, int]) -> None:
    stream, write = pipe
    meter = serial_lines.live(stream, "/dev/meter")
    os.write(write, b"# hello\nW=5.5\nW=6.")
    first = meter.read()
    os.write(write, b"25\nrubbish\nV=5 A=1\n")
    second = meter.read()
    assert (first.values, second.values) == ({"input": 5.5}, {"input": 6.25})
    assert first.t_ns < second.t_ns
    with pytest.raises(DeviceError, match="rubbish"):
        meter.read()
    assert meter.read().values == {"input": 5}  # and reads on
    os.write(write, b"J=3\n")
    with pytest.raises(DeviceError, match="no power"):
        meter.read()
    os.close(write)
    with pytest.raises(DeviceError, match="ended or was unplugged"):
        meter.read()


def test_line_that_never_comes_or_never_ends(pipe: tuple[serial_lines.Stream, int]) -> None:
    stream, write = pipe
    live = serial_lines.live(stream, "/dev/meter")
    meter = serial_lines.LineMeter(**{**vars(live), "patience_s": 0.01})
    with pytest.raises(DeviceError, match=r"no line within 0\.01 s"):
        meter.read()
    os.write(write, b"\xff" * 5000)
    with pytest.raises(DeviceError, match="baud rate"):
        meter.read()
    os.write(write, b"\nW=1\n")
    assert meter.read().values == {"input": 1}


def test_running_tegrastats(pipe: tuple[serial_lines.Stream, int]) -> None:
    stream, write = pipe
    meter = tegrastats.live(stream)
    os.write(write, TEGRA.format(stamp="11-15-2024 08:38:09", mw=12479).encode() + b"\n")
    assert meter.read().values == {"VDD_IN": 12.479, "VDD_SOC": 2.817}
    assert meter.total == ("VDD_IN",)


def test_serial_port() -> None:
    ours, theirs = os.openpty()
    try:
        port = os.ttyname(theirs)
        os.write(ours, b"W=99 from long ago\n")
        meter = from_option(f"serial:{port}@9600")
        os.write(ours, b"W=4.5\r\n")
        assert meter.read().values == {"input": 4.5}
        assert meter.provenance == f"{port} at 9600 baud"
        meter.stream.close()
        with pytest.raises(UsageError, match="12345 baud"):
            from_option(f"serial:{port}@12345")
    finally:
        os.close(ours)
        os.close(theirs)


def test_json_of_a_log_is_whole(tmp_path: Path) -> None:
    eembc(tmp_path / "trace1-energy.bin", [40.0] * 50)
    held = json.dumps(read_log(tmp_path)[0].to_json(), allow_nan=False)
    assert json.loads(held)["unit"] == "J"


@given(st.one_of(st.text(), st.from_regex(r"(RAM \d+/\d+MB|W=|t=|Time,|\*\*\* Sampled).*")))
@settings(max_examples=200)
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (rail_watts, charge, parse_throttled, tegrastats.parse_line, Lines().values):
        with contextlib.suppress(DeviceError):
            read(text)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=60).map(lambda data: b"\xf1" + data),
        st.lists(
            st.sampled_from(
                [
                    *SAMPLED.format(when="now", ms="5", cpu=1, both=2).splitlines(),
                    "*** Sampled system activity (Sun Jun 29 19:31:00 2025 -0400) (0ms elapsed)",
                    TEGRA.format(stamp="99-99-2024 08:38:09", mw=1),
                    "t=1 W=2", "t,W", "3,4", "unix=5 J=6", "Time,03-03-2021 00:42:30.170,Watts,3,",
                ]
            )
        ).map(lambda lines: "\n".join(lines).encode()),
    )
)  # fmt: skip
@settings(max_examples=300)
def test_any_file_is_read_or_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any-energy.bin"
        path.write_bytes(data)
        with contextlib.suppress(FormatError):
            for trace in read_log(path):
                energy = trace.energy(TimeWindow("run", 0, 5_000_000_000))
                assert (energy.joules is None) != (energy.reason is None)
