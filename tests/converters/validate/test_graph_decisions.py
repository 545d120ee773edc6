"""Decisions on float values: how far each is from a tie, and what a conversion may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnxruntime", reason="needs the extra ort")
pytest.importorskip("onnx", reason="needs the extra ort")

from edgeq.converters import graph_target
from edgeq.converters.convert import convert
from edgeq.converters.validate.graph import compare_graph
from edgeq.converters.validate.graph_decisions import decision
from edgeq.graph.ir import Graph, Info, Node
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.recipe import Recipe
from tests.graph_made import Made

SUFFIX = {"ort": ".onnx", "tflite": ".tflite"}


def deciding(op: str, out: Info, second: Any = None, output: int = 0, **attrs: Any) -> Graph:
    """A graph whose output decides on the values of a Relu."""
    m = Made(0, x=Info((1, 4)))
    scores = m.same("Relu", "x")
    inputs = [scores] if second is None else [scores, m.constant(second)]
    outputs = ["", "d"] if output else ["d"]
    m.nodes.append(Node(op, "decides", tuple(inputs), tuple(outputs), attrs))
    m.values["d"] = out
    return m.graph("d")


def gaps(graph: Graph, scores: list[float], got: Any) -> list[float]:
    made = decision(graph, "d")
    assert made is not None
    (name,) = made.scores
    found: NDArray[np.float64] = made.gaps({name: np.array([scores], np.float32)}, np.array(got))
    return [round(float(gap), 6) for gap in found]


def test_how_far_each_decision_is_from_a_tie() -> None:
    scores = [0.0, 3.0, 2.5, 1.0]
    best = deciding("ArgMax", Info((1,), "int64"), axis=1, keepdims=0)
    assert gaps(best, scores, [1]) == [0]
    assert gaps(best, scores, [2]) == [0.5]
    assert gaps(best, scores, [7]) == [np.inf]
    least = deciding("ArgMin", Info((1,), "int64"), axis=1, keepdims=0)
    assert gaps(least, scores, [3]) == [1]
    places = deciding("TopK", Info((1, 2), "int64"), np.array([2]), 1, axis=-1, largest=1, sorted=1)
    assert gaps(places, scores, [[2, 1]]) == [0.5, 0.5]
    assert gaps(places, scores, [[1, 3]]) == [0, 1.5]
    above = deciding("Greater", Info((1, 4), "bool"), np.float32(2))
    assert gaps(above, scores, [[True] * 4]) == [2, 1, 0.5, 1]


def test_whole_numbers_stand_for_what_is_cut_off_to_them() -> None:
    whole = deciding("Cast", Info((1, 4), "int32"), to=6)
    assert gaps(whole, [2.9, 2.9, 2.9, 2.9], [[2, 3, 4, 1]]) == pytest.approx([0, 0.1, 1.1, 0.9])
    assert gaps(whole, [-0.5, -0.5, -2.5, -2.5], [[0, -1, -2, -4]]) == pytest.approx(
        [0, 0.5, 0, 1.5]
    )


def test_what_is_no_decision_on_floats_is_none() -> None:
    assert decision(deciding("Neg", Info((1, 4))), "d") is None
    m = Made(0, x=Info((1, 4), "int64"))
    m.nodes.append(Node("Greater", "g", ("x", m.constant(np.int64(2))), ("d",)))
    m.values["d"] = Info((1, 4), "bool")
    assert decision(m.graph("d"), "d") is None


def pixels(shift: float = 0.0) -> Graph:
    """A picture of bytes behind a convolution, as super resolution gives it; and a mask of it."""
    m = Made(0, x=Info((1, 3, 12, 12)))
    sure = m.same("Sigmoid", m.conv("x", 3))
    scaled = m.same("Mul", sure, m.constant(np.float32(255)))
    scaled = m.same("Add", scaled, m.constant(np.float32(shift)))
    m.nodes.append(Node("Cast", "bytes", (scaled,), ("picture",), {"to": 2}))
    m.nodes.append(
        Node("Greater", "bound", (sure, m.constant(np.float32(0.5 + shift / 255))), ("mask",))
    )
    m.values |= {"picture": Info((1, 3, 12, 12), "uint8"), "mask": Info((1, 3, 12, 12), "bool")}
    return m.graph("picture", "mask")


@pytest.mark.parametrize("preset", ["w8-channel", "w8-dynamic", "w8a8-static"])
@pytest.mark.parametrize("target", list(SUFFIX))
def test_bytes_and_masks_may_differ_by_ties_alone(target: str, preset: str, tmp_path: Path) -> None:
    if target == "tflite":
        pytest.importorskip("ai_edge_litert")
    graph, wrong = pixels(), pixels(8.0)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, 3, 12, 12)).astype(np.float32)} for _ in range(16)]
    made = [
        quantize_graph(g, Recipe.named(preset, "graph"), samples_for(g, feeds, preset)).graph
        for g in (graph, wrong)
    ]
    options = {"compute": "int8"} if (target, preset) == ("tflite", "w8-channel") else {}
    done = convert(made[0], target, tmp_path / f"m{SUFFIX[target]}", options, samples=feeds[:4])
    assert done.certificate is not None
    assert done.certificate["passed"]
    # a constant of another value changes both outputs by more than ties
    path = tmp_path / f"w{SUFFIX[target]}"
    graph_target(target).write(made[1], path, options, None)
    found = compare_graph(made[0], path, target, samples=feeds[:4]).graph
    assert found is not None
    assert all(found.error[name] > found.allowed[name] for name in ("picture", "mask"))


def samples_for(graph: Graph, feeds: list[dict[str, NDArray[Any]]], preset: str) -> Any:
    from edgeq.quant.graph.samples import samples_of

    return samples_of(graph, feeds) if preset.endswith("static") else None
