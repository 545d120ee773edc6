"""The Makefile on a machine that lacks something says what, before it does anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or sys.platform == "win32", reason="make is absent"
)


def made(folder: Path, python: str, target: str = "demo") -> tuple[int, str]:
    """Exit code and output of a target, with a Python and an environment that is not there."""
    done = subprocess.run(
        ["make", target, f"PYTHON={python}", f"VENV={folder / 'venv'}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not (folder / "venv").exists()
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def pretending(folder: Path, changes: str) -> str:
    """A Python that runs `-c` with something changed."""
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -c "{changes}; exec(sys.argv[1])" "$2"\n'
    )
    script.chmod(0o755)
    return str(script)


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    code, said = made(tmp_path, str(tmp_path / "absent"))
    assert code != 0
    assert "absent was not found: install Python 3.11 or newer" in said


@pytest.mark.parametrize("target", ["demo", "test"])
def test_a_python_that_is_too_old(tmp_path: Path, target: str) -> None:
    code, said = made(
        tmp_path, pretending(tmp_path, "import sys; sys.version_info = (3, 9)"), target
    )
    assert code != 0
    assert "is Python 3.9 and edgeq needs Python 3.11 or newer" in said


def test_a_python_of_32_bits(tmp_path: Path) -> None:
    code, said = made(tmp_path, pretending(tmp_path, "import sys; sys.maxsize = 2**31 - 1"))
    assert code != 0
    assert "for 32 bits" in said
    assert "install the 64-bit edition of the system" in said


def test_venv_that_is_missing(tmp_path: Path) -> None:
    """As on Debian without python3-venv, where the environment is left half-made."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\n[ "$1" = -m ] && exit 1\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    code, said = made(tmp_path, str(script))
    assert code != 0
    assert "could not make a virtual environment" in said
    assert "apt-get install python3-venv" in said
