"""A Kotlin compiler, where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

COMPILER = os.environ.get("EDGEQ_KOTLIN", "")
"""The folder of a Kotlin compiler, with its `lib`; the package kotlin-compiler of npm is one."""


def need_kotlin() -> None:
    """Skip the test, by name, where no compiler is."""
    if not COMPILER or shutil.which("java") is None:
        pytest.skip("no Kotlin compiler (EDGEQ_KOTLIN names the folder of one)")


def compiled(files: Iterable[Path], out: Path) -> list[str]:
    """Compile sources without a warning; gives the command that runs a class of the result."""
    library = Path(COMPILER) / "lib"
    jars = ":".join(str(jar) for jar in sorted(library.glob("*.jar")) if "sources" not in jar.name)
    done = subprocess.run(
        ["java", "-cp", jars, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-no-stdlib",
         "-kotlin-home", COMPILER, "-cp", str(library / "kotlin-stdlib.jar"), "-Werror",
         *map(str, files), "-d", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return ["java", "-cp", f"{out}:{library / 'kotlin-stdlib.jar'}"]
