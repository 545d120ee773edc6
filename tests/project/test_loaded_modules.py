"""What a command loads before it answers: `run` loads what runs an artifact, and nothing else.

Sets are compared as a whole, so that a module that is loaded no more has to leave them too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgeq
from tests.conftest import DEMO

CODE = """
import json, sys
from edgeq.cli import main
code = main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
sys.exit(code)
"""
RUN_PACKAGES = {
    "api", "cli", "compiler", "core", "devices", "formats", "graph", "importers", "model",
    "runtime", "_version",
}  # fmt: skip
"""Packages and modules of edgeq that `run` of an artifact takes modules from."""
RUN_PARTS = {
    "api": {"conversation", "devices", "run"},
    "cli": {
        "answer_options", "app", "busy", "options", "plan", "render", "run", "signals", "terminal",
        "warmup",
    },
    "devices": {"cores", "model_header", "planner", "profile", "roofline"},
    "graph": {"files", "tflite"},
    "importers": {"huggingface", "json_object", "lazy", "tokenizer"},
}  # fmt: skip
"""Of these packages only so much: the other commands, the meters and the readers of other sources
are not loaded."""
NAMES_OF_MATRICES = ["edgeq", "quant", "rules"]
"""What a plan may ask which matrices keep 8 bits; nothing else that quantizes is loaded."""
SLOW = {"email", "importlib.metadata", "numba", "socket", "subprocess", "tomllib"}
"""Modules that take milliseconds and that no token needs once the kernels are compiled."""


def loaded(*args: str) -> set[str]:
    """The modules that a command has loaded at its end."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *args], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    artifact = tmp_path_factory.mktemp("run") / "model.edgeq"
    edgeq.quantize(DEMO, artifact, fast=True)
    args = ("run", str(artifact), "-n", "1", "Once")
    loaded(*args)  # compiles what is not in the cache yet
    return loaded(*args)


def test_run_loads_what_runs_an_artifact(running: set[str]) -> None:
    parts = [name.split(".") for name in running if name.startswith("edgeq.")]
    parts = [part for part in parts if part not in (NAMES_OF_MATRICES, NAMES_OF_MATRICES[:2])]
    assert {part[1] for part in parts} == RUN_PACKAGES
    for package, wanted in RUN_PARTS.items():
        assert {part[2] for part in parts if part[1] == package and len(part) > 2} == wanted


def test_run_loads_nothing_slow_that_it_does_not_need(running: set[str]) -> None:
    assert "llvmlite.binding" in running
    assert running & SLOW == set()


def test_a_command_loads_no_other_command() -> None:
    modules = {path.stem for path in (Path(edgeq.__file__).parent / "cli").glob("*.py")}
    assert {"inspect", "serve", "sweep"} <= modules
    others = {f"edgeq.cli.{name}" for name in modules} & loaded("doctor", "--help")
    assert "edgeq.cli.doctor" in others
    assert not others & {f"edgeq.cli.{name}" for name in ("inspect", "run", "serve", "sweep")}
