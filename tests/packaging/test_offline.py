"""Models of packages in their runtimes, from the package's folder alone, with the network cut."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeq.core.cache import cache_home
from edgeq.graph.execute import sums_saturate
from tests.packaging.conftest import Apps, need_runtimes
from tests.paths import ROOT, TESTS

PROGRAM = TESTS / "packaging" / "offline.py"
CUT = ("unshare", "--map-root-user", "--net")
"""Runs a command with no network: nothing but a loopback device that is down."""
PLAIN = f"""
import importlib.util, runpy, sys
sys.path.append({str(Path(np.__file__).parents[1])!r})
assert importlib.util.find_spec("edgeq") is None, "edgeq can be imported"
sys.argv = [{str(PROGRAM)!r}, "."]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The program with the installed packages alone on the path."""
DIAL = """
import socket
try:
    socket.create_connection(("192.0.2.1", 80), timeout=20).close()
except OSError as err:
    print(err.errno)
"""
"""Prints why a connection to an address of no machine (RFC 5737) fails."""
NO_ROUTE = 101
"""ENETUNREACH of Linux."""


@functools.cache
def can_cut() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*CUT, "true"], capture_output=True, check=False).returncode == 0
    )


def need_cut() -> None:
    """Skip the test, by name, where the network cannot be cut."""
    if not can_cut():
        pytest.skip("the network cannot be cut (unshare --map-root-user --net is not permitted)")


def alone(folder: Path, tmp_path: Path) -> Path:
    """The package in an empty place."""
    need_cut()
    return Path(shutil.copytree(folder, tmp_path / "alone"))


def cut(command: list[str], folder: Path, **settings: str) -> str:
    """What a command prints that runs in a folder without the network."""
    known = {"PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR"}
    kept = {name: value for name, value in os.environ.items() if name in known}
    done = subprocess.run(
        [*CUT, sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False,
        env=kept | {"HOME": str(folder.parent)} | settings,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_network_is_cut(tmp_path: Path) -> None:
    need_cut()
    assert cut(["-c", DIAL], tmp_path).strip() == str(NO_ROUTE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "kind", "forms"),
    [
        ("ort-mobile", "model", {"genai"}),
        ("ort-mobile", "graph", {"ort"}),
        ("android", "model", {"litertlm", "genai"}),
        ("android", "graph", {"litert", "ort"}),
    ],
)
def test_models_run_in_their_runtimes_from_the_folder_alone(
    platform: str, kind: str, forms: set[str], apps: Apps, tmp_path: Path
) -> None:
    """Neither edgeq nor the checkout is on the path of the program that runs them."""
    need_runtimes(platform)
    if "litertlm" in forms:
        pytest.importorskip("litert_lm")
    if kind == "graph" and platform == "ort-mobile" and sums_saturate():
        pytest.skip("onnxruntime's sums of an .ort file saturate on this processor (no VNNI)")
    folder = alone(apps[f"{platform} {kind}"], tmp_path)
    said = cut(["-I", "-S", "-B", "-c", PLAIN], folder)
    assert set(json.loads(said.splitlines()[-1])) == forms


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "graph"])
def test_core_ml_programs_run_in_the_executor_from_the_folder_alone(
    kind: str, apps: Apps, tmp_path: Path
) -> None:
    need_runtimes("ios")
    folder = alone(apps[f"ios {kind}"], tmp_path)
    said = cut(
        ["-B", "-m", "edgeq", "package", "--verify", ".", "--format", "json"], folder,
        PYTHONPATH=str(ROOT), EDGEQ_CACHE=str(cache_home()),
    )  # fmt: skip
    report = json.loads(said)
    assert report["passed"]
    assert report["not_run"] == []
    found = {one["check"]: one["found"] for one in report["checks"]}
    assert "edgeq.converters.coreml.exec" in found["golden tests of coreml"]
