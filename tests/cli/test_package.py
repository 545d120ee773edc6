"""``edgeq package`` as it is typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Said
from tests.conftest import clear_settings
from tests.paths import DEMO


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch, "EDGEQ_CACHE")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgeq.cli import main

    path = tmp_path_factory.mktemp("made") / "tale"
    assert main(["package", str(DEMO), "--preset", "w4-g32", "--for", "rpi", "-o", str(path)]) == 0
    return path


def test_a_package_is_made_verified_and_described(said: Said, made: Path, tmp_path: Path) -> None:
    out = said("package", DEMO, "--preset", "w4-g32", "--for", "rpi", "-o", tmp_path / "out")
    assert "for edgeq's engine" in out
    assert "license of the model: apache-2.0" in out
    assert "edgeq package --verify" in out.replace("\n", " ").replace("    ", "")
    assert said("package", "--verify", tmp_path / "out").splitlines()[-1].split() == [
        "result", "passed",
    ]  # fmt: skip
    (tmp_path / "out/run.sh").write_text("changed")
    out = said("package", "--verify", tmp_path / "out", code=1)
    assert "FAILED: run.sh has 7 bytes" in out


def test_json_is_whole(said: Said, made: Path, tmp_path: Path) -> None:
    told = json.loads(
        said("package", DEMO, "--preset", "w4-g32", "--for", "rpi", "-o", tmp_path / "out",
             "--name", "tale", "--format", "json")
    )  # fmt: skip
    assert told["platform"] == "rpi"
    assert told["variants"][0]["entry"] == "model/tale.edgeq"
    assert told["variants"][0]["why"]
    assert [tier["variant"] for tier in told["tiers"]] == ["edgeq"] * len(told["tiers"])
    assert told["tiers"][0]["by"] == "edgeq plan"
    report = json.loads(said("package", "--verify", tmp_path / "out", "--format", "json"))
    assert report["passed"] is True
    assert report["digest"] == told["digest"]
    (tmp_path / "out/run.sh").unlink()
    report = json.loads(said("package", "--verify", tmp_path / "out", "--format", "json", code=1))
    assert report["fault"] == "run.sh is missing"
    assert report["place"] == "run.sh"


def test_a_delta_is_made_and_applied(said: Said, made: Path, tmp_path: Path) -> None:
    said("package", DEMO, "--preset", "w4-g32", "--for", "rpi", "-o", tmp_path / "new", "-c", 128)
    out = said("package", tmp_path / "new", "--delta", made, "-o", tmp_path / "d")
    assert "blocks are new" in out
    said("package", made, "--apply", tmp_path / "d", "-o", tmp_path / "built")
    assert (tmp_path / "built/manifest.json").read_bytes() == (
        tmp_path / "new/manifest.json"
    ).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        ([], "Missing argument", 2),
        (["MODEL"], "--output", 2),
        (["MODEL", "-o", "out"], "--for", 2),
        (["MODEL", "-o", "out", "--for", "wii"], "'wii' is not one of", 2),
        (["MODEL", "-o", "out", "--for", "rpi", "--data", "x"], "--data is for graphs", 2),
        (["MODEL", "-o", "out", "--for", "rpi", "--verify", "x"], "either MODEL or --verify", 2),
        (["--verify", "x", "--name", "y"], "--name is for making a package", 2),
        (["MODEL", "-o", "out", "--for", "rpi", "--no-golden"], "--golden is for --verify", 2),
        (["MADE", "-o", "out", "--delta", "a", "--apply", "b"], "either --delta OLD or", 2),
        (["MADE", "-o", "out", "--delta", "a", "--for", "rpi"], "--for is for making", 2),
        (["nothing", "-o", "out", "--for", "rpi"], "does not exist", 1),
        (["--verify", "nothing"], "is not a folder", 1),
        (["MADE", "-o", "out", "--delta", "nothing"], "no manifest.json", 1),
        (["MADE", "-o", "out", "--apply", "nothing"], "cannot be read", 1),
    ],
)
def test_refusals(
    arguments: list[str], words: str, code: int, said: Said, made: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = {"MODEL": str(DEMO), "MADE": str(made)}
    said("package", *(given.get(argument, argument) for argument in arguments), code=code)
    assert words in " ".join(said.err.split())
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_a_package_cannot_be_made_of_what_is_a_program(said: Said, tmp_path: Path) -> None:
    shutil.copy(DEMO / "README.md", tmp_path / "a.ort")
    said("package", tmp_path / "a.ort", "--for", "rpi", "-o", tmp_path / "out", code=1)
    assert "cannot be converted again" in " ".join(said.err.split())
