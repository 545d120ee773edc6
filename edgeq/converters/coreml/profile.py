"""The operators of Core ML programs, which are counted but not timed."""

from __future__ import annotations

from pathlib import Path

from edgeq.converters.coreml.exec import describe
from edgeq.converters.target import OperatorCounts, ProfilerTarget

NOT_TIMED = (
    "Core ML programs are executed here by NumPy, which says nothing of a device's times; "
    "operations are only counted"
)


class CoreMLProfiler(ProfilerTarget):
    """Core ML programs, which edgeq executes in NumPy."""

    def count_operators(self, path: Path) -> OperatorCounts:
        """How many operators of each type the first function has."""
        functions = describe(path).functions
        first = functions[next(iter(functions))]
        return OperatorCounts("the file's program", dict(first.ops), NOT_TIMED)
