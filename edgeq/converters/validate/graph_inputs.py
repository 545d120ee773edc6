"""The inputs that a converted graph is compared with its source on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import Graph
from edgeq.quant.graph.stored_samples import stored_samples

RUNS = 8
"""Number of random inputs."""
GIVEN, KEPT, RANDOM = "samples given", "calibration samples", "random inputs"
"""Where the inputs of a comparison come from."""


def inputs_of(graph: Graph, samples: Iterable[Feeds] | None) -> tuple[str, list[Feeds]]:
    """The inputs of a comparison: the samples given, those stored in the QDQ file, or random ones.

    Returns:
        what the report calls them, and the inputs.

    Raises:
        UsageError: samples are given and there are none.
        FormatError: those stored in the file are damaged.
    """
    if samples is not None:
        feeds: list[Feeds] = list(samples)
        if not feeds:
            raise UsageError("there are no samples to compare on; give at least one")
        return GIVEN, feeds
    own: list[Feeds] = list(stored_samples(graph))
    return (KEPT, own) if own else (RANDOM, list(made_up(graph)))


def made_up(graph: Graph) -> list[dict[str, NDArray[Any]]]:
    """Inputs within the ranges that the graph was calibrated for, or around 0.

    Integers are taken as row numbers of the table they select from; without one, and truth values,
    as a mask: ones, and zeros behind them.
    """
    rng = np.random.default_rng(0)
    return [{name: _input(graph, name, rng) for name in graph.inputs} for _ in range(RUNS)]


def _input(graph: Graph, name: str, rng: np.random.Generator) -> NDArray[Any]:
    info, quant = graph.info(name), graph.quants.get(name)
    if info.dtype.startswith(("int", "uint", "bool")):
        tables = [
            graph.info(node.inputs[0]).shape[node.attrs.get("axis", 0)]
            for node in graph.consumers.get(name, ())
            if node.op == "Gather" and node.inputs[1] == name
        ]
        if tables:
            return rng.integers(0, min(tables), info.shape).astype(info.dtype)
        n = info.shape[-1] if info.shape else 1
        mask = np.arange(n) < rng.integers(1, n + 1)
        return np.broadcast_to(mask.reshape((-1,)[: len(info.shape)]), info.shape).astype(
            info.dtype
        )
    if quant is None:
        return rng.standard_normal(info.shape).astype(info.dtype)
    levels = rng.integers(-128, 128, info.shape).astype(np.int8)
    return quant.dequantize(levels)
