"""How much static quantization computes: it grows as the graph does, and waits without spinning."""

from __future__ import annotations

from typing import Any

import pytest

from edgeq.graph import execute
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.recipe import Recipe
from tests.graph_made import samples
from tests.quant.graph.test_bias import deep

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Work:
    """Counts what onnxruntime is given: nodes of every session, each as often as it runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[Any] = []
        self.nodes_opened = self.nodes_run = 0
        opens, runs = execute._session, execute._run

        def opened(runtime: Any, content: bytes, threads: int, optimize: bool) -> Any:
            session = opens(runtime, content, threads, optimize)
            size = len(onnx.load_from_string(content).graph.node)
            self.opened.append((session, size))
            self.nodes_opened += size
            return session

        def run(session: Any, *rest: Any) -> Any:
            self.nodes_run += next(size for known, size in self.opened if known is session)
            return runs(session, *rest)

        monkeypatch.setattr(execute, "_session", opened)
        monkeypatch.setattr(execute, "_run", run)


def work(monkeypatch: pytest.MonkeyPatch, layers: int, **options: Any) -> Work:
    graph = deep(layers=layers)
    recipe = Recipe.from_options(preset="w8a8-static", source="graph", **options)
    with monkeypatch.context() as patched:
        counted = Work(patched)
        quantize_graph(graph, recipe, samples(graph))
    return counted


def test_deep_graphs_take_work_in_proportion_to_their_depth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Running the whole graph again for each layer would make it the square."""
    small, large = (work(monkeypatch, layers) for layers in (8, 32))
    assert 0 < large.nodes_run < 4 * small.nodes_run
    assert 0 < large.nodes_opened < 4 * small.nodes_opened


def test_a_method_without_a_search_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--method rtn` is the quick way for graphs."""
    plain, quick = work(monkeypatch, 16), work(monkeypatch, 16, method="rtn")
    assert 0 < quick.nodes_run < plain.nodes_run


def test_threads_do_not_spin_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = work(monkeypatch, 4)
    assert counted.opened
    for session, _ in counted.opened:
        entry = session.get_session_options().get_session_config_entry
        assert entry("session.intra_op.allow_spinning") == "0"
