"""Energy of windows: integration, edges, counters that turn over, idle, and what cannot be told."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.core.errors import DeviceError, FormatError, UsageError
from edgeq.devices.energy import (
    Energy,
    TimeWindow,
    joules_of_counter,
    joules_of_power,
    per_token,
)
from edgeq.devices.meters import Reading, Sensor, Trace

SECOND = 1_000_000_000


def window(start_s: float, end_s: float, label: str = "run") -> TimeWindow:
    return TimeWindow(label, round(start_s * SECOND), round(end_s * SECOND))


def trace(
    quantity: str, times_s: list[float], values: list[float], rate_hz: float = 10, **more: object
) -> Trace:
    sensor = Sensor(
        name="meter", quantity=quantity, provenance="a test", rate_hz=rate_hz,
        total=("all",), **more,
    )  # fmt: skip
    samples = [Reading(round(t * SECOND), {"all": v}) for t, v in zip(times_s, values, strict=True)]
    return Trace.of(sensor, samples)


def tenths(n: int) -> list[float]:
    return [i / 10 for i in range(n)]


def test_constant_power_times_time() -> None:
    found = trace("power", tenths(101), [5.0] * 101).energy(window(2, 4.5))
    assert found.joules == pytest.approx(12.5)
    assert found.mean_watts == pytest.approx(5)
    assert found.reason is None
    assert (found.meter, found.provenance, found.rate_hz) == ("meter", "a test", 10)
    assert found.samples == 26
    assert found.idle_watts is None


def test_only_the_window_counts() -> None:
    # 100 W before and after, as while a model is loaded; 2 W in the window
    watts = [2.0 if 3 <= t <= 7 else 100.0 for t in tenths(101)]
    assert trace("power", tenths(101), watts).energy(window(3, 7)).joules == pytest.approx(8)


def test_edges_between_samples_are_interpolated() -> None:
    times = tenths(21)
    found = trace("power", times, [10 * t for t in times]).energy(window(0.55, 1.45))
    assert found.joules == pytest.approx(10 * (1.45**2 - 0.55**2) / 2)


@given(
    st.lists(st.floats(0, 100), min_size=41, max_size=41),
    st.floats(0.5, 1.5),
    st.floats(2.0, 3.5),
)
def test_neighboring_windows_add_up(watts: list[float], first: float, second: float) -> None:
    t_ns = np.arange(41, dtype=np.int64) * SECOND // 10
    counter = np.cumsum(watts)
    for of, values in ((joules_of_power, np.array(watts)), (joules_of_counter, counter)):
        parts = [(0.1, first), (first, second), (second, 3.9)]
        added = sum(of(t_ns, values, window(a, b), 10) for a, b in parts)
        assert added == pytest.approx(of(t_ns, values, window(0.1, 3.9), 10), abs=1e-5)


def test_counter_is_a_difference() -> None:
    times = tenths(101)
    found = trace("energy", times, [7 * t + 1000 for t in times]).energy(window(2.03, 8.01))
    assert found.joules == pytest.approx(7 * 5.98)
    assert found.mean_watts == pytest.approx(7)


def test_counter_turns_over() -> None:
    # 50 W on a counter of 65.5 J: four turns in five seconds
    times, limit = tenths(51), 65.536
    turning = [(60 + 50 * t) % limit for t in times]
    of = trace("energy", times, turning, wraps={"all": limit})
    found = of.energy(window(0.5, 4.5))
    assert found.joules == pytest.approx(200)
    assert found.problems == ()


def test_counter_without_a_limit_that_falls_is_not_believed() -> None:
    times = tenths(51)
    fell = [100 + 5 * t if t < 2 else 5 * (t - 2) for t in times]
    found = trace("energy", times, fell).energy(window(1, 4))
    assert found.joules is None
    assert "the counter fell" in str(found.reason)
    assert trace("energy", times, fell).energy(window(0.5, 1.5)).joules == pytest.approx(5)


def test_leap_of_a_counter_is_left_out() -> None:
    times = tenths(51)
    joules = [5 * t for t in times]
    joules[20] = 1e9
    found = trace("energy", times, joules).energy(window(1, 4))
    assert found.joules == pytest.approx(15)
    assert "leapt" in found.problems[0]


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf, -3.0, 1e6])
def test_invalid_samples_are_left_out_and_counted(nonsense: float) -> None:
    watts = [5.0] * 101
    watts[50] = nonsense
    found = trace("power", tenths(101), watts).energy(window(2, 8))
    assert found.joules == pytest.approx(30)
    if math.isnan(nonsense):  # nan in a trace is a value that was not read
        assert found.problems == ()
    else:
        assert "is not possible" in found.problems[0]


@pytest.mark.parametrize("quantity", ["power", "energy"])
def test_all_nonsense_is_no_zero(quantity: str) -> None:
    found = trace(quantity, tenths(51), [-1.0] * 51).energy(window(1, 4))
    assert found.joules is None
    assert found.mean_watts is None
    assert "0 samples" in str(found.reason)
    assert "not possible (51 times)" in str(found.reason)


@pytest.mark.parametrize("quantity", ["power", "energy"])
def test_sensor_that_vanishes_in_the_window(quantity: str) -> None:
    times = [t for t in tenths(101) if t < 5]
    values = [5.0 * t for t in times] if quantity == "energy" else [5.0] * len(times)
    of = trace(quantity, times, values)
    assert of.energy(window(1, 4)).joules == pytest.approx(15)
    found = of.energy(window(3, 9))
    assert found.joules is None
    assert "no good sample for" in str(found.reason)


def test_hole_costs_power_but_not_a_counter() -> None:
    times = [t for t in tenths(101) if not 4 < t < 6]
    assert trace("power", times, [5.0] * len(times)).energy(window(2, 8)).joules is None
    counted = trace("energy", times, [5 * t for t in times]).energy(window(2, 8))
    assert counted.joules == pytest.approx(30)


def test_hole_at_the_edge_costs_a_counter_too() -> None:
    times = [t for t in tenths(101) if not 4 < t < 6]
    found = trace("energy", times, [5 * t for t in times]).energy(window(5, 9))
    assert found.joules is None


def test_window_shorter_than_the_sensor_can_see() -> None:
    found = trace("power", tenths(101), [5.0] * 101).energy(window(2.01, 2.15))
    assert found.joules is None
    assert "1 samples in the 0.14 s of run; at least 3" in str(found.reason)


def test_slow_sensor_is_judged_by_the_rate_it_kept() -> None:
    times = [t / 2 for t in range(41)]  # promised 10 a second, gave 2
    found = trace("power", times, [5.0] * 41).energy(window(3.2, 17.7))
    assert found.joules == pytest.approx(5 * 14.5)


def test_idle_is_subtracted() -> None:
    times = tenths(201)
    of = trace("power", times, [3.0 if t < 10 else 8.0 for t in times])
    found = of.energy(window(11, 19), idle=window(1, 9, "idle"))
    assert found.joules == pytest.approx(40)
    assert found.mean_watts == pytest.approx(5)
    assert found.idle_watts == pytest.approx(3)
    assert of.energy(window(11, 19), idle=2.5).joules == pytest.approx(44)


def test_unknown_idle_power_leaves_no_number() -> None:
    of = trace("power", tenths(101), [5.0] * 101)
    found = of.energy(window(2, 8), idle=window(20, 25, "idle"))
    assert found.joules is None
    assert "of idle" in str(found.reason)
    assert found.idle_watts is None


def test_less_than_idle_is_no_energy() -> None:
    found = trace("power", tenths(101), [5.0] * 101).energy(window(2, 8), idle=6.0)
    assert found.joules is None
    assert "measure idle again" in str(found.reason)


def test_sensor_whose_channels_do_not_add_up_is_asked_by_channel() -> None:
    sensor = Sensor(name="chip", quantity="power", provenance="a test", rate_hz=10)
    samples = [Reading(i * SECOND // 10, {"gpu": 2.0, "cpu": 3.0}) for i in range(51)]
    of = Trace.of(sensor, samples)
    assert "ask for one of gpu, cpu" in str(of.energy(window(1, 4)).reason)
    found = of.energy(window(1, 4), channel="cpu")
    assert (found.joules, found.covers) == (pytest.approx(9), "cpu")
    assert of.energy(window(1, 4), channel="ram").joules is None


def test_temperature_has_no_energy() -> None:
    found = trace("temperature", tenths(51), [50.0] * 51).energy(window(1, 4))
    assert "measures temperature" in str(found.reason)


def test_an_energy_has_joules_or_a_reason() -> None:
    with pytest.raises(UsageError, match="joules or the reason"):
        Energy(None, None, 1.0)
    with pytest.raises(UsageError, match="joules or the reason"):
        Energy(1.0, "but", 1.0)
    with pytest.raises(UsageError, match="nan"):
        Energy(math.nan, None, 1.0)


def test_window_ends_after_it_starts() -> None:
    with pytest.raises(UsageError, match="end later"):
        window(2, 2)


def test_per_token_over_repeats() -> None:
    found = per_token([Energy(j, None, 1.0) for j in (10.0, 12.0, 14.0)], [10, 10, 10])
    assert (found.mean, found.std) == (pytest.approx(1.2), pytest.approx(0.2))
    assert found.reason is None


def test_per_token_keeps_missing_repeats_missing() -> None:
    found = per_token([Energy(10.0, None, 1.0), Energy(None, "it vanished", 1.0)], [10, 10])
    assert found.samples == (1.0, None)
    assert (found.mean, found.std, found.reason) == (1.0, None, "it vanished")


def test_per_token_of_nothing_is_none() -> None:
    found = per_token([Energy(None, "no sensor", 1.0)] * 3, [10, 10, 10])
    assert (found.mean, found.std) == (None, None)
    assert found.reason == "no sensor"
    assert per_token([], []).mean is None
    with pytest.raises(UsageError, match="one positive count"):
        per_token([Energy(1.0, None, 1.0)], [0])


def test_trace_survives_json() -> None:
    sensor = Sensor(
        name="rapl", quantity="energy", provenance="/sys", rate_hz=10, scope="package",
        total=("a",), wraps={"a": 65.5},
    )  # fmt: skip
    samples = [
        Reading(2, {"a": 3.0}), Reading(1, {"a": 1.0, "b": 2.0}, ("it coughed",)), Reading(3, {}),
    ]  # fmt: skip
    first = Trace.of(sensor, samples, {"it coughed": 1}, "unix")
    text = json.dumps(first.to_json(), allow_nan=False)
    second = Trace.from_json(json.loads(text))
    assert second.sensor == sensor
    assert second.t_ns.tolist() == [1, 2, 3]
    assert second.values["a"].tolist()[:2] == [1.0, 3.0]
    assert np.isnan(second.values["b"]).tolist() == [False, True, True]
    assert (second.problems, second.clock) == ({"it coughed": 2}, "unix")
    with pytest.raises(FormatError, match="not a trace"):
        Trace.from_json({"name": "x"})


def test_sensor_is_checked() -> None:
    with pytest.raises(UsageError, match="did you mean 'power'"):
        Sensor(name="x", quantity="powr", provenance="", rate_hz=1)
    with pytest.raises(UsageError, match="must be positive"):
        Sensor(name="x", quantity="power", provenance="", rate_hz=0)


def test_too_few_samples_say_so() -> None:
    with pytest.raises(DeviceError, match="measure for longer"):
        joules_of_power(np.zeros(0, np.int64), np.zeros(0), window(0, 1), 10)
