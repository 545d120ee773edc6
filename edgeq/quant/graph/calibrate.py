"""Measure the ranges of a graph's values on samples, a few values at a time to limit memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from edgeq.core.errors import FormatError, UsageError
from edgeq.core.progress import Progress
from edgeq.graph.feeds import Feeds, OpenSession
from edgeq.graph.ir import Graph
from edgeq.quant.histogram import Function, Range
from edgeq.quant.observers import LeastSquares, Observer, observer_named

BUDGET = 64 << 20
"""Most bytes of one sample's observed values that are in memory at the same time."""


def ranges(
    graph: Graph,
    watch: Iterable[str],
    samples: Iterable[Feeds],
    *,
    session_of: OpenSession,
    observer: str = "minmax",
    functions: Mapping[str, Function] | None = None,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> dict[str, Range]:
    """Observe values on samples and choose the range of each with an observer.

    ``watch`` is split into parts of at most ``budget`` bytes, and the graph is run on all samples
    once for each part.

    Args:
        graph: the float graph.
        watch: names of the inputs and values to observe.
        samples: inputs of the graph; they are iterated over once for each part.
        session_of: opens a session that runs a graph.
        observer: a name of `edgeq.quant.observers.OBSERVERS`.
        functions: value -> the function that is its only consumer. The observer "mse" then measures
            the error of the function's result.
        budget: most bytes of one sample's observed values in memory; a single value may need more.
        progress: called with the name of the part, the samples done, and 0 for their unknown total.

    Returns:
        name -> (low, high) with low <= 0 <= high.

    Raises:
        FormatError: a value is NaN or infinite; the message names the value and the sample.
        UsageError: there are no samples, or the observer is unknown.
    """
    portions = list(parts(graph, list(watch), budget))
    chosen: dict[str, Range] = {}
    for number, part in enumerate(portions, 1):
        observers = {name: _observer(observer, (functions or {}).get(name)) for name in part}
        run = session_of(graph, [name for name in part if name not in graph.inputs])
        n = -1
        for n, feeds in enumerate(samples):
            _observe(observers, {**run(feeds), **feeds}, n)
            if progress is not None:
                progress(f"calibrating, part {number} of {len(portions)}", n + 1, 0)
        if n < 0:
            raise UsageError("there are no calibration samples; give at least one")
        chosen.update({name: watcher.range() for name, watcher in observers.items()})
    return chosen


def _observer(name: str, function: Function | None) -> Observer:
    if name == "mse" and function is not None:
        return LeastSquares(function=function)
    return observer_named(name)


def _observe(observers: Mapping[str, Observer], values: Feeds, n: int) -> None:
    for name, observer in observers.items():
        try:
            observer.add(np.asarray(values[name], np.float32))
        except FormatError as err:
            raise FormatError(
                f"the value {name!r} is not finite for sample {n} (counted from 0); the model "
                f"overflows there, or the sample is out of its range: {err}"
            ) from err


def parts(graph: Graph, watch: Sequence[str], budget: int) -> Iterator[list[str]]:
    """Split names into lists of values that take at most ``budget`` bytes."""
    part: list[str] = []
    nbytes = 0
    for name in watch:
        size = graph.info(name).nbytes
        if part and nbytes + size > budget:
            yield part
            part, nbytes = [], 0
        part.append(name)
        nbytes += size
    if part:
        yield part
