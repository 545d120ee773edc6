"""``edgeq profile --on``: over a real sshd, on a Python that has only NumPy and Numba."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from edgeq.cli import main
from edgeq.core.cache import cache_home
from edgeq.core.errors import DeviceError
from edgeq.devices.contention import Contention
from edgeq.devices.transport import open_transport
from edgeq.model.artifact import save
from edgeq.profiling import document
from edgeq.profiling.foreign import Named
from edgeq.profiling.remote import CACHED, PACKAGES, PYTHON, package, profile_on
from edgeq.profiling.session import Workload
from tests.conftest import clear_settings
from tests.families import quantized, random_model, tiny_config
from tests.loopback import OPTIONS, Sshd, Wire, alive, eventually, small_disk, sshd
from tests.paths import ROOT

QUICK = ("-p", "6", "-n", "4", "-r", "2", "-t", "1")
NUMPY = ("--backend", "numpy", "--no-operations")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.edgeq"
    save(quantized(random_model(tiny_config("llama")), "w4-g32"), path)
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    home = tmp_path_factory.mktemp("home")
    environment = {"EDGEQ_CACHE": str(cache_home()), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    with sshd(tmp_path_factory.mktemp("sshd"), environment) as running:
        yield running


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch, "EDGEQ_CACHE")


@pytest.fixture
def reach(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    monkeypatch.setenv(OPTIONS, server.options())
    return server


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter without any package."""
    folder = tmp_path_factory.mktemp("empty") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with NumPy and Numba, and nothing else that edgeq installs."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    here = Path(sysconfig.get_path("platlib"))
    for found in here.iterdir():
        if re.match(r"(numpy|numba|llvmlite)([.-]|$)", found.name):
            (site / found.name).symlink_to(found)
    return folder / "bin" / "python"


def shape(held: Any) -> Any:
    """The fields of a document and the kinds of their values."""
    if isinstance(held, dict):
        return {key: shape(value) for key, value in held.items()}
    if isinstance(held, list):
        return sorted({json.dumps(shape(value), sort_keys=True) for value in held})
    return "number" if isinstance(held, int | float) else type(held).__name__


