"""The .ort format of onnxruntime's minimal builds, written by onnxruntime's own tool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edgeq.core.errors import EdgeqError


def to_ort_format(path: Path, version: str) -> None:
    """Run onnxruntime's converter, which prints and loads the whole model, in its own process."""
    command = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort"]
    # "arm" leaves out what is baked in for x86 alone
    command += [path.name, "--target_platform", "arm", "--optimization_style", "Fixed"]
    done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
    if done.returncode or not path.with_suffix(".ort").exists():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise EdgeqError(f"onnxruntime's tool made no .ort file of {path.name}: {' '.join(last)}")
    operators = path.with_suffix(".required_operators.config")
    # the tool's own comment names the place where the file was made
    lines = [line for line in operators.read_text("utf-8").splitlines() if line[:1] != "#"]
    operators.write_text("\n".join([f"# made by onnxruntime {version}", *lines, ""]), "utf-8")
