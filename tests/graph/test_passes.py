"""What each pass recognizes, what it leaves alone, and that it computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeq.core.errors import FormatError
from edgeq.graph.ir import Graph, Info, Node
from edgeq.graph.onnx.read import read_onnx
from edgeq.graph.rewrite import ordered, prune
from tests.graph.onnx.test_read import assert_canonical, assert_same, ops
from tests.graph_zoo import Exporter

Built = Callable[[Exporter], str]


def passed(built: Built, tmp_path: Path, shape: tuple[int, ...], opset: int = 17) -> Graph:
    """The canonical graph of what is built on "x", which computes what the file does."""
    e = Exporter(opset)
    onnx.save(e.model({"x": shape}, {"y": built(e)}), tmp_path / "m.onnx")
    graph = read_onnx(tmp_path / "m.onnx")
    assert_canonical(graph)
    assert_same(graph, tmp_path / "m.onnx")
    return graph


IMAGE = (1, 4, 8, 8)


@pytest.mark.parametrize("op", ["Mul", "Div", "Add", "Sub"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 6, 1, 1), (1,), ()])
def test_by_channel_behind_a_conv(
    op: str, first: bool, shape: tuple[int, ...], tmp_path: Path
) -> None:
    def built(e: Exporter) -> str:
        x, c = e.conv("x", 4, 6), e.f(*shape, at=3, scale=0.5)
        if op == "Div" and not first:
            x = e("Add", x, e.c(50, np.float32))  # far from dividing by nothing
        return str(e(op, x, c) if first else e(op, c, x))

    graph = passed(built, tmp_path, IMAGE)
    assert ops(graph) == (["Conv"] if first or op != "Div" else ["Conv", "Div"])


def test_the_factor_of_an_attentions_queries(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        x = e("Reshape", e.dense("x", 8, 8), e.i(2, 3, 2, 4))
        x = e("Div", e("Transpose", x, perm=[0, 2, 1, 3]), e.c(2, np.float32))
        y = e("Mul", e.c(3, np.float32), e("Relu", e.dense("x", 8, 4)))  # nothing to be folded into
        return str(e("Add", x, e("Unsqueeze", y, e.i(1))))

    found = ops(passed(built, tmp_path, (2, 3, 8)))
    assert "Div" not in found
    assert Counter(found)["Mul"] == 1


def test_slices_of_several_axes(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        x = e("Slice", "x", e.i(0), e.i(8), e.i(2), e.i(2))
        x = e("Slice", x, e.i(1), e.i(8), e.i(3), e.i(2))
        return str(e("Slice", x, e.i(1), e.i(3), e.i(3)))

    assert ops(passed(built, tmp_path, IMAGE)) == ["Slice", "Slice"]


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 4, 8, 8)])
def test_by_position_is_not_by_channel(shape: tuple[int, ...], tmp_path: Path) -> None:
    graph = passed(lambda e: str(e("Add", e.conv("x", 4, 6, 1), e.f(*shape[-2:]))), tmp_path, IMAGE)
    assert ops(graph) == ["Conv", "Add"]


def test_shared_weights_are_folded_apart(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        w = e.f(4, 4, 3, 3, scale=0.2)
        a, b = (e.batch_norm(e("Conv", x, w, pads=[1] * 4), 4) for x in ("x", e("Relu", "x")))
        return str(e("Sub", a, b))

    graph = passed(built, tmp_path, IMAGE)
    assert Counter(ops(graph)) == {"Conv": 2, "Relu": 1, "Sub": 1}


def test_a_norm_behind_two_users_stays(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        x = e.conv("x", 4, 4)
        return str(e("Add", e.batch_norm(x, 4), x))

    assert Counter(ops(passed(built, tmp_path, IMAGE))) == {"Conv": 1, "Mul": 1, "Add": 2}


def test_norms_behind_dense_and_transposed(tmp_path: Path) -> None:
    def dense(e: Exporter) -> str:
        return e.batch_norm(e.gemm("x", 8, 6), 6)

    assert ops(passed(dense, tmp_path, (3, 8))) == ["Linear"]

    def transposed(e: Exporter) -> str:
        return e.batch_norm(e("ConvTranspose", "x", e.f(4, 3, 2, 2), group=2), 6)

    assert ops(passed(transposed, tmp_path, IMAGE)) == ["ConvTranspose"]


def test_zero_pads_join_the_conv(tmp_path: Path) -> None:
    def built(e: Exporter, value: float = 0.0) -> str:
        x = e("Pad", "x", e.i(0, 0, 1, 0, 0, 0, 2, 1), e.c(value, np.float32))
        return e.conv(x, 4, 6, 3, strides=[2, 2], pads=[0, 1, 0, 1])

    graph = passed(built, tmp_path, IMAGE)
    assert ops(graph) == ["Conv"]
    assert graph.nodes[0].attrs["pads"] == (1, 1, 2, 2)
    assert ops(passed(lambda e: built(e, 1.0), tmp_path, IMAGE)) == ["Pad", "Conv"]


def test_transposes_that_undo_each_other(tmp_path: Path) -> None:
    """TensorFlow's images are channels last; its exporters turn them at every step."""

    def built(e: Exporter) -> str:
        x = e("Transpose", "x", perm=[0, 2, 3, 1])
        x = e("Transpose", x, perm=[0, 3, 1, 2])
        x = e("Relu", e.conv(x, 4, 6))
        x = e("Transpose", e("Transpose", x, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2])
        x = e("Reshape", e("Unsqueeze", e("Squeeze", x, e.i(0)), e.i(0)), e.i(1, -1))
        x = e("Cast", e("Slice", x, e.i(0), e.i(10**6), e.i(1)), to=1)
        return str(e("Concat", e("Dropout", x), axis=1))

    assert ops(passed(built, tmp_path, IMAGE)) == ["Conv", "Relu", "Reshape"]