def test_the_same_file_as_a_local_run(
    artifact: Path, reach: Sshd, python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {}
    for name, more in (
        ("here", []),
        ("local", ["--on", "local:", "--on-python", str(python)]),
        ("ssh", ["--on", reach.where, "--on-python", str(python)]),
    ):
        files[name] = tmp_path / f"{name}.json"
        args = ["profile", str(artifact), *QUICK, "-o", str(files[name]), *more]
        assert main(args) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        for words in ("first token", str(artifact), "decode: op", "gate_up", "peak RSS"):
            assert words in out
    read = {name: document.read(file) for name, file in files.items()}
    shapes = {}
    for name, made in read.items():
        (run,) = made.runs
        assert [(s.round, len(s.step_ns)) for s in run.samples] == [(-1, 4), (0, 4), (1, 4)]
        assert run.subject["name"] == str(artifact)
        assert run.subject["kernel"] == read["here"].runs[0].subject["kernel"]
        assert made.tool == read["here"].tool
        assert made.environment["cpu"] == read["here"].environment["cpu"]
        assert [t.sensor.name for t in made.recording.traces] == [
            t.sensor.name for t in read["here"].recording.traces
        ]
        held = json.loads(files[name].read_text())
        for key in ("contention", "limits_contention"):  # what is unknown differs between the runs
            contention = held["environment"].pop(key)
            assert contention.keys() == {field.name for field in fields(Contention)}
        shapes[name] = shape({k: v for k, v in held.items() if k != "recording"})
        assert held["recording"].keys() == json.loads(files["here"].read_text())["recording"].keys()
    assert shapes["here"] == shapes["local"] == shapes["ssh"]
    assert not reach.left


def test_compare_and_json(
    artifact: Path, reach: Sshd, python: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = ["--on", reach.where, "--on-python", str(python), "--format", "json"]
    args = ["profile", str(artifact), "--compare", str(artifact), *QUICK, *NUMPY, *there]
    assert main([*args, "--estimate", "rpi5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["tpot_ms"]["n"] for run in told["runs"]] == [8, 8]
    assert [run["name"] for run in told["runs"]] == [str(artifact)] * 2
    assert told["runs"][0]["estimate"]["device"] == "rpi5"
    assert not reach.left


def test_a_folder_is_pushed_whole(
    artifact: Path, reach: Sshd, python: Path, tmp_path: Path
) -> None:
    source = tmp_path / "a model"
    (source / "part").mkdir(parents=True)
    (source / "part" / "b").write_bytes(b"b")
    seen: list[str] = []
    with pytest.raises(DeviceError, match=r"config\.json"):
        profile_on(
            open_transport(reach.where), [Named(source, None)], Workload(), python=str(python),
            backend="numpy", progress=lambda label, done, total: seen.append(label),
        )  # fmt: skip
    assert seen[-1] == "b"
    assert not reach.left


def test_weights_beside_a_graph_go_with_it(reach: Sshd, python: Path, tmp_path: Path) -> None:
    graph = tmp_path / "g.onnx"
    for file in (graph, tmp_path / "g.onnx.data"):
        file.write_bytes(b"no graph")
    seen: set[str] = set()
    # the Python there has no onnx, and edgeq says so in its own words
    with pytest.raises(DeviceError, match=r"'onnx', which is needed .* pip install 'edgeq\[ort\]'"):
        profile_on(
            open_transport(reach.where), [Named(graph, "ort")], Workload(), python=str(python),
            progress=lambda label, done, total: seen.add(label),
        )  # fmt: skip
    assert {"g.onnx", "g.onnx.data"} <= seen
    assert not reach.left


def old_python(tmp_path: Path) -> Path:
    """This Python, saying that it is an older one."""
    made = tmp_path / "old"
    made.write_text(
        f'#!/bin/sh\nshift; code=$1; shift\nexec {sys.executable} -c "import sys\n'
        'sys.version_info = (3, 9, 2)\n$code" "$@"\n'
    )
    made.chmod(0o755)
    return made


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("/no/such/python", "there is no /no/such/python"),
        ("env/bin/python", "there is no env/bin/python"),
        ("false", "false does not work"),
        ("empty", "has no numpy and has no numba; there: pip install numpy numba"),
        ("old", r"\(3.9.2\) is too old; edgeq needs Python 3.11"),
    ],
)
def test_pythons_that_do_not_fit(
    which: str, words: str, artifact: Path, reach: Sshd, empty_python: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chosen = {"empty": empty_python, "old": old_python(tmp_path)}.get(which, which)
    args = ["profile", str(artifact), "--on", reach.where, "--on-python", str(chosen)]
    assert main(args) == 1
    out, err = capsys.readouterr()
    assert re.search(words, err)
    assert "Traceback" not in err
    assert not out
    assert not reach.left


def test_a_package_that_is_too_old(
    artifact: Path, reach: Sshd, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "numba", (99, 0))
    with pytest.raises(DeviceError, match=r"has numba \S+, which is older than 99.0; there: pip"):
        profile_on(
            open_transport(reach.where), [Named(artifact, None)], Workload(), python=str(python)
        )


def test_the_python_in_the_home_folder(
    artifact: Path, reach: Sshd, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGES, "numba", (99, 0))  # it was found and says what it has
    with open_transport(reach.where) as far:
        lines: list[str] = []
        far.run(["sh", "-c", 'echo "$HOME"'], on_line=lines.append)
    (Path(lines[0]) / "my env").symlink_to(python.parent.parent)
    for name, words in (("my env/bin/python", "has numba"), ("~/my env/bin/python", "has numba")):
        with pytest.raises(DeviceError, match=words):
            profile_on(
                open_transport(reach.where), [Named(artifact, None)], Workload(), python=name
            )


def test_least_versions_are_the_package_s() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert about["requires-python"] == f">={'.'.join(map(str, PYTHON))}"
    for name, least in PACKAGES.items():
        assert f"{name}>={'.'.join(map(str, least))}" in about["dependencies"]


def test_what_is_pushed_is_small() -> None:
    assert len(package()) < 2 << 20


def test_its_own_errors_are_passed_on(
    reach: Sshd, python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.edgeq"
    damaged.write_bytes(b"\x10" + bytes(7) + b'{"a": 1}' + bytes(30))
    there = ["--on", reach.where, "--on-python", str(python)]
    assert main(["profile", str(damaged), *there]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {reach.where}: ")
    assert "damaged.edgeq" in err
    assert "Traceback" not in err
    assert main(["profile", str(tmp_path / "none.edgeq"), *there]) == 1
    assert "none.edgeq does not exist" in capsys.readouterr().err
    assert main(["profile", str(damaged), "--on-python", str(python)]) == 2
    assert "--on" in capsys.readouterr().err
    assert not reach.left


class Strike:
    """A progress callback that acts once, when the measuring over there goes on."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act
        self.seen: list[str] = []

    def __call__(self, label: str, done: int, total: int) -> None:
        if label == "measuring" and label not in self.seen:
            self._act()
        if label not in self.seen:
            self.seen.append(label)


def endless(where: str, artifact: Path, python: Path, progress: Strike) -> None:
    profile_on(
        open_transport(where), [Named(artifact, None)], Workload(6, 4, min_seconds=300.0),
        python=str(python), backend="numpy", progress=progress,
    )  # fmt: skip


def test_a_run_that_is_killed(artifact: Path, reach: Sshd, python: Path) -> None:
    def act() -> None:
        for pid in reach.pids():
            os.kill(pid, signal.SIGKILL)

    strike = Strike(act)
    with pytest.raises(DeviceError, match=r"was killed \(SIGKILL\), most often for lack of memory"):
        endless(reach.where, artifact, python, strike)
    assert strike.seen == ["edgeq.zip", "tiny.edgeq", "measuring"]
    assert not reach.left


def test_a_connection_that_breaks(artifact: Path, reach: Sshd, python: Path) -> None:
    pids: list[int] = []
    with Wire(reach.port) as wire:

        def act() -> None:
            pids.extend(reach.pids())
            wire.cut()

        with pytest.raises(DeviceError, match="the connection broke"):
            endless(f"ssh://127.0.0.1:{wire.port}", artifact, python, Strike(act))
    assert pids
    assert eventually(lambda: not reach.left)
    assert not any(alive(pid) for pid in pids)


def test_a_disk_that_is_full(artifact: Path, reach: Sshd, python: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        for where in (f"{reach.where}{disk}", f"local:{disk}"):
            with pytest.raises(DeviceError, match=r"no space left in .* for edgeq\.zip"):
                endless(where, artifact, python, Strike(lambda: None))
            assert not list(disk.iterdir())


@pytest.fixture
def short() -> Iterator[str]:
    """A folder for what a killed process cannot remove here, its name short enough for sockets."""
    with tempfile.TemporaryDirectory() as made:
        yield made


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_here(
    how: signal.Signals, artifact: Path, reach: Sshd, python: Path, tmp_path: Path, short: str
) -> None:
    args = ["profile", str(artifact), *QUICK, *NUMPY, "--sustained", "300s", "--on", reach.where]
    out = tmp_path / "run.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeq", *args, "--on-python", str(python), "-o", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": short}, start_new_session=True,
    )  # fmt: skip
    try:

        def running() -> bool:
            return any(
                b"remote_job" in Path(f"/proc/{pid}/cmdline").read_bytes()
                for pid in reach.pids()
                if alive(pid)
            )

        assert eventually(lambda: running() or process.poll() is not None, 60)
        pids = reach.pids()
        if how == signal.SIGINT:  # as a terminal does
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert pids, err
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in err
    assert how == signal.SIGKILL or not reach.left  # it waited to be told
    assert eventually(lambda: not reach.left)
    assert eventually(lambda: not any(alive(pid) for pid in pids))
    assert not out.exists()


@pytest.mark.parametrize("made", [True, False])
def test_kernels_are_kept_only_where_edgeq_keeps_them(made: bool, tmp_path: Path) -> None:
    cache, chosen = tmp_path / "cache", []
    if made:
        cache.mkdir()
    with open_transport("local:") as far:
        command = ["sh", "-c", CACHED, f"{far.folder}/cache", "sh", "-c", 'echo "$EDGEQ_CACHE"']
        far.run(command, {"EDGEQ_CACHE": str(cache)}, chosen.append)
        assert chosen == [str(cache) if made else f"{far.folder}/cache"]
