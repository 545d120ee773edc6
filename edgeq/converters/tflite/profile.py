"""Any .tflite file in LiteRT's interpreter, and how many operators it has.

LiteRT's Python package has no profiler: its interpreter gives whole runs only. (The C++ tool
``benchmark_model --enable_op_profiling`` times operators.)
"""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.target import OperatorCounts, ProfilerTarget
from edgeq.converters.tflite.interpreter import interpreter
from edgeq.core.errors import FormatError
from edgeq.graph.tflite.schema import mapped_flatbuffer, schema

NO_PROFILER = "LiteRT's Python package has no profiler; only whole runs could be timed"


class LiteRTProfiler(ProfilerTarget):
    """LiteRT, whose Python package has no profiler."""

    def open_graph(self, path: Path, *, threads: int | None = None) -> LiteRTTimedGraph:
        """Any .tflite file with random inputs."""
        return LiteRTTimedGraph(path, threads=threads)

    def count_operators(self, path: Path) -> OperatorCounts:
        """How many operators of each type the file's graphs have."""
        return OperatorCounts("the file's graphs", operators(path), NO_PROFILER)


class LiteRTTimedGraph:
    """A file with random inputs: dimensions that it leaves open are 1, integers are 0.

    Args:
        path: .tflite file.
        threads: LiteRT's; all cores if None.

    Raises:
        FormatError: LiteRT refuses it.
        MissingDependencyError: LiteRT is not installed.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self._interpreter: Any = interpreter(path, threads=threads)
        try:
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as err:
            raise FormatError(f"LiteRT cannot load {path}: {err}") from err
        self.runtime = f"ai-edge-litert {version('ai-edge-litert')}"
        rng = np.random.default_rng(0)
        for entry in self._interpreter.get_input_details():
            kind, shape = np.dtype(entry["dtype"]), entry["shape"]
            values = rng.standard_normal(shape) if kind.kind == "f" else np.zeros(shape)
            self._interpreter.set_tensor(entry["index"], values.astype(kind))

    def run(self) -> None:
        """Run it once."""
        try:
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as err:
            raise FormatError(f"LiteRT cannot run it on made-up inputs: {err}") from err

    def close(self) -> None:
        """Close the interpreter."""
        self._interpreter = None


def operators(path: Path) -> dict[str, int]:
    """Operator -> how many the file's graphs have together.

    Raises:
        FormatError: it is no .tflite file.
    """
    code, data = schema(), mapped_flatbuffer(path)
    try:
        model = code.Model.GetRootAs(data, 0)
        names = {v: k for k, v in vars(code.BuiltinOperator).items() if isinstance(v, int)}
        kinds = []
        for i in range(model.OperatorCodesLength()):
            entry = model.OperatorCodes(i)
            number = max(entry.BuiltinCode(), entry.DeprecatedBuiltinCode())
            custom = entry.CustomCode()
            kinds.append(custom.decode() if custom else names.get(number, str(number)))
        counts: Counter[str] = Counter()
        for i in range(model.SubgraphsLength()):
            graph = model.Subgraphs(i)
            for j in range(graph.OperatorsLength()):
                counts[kinds[graph.Operators(j).OpcodeIndex()]] += 1
    # flatbuffers reads wherever the bytes point: a damaged file fails in any way
    except Exception as err:
        raise FormatError(f"{path} is not a .tflite file: {err!r}") from err
    return dict(counts)
