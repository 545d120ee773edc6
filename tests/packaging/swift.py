"""A Swift compiler, where there is one."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.paths import TESTS

COMPILER = os.environ.get("EDGEQ_SWIFT", "")
"""The program `swiftc` of Swift 6 for Linux, which has XCTest; Debian 13's package swiftlang is
one."""
STUBS = TESTS / "packaging" / "swift_stubs"
_MODULES = ("CoreML", "CoreGraphics", "Tokenizers")


def need_swift() -> None:
    """Skip the test, by name, where no compiler is."""
    if not COMPILER:
        pytest.skip("no Swift compiler (EDGEQ_SWIFT names swiftc)")


def _swiftc(*arguments: str | Path) -> None:
    done = subprocess.run(
        [COMPILER, "-parse-as-library", "-swift-version", "5", "-warnings-as-errors",
         *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr or done.stdout


def compiled(package: Path, sources: Sequence[Path], scratch: Path) -> None:
    """Compile the library of a Swift package and its tests without a warning.

    Apple's frameworks and swift-transformers are stubs.

    Args:
        package: folder of the package.
        sources: files of the library.
        scratch: an empty folder.
    """
    (name,) = re.findall(r'\.library\(name: "(\w+)"', (package / "Package.swift").read_text())
    for module in _MODULES:
        made = scratch / f"{module}.swiftmodule"
        _swiftc("-emit-module", "-module-name", module, "-emit-module-path", made,
                STUBS / f"{module}.swift")  # fmt: skip
    library = [*sources, STUBS / "Bundle.swift"]
    _swiftc("-typecheck", "-module-name", name, "-I", scratch, *library)
    made = scratch / f"{name}.swiftmodule"
    _swiftc("-emit-module", "-enable-testing", "-module-name", name, "-I", scratch,
            "-emit-module-path", made, *library)  # fmt: skip
    tests = sorted((package / "ios" / "Tests").glob("*.swift"))
    _swiftc("-typecheck", "-module-name", f"{name}Tests", "-I", scratch, *tests,
            STUBS / "Bundle.swift")  # fmt: skip
