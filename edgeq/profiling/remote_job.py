"""The part of `edgeq.profiling.remote` that runs on the other machine.

    python3 -m edgeq.profiling.remote_job job.json

needs Python, NumPy and, for compiled kernels, Numba; not the packages of the command line. Lines
of stdout that begin with `MARK` are for the other side.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeq.core.errors import EdgeqError
from edgeq.model.kv_bits import KvBits
from edgeq.profiling.session import Workload

MARK = "edgeq:"
RESULT = "run.json"
"""Where the document is written."""
_EVERY_S = 1.0
"""Seconds between two reports of progress, at least: telling costs time of what is measured."""


@dataclass(frozen=True)
class Job:
    """A profile to make.

    Args:
        models: (path relative to the folder, target or None) of each.
        workload: what each does.
        threads, kv_bits, backend, idle_seconds, operations: as `edgeq.profiling.profile.profile`.
        meters: as the user named them, read over there.
        estimate: name of a device profile, or a TOML file in the folder.
    """

    models: tuple[tuple[str, str | None], ...]
    workload: Workload
    threads: int | None
    kv_bits: KvBits
    backend: str
    meters: tuple[str, ...]
    idle_seconds: float
    operations: bool
    estimate: str | None

    def to_json(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> Job:
        """The job that `to_json` wrote."""
        models = tuple((path, target) for path, target in held["models"])
        changed = {"models": models, "meters": tuple(held["meters"])}
        return cls(**{**held, **changed, "workload": Workload(**held["workload"])})


def perform(job: Job) -> None:
    """Make the profile and write it to `RESULT`.

    Raises:
        EdgeqError: something cannot be opened, run or written.
    """
    from edgeq.devices.meters import from_option, probe
    from edgeq.devices.profile import find
    from edgeq.profiling import document
    from edgeq.profiling.foreign import Named
    from edgeq.profiling.profile import profile

    last = -_EVERY_S

    def progress(label: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _EVERY_S:
            last = time.monotonic()
            _tell("progress", [label, done, total])

    device = None if job.estimate is None else find(job.estimate)
    if job.backend == "numba" and any(target is None for _, target in job.models):
        _tell("progress", ["compiling for that CPU", 0, 0])
        from edgeq.runtime import kernels

        kernels.decoder()
    result = profile(
        [Named(Path(path), target) for path, target in job.models], job.workload,
        threads=job.threads, kv_bits=job.kv_bits, backend=job.backend,
        meters=[*(from_option(text) for text in job.meters), *probe()],
        idle_seconds=job.idle_seconds, operations=job.operations, estimate=device,
        progress=progress,
    )  # fmt: skip
    document.write(result, RESULT)


def _tell(kind: str, content: Any) -> None:
    print(f"{MARK}{kind} {json.dumps(content)}", flush=True)


def main(args: Sequence[str]) -> int:
    """Perform the job in a file; failures are reported as messages."""
    try:
        perform(Job.from_json(json.loads(Path(args[0]).read_text("utf-8"))))
    except EdgeqError as err:
        _tell("error", str(err))
    except MemoryError:
        _tell("error", "there is not enough memory for this; use a smaller model or context")
    except OSError as err:
        of = f": {err.filename}" if err.filename else ""
        _tell("error", f"{err.strerror or err}{of}")
    except Exception as err:  # noqa: BLE001 - the other side has no other way to know
        traceback.print_exc()
        _tell("error", f"{type(err).__name__}: {err}")
    else:
        return 0
    return 1


if __name__ == "__main__":
    os.umask(0o077)
    raise SystemExit(main(sys.argv[1:]))
