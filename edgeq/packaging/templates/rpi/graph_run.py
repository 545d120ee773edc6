"""Run the model "@NAME@", or its golden tests. Needs onnxruntime and NumPy and nothing else.

    python run.py --check             the golden tests of this package
    python run.py in.npz out.npz      arrays by input name in, arrays by output name out

In a program:

    import run
    model = run.Model()
    outputs = model({"@INPUT@": array})
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent
VARIANT = "@VARIANT@"


class Model:
    """The model; ``threads`` is how many cores it may use."""

    def __init__(self, threads=4):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(HERE / "@ENTRY@"), options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(self, inputs):
        """Arrays by input name to arrays by output name."""
        return dict(zip(self.outputs, self.session.run(self.outputs, dict(inputs))))


def check():
    """Compare with the golden results; returns what is wrong, or None."""
    model = Model(threads=1)
    runs = json.loads((HERE / "golden/inputs.json").read_text())["runs"]
    allowed = json.loads((HERE / f"golden/{VARIANT}.json").read_text())["allowed"]
    wrong, size = dict.fromkeys(allowed, 0.0), dict.fromkeys(allowed, 0.0)
    for run in runs:
        got = model({name: read(about) for name, about in run["inputs"].items()})
        for name, about in run["outputs"].items():
            right = read(about)
            if right.dtype.kind == "f":
                wrong[name] += float(np.square(got[name].astype(float) - right).sum())
                size[name] += float(np.square(right.astype(float)).sum())
            else:
                wrong[name] += float((got[name] != right).mean()) ** 2 / len(runs)
                size[name] = 1.0
    for name, limit in allowed.items():
        error = (wrong[name] / (size[name] or 1.0)) ** 0.5
        if not error <= limit:
            return f"the output {name} differs by {error:.3g} of its size (allowed {limit:.3g})"
    return None


def read(about):
    """An array of the golden tests."""
    dtype = np.dtype(about["dtype"]).newbyteorder("<")
    return np.fromfile(HERE / about["file"], dtype).reshape(about["shape"]).astype(about["dtype"])


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        fault = check()
        sys.exit(fault) if fault else print("the golden tests passed")
    elif len(sys.argv) == 3:
        np.savez(sys.argv[2], **Model()(np.load(sys.argv[1])))
    else:
        sys.exit(__doc__)
