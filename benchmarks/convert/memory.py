"""Memory of converting a language model, of validating the file, and of its runtime alone.

    python benchmarks/convert/memory.py MODEL.edgeq [--targets ort,gguf] [--format json]

Each of the three is a process of its own with one thread. The peak is the kernel's (VmHWM); how
much of it is anonymous memory, and how much pages of mapped files, is read from /proc every 20 ms.
"alone" opens the file in its runtime as validation does and runs 19 tokens, and nothing else. The
SHA-256 of every file is in the JSON form, so that two versions of edgeq can be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
OUTPUTS = {"gguf": "m.gguf", "ort": "ort", "genai": "genai", "tflite": "m.tflite",
           "litertlm": "m.litertlm", "coreml": "m.mlpackage"}  # fmt: skip
EVERY = 0.02
"""Seconds between two readings."""
_CONVERT = """
import sys
from edgeq.converters.convert import convert
convert(sys.argv[1], sys.argv[2], sys.argv[3], validate=False)
"""
_VALIDATE = """
import sys
import edgeq
report = edgeq.validate(sys.argv[3], sys.argv[1], threads=1)
sys.exit(0 if report.passed else report.explain())
"""
_ALONE = """
import sys
from pathlib import Path
import numpy as np
from edgeq.converters.targets import target_named
runner = target_named(sys.argv[2]).decoder_target().open_frugal(Path(sys.argv[3]), threads=1)
for length in (1, 17, 1):
    runner.forward(np.arange(1, 1 + length))
runner.close()
"""
STEPS = {"convert": _CONVERT, "validate": _VALIDATE, "alone": _ALONE}


def watched(program: str, *arguments: str) -> dict[str, Any]:
    """Run a Python program; its peak of memory in MiB, and its processor time."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
           "OPENBLAS_NUM_THREADS": "1"}  # fmt: skip
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, "-c", program, *arguments], env=env, stdout=errors, stderr=errors
        )
        status = Path(f"/proc/{child.pid}/status")
        peak = {"VmRSS": 0}
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            now = _kilobytes(status)
            if now.get("VmRSS", 0) > peak["VmRSS"]:
                peak = now
            time.sleep(EVERY)
        _, code, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(code)
        errors.seek(0)
        said = errors.read()
    if child.returncode:
        return {"failed": said.strip().splitlines()[-1] if said.strip() else str(child.returncode)}
    return {
        "peak": usage.ru_maxrss / 1024,
        "anonymous": peak.get("RssAnon", 0) / 1024,
        "file": peak.get("RssFile", 0) / 1024,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
    }


def _kilobytes(status: Path) -> dict[str, int]:
    try:
        lines = [line.split() for line in status.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0][:-1]: int(words[1]) for words in lines if words and words[-1] == "kB"}


def measured(artifact: Path, target: str, folder: Path) -> dict[str, Any]:
    """One target: its file, and the three processes."""
    out = folder / OUTPUTS[target]
    row: dict[str, Any] = {"target": target}
    for step, program in STEPS.items():
        row[step] = watched(program, str(artifact), target, str(out))
        if "failed" in row[step]:
            return row
    files = sorted([out] if out.is_file() else (f for f in out.rglob("*") if f.is_file()))
    row["MiB"] = sum(f.stat().st_size for f in files) / 2**20
    row["sha256"] = {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
    }
    return row


def text(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [row["target"], f"{row['MiB']:.0f}" if "MiB" in row else ""]
    for step in STEPS:
        found = row.get(step, {})
        if "failed" in found:
            return "| " + " | ".join([*cells, f"{step} failed: {found['failed']}"]) + " |"
        cells.append(
            f"{found['peak']:.0f} ({found['anonymous']:.0f} + {found['file']:.0f}), "
            f"{found['cpu_seconds']:.0f} s"
        )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print a row for each target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--targets", default=",".join(OUTPUTS))
    parser.add_argument("--format", choices=("text", "json"), default="text")
    options = parser.parse_args()
    if options.format == "text":
        size = options.artifact.stat().st_size / 2**20
        print(f"{options.artifact.name}: {size:.0f} MiB. Peaks in MiB (anonymous + file), CPU s\n")
        print("| target | file, MiB | convert | validate | runtime alone |\n" + "| --- " * 5 + "|")
    for target in options.targets.split(","):
        with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
            row = measured(options.artifact, target, Path(folder))
        print(json.dumps(row) if options.format == "json" else text(row), flush=True)


if __name__ == "__main__":
    main()
