"""Run packages with the network cut, from a copy of their folder alone:

    python benchmarks/package/offline.py PACKAGE [PACKAGE ...]

`unshare` starts each program in a network namespace of its own, which has no network. What runs a
package depends on its platform:

    android, ort-mobile   onnxruntime, onnxruntime-genai, LiteRT and LiteRT-LM on the golden tests;
                          edgeq and the checkout are not on the path (tests/packaging/offline.py)
    ios                   edgeq's executor of Core ML programs (`edgeq package --verify`)
    rpi, a graph          the package's own run.py, with onnxruntime and NumPy alone on the path
    rpi, a language model the package's wheel, run.sh and healthcheck.sh on an emulated Raspberry Pi
                          (tests/arm/serve_package.py, after benchmarks/arm/setup.sh); its wheels
                          are fetched before the network is cut
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from edgeq.core.cache import cache_home  # noqa: E402
from tests.packaging.test_offline import CUT, DIAL, NO_ROUTE, PLAIN, cut  # noqa: E402

ALONE = f"""
import runpy, sys
sys.path[:0] = ["", {str(Path(np.__file__).parents[1])!r}]
sys.argv = ["run.py", "--check"]
runpy.run_path("run.py", run_name="__main__")
"""
"""The program of a graph's package for a Raspberry Pi."""


def on_a_board(package: Path, board: str) -> str:
    """Serve a package on an emulated board; the last line that is printed."""
    from tests.arm.serve_package import install

    install(package)
    command = [sys.executable, "-m", "tests.arm.serve_package", str(package), board]
    done = subprocess.run(
        [*CUT, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


def ran(package: Path, board: str) -> str:
    """Run a package, and say what was compared.

    Args:
        package: a copy in a folder of its own.
        board: the emulated board for language models.
    """
    manifest = json.loads((package / "manifest.json").read_text("utf-8"))
    platform, graph = manifest["platform"], manifest["kind"] == "graph"
    if platform == "rpi":
        if not graph:
            return on_a_board(package, board)
        return cut(["-I", "-S", "-B", "-c", ALONE], package).splitlines()[-1]
    if platform == "ios":
        command = ["-B", "-m", "edgeq", "package", "--verify", ".", "--format", "json"]
        settings = {"PYTHONPATH": str(ROOT), "EDGEQ_CACHE": str(cache_home())}
        report = json.loads(cut(command, package, **settings))
        assert report["passed"]
        assert not report["not_run"]
        return str(report["checks"][-1]["found"])
    found = json.loads(cut(["-I", "-S", "-B", "-c", PLAIN], package).splitlines()[-1])
    return "; ".join(f"{form}: {what}" for form, what in found.items())


def main() -> None:
    """Print a row for each package."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--board", default="pi5", choices=("pi5", "pi4", "zero2"))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeq-") as name:
        assert cut(["-c", DIAL], Path(name)).strip() == str(NO_ROUTE)
        print("A connection fails there with ENETUNREACH: the network is cut.\n")
        print("| package | ran with the network cut |\n| --- | --- |", flush=True)
        for path in chosen.packages:
            copy = Path(shutil.copytree(path, Path(name) / "alone"))
            print(f"| {path.name} | {ran(copy, chosen.board)} |", flush=True)
            shutil.rmtree(copy)


if __name__ == "__main__":
    main()
