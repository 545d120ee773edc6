"""The conversions that README.md shows, of a model that was quantized by the defaults."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from edgeq.cli import main
from tests.conftest import DEMO
from tests.paths import ROOT

SHOWN = "$ edgeq convert smol.edgeq "
COMMANDS = [
    line.removeprefix(SHOWN)
    for line in (ROOT / "README.md").read_text("utf-8").splitlines()
    if line.startswith(SHOWN)
]
NEEDS = {"coreml": "coremltools", "litertlm": "litert_lm_builder"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readme") / "smol.edgeq"
    assert main(["quantize", str(DEMO), "-o", str(path), "--no-card"]) == 0
    return path


def test_the_readme_shows_conversions() -> None:
    assert len(COMMANDS) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_readme_converts_is_written_and_validated(
    command: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = shlex.split(command)
    target = arguments[arguments.index("--to") + 1]
    if target in NEEDS:
        pytest.importorskip(NEEDS[target])
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(artifact), *arguments, "--steps", "2"]) == 0
    written = {path.name for path in tmp_path.iterdir()}
    assert arguments[arguments.index("-o") + 1] in written
    assert any(name.endswith("certificate.json") for name in written)
