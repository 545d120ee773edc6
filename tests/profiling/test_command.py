"""``edgeq profile``: what it prints and keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeq.cli import main
from edgeq.model.artifact import save
from edgeq.profiling import document
from tests.conftest import clear_settings
from tests.families import quantized, random_model, tiny_config


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch, "EDGEQ_CACHE")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.edgeq"
    save(quantized(random_model(tiny_config("llama")), "w4-g32"), path)
    return path


QUICK = ("-p", "6", "-n", "4", "-r", "2", "-t", "1")


def test_the_tables(artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    kept = tmp_path / "run.json"
    assert main(["profile", str(artifact), *QUICK, "-o", str(kept)]) == 0
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    for words in ("first token", "each token", "p99", "decode: op", "gate_up", "decode: layer",
                  "% of what this machine reads", "cover "):  # fmt: skip
        assert words in out
    held = document.read(kept)
    assert len(held.runs[0].timed) == 2
    assert list(held.environment["read_gb_s"]) == ["1"]
    assert held.environment["int8_gops"]["1"] > 0


def test_json_for_scripts(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["profile", str(artifact), *QUICK, "--backend", "numpy", "--format", "json"]
    assert main([*args, "--compare", str(artifact)]) == 0
    told = json.loads(capsys.readouterr().out)
    first, second = told["runs"]
    assert first["tpot_ms"]["n"] == second["tpot_ms"]["n"] == 8
    assert first["memory"]["peak_rss_bytes"] is None  # they share the process
    assert first["tables"] == {}
    assert "NumPy" in first["operations"]["reason"]
    assert first["bandwidth_percent"] is None
    energy = first["energy"]["decode"]["joules_per_token"]
    assert (energy["mean"] is None) == bool(energy["reason"])


def test_compared_operations_tell_the_speedup(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["profile", str(artifact), *QUICK, "--compare", str(artifact), "--format", "json"]
    assert main(args) == 0
    first, second = json.loads(capsys.readouterr().out)["runs"]
    for a, b in zip(*(sorted(r["tables"]["decode"]["operations"], key=lambda row: row["op"])
                      for r in (first, second)), strict=True):  # fmt: skip
        if a["speedup"] is not None:
            assert a["speedup"] * b["speedup"] == pytest.approx(1)


def test_sustained_shows_time(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["profile", str(artifact), *QUICK, "--backend", "numpy", "--sustained", "0.2s"]
    assert main(args) == 0
    assert "seconds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (["-p", "0", "-n", "0"], "nothing to time", 2),
        (["-o", "no-such-folder/run.json"], "make it first", 2),
        (["--idle", "long"], "write 30s, 10m or 1h", 2),
        (["--estimate", "rpi6"], "did you mean", 1),
        (["--meter", "x"], "serial:/dev/ttyACM0", 1),
        (["--compare", "no-such-model"], "no-such-model", 1),
    ],
)
def test_profile_refuses_wrong_options(
    artifact: Path, args: list[str], words: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(artifact), "--backend", "numpy", *args]) == code
    out, err = capsys.readouterr()
    assert words in err
    assert "Traceback" not in err
    assert not out
