"""Recorder: samples meters during a run, at little cost, and divides the run into windows.

Loading and warming up stay outside the windows, so that their energy is not counted:

    with Recorder(meters.probe()) as recorder:
        with recorder.window("idle"):
            time.sleep(30)
        with recorder.window("decode"):
            engine.greedy(token, 256)
    recorder.recording.energy("decode", idle="idle")
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from edgeq.core.errors import DeviceError, FormatError, UsageError, unknown
from edgeq.devices.energy import Energy, TimeWindow
from edgeq.devices.meters.base import SCOPES, Absent, Meter, Reading, absent_of, meters_of
from edgeq.devices.meters.trace import Trace

FIRST_S = 1.0
"""Seconds that starting waits for the meters' first samples."""

BUDGET = 0.005
"""The part of a core that sampling one meter may take; one that costs more is asked less often."""

TOGETHER_S = 0.02
"""Seconds before it is due that a meter is sampled, if another is."""

LAST_S = 3.0
"""Seconds that stopping waits for a meter that does not answer."""

_ENERGETIC = ("power", "energy")


@dataclass(frozen=True)
class Recording:
    """The values of the meters, and the windows of a run.

    Args:
        traces: one per meter that gave anything or failed.
        absent: meters that could not be read from the start.
        windows: in the order they ended; labels may repeat.
        marks: (label, t_ns) of moments.
        start_ns: when sampling began, `time.monotonic_ns`.
        end_ns: when it ended.
        unix_ns: what to add to get nanoseconds since 1970.
        cpu_seconds: processor time that sampling took in this process.
    """

    traces: tuple[Trace, ...]
    absent: tuple[Absent, ...]
    windows: tuple[TimeWindow, ...]
    marks: tuple[tuple[str, int], ...]
    start_ns: int
    end_ns: int
    unix_ns: int
    cpu_seconds: float

    @property
    def load(self) -> float:
        """The part of one core that sampling took."""
        return self.cpu_seconds * 1e9 / max(self.end_ns - self.start_ns, 1)

    def trace(self, name: str) -> Trace | None:
        """The trace of a meter, or None if there is none."""
        return next((t for t in self.traces if t.sensor.name == name), None)

    def named(self, label: str) -> tuple[TimeWindow, ...]:
        """All windows of a label, in order."""
        return tuple(w for w in self.windows if w.label == label)

    def energy(
        self,
        window: TimeWindow | str,
        *,
        idle: TimeWindow | str | None = None,
        meter: str | None = None,
        channel: str | None = None,
    ) -> Energy:
        """The energy of a window by the most telling meter that can tell it.

        The order is that of `SCOPES`, then of the meters. A part, such as a graphics card, does
        not stand for the run and is asked only by name; neither does one rail of several.
        Where a better meter fails, the answer of the next carries its reason among the problems.

        Args:
            window: one of the recording's, or the label of the only one that has it.
            idle: one in which nothing ran, whose power is subtracted.
            meter: name of the one to ask.
            channel: of that meter, instead of its total.

        Raises:
            UsageError: no window, or more than one, has that label.
        """
        window = self._window(window)
        idle = None if idle is None else self._window(idle)
        asked = [t for t in self.traces if t.sensor.quantity in _ENERGETIC]
        if meter is not None:
            asked = [t for t in asked if t.sensor.name == meter]
        else:
            asked = [t for t in asked if t.sensor.scope != "part"]
        asked.sort(key=lambda t: SCOPES.index(t.sensor.scope))
        failed: list[str] = []
        rails = [t.sensor.name for t in asked if t.sensor.scope == "rail"]
        if len(rails) > 1:
            asked = [t for t in asked if t.sensor.scope != "rail"]
        for trace in asked:
            energy = trace.energy(window, idle=idle, channel=channel)
            if energy.reason is None:
                return replace(energy, problems=(*energy.problems, *failed))
            failed.append(energy.reason)
        if len(rails) > 1:
            failed.append(
                f"{' and '.join(rails)} each measure one supply rail, and none of them is the "
                "whole device; ask for one by its name"
            )
        if not failed:
            failed = [
                f"{a.name}: {a.reason}"
                for a in self.absent
                if a.quantity in _ENERGETIC and meter in (None, a.name)
            ]
        nothing = "no meter of power or energy" + (f" named {meter!r}" if meter else "")
        return Energy(None, "; ".join(failed) or nothing, window.seconds)

    def align(self, trace: Trace) -> Trace:
        """A trace that something else recorded meanwhile, on this recording's clock.

        Raises:
            DeviceError: its times count from something that only its meter knows, or it has no
                sample between the recording's start and its end.
        """
        if trace.clock == "own":
            raise DeviceError(
                f"{trace.sensor.name}: the times of {trace.sensor.provenance} do not say when it "
                "began; record it with times since 1970"
            )
        if trace.clock == "unix":
            trace = trace.shifted(-self.unix_ns, "monotonic")
        if not trace.within(TimeWindow("the run", self.start_ns, self.end_ns)).t_ns.size:
            raise DeviceError(
                f"{trace.sensor.name}: {trace.sensor.provenance} was recorded {self._span(trace)}, "
                f"and the run lasted {self._span(self)}; give the log of the run's own time (a "
                "log that names no time zone is read in this machine's)"
            )
        return trace

    def _span(self, of: Trace | Recording) -> str:
        """When something began and ended, in words, local time."""
        if isinstance(of, Recording):
            ends = (of.start_ns, of.end_ns)
        elif not of.t_ns.size:
            return "without a single sample"
        else:
            ends = (int(of.t_ns[0]), int(of.t_ns[-1]))
        first, last = (datetime.fromtimestamp((t + self.unix_ns) / 1e9).astimezone() for t in ends)
        return f"from {first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S} ({last:%Z})"

    def joined(self, traces: Iterable[Trace]) -> Recording:
        """This recording with other traces, aligned."""
        more = tuple(self.align(trace) for trace in traces)
        return replace(self, traces=self.traces + more)

    def to_json(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "start_ns": self.start_ns,
            "end_ns": self.end_ns,
            "unix_ns": self.unix_ns,
            "cpu_seconds": self.cpu_seconds,
            "windows": [[w.label, w.start_ns, w.end_ns] for w in self.windows],
            "marks": [[label, t_ns] for label, t_ns in self.marks],
            "absent": [asdict(a) for a in self.absent],
            "traces": [trace.to_json() for trace in self.traces],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recording:
        """The recording that `to_json` wrote.

        Raises:
            FormatError: something is missing or of the wrong kind.
        """
        try:
            return cls(
                tuple(Trace.from_json(trace) for trace in data["traces"]),
                tuple(Absent(**absent) for absent in data["absent"]),
                tuple(TimeWindow(*window) for window in data["windows"]),
                tuple((label, t_ns) for label, t_ns in data["marks"]),
                data["start_ns"],
                data["end_ns"],
                data["unix_ns"],
                data["cpu_seconds"],
            )
        except (KeyError, TypeError, ValueError) as err:
            raise FormatError(f"not a recording of meters: {type(err).__name__} {err}") from err

    def _window(self, wanted: TimeWindow | str) -> TimeWindow:
        if isinstance(wanted, TimeWindow):
            return wanted
        named = self.named(wanted)
        if len(named) == 1:
            return named[0]
        if named:
            raise UsageError(f"{len(named)} windows are called {wanted!r}; give one of named()")
        raise UsageError(unknown("window", wanted, {w.label for w in self.windows}))


class Recorder:
    """Samples meters on a thread, and those that keep it waiting each on one of their own.

    Args:
        meters: what to sample; those absent are noted.
        rate_hz: samples per second at most; each meter's own rate if None.
    """

    def __init__(self, meters: Iterable[Meter | Absent], rate_hz: float | None = None) -> None:
        if rate_hz is not None and not rate_hz > 0:
            raise UsageError(f"a rate of {rate_hz} Hz; must be positive")
        chosen = list(meters)
        self._absent = tuple(absent_of(chosen))
        self._order = meters_of(chosen)
        self._loops = _loops(self._order, rate_hz)
        self._windows: list[TimeWindow] = []
        self._marks: list[tuple[str, int]] = []
        self._start_ns: int | None = None
        self._recording: Recording | None = None

    def start(self) -> None:
        """Begin sampling; returns when every meter has answered once, or after a second."""
        if self._start_ns is not None:
            raise UsageError("a recorder records once; make a new one")
        self._start_ns = time.monotonic_ns()
        limit = time.monotonic() + FIRST_S
        for loop in self._loops:
            loop.thread.start()
        for loop in self._loops:
            loop.answered.wait(max(limit - time.monotonic(), 0))

    def stop(self) -> Recording:
        """End sampling, after one last sample of every meter."""
        if self._start_ns is None:
            raise UsageError("the recorder was not started")
        if self._recording is None:
            unix_ns = time.time_ns() - time.monotonic_ns()
            for loop in self._loops:
                loop.ending.set()
            limit = time.monotonic() + LAST_S
            traces = [trace for loop in self._loops for trace in loop.finish(limit)]
            names = [meter.name for meter in self._order]
            self._recording = Recording(
                tuple(sorted(traces, key=lambda trace: names.index(trace.sensor.name))),
                self._absent,
                tuple(self._windows),
                tuple(self._marks),
                self._start_ns,
                time.monotonic_ns(),
                unix_ns,
                sum(loop.cpu_ns for loop in self._loops) / 1e9,
            )
        return self._recording

    @property
    def recording(self) -> Recording:
        """What was recorded, once stopped."""
        if self._recording is None:
            raise UsageError("still recording; stop the recorder first")
        return self._recording

    def mark(self, label: str) -> None:
        """Note this moment."""
        self._marks.append((label, time.monotonic_ns()))

    @contextmanager
    def window(self, label: str) -> Iterator[None]:
        """Record a window for the time of the block; a block that fails leaves none."""
        start_ns = time.monotonic_ns()
        yield
        self.add_window(label, start_ns, time.monotonic_ns())

    def add_window(self, label: str, start_ns: int, end_ns: int) -> TimeWindow:
        """Note a stretch that was timed elsewhere, by `time.monotonic_ns`."""
        window = TimeWindow(label, start_ns, max(end_ns, start_ns + 1))
        self._windows.append(window)
        return window

    def __enter__(self) -> Recorder:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass
class _Track:
    """The readings of one meter, and when it is read again."""

    meter: Meter
    period: float
    samples: list[Reading] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)
    due: float = 0.0

    def read(self) -> None:
        """Ask once, and set when next; at once only if the meter itself waits for its next."""
        before = time.thread_time()
        good = False
        try:
            self.samples.append(self.meter.read())
            good = True
        except DeviceError as err:
            self.problems[str(err)] += 1
        except Exception as err:  # noqa: BLE001 - a sensor's fault must never end a run
            self.problems[f"{type(err).__name__}: {err}"] += 1
        now = time.monotonic()
        if good and self.meter.pushes:
            self.due = now
        else:
            cost = time.thread_time() - before
            self.due = max(self.due + self.period, now + cost / BUDGET)


