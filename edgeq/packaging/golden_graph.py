"""Golden tests of graphs: five inputs, the expected outputs, and the tolerance of each form.

The expected outputs are those of the source graph, computed in float32 from its integers. The
tolerance of each form was measured when the form was converted
(`edgeq.converters.validate.graph_tolerance`): it is the difference between correct runtimes. Arrays
are stored as raw little-endian numbers in row-major order, with the axes of the source graph;
`golden/inputs.json` lists their shapes and types.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.runners import GraphRunner
from edgeq.converters.validate.graph_inputs import RANDOM, inputs_of, made_up
from edgeq.core.errors import FormatError
from edgeq.core.files import is_inside
from edgeq.graph.execute import Session
from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import Graph

COUNT = 5
"""Number of golden inputs of a package."""
INDEX = "golden/inputs.json"
CHANCE = 2.0
"""Factor on the measured tolerance, which is a mean over other inputs."""
_LEAST = 1e-5
"""Relative error of an output that is always allowed."""


def write_golden(graph: Graph, folder: Path, samples: Iterable[Feeds] | None) -> list[Feeds]:
    """Write five inputs and the outputs that are expected for them.

    Args:
        graph: the source graph.
        folder: folder of the package.
        samples: real inputs. None takes inputs that were stored at calibration, or random ones.

    Returns:
        the inputs, as arrays by name.
    """
    where, feeds = inputs_of(graph, samples)
    feeds = feeds[:COUNT]
    drawn = made_up(graph) if len(feeds) < COUNT else []
    kinds = [where] * len(feeds) + [RANDOM] * (COUNT - len(feeds))
    feeds = [*feeds, *drawn[: COUNT - len(feeds)]]
    truth = Session(graph, optimize=False)
    (folder / "golden").mkdir()
    runs = []
    for number, (feed, kind) in enumerate(zip(feeds, kinds, strict=True), 1):
        outputs = truth(feed)
        runs.append(
            {
                "id": f"run{number}",
                "from": kind,
                "inputs": {
                    name: _write(folder, f"run{number}-in{i}", np.asarray(feed[name]))
                    for i, name in enumerate(graph.inputs)
                },
                "outputs": {
                    name: _write(folder, f"run{number}-out{i}", outputs[name])
                    for i, name in enumerate(graph.outputs)
                },
            }
        )
    (folder / INDEX).write_bytes((json.dumps({"runs": runs}, indent=1) + "\n").encode())
    return feeds


def _write(folder: Path, name: str, array: NDArray[Any]) -> dict[str, Any]:
    place = f"golden/{name}.bin"
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    (folder / place).write_bytes(little.tobytes())
    return {"file": place, "dtype": array.dtype.name, "shape": list(array.shape)}


def read_golden(folder: Path) -> list[dict[str, Any]]:
    """Read the golden inputs and outputs of a package.

    Returns:
        for each run "id", "inputs" and "outputs"; the last two are arrays by name.

    Raises:
        FormatError: a file is damaged.
    """
    index = json.loads((folder / INDEX).read_text("utf-8"))
    return [
        {
            "id": run["id"],
            **{
                part: {name: _read(folder, about) for name, about in run[part].items()}
                for part in ("inputs", "outputs")
            },
        }
        for run in index["runs"]
    ]


def _read(folder: Path, about: Mapping[str, Any]) -> NDArray[Any]:
    if not is_inside(about["file"]):
        raise FormatError(f"{INDEX} names {about['file']!r}, which is not a file of the package")
    dtype = np.dtype(about["dtype"]).newbyteorder("<")
    raw = (folder / about["file"]).read_bytes()
    if len(raw) != dtype.itemsize * int(np.prod(about["shape"], dtype=np.int64)):
        raise FormatError(
            f"{about['file']} has {len(raw)} bytes, which does not fit its shape {about['shape']} "
            f"of {about['dtype']}"
        )
    return np.frombuffer(raw, dtype).reshape(about["shape"]).astype(about["dtype"])


def allowed_errors(certified: Mapping[str, float]) -> dict[str, float]:
    """The relative error that each output of a form may have in the golden tests.

    Args:
        certified: output -> the relative error that the form's certificate allows.
    """
    return {name: float(f"{max(CHANCE * error, _LEAST):.3g}") for name, error in certified.items()}


def first_fault(
    runner: GraphRunner, runs: list[dict[str, Any]], allowed: Mapping[str, float]
) -> str | None:
    """Run the golden tests of a form.

    Returns:
        a sentence about the first output that is wrong; None if all outputs are right.
    """
    wrong: dict[str, float] = dict.fromkeys(allowed, 0.0)
    size = dict(wrong)
    for run in runs:
        got = runner(run["inputs"])
        for name, right in run["outputs"].items():
            if name not in got or got[name].shape != right.shape:
                return f"{run['id']}: the output {name} is missing or has another shape"
            a, b = right.astype(np.float64), np.asarray(got[name]).astype(np.float64)
            if right.dtype.kind == "f":
                sound = np.isfinite(a)
                if not np.isfinite(b[sound]).all():
                    return f"{run['id']}: the output {name} is not finite"
                wrong[name] += float(np.square(b - a)[sound].sum())
                size[name] += float(np.square(a)[sound].sum())
            else:
                wrong[name] += float((a != b).mean()) ** 2 / len(runs)
                size[name] = 1.0
    for name, limit in allowed.items():
        error = float(np.sqrt(wrong[name] / (size[name] or 1.0)))
        if not error <= limit:
            return (
                f"the output {name} differs from the golden one by {error:.3g} of its size "
                f"(allowed {limit:.3g})"
            )
    return None
