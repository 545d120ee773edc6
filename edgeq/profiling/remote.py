"""Profile models on another machine, which needs Python, NumPy and Numba but not edgeq.

The models and edgeq itself are pushed, so that both sides are of one version, and the document
comes back. `edgeq.profiling.remote_job` is the other side.
"""

from __future__ import annotations

import io
import json
import signal
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgeq.core.errors import DeviceError, FormatError
from edgeq.core.progress import Progress
from edgeq.devices.transport import Finished, Transport
from edgeq.model.kv_bits import KvBits
from edgeq.profiling import document
from edgeq.profiling.document import Document
from edgeq.profiling.foreign import Named
from edgeq.profiling.remote_job import MARK, RESULT, Job
from edgeq.profiling.session import Workload

PYTHON = (3, 11)
PACKAGES = {"numpy": (2, 0), "numba": (0, 66)}
"""The lowest versions that the other machine must have."""

CACHED = (
    'c="${EDGEQ_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/edgeq}"; '
    '[ -d "$c" ] || c="$0"; EDGEQ_CACHE="$c" exec "$@"'
)
"""Runs a command that keeps kernels in edgeq's cache folder there if that exists, otherwise in the
folder ``$0``."""

_LIBRARY = "lib"
_ABOUT = (
    "import sys,json; n=sys.argv[1:] if sys.version_info>=(3,10) else []; "
    "d=__import__('importlib.metadata').metadata.distributions() if n else []; "
    "v=[((i.metadata['Name'] or '').lower(),i.version) for i in d]; "
    "print('edgeq:python '+json.dumps([sys.executable,sys.version_info[:3],"
    "dict(i for i in reversed(v) if i[0] in n)]))"
)
"""Says which Python it is and what it has; Pythons too old for edgeq can say it too."""


def profile_on(
    transport: Transport,
    models: Sequence[Named],
    workload: Workload,
    *,
    python: str | None = None,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    meters: Sequence[str] = (),
    idle_seconds: float = 0.0,
    operations: bool = True,
    estimate: str | None = None,
    progress: Progress | None = None,
) -> Document:
    """Profile on another machine, as `edgeq.profiling.profile.profile` does on this one.

    Args:
        transport: to the place; entered and left here.
        models: files here; each is pushed once.
        workload: what each does.
        python: the interpreter there; a path that is not absolute counts from the home folder.
        threads: of each model; all its cores if None.
        kv_bits, backend, idle_seconds, operations: as there.
        meters: as `edgeq.devices.meters.from_option` takes them, on the other machine.
        estimate: name of a device profile, or a TOML file here.
        progress: called with what is done.

    Raises:
        EdgeqError: a model is not here; the place cannot be reached or breaks away; it has no
            Python that fits; or what the run over there says.
    """
    for named in models:
        if not named.path.exists():
            raise FormatError(f"{named.path} does not exist; give a model or what convert made")
    ours = any(named.target is None for named in models)
    needs = ["numpy", "numba"] if ours and backend == "numba" else ["numpy"]
    with transport:
        interpreter = _interpreter(transport, python, needs)
        _push_edgeq(transport, interpreter, progress)
        names = _push_models(transport, models, progress)
        if estimate is not None and estimate.endswith(".toml"):
            transport.push(Path(estimate), "device.toml")
            estimate = "device.toml"
        targets = [named.target for named in models]
        job = Job(
            tuple(zip(names, targets, strict=True)), workload, threads, kv_bits, backend,
            tuple(meters), idle_seconds, operations, estimate,
        )  # fmt: skip
        transport.push(json.dumps(job.to_json()).encode(), "job.json")
        _perform(transport, interpreter, progress)
        with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
            transport.pull(RESULT, Path(folder) / RESULT)
            result = document.read(Path(folder) / RESULT)
    # each is called what the user calls it here
    runs = [
        replace(run, subject={**run.subject, "name": str(named.path)})
        for run, named in zip(result.runs, models, strict=True)
    ]
    return replace(result, runs=tuple(runs))


def package() -> bytes:
    """edgeq's own files as a zip: sources and data, without the demo's model."""
    buffer = io.BytesIO()
    root = Path(__file__).parent.parent
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for file in sorted(root.rglob("*")):
            inside = file.relative_to(root)
            if file.suffix in (".py", ".toml", ".txt") and inside.parts[0] != "demo_model":
                bundle.write(file, Path("edgeq") / inside)
    return buffer.getvalue()


