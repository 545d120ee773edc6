"""Lower bounds of the requirements are versions that tests were run with, not wishes."""

from __future__ import annotations

import re
import tomllib

from tests.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
APART = {"llama-cpp-python", "torch", "onnxruntime-genai"}
"""Packages whose bound is not the version of either list: the first two are run in one version, by
.ci/run and the Makefile, and the last one needs a newer onnxruntime than the oldest."""


def version(text: str) -> tuple[int, ...]:
    """Numbers of a version without trailing zeros, so that 1.26 equals 1.26.0."""
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def name_of(text: str) -> str:
    return text.lower().replace("_", "-")


def bounds() -> dict[str, str]:
    """Lower bounds of what edgeq is used with; tools of its development are not among them."""
    optional = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"]]
    lines += [line for extra, held in optional.items() if extra not in ("dev", "all")
              for line in held if not line.startswith("edgeq[")]  # fmt: skip
    found = {}
    for line in lines:
        match = re.match(r"([\w-]+)>=([\d.]+)", line)
        assert match, f"{line} has no lower bound"
        found[name_of(match[1])] = match[2]
    return found


def pins(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text("utf-8").splitlines()
    held = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name_of(name): pinned for name, pinned in held}


def test_bounds_are_what_the_oldest_packages_are() -> None:
    oldest, newest = pins("tests/oldest.txt"), pins("tests/constraints.txt")
    for name, bound in bounds().items():
        if name in oldest:
            assert version(oldest[name]) == version(bound), name
        elif name not in APART:
            assert version(newest[name]) == version(bound), name
    # and nothing is listed that no longer is a requirement
    assert set(oldest) <= set(bounds())


def test_versions_known_to_pass_satisfy_the_bounds() -> None:
    newest = pins("tests/constraints.txt")
    for name, bound in bounds().items():
        if name in newest:
            assert version(newest[name]) >= version(bound), name
    assert version(re.search(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())[1]) >= version(
        bounds()["torch"]
    )
