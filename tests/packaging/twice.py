"""A package made twice by the command line: in another folder, and as if it were another day."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT

ANOTHER_DAY = """
import time
day = 86_400 * 365 * 3
real = time.time
for name in ("localtime", "gmtime"):
    def moved(seconds=None, of=getattr(time, name)):
        return of(real() + day if seconds is None else seconds)
    setattr(time, name, moved)
time.time = lambda: real() + day
time.time_ns = lambda: int((real() + day) * 1e9)
from edgeq.cli import main
raise SystemExit(main())
"""
"""The command line three years later, as far as Python can tell."""


def contents(folder: Path) -> dict[str, tuple[bytes, bool]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), os.access(path, os.X_OK))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def built_twice(
    source: Path, platform: str, options: list[str], tmp_path: Path
) -> tuple[Path, Path]:
    """The folders of both packages, whose bytes are compared.

    Args:
        source: a file.
        platform: of the package.
        options: of the command.
        tmp_path: an empty folder.
    """
    made = []
    for number, program in enumerate(("", ANOTHER_DAY)):
        place = tmp_path / f"folder{number}"
        place.mkdir()
        shutil.copy(source, place / source.name)
        command = [sys.executable, *(("-c", program) if program else ("-m", "edgeq"))]
        command += ["package", source.name, "--for", platform, "-o", f"out{number}", *options]
        settings = os.environ | {"PYTHONHASHSEED": str(number), "TZ": f"UTC+{number}"}
        settings["PYTHONPATH"] = str(ROOT)
        done = subprocess.run(
            command, cwd=place, capture_output=True, text=True, env=settings, check=False
        )
        assert done.returncode == 0, done.stderr
        made.append(place / f"out{number}")
    first, again = made
    before, after = contents(first), contents(again)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    return first, again
