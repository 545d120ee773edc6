"""Pin what packages for the Raspberry Pi install: ``python docs/pin_requirements.py``.

Writes edgeq/packaging/templates/rpi/requirements-*.txt: every package with its version, and the
SHA-256 of each wheel that a 64-bit system with one of the Python versions may take, wheels named.
The pins of packages that the project tests with are those of tests/constraints.txt. It downloads
the wheels with pip, about 800 MB, and keeps them in the folder given as the first argument.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "edgeq" / "packaging" / "templates" / "rpi"
PYTHONS = ("311", "312", "313")
MACHINES = ("aarch64", "x86_64")
GLIBC = range(17, 37)
"""Raspberry Pi OS 12 has glibc 2.36."""
SETS = {
    "model": "numpy numba llvmlite tokenizers click rich jinja2 starlette uvicorn llguidance",
    "graph": "numpy onnxruntime",
}


def fetch(packages: list[str], folder: Path, python: str, machine: str) -> None:
    """Download the wheels that one system would install."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += ["--platform", f"manylinux2014_{machine}", "-c", str(ROOT / "tests/constraints.txt")]
    for minor in GLIBC:
        command += ["--platform", f"manylinux_2_{minor}_{machine}"]
    subprocess.run([*command, *packages], check=True)


def requirements(wheels: set[Path]) -> str:
    """The text of a requirements file.

    Args:
        wheels: those of all systems; the same wheel may be there several times.
    """
    found: dict[str, dict[str, Path]] = {}
    for wheel in wheels:
        name, version = wheel.name.split("-")[:2]
        key = f"{re.sub('[-_.]+', '-', name).lower()}=={version}"
        found.setdefault(key, {})[wheel.name] = wheel
    lines = [
        "# Packages for 64-bit Linux (aarch64 of a Raspberry Pi, x86_64 to try it elsewhere),",
        "# Python 3.11 to 3.13. pip refuses any wheel whose SHA-256 is not listed here.",
    ]
    for key in sorted(found):
        hashes = []
        for name in sorted(found[key]):
            lines.append(f"# {name}")
            hashes.append(hashlib.sha256(found[key][name].read_bytes()).hexdigest())
        lines.append(" \\\n".join([key, *(f"    --hash=sha256:{digest}" for digest in hashes)]))
    return "\n".join(lines) + "\n"


def main(folder: Path) -> None:
    """Write both files."""
    for kind, packages in SETS.items():
        wheels: set[Path] = set()
        for python in PYTHONS:
            for machine in MACHINES:
                place = folder / f"{kind}-{python}-{machine}"
                fetch(packages.split(), place, python, machine)
                wheels.update(place.glob("*.whl"))
        (OUT / f"requirements-{kind}.txt").write_text(requirements(wheels), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
