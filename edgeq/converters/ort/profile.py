"""Any ONNX graph in onnxruntime, and its nodes' times from onnxruntime's own profiler.

Source: onnxruntime's docs/performance/tune-performance/profiling-tools.md: a JSON of Chrome trace
events; those of category "Node" whose names end in "_kernel_time" are a node's executions.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.ort.run import OrtRunner, graph_of
from edgeq.converters.ort.session import TYPES, open_session, require
from edgeq.converters.target import NodeTime, ProfilerTarget
from edgeq.core.errors import FormatError

_NODE = "_kernel_time"


class OrtProfiler(ProfilerTarget):
    """onnxruntime, which has a profiler of nodes."""

    name = "onnxruntime"

    def open_graph(self, path: Path, *, threads: int | None = None) -> OrtTimedGraph:
        """Any .onnx or .ort file with random inputs."""
        return OrtTimedGraph(graph_of(path), threads=threads)

    def time_nodes(
        self,
        path: Path,
        work: Callable[[Any], object],
        *,
        decoder: bool,
        skip: int,
        threads: int | None = None,
    ) -> tuple[list[NodeTime], int, int]:
        """Time a file's nodes with onnxruntime's profiler, in a session of its own."""
        kind = OrtRunner if decoder else OrtTimedGraph
        file = graph_of(path)
        return node_times(lambda to: kind(file, threads=threads, profile=to), work, skip)


class OrtTimedGraph:
    """A graph with random inputs: dimensions that the graph leaves open are 1, integers are 0.

    Args:
        path: .onnx or .ort file.
        threads: onnxruntime's; all cores if None.
        profile: prefix of the profiler's file; None does not profile.

    Raises:
        FormatError: onnxruntime refuses it, or it takes an input that cannot be made up.
        MissingDependencyError: onnxruntime is not installed.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, profile: Path | None = None
    ) -> None:
        _, onnxruntime = require()
        self._session = open_session(path, threads=threads, profile=profile)
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        rng = np.random.default_rng(0)
        self.inputs: dict[str, Any] = {}
        for entry in self._session.get_inputs():
            if entry.type not in TYPES:
                raise FormatError(f"{path}: input {entry.name} is a {entry.type}, not numbers")
            shape = [d if isinstance(d, int) else 1 for d in entry.shape]
            values = rng.standard_normal(shape) if "float" in entry.type else np.zeros(shape)
            self.inputs[entry.name] = values.astype(TYPES[entry.type])

    def run(self) -> None:
        """Run it once."""
        try:
            self._session.run(None, self.inputs)
        except Exception as err:
            raise FormatError(f"onnxruntime cannot run it on made-up inputs: {err}") from err

    def end_profiling(self) -> Path:
        """The profiler's file."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Close the session."""
        self._session = None


def node_times(
    open_it: Callable[[Path], Any], work: Callable[[Any], object], skip: int
) -> tuple[list[NodeTime], int, int]:
    """Time a graph's nodes with onnxruntime's profiler, in a session of its own.

    Args:
        open_it: opens an `OrtTimedGraph` or `OrtRunner`, given the prefix of the profile.
        work: runs it.
        skip: the first runs, which are not counted.

    Returns:
        the nodes in the order of their first execution, how many runs were counted, and their
        nanoseconds.

    Raises:
        FormatError: the profile is not what it should be.
    """
    with tempfile.TemporaryDirectory(prefix="edgeq-profile-") as folder:
        opened = open_it(Path(folder) / "ort")
        try:
            work(opened)
            text = opened.end_profiling().read_text("utf-8")
        finally:
            opened.close()
    return summed(text, skip)


def summed(text: str, skip: int) -> tuple[list[NodeTime], int, int]:
    """What `node_times` returns, from the text of a profile."""
    calls: Counter[tuple[str, str]] = Counter()
    spent: Counter[tuple[str, str]] = Counter()
    runs, wall = 0, 0
    pending: list[tuple[tuple[str, str], int]] = []
    try:
        for event in json.loads(text):
            name, took = str(event["name"]), event.get("dur", 0)
            if event["cat"] == "Node" and name.endswith(_NODE):
                key = (str(event["args"]["op_name"]), name.removesuffix(_NODE))
                pending.append((key, int(took)))
            elif name == "model_run":  # it comes after the nodes of the run
                runs += 1
                if runs > skip:
                    wall += int(took)
                    for key, dur in pending:
                        calls[key] += 1
                        spent[key] += dur
                pending = []
    except (ValueError, KeyError, TypeError) as err:
        raise FormatError(f"onnxruntime's profile cannot be read: {err!r}") from err
    nodes = [NodeTime(op, name, n, 1000 * spent[op, name]) for (op, name), n in calls.items()]
    return nodes, max(runs - skip, 0), 1000 * wall
