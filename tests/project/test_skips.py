"""The end of the tests' output says what was skipped and why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.skips import reason_of, summary

DATA = "their data is not part of the repository (set EDGEQ_TEST_DATA to a folder that has it)"


def test_one_cause_has_one_line() -> None:
    found = [
        ("tests/a.py::one", "Skipped: shared data absent: data/x"),
        ("tests/a.py::two", "shared data absent: models/y z"),
        ("tests/b.py", "Skipped: could not import 'llama_cpp': No module named 'llama_cpp'"),
        ("tests/b.py::three", "Skipped: llama-cpp-python is absent"),
        ("tests/c.py::four", "published model absent: m/x.gguf (package m-x; make dev fetches it)"),
        ("tests/c.py::five", "could not import 'strange.part': No module named 'strange'"),
        ("tests/c.py::six", "only macOS has this"),
    ]
    assert summary(found, "not heavy") == [
        f"skipped: 2 tests: {DATA}",
        "skipped: 1 test and 1 file: llama-cpp-python is absent "
        "(pip install 'edgeq[llamacpp]' compiles it)",
        "skipped: 1 test: only macOS has this",
        "skipped: 1 test: strange is absent (pip install strange)",
        "skipped: 1 test: the published model m-x is absent (make dev fetches it with pip)",
        "not run: the heavy tests, which need gigabytes or minutes (make test-heavy)",
    ]
    assert summary([]) == ["skipped: nothing"]
    assert reason_of("") == "no reason given"


def test_a_run_ends_with_the_reasons_and_pytests_own_line(tmp_path: Path) -> None:
    """A real run, on two workers, of tests that cannot run without the shared data."""
    command = [sys.executable, "-m", "pytest", "-n", "2", "-q", "-p", "no:randomly",
               "-o", f"cache_dir={tmp_path}/cache", "tests/devices/meters/test_sysfs.py",
               "-k", "tree or number"]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "EDGEQ_TEST_DATA": str(tmp_path / "absent")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert f"skipped: 2 tests: {DATA}" in lines
    assert "passed" in lines[-1]
    kept = (tmp_path / "cache/v/edgeq/skipped").read_text()
    assert "tests/devices/meters/test_sysfs.py::test_procfs_tree" in kept
