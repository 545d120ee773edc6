"""One profiling run as a JSON document: raw samples, operations and the values of the meters.

docs/profile.md describes each field. Only raw numbers are stored; `edgeq.profiling.summary`
derives medians, percentiles and joules from them. Reports and remote runs read and write it here.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeq._version import __version__
from edgeq.core.cpu import this_cpu
from edgeq.core.documents import read_document
from edgeq.core.errors import DeviceError, EdgeqError, FormatError
from edgeq.core.files import write_whole
from edgeq.devices.contention import Contention, Watch
from edgeq.devices.meters import Trace
from edgeq.devices.recorder import Recording
from edgeq.profiling.operations import Operations
from edgeq.profiling.session import Round, Workload

FORMAT, FORMAT_VERSION = "edgeq-profile", 1
IDLE = "idle"
"""The window of the recording in which nothing ran."""

_PROGRAMS = {
    "powermetrics": ("a Mac", ("macos", "darwin")),
    "tegrastats": ("an NVIDIA Jetson", ("aarch64", "arm64")),
}
"""Programs that record the power of the machine they run on: what machine that is, and words of
which its operating system's or its processor's name has one."""


@dataclass(frozen=True)
class Run:
    """The measurements of one model.

    Args:
        subject: its description.
        samples: raw times, those of the warm-up too; none if it was not run.
        operations: the times of its operations; None if they were not requested.
        peak_rss_bytes: peak memory of the process while it ran; None if unknown, as it is if
            several models alternate.
        estimate: figures that are estimated, not measured; None if not requested.
    """

    subject: Mapping[str, Any]
    samples: tuple[Round, ...]
    operations: Operations | None = None
    peak_rss_bytes: int | None = None
    estimate: Mapping[str, Any] | None = None

    @property
    def timed(self) -> tuple[Round, ...]:
        """The samples after the warm-up."""
        return tuple(s for s in self.samples if s.round >= 0)


@dataclass(frozen=True)
class Document:
    """A profiling run.

    Args:
        workload: what every subject did in turns.
        runs: one for each subject.
        environment: the machine; see `environment`.
        recording: the values of the meters meanwhile; its window `IDLE` is there if idle power was
            measured.
        created: UTC, ISO 8601.
        tool: name and version of what measured.
    """

    workload: Workload
    runs: tuple[Run, ...]
    environment: Mapping[str, Any]
    recording: Recording
    created: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    tool: str = f"edgeq {__version__}"

    @property
    def contention(self) -> Contention | None:
        """What else used the processor during the run; None if that was not recorded."""
        return _contention(self.environment, "contention")

    @property
    def limits_contention(self) -> Contention | None:
        """What else used the processor while the machine's limits were measured."""
        return _contention(self.environment, "limits_contention")

    def with_logs(self, traces: Sequence[Trace]) -> Document:
        """The run with what other programs recorded of it meanwhile.

        Raises:
            DeviceError: a log is of another machine or of another time.
        """
        for trace in traces:
            self._check_machine(trace)
        return replace(self, recording=self.recording.joined(traces))

    def _check_machine(self, trace: Trace) -> None:
        """Refuse logs of programs that the machine of this run does not have."""
        program = trace.sensor.name.partition("-")[0]
        machine = f"{self.environment.get('os', '')} {self.environment.get('arch', '')}"
        of, words = _PROGRAMS.get(program, ("", ()))
        if words and not any(word in machine.casefold() for word in words):
            raise DeviceError(
                f"{trace.sensor.provenance} is a log of {program}, which runs on {of}, and the run "
                f"was on {machine.strip()}: it is the power of another machine"
            )

    def to_json(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "created": self.created,
            "tool": self.tool,
            "environment": dict(self.environment),
            "workload": asdict(self.workload),
            "runs": [
                {
                    "subject": dict(run.subject),
                    "samples": [sample.to_json() for sample in run.samples],
                    "operations": run.operations and run.operations.to_json(),
                    "peak_rss_bytes": run.peak_rss_bytes,
                    "estimate": run.estimate and dict(run.estimate),
                }
                for run in self.runs
            ],
            "recording": self.recording.to_json(),
        }

    @classmethod
    def from_json(cls, data: Any, name: str = "the document") -> Document:
        """The document that `to_json` wrote.

        Raises:
            FormatError: it is not a profile, of a later version, or damaged.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise FormatError(
                f"{name} is not a profile of edgeq; make one with edgeq profile -o run.json"
            )
        if data.get("format_version") != FORMAT_VERSION:
            raise FormatError(
                f"{name} is of format version {data.get('format_version')}, this edgeq reads "
                f"{FORMAT_VERSION}; upgrade edgeq or profile again"
            )
        try:
            runs = tuple(
                Run(
                    run["subject"],
                    tuple(Round.from_json(sample) for sample in run["samples"]),
                    run["operations"] and Operations.from_json(run["operations"]),
                    run["peak_rss_bytes"],
                    run["estimate"],
                )
                for run in data["runs"]
            )
            return cls(
                Workload(**data["workload"]),
                runs,
                data["environment"],
                Recording.from_json(data["recording"]),
                data["created"],
                data["tool"],
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, EdgeqError) as err:
            raise FormatError(f"{name} is damaged: {type(err).__name__} {err}") from err


def _contention(environment: Mapping[str, Any], key: str) -> Contention | None:
    data = environment.get(key)
    return None if data is None else Contention.from_json(data)


def write(document: Document, path: str | Path) -> None:
    """Write a document, whole or not at all.

    Raises:
        EdgeqError: it cannot be written.
    """
    text = json.dumps(document.to_json(), allow_nan=False)
    write_whole(Path(path), [text.encode(), b"\n"], "the profile")


def read(path: str | Path) -> Document:
    """Read a document.

    Raises:
        FormatError: it cannot be read, or is not a profile.
    """
    path = Path(path)
    return Document.from_json(read_document(path), str(path))


def environment(kernels_on: Sequence[int] = ()) -> dict[str, Any]:
    """The machine, and what its memory and its integer units can do at most.

    Args:
        kernels_on: numbers of threads to measure the limits with, which needs compiled kernels
            and takes a moment; none leaves them unmeasured.

    Returns:
        facts of the machine. "limits_contention" is what else used the processor while the limits
        were measured; `edgeq.profiling.profile.profile` adds "contention" of the run itself.
    """
    cpu = this_cpu()
    environment: dict[str, Any] = {
        "os": platform.platform(),
        "python": platform.python_version(),
        "arch": cpu.arch,
        "cpu": cpu.name,
        "isa": sorted(cpu.features),
        "cores": cpu.cores,
        "read_gb_s": {},
        "int8_gops": {},
    }
    if kernels_on:
        from edgeq.runtime.kernels import int8_throughput, read_bandwidth

        watch = Watch()
        for threads in sorted(set(kernels_on)):
            environment["read_gb_s"][str(threads)] = read_bandwidth(threads)
            environment["int8_gops"][str(threads)] = int8_throughput(threads)
        environment["limits_contention"] = watch.stop().to_json()
    return environment
