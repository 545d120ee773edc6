"""Ranges of a graph's values: equal to looking at everything at once, in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest

from edgeq.core.errors import FormatError, UsageError
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph
from edgeq.quant.graph.calibrate import parts, ranges
from edgeq.quant.graph.samples import samples_of
from edgeq.quant.observers import OBSERVERS, observer_named
from tests.graph_made import cnn, samples

pytest.importorskip("onnxruntime")
GRAPH = cnn()
WATCH = ["x", "relu1_out", "add5_out", "linear10_out"]


@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranges_are_the_observers_of_all_values(observer: str) -> None:
    given = samples(GRAPH)
    found = ranges(GRAPH, WATCH, given, session_of=Session, observer=observer)
    run = Session(GRAPH, WATCH[1:])
    for name in WATCH:
        seen = observer_named(observer)
        for feeds in given:
            seen.add({**feeds, **run(feeds)}[name])
        assert found[name] == seen.range()


def test_a_small_budget_changes_nothing_but_the_number_of_sessions() -> None:
    made: list[tuple[str, ...]] = []

    def session_of(graph: Graph, watch: list[str]) -> Session:
        made.append(tuple(watch))
        return Session(graph, watch)

    whole = ranges(GRAPH, WATCH, samples(GRAPH), session_of=session_of)
    assert len(made) == 1
    small = ranges(GRAPH, WATCH, samples(GRAPH), session_of=session_of, budget=2100)
    assert small == whole
    assert made[1:] == [(), ("relu1_out",), ("add5_out", "linear10_out")]


def test_parts_hold_what_the_budget_allows_or_one_value() -> None:
    found = list(parts(GRAPH, WATCH, 2100))
    assert [name for part in found for name in part] == WATCH
    for part in found:
        size = sum(GRAPH.info(name).nbytes for name in part)
        assert size <= 2100 or len(part) == 1


def test_progress_counts_samples() -> None:
    said = []
    ranges(
        GRAPH, WATCH, samples(GRAPH, 3), session_of=Session,
        progress=lambda *what: said.append(what),
    )  # fmt: skip
    assert said == [("calibrating, part 1 of 1", i, 0) for i in (1, 2, 3)]


def test_no_samples_and_overflow_are_refused() -> None:
    with pytest.raises(UsageError, match="there are no calibration samples"):
        ranges(GRAPH, WATCH, [], session_of=Session)
    huge = {"x": np.full((1, 3, 8, 8), 3e38, np.float32)}
    given = samples_of(GRAPH, [*samples(GRAPH, 2), huge])
    with pytest.raises(FormatError, match=r"'relu1_out' is not finite for sample 2"):
        ranges(GRAPH, ["relu1_out"], given, session_of=Session)
    with pytest.raises(UsageError, match="unknown observer"):
        ranges(GRAPH, WATCH, samples(GRAPH), session_of=Session, observer="max")