class _Loop:
    """A thread and the meters it samples."""

    def __init__(self, tracks: list[_Track]) -> None:
        self.tracks = tracks
        self.answered = threading.Event()
        self.ending = threading.Event()
        self.cpu_ns = 0
        # a daemon: a sensor that hangs must not keep the program from ending
        names = ", ".join(track.meter.name for track in tracks)
        self.thread = threading.Thread(target=self._run, name=f"meters {names}", daemon=True)

    def _run(self) -> None:
        began = time.monotonic()
        for track in self.tracks:
            track.due = began
        while True:
            last = self.ending.is_set()
            # those due soon are taken along: waking up costs more than reading
            soon = time.monotonic() + TOGETHER_S
            for track in self.tracks:
                if last or track.due <= soon:
                    track.read()
            self.answered.set()
            self.cpu_ns = time.thread_time_ns()
            if last:
                return
            next_due = min(track.due for track in self.tracks)
            self.ending.wait(max(next_due - time.monotonic(), 0))

    def finish(self, limit: float) -> list[Trace]:
        """The traces so far; a thread that hangs is abandoned and reported."""
        self.thread.join(max(limit - time.monotonic(), 0))
        traces = []
        for track in self.tracks:
            problems = Counter(track.problems)
            if self.thread.is_alive():
                problems["did not answer when it was asked for the last sample"] += 1
            traces.append(Trace.of(track.meter.described(), list(track.samples), problems))
        return traces


def _loops(meters: list[Meter], rate_hz: float | None) -> list[_Loop]:
    """A thread for all meters that answer at once, and one for each of the others."""
    tracks = [_Track(m, 1 / min(m.rate_hz, rate_hz or m.rate_hz)) for m in meters]
    quick = [track for track in tracks if not track.meter.waits]
    slow = [[track] for track in tracks if track.meter.waits]
    return [_Loop(group) for group in [quick, *slow] if group]
