"""Run a converted Core ML package on a Mac, and hold what it says against what it should.

    edgeq convert model.edgeq --to coreml -o model.mlpackage        on any machine
    python examples/coreml_smoke_test.py model.mlpackage            on a Mac, macOS 15 or newer

edgeq checks a package by executing it in NumPy, which shows that the program is right but nothing
of Apple's compiler and processors. This script feeds the same tokens to Core ML on the CPU, the
GPU and the Neural Engine: a prefill and then one token after another. It prints, for each, how far
the logits are from NumPy's, whether the greedy tokens are the same, and the time of a token, first
loading apart.

``--here`` runs the package in NumPy with float16 arithmetic in Core ML's place, on any machine:
how far float16 alone may move the logits.

Needs edgeq and coreml: pip install 'edgeq[coreml]'
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.coreml.run import CoreMLRunner
from edgeq.core.errors import EdgeqError

UNITS = {"cpu": "CPU_ONLY", "gpu": "CPU_AND_GPU", "ane": "CPU_AND_NE", "all": "ALL"}
WORST = 0.05
"""Of the range of logits: more than that is no rounding."""


class AppleRunner(CoreMLRunner):
    """The package in Core ML itself, on one kind of processor."""

    def __init__(self, path: Path, unit: str) -> None:
        import coremltools as ct

        self._load = lambda function: ct.models.MLModel(
            str(path),
            compute_units=getattr(ct.ComputeUnit, UNITS[unit]),
            **({"function_name": function} if function != "main" else {}),
        )
        self._models: dict[str, Any] = {}
        self._kept: Any = None
        super().__init__(path)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self._kept = None

    def call(
        self, function: str, inputs: Mapping[str, Any], watch: Sequence[str] = ()
    ) -> dict[str, Any]:
        """One prediction; functions share the state."""
        if function not in self._models:
            self._models[function] = self._load(function)
        model = self._models[function]
        given = {
            name: np.asarray(v, np.float16 if "cache" in name else np.int32)
            for name, v in inputs.items()
        }
        if "key_cache" in inputs:  # iOS 16: the cache goes in and out
            return dict(model.predict(given))
        if self._kept is None:
            self._kept = model.make_state()
        return dict(model.predict(given, state=self._kept))


def compare(path: Path, unit: str, prompt: list[int], steps: int) -> bool:
    """Run one kind of processor and print what came of it; whether it is near enough."""
    began = time.perf_counter()
    theirs = CoreMLRunner(path, "float16") if unit == "here" else AppleRunner(path, unit)
    ours = CoreMLRunner(path)
    a, b = ours.forward(np.asarray(prompt)), theirs.forward(np.asarray(prompt))
    loading = time.perf_counter() - began
    theirs.forward(np.asarray([int(a.argmax())]))  # loads the function of one token, too
    theirs.reset()
    began = time.perf_counter()
    theirs.forward(np.asarray(prompt))
    prefill = time.perf_counter() - began
    worst, equal, seconds = 0.0, 0, []
    for _ in range(steps):
        worst = max(worst, float(np.abs(a - b).max() / (a.max() - a.min())))
        equal += int(a.argmax()) == int(b.argmax())
        token = np.asarray([int(a.argmax())])  # both go on with the right one
        began = time.perf_counter()
        b = theirs.forward(token)
        seconds.append(time.perf_counter() - began)
        a = ours.forward(token)
    passed = worst <= WORST
    print(
        f"{unit:5s} {'ok  ' if passed else 'FAIL'}  logits differ by {worst:.2%} of their range, "
        f"{equal} of {steps} greedy tokens equal; first load {loading:.1f} s, "
        f"prefill {len(prompt) / prefill:.0f} tokens/s, "
        f"decoding {1 / statistics.median(seconds):.1f} tokens/s"
    )
    return passed


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("package", type=Path, help="a .mlpackage that edgeq convert made")
    parser.add_argument("--units", default="cpu,gpu,ane", help=f"some of {', '.join(UNITS)}")
    parser.add_argument("--tokens", default="1,2,3,4,5,6,7,8,9,10", help="ids of the prompt")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded after it")
    parser.add_argument("--here", action="store_true", help="NumPy in float16, on any machine")
    options = parser.parse_args()
    units = ["here"] if options.here else options.units.split(",")
    if bad := [unit for unit in units if unit not in (*UNITS, "here")]:
        parser.error(f"unknown unit {bad[0]!r}; some of {', '.join(UNITS)}")
    if not options.here and platform.system() != "Darwin":
        print("Core ML runs on a Mac only; --here runs the package in NumPy", file=sys.stderr)
        return 1
    prompt = [int(token) for token in options.tokens.split(",")]
    try:
        passed = [compare(options.package, unit, prompt, options.steps) for unit in units]
    except EdgeqError as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
