"""Sweeps on real Dask: a scheduler and two worker processes, one of them killed in mid-run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from edgeq.cli import main
from edgeq.core.errors import EdgeqError, FormatError, SchemeError
from edgeq.sweeping import SweepResult, pareto, run_task, sweep, sweep_sensitivity, tasks
from tests.paths import ROOT

pytest.importorskip("distributed", reason="Dask is not installed: pip install 'edgeq[sweep]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Dask's own, in threads of its own

DEMO = ROOT / "edgeq" / "demo_model"
RECIPES = (
    "w8-channel", "w8-g32", "w4-g32", "w4-g64", "w4-g128", "w4-g32-asym", "w4-g32-mse", "w3-g32",
    "w3-g32-mse", "w3-g64", "w2-g16", "w4-g16",
)  # fmt: skip
EXACT = ("key", "model", "name", "nbytes", "bpw", "error")
MEASURED = ("nll", "base_nll", "kl")


@pytest.fixture
def text(tmp_path: Path) -> str:
    """Little text, so that tasks are short."""
    path = tmp_path / "text.txt"
    path.write_text((DEMO / "heldout.txt").read_text("utf-8")[:1500], "utf-8")
    return str(path)


class Cluster:
    """A scheduler and workers as processes of their own, as on several machines."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{port}"
        self._folder = folder
        self._scheduler = self._start("scheduler", "--port", str(port), "--host", "127.0.0.1")
        self.workers = [self.worker(), self.worker()]

    def worker(self) -> subprocess.Popen[bytes]:
        return self._start("worker", self.address, "--nthreads", "1", "--no-nanny",
                           "--local-directory", str(self._folder))  # fmt: skip

    def _start(self, kind: str, *args: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", kind, *args, "--no-dashboard"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        log = (self._folder / f"{kind}.log").open("ab")
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def close(self) -> None:
        for process in (*self.workers, self._scheduler):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


def assert_same_results(got: list[SweepResult], want: list[SweepResult]) -> None:
    """Compare what does not depend on where a task ran.

    Measures went through a BLAS library, whose order of summation depends on its threads.
    """
    assert len(got) == len(want)
    for mine, theirs in zip(got, want, strict=True):
        for name in EXACT:
            assert getattr(mine, name) == getattr(theirs, name), name
        for name in MEASURED:
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-3), name
        assert mine.top1 == pytest.approx(theirs.top1, abs=0.01)


@pytest.mark.slow
def test_a_killed_worker_costs_only_time(tmp_path: Path, text: str, cluster: Cluster) -> None:
    todo = tasks([DEMO], RECIPES, eval_text=text, timed=False)
    assert len(todo) == 12
    serial = [run_task(task) for task in todo]
    seen: list[str] = []

    def kill_one(label: str, done: int, total: int) -> None:
        seen.append(label)
        if done == 3:
            cluster.workers[0].send_signal(signal.SIGKILL)

    folder = tmp_path / "results"
    rows = sweep(todo, folder, scheduler=cluster.address, progress=kill_one)
    assert cluster.workers[0].wait() == -signal.SIGKILL
    assert_same_results(rows, serial)
    assert len(seen) == len(set(seen)) == 12
    assert len(list(folder.glob("*.json"))) == 12
    # both had work before one was killed, and the results say who did it
    assert len({row.worker for row in rows}) == 2


def test_a_second_run_does_only_what_is_missing(tmp_path: Path, text: str) -> None:
    todo = tasks([DEMO], ["w4-g32", "w8-channel", "w3-g32"], eval_text=text, timed=False)
    folder = tmp_path / "results"
    first = sweep(todo[:2], folder, workers=2)
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done: list[int] = []
    second = sweep(todo, folder, workers=1, progress=lambda _, n, __: done.append(n))
    assert second[:2] == first
    assert done == [3]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    next(iter(stamps)).write_text("{", "utf-8")
    with pytest.raises(FormatError, match="delete it"):
        sweep(todo, folder)


def test_an_interrupted_sweep_keeps_what_is_done(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    todo = tasks([DEMO], ["w4-g32", "w8-channel", "w3-g32"], eval_text=text, timed=False)

    def stop(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(todo, tmp_path, workers=1, progress=stop)
    assert not list(elsewhere.glob("edgeq-*"))  # the worker was stopped at its next task
    kept = list(tmp_path.glob("edgeq-*.json"))
    assert len(kept) == 1
    assert len(sweep(todo, tmp_path, workers=1)) == 3
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_recipe_that_does_not_suit_is_a_row_with_the_reason(tmp_path: Path, text: str) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_text('default = "w4-g32"\nrules = [["no_such_tensor", "w8-g32"]]\n', "utf-8")
    todo = tasks([DEMO], [str(recipe)], eval_text=text, timed=False)
    (row,) = sweep(todo, tmp_path / "results", workers=1)
    assert row.name == "bad"
    assert row.nbytes is None
    assert "matches no tensor" in str(row.error)


def test_the_command_ends_with_a_table_and_a_plot(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results"
    args = ["sweep", str(DEMO), "--recipe", "w4-g32", "--recipe", "w8-channel",
            "--eval-text", text, "-o", str(out), "--workers", "1"]  # fmt: skip
    assert main(args) == 0
    table = capsys.readouterr().out
    lines = table.splitlines()
    assert lines[2].split()[:3] == ["demo_model", "*", "w4-g32"]
    assert lines[3].split()[:3] == ["demo_model", "*", "w8-channel"]
    assert "Size and divergence" in (out / "report.html").read_text("utf-8")
    assert main([*args, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found] == ["w4-g32", "w8-channel"]
    assert all(row["tokens_per_s"] > 0 and row["pareto"] for row in found)


def test_sensitivities_of_layers_on_workers_are_those_of_one_run(text: str) -> None:
    from edgeq.calibration_text import calibration
    from edgeq.formats.schemes import QuantScheme
    from edgeq.importers import load
    from edgeq.quant.decoder.sensitivity import measure_sensitivity

    model = load(DEMO)
    windows = calibration(model, text, 1, 64)
    want = measure_sensitivity(model, windows, QuantScheme(4), mode="output")
    got = sweep_sensitivity(str(DEMO), text, 1, 64, "w4-g32", "output", workers=2)
    assert replace(got, losses=want.losses) == want
    assert list(got.losses) == list(want.losses)
    for name, losses in want.losses.items():
        assert got.losses[name] == pytest.approx(losses, rel=1e-3), name


def test_the_front_holds_what_nothing_beats() -> None:
    def row(name: str, nbytes: int | None, kl: float | None, model: str = "m") -> SweepResult:
        return SweepResult(name, model, name, nbytes=nbytes, kl=kl)

    rows = [row("a", 10, 0.5), row("b", 20, 0.1), row("c", 20, 0.2), row("d", 30, 0.1),
            row("e", None, None), row("f", 5, 9.0, "other")]  # fmt: skip
    assert [r.name for r in pareto(rows)] == ["a", "b", "f"]


def test_what_cannot_be_swept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="w4-g32-gptq"):
        tasks([DEMO], ["w4-g32-gpt"])
    todo = tasks([DEMO], ["w4-g32", "w4-g32"], timed=False)
    assert len(todo) == 1
    assert replace(todo[0], eval_text="x").key != todo[0].key
    with pytest.raises(EdgeqError, match="no Dask scheduler answers"):
        sweep(todo, tmp_path, scheduler="tcp://127.0.0.1:9")
