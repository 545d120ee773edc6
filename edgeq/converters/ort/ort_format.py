"""The .ort format of onnxruntime's minimal builds, written by onnxruntime's own tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edgeq.core.errors import EdgeqError

_TOOL = "onnxruntime.tools.convert_onnx_models_to_ort"
_AT_FIXED_ADDRESSES = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).personality(0x0040000)
except (AttributeError, OSError):
    pass
needed = ("LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "SYSTEMROOT")
kept = {name: os.environ[name] for name in needed if name in os.environ}
kept["PYTHONHASHSEED"] = "0"
os.execve(sys.executable, [sys.executable, "-c", sys.argv[1]], kept)
"""
"""Runs a program with memory at fixed addresses (ADDR_NO_RANDOMIZE) where Linux allows it: the tool
writes the types of operators in the order of a hash table, whose seed is the address at which
onnxruntime is loaded. Other variables of the environment, such as LD_PRELOAD, would move that
address, so they are left out."""
_LOADED_FIRST = """
import onnxruntime, json, os, runpy, sys
folder, *sys.argv = json.load(sys.stdin)
os.chdir(folder)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Runs the tool. Its folder and arguments are read after onnxruntime is loaded, because strings of
another length may move what is loaded after them."""


def to_ort_format(path: Path, version: str) -> None:
    """Run onnxruntime's converter, which prints and loads the whole model, in its own process."""
    # "arm" leaves out what is baked in for x86 alone
    arguments = [path.name, "--target_platform", "arm", "--optimization_style", "Fixed"]
    done = subprocess.run(
        [sys.executable, "-c", _AT_FIXED_ADDRESSES, _LOADED_FIRST],
        input=json.dumps([str(path.parent.absolute()), _TOOL, *arguments]),
        cwd=path.absolute().anchor, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not path.with_suffix(".ort").exists():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise EdgeqError(f"onnxruntime's tool made no .ort file of {path.name}: {' '.join(last)}")
    operators = path.with_suffix(".required_operators.config")
    # the tool's own comment names the place where the file was made
    lines = [line for line in operators.read_text("utf-8").splitlines() if line[:1] != "#"]
    operators.write_text("\n".join([f"# made by onnxruntime {version}", *lines, ""]), "utf-8")


def operators_config(path: Path, version: str) -> str:
    """The operators that a build of onnxruntime needs for an .onnx file, as its build script reads.

    One line for each domain and version: ``ai.onnx;21;Add,Mul``.

    Args:
        path: of the model; its data files are not read.
        version: of onnxruntime, for the first line.

    Source: onnxruntime's docs/Reduced_Operator_Kernel_build.md.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    versions = {one.domain or "ai.onnx": one.version for one in model.opset_import}
    found: dict[str, set[str]] = {}
    for node in model.graph.node:
        found.setdefault(node.domain or "ai.onnx", set()).add(node.op_type)
    lines = [
        f"{domain};{versions[domain]};{','.join(sorted(names))}"
        for domain, names in sorted(found.items())
    ]
    return "\n".join([f"# made for onnxruntime {version}", *lines, ""])
