"""Ranges of a graph's values over samples, a few values at a time to bound memory."""

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
"""Bytes of one sample's watched values that are held at the same time."""


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
    """Observe values over samples, and let an observer choose the range of each.

    The graph is run over all samples once for each ``budget`` of watched bytes.

    Args:
        graph: float.
        watch: names of its inputs and values.
        samples: gone through once for each part of ``watch``.
        session_of: what runs a graph.
        observer: a name of `edgeq.quant.observers.OBSERVERS`.
        functions: value -> what alone is computed of it; "mse" then measures the error of that.
        budget: most bytes of one sample's watched values held at a time; one value may be more.
        progress: called with the part, samples done, and 0 for their unknown number.

    Returns:
        name -> (low, high) with low <= 0 <= high.

    Raises:
        FormatError: a value is NaN or infinite; names it and the sample.
        UsageError: there are no samples, or an unknown observer.
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