def _interpreter(transport: Transport, python: str | None, needs: Sequence[str]) -> str:
    """The absolute path of a Python over there that has what is needed."""
    asked = (python or transport.python).removeprefix("~/")
    command = [asked, "-c", _ABOUT, *needs]
    if "/" in asked and not asked.startswith("/"):
        command = ["sh", "-c", 'exec "$HOME/$0" "$@"', *command]
    output: list[str] = []
    finished = transport.run(command, on_line=output.append)
    lines = [line for line in output if line.startswith(f"{MARK}python ")]
    if not lines:
        if finished.code in (126, 127):
            raise DeviceError(
                f"{transport.where}: there is no {asked} ({finished.last_words}); "
                f"{transport.no_python}; or name another with --on-python"
            )
        raise DeviceError(f"{transport.where}: {asked} does not work: {_ending(finished)}")
    path, version, versions = json.loads(lines[-1].removeprefix(f"{MARK}python "))
    name = f"{transport.where}: its {path} ({'.'.join(map(str, version))})"
    if tuple(version[:2]) < PYTHON:
        raise DeviceError(
            f"{name} is too old; edgeq needs Python {'.'.join(map(str, PYTHON))} or later: install "
            "one there and name it with --on-python"
        )
    faults = [_fault(package, versions.get(package)) for package in needs]
    if any(faults):
        raise DeviceError(
            f"{name} {' and '.join(filter(None, faults))}; there: pip install {' '.join(needs)}. "
            "Where the system's Python is not to be changed: python3 -m venv edgeq-env && "
            f"edgeq-env/bin/pip install {' '.join(needs)}, then --on-python edgeq-env/bin/python"
        )
    return str(path)


def _fault(package: str, version: str | None) -> str | None:
    if version is None:
        return f"has no {package}"
    least = PACKAGES[package]
    if tuple(int(part) for part in version.split(".")[:2]) < least:
        return f"has {package} {version}, which is older than {'.'.join(map(str, least))}"
    return None


def _push_edgeq(transport: Transport, python: str, progress: Progress | None) -> None:
    transport.push(package(), "edgeq.zip", progress)
    finished = transport.run([python, "-m", "zipfile", "-e", "edgeq.zip", _LIBRARY])
    if finished.code:
        raise DeviceError(f"{transport.where}: edgeq cannot be unpacked: {_ending(finished)}")


def _push_models(
    transport: Transport, models: Sequence[Named], progress: Progress | None
) -> list[str]:
    """Push each once; where they are."""
    names: dict[Path, str] = {}
    for named in models:
        path = named.path.resolve()
        if path in names:
            continue
        names[path] = f"models/{len(names)}/{path.name}"
        transport.push(path, names[path], progress)
        weights = path.with_name(f"{path.name}.data")  # those of an ONNX graph
        if weights.is_file():
            transport.push(weights, f"{names[path]}.data", progress)
    return [names[named.path.resolve()] for named in models]


def _perform(transport: Transport, python: str, progress: Progress | None) -> None:
    """Run the job over there."""
    errors: list[str] = []

    def hear(line: str) -> None:
        if not line.startswith(MARK):
            return
        kind, _, content = line.removeprefix(MARK).partition(" ")
        message: Any = json.loads(content)
        if kind == "error":
            errors.append(message)
        elif kind == "progress" and progress:
            progress(*message)

    folder = transport.folder
    job = [python, "-m", "edgeq.profiling.remote_job", "job.json"]
    command = ["sh", "-c", CACHED, f"{folder}/cache", *job]
    finished = transport.run(command, {"PYTHONPATH": f"{folder}/{_LIBRARY}"}, hear)
    if errors:
        raise DeviceError(f"{transport.where}: {errors[-1]}")
    if finished.code:
        raise DeviceError(f"{transport.where}: the run {_ending(finished)}")


def _ending(finished: Finished) -> str:
    """How a command that failed ended."""
    if finished.code == 128 + signal.SIGKILL:
        return "was killed (SIGKILL), most often for lack of memory; try a smaller model or context"
    if finished.code > 128:
        try:
            name = signal.Signals(finished.code - 128).name
        except ValueError:
            name = f"signal {finished.code - 128}"
        return f"was ended by {name}: {finished.last_words}"
    return f"ended with code {finished.code}: {finished.last_words}"