@pytest.mark.parametrize("first", [True, False])
def test_constants_added_one_after_the_other(first: bool, tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        x = e("Add", "x", e.f(3, 4)) if first else e("Add", e.f(3, 4), "x")
        return str(e("Relu", e("Add", x, e.f(1, 4))))

    graph = passed(built, tmp_path, (2, 3, 4))
    assert ops(graph) == ["Add", "Relu"]
    assert [c.shape for c in graph.constants.values()] == [(3, 4)]


def test_a_sum_of_constants_that_would_be_larger_is_not_made(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        return str(e("Add", e("Add", "x", e.f(3, 1)), e.f(1, 4)))

    assert ops(passed(built, tmp_path, (2, 3, 4))) == ["Add", "Add"]


@pytest.mark.parametrize(
    ("kernel", "pads", "found"),
    [
        ([8, 8], [0, 0, 0, 0], "GlobalAveragePool"),
        ([8, 4], [0, 0, 0, 0], "AveragePool"),
        ([8, 8], [1, 1, 1, 1], "AveragePool"),
    ],
)
def test_a_pool_of_the_whole_picture(
    kernel: list[int], pads: list[int], found: str, tmp_path: Path
) -> None:
    def built(e: Exporter) -> str:
        return str(e("AveragePool", "x", kernel_shape=kernel, pads=pads, strides=[2, 2]))

    assert ops(passed(built, tmp_path, IMAGE)) == [found]


def test_what_is_computed_twice(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        w, b = e.f(4, 4), e.f(4)
        a, c = (e("Sigmoid", e("Add", e("MatMul", "x", w), b)) for _ in range(2))
        return str(e("Mul", a, e("Add", c, "x")))

    found = Counter(ops(passed(built, tmp_path, (2, 4))))
    assert found == {"Linear": 1, "Sigmoid": 1, "Add": 1, "Mul": 1}


@pytest.mark.parametrize("factor", [0.5, 0.51])
@pytest.mark.parametrize("root", [2**0.5, 1.5])
def test_only_a_gelu_is_one(factor: float, root: float, tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        y = e("Erf", e("Div", "x", e.c(root, np.float32)))
        y = e("Mul", "x", e("Add", e.c(1, np.float32), y))
        return str(e("Mul", y, e.c(factor, np.float32)))

    found = ops(passed(built, tmp_path, (2, 9)))
    assert (found == ["Gelu"]) == (factor == 0.5 and root == 2**0.5)


@pytest.mark.parametrize("form", ["cube by products", "x in front", "power"])
def test_gelus_with_tanh(form: str, tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        x = e("Add", "x", e.f(9))
        few, root = e.c(0.044715, np.float32), e.c((2 / np.pi) ** 0.5, np.float32)
        if form == "cube by products":
            inner = e("Add", x, e("Mul", few, e("Mul", e("Mul", x, x), x)))
        elif form == "power":
            inner = e("Add", e("Mul", e("Pow", x, e.c(3, np.float32)), few), x)
        else:
            square = e("Mul", e("Mul", x, x), few)
            inner = e("Mul", x, e("Add", e.c(1, np.float32), square))
        y = e("Add", e("Tanh", e("Mul", root, inner)), e.c(1, np.float32))
        return str(e("Mul", e("Mul", e.c(0.5, np.float32), x), y))

    assert ops(passed(built, tmp_path, (2, 9))) == ["Add", "Gelu"]


@pytest.mark.parametrize("form", ["square", "inverse", "bare", "two axes", "pow"])
def test_layer_norms_spelled_out(form: str, tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        axes = (-2, -1) if form == "two axes" else (-1,)
        centered = e("Sub", "x", e.mean("x", *axes))
        other = e("Sub", "x", e.mean("x", *axes))  # some exporters write it twice
        square = e("Mul", other, other)
        if form == "pow":
            square = e("Pow", other, e.c(2, np.float32))
        total = e("Add", e.c(1e-5, np.float32), e.mean(square, *axes))
        root = e("Pow", total, e.c(0.5, np.float32)) if form == "pow" else e("Sqrt", total)
        if form == "inverse":
            y = e("Mul", centered, e("Reciprocal", root))
        else:
            y = e("Div", centered, root)
        if form == "bare":
            return str(y)
        held = (3, 7) if form == "two axes" else (7,)
        return str(e("Add", e.f(*held), e("Mul", e.f(*held), y)))

    graph = passed(built, tmp_path, (2, 3, 7))
    assert ops(graph) == ["LayerNormalization"]
    assert graph.nodes[0].attrs["axis"] == (1 if form == "two axes" else 2)
    assert len(graph.nodes[0].inputs) == (2 if form == "bare" else 3)


def test_norms_over_other_axes_are_not_layer_norms(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        centered = e("Sub", "x", e.mean("x", 1))
        total = e("Add", e.mean(e("Mul", centered, centered), 1), e.c(1e-5, np.float32))
        return str(e("Div", centered, e("Sqrt", total)))

    assert "LayerNormalization" not in ops(passed(built, tmp_path, (2, 3, 7)))


def test_clips_and_relus(tmp_path: Path) -> None:
    zero, six = (lambda e, v=v: e.c(v, np.float32) for v in (0, 6))

    def built(e: Exporter) -> str:
        a = e("Min", e("Max", "x", zero(e)), six(e))
        b = e("Clip", e("Relu", "x"), "", six(e))
        c = e("Clip", "x", zero(e))
        d = e("PRelu", "x", e.c([[0.25]], np.float32))
        return str(e("Concat", a, b, c, d, axis=1))

    graph = passed(built, tmp_path, (2, 9))
    assert Counter(ops(graph)) == {"Clip": 1, "Relu": 1, "LeakyRelu": 1, "Concat": 1}
    clip = next(n for n in graph.nodes if n.op == "Clip")
    assert [float(graph.array(name)) for name in clip.inputs[1:]] == [0, 6]


def test_a_mask_is_made_finite_and_nothing_else(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        low = e.c(np.finfo(np.float32).min, np.float32)
        mask = e("Mul", e("Sub", e.c(1, np.float32), e.c([[1, 1, 0]], np.float32)), low)
        soft = e("Softmax", e("Add", e("MatMul", "x", e("Transpose", "x", perm=[1, 0])), mask))
        big = e("Mul", "x", e.c(1e6, np.float32))
        return str(e("Add", e("MatMul", soft, "x"), e("Max", big, low)))

    graph = passed(built, tmp_path, (3, 3))
    held = [graph.array(c) for c in graph.constants if graph.array(c).dtype == np.float32]
    assert any(float(h.min()) == -1e4 for h in held)
    assert any(float(h.max()) == 1e6 for h in held)


def test_splits_get_explicit_sizes(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        a, b, c = e("Split", "x", outputs=3, axis=-1, num_outputs=3)
        return str(e("Concat", c, a, b, axis=1))

    graph = passed(built, tmp_path, (2, 8), opset=18)
    assert graph.array(graph.nodes[0].inputs[1]).tolist() == [3, 3, 2]


def test_shapes_are_folded_away(tmp_path: Path) -> None:
    def built(e: Exporter) -> str:
        shape = e("Shape", "x")
        n = e("Gather", shape, e.c(0, np.int64))
        rest = e("ReduceProd", e("Slice", shape, e.i(1), e.i(4)), keepdims=1)
        to = e("Concat", e("Unsqueeze", n, e.i(0)), rest, axis=0)
        zeros = e("ConstantOfShape", to)
        return str(e("Add", e("Reshape", "x", to), zeros))

    graph = passed(built, tmp_path, IMAGE)
    assert ops(graph) == ["Reshape", "Add"]
    assert graph.array(graph.nodes[0].inputs[1]).tolist() == [1, 256]


def test_softmax_as_it_was_before_opset_13(tmp_path: Path) -> None:
    graph = passed(lambda e: str(e("Softmax", "x", axis=1)), tmp_path, (2, 3, 4), opset=11)
    assert ops(graph) == ["Reshape", "Softmax", "Reshape"]
    graph = passed(lambda e: str(e("Softmax", "x", axis=1)), tmp_path, (2, 3, 1), opset=11)
    assert ops(graph) == ["Softmax"]


def nodes_of(*rows: tuple[str, str, str]) -> Graph:
    """A graph of Relus, (name, takes, makes) each, from x to y."""
    nodes = tuple(Node("Relu", name, (takes,), (makes,)) for name, takes, makes in rows)
    values = dict.fromkeys(("x", *(makes for *_, makes in rows)), Info((1,)))
    return Graph("g", ("x",), ("y",), nodes, {}, values)


def test_order() -> None:
    graph = ordered(nodes_of(("last", "b", "y"), ("second", "a", "b"), ("first", "x", "a")))
    assert [n.name for n in graph.nodes] == ["first", "second", "last"]
    with pytest.raises(FormatError, match="'one' is part of a cycle"):
        ordered(nodes_of(("one", "b", "a"), ("two", "a", "b"), ("three", "x", "y")))
    with pytest.raises(FormatError, match="'one' reads 'ghost', which no operator computes"):
        ordered(nodes_of(("one", "ghost", "y")))


def test_prune() -> None:
    graph = prune(nodes_of(("dead", "x", "a"), ("deader", "a", "b"), ("kept", "x", "y")))
    assert [n.name for n in graph.nodes] == ["kept"]
    assert set(graph.values) == {"x", "y"}
