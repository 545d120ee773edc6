"""Graphs as Core ML packages: each operator, executed, against onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.coreml import graph as coreml_graph
from edgeq.converters.coreml.exec.machine import SUPPORTED
from edgeq.converters.coreml.graph import CoreMLGraphTarget
from edgeq.converters.coreml.lower.build import CoremlLowering
from edgeq.converters.coreml.lower.support import EMITTERS
from edgeq.core.errors import UnsupportedError, UsageError
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph, Info, Node, QuantWeight
from edgeq.graph.onnx.infer import inferred
from tests import graph_zoo

coreml_lower = CoreMLGraphTarget()

pytest.importorskip("coremltools")
pytest.importorskip("onnxruntime")

FLOAT32 = {"precision": "float32"}
Case = tuple[Graph, dict[str, NDArray[Any]]]
Given = Sequence[int] | NDArray[Any]


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def one(
    op: str, *inputs: Given | None, outputs: int = 1, fed: Sequence[int] = (0,), **attrs: Any
) -> Case:
    """A graph of one node, and what to feed it.

    Args:
        op: its type.
        inputs: shapes of float32 values, or arrays; None for one left out.
        outputs: of the node.
        fed: places of the inputs that are values, the others being constants.
    """
    feeds: dict[str, NDArray[Any]] = {}
    constants: dict[str, NDArray[Any]] = {}
    names = []
    for i, given in enumerate(inputs):
        if given is None:
            names.append("")
            continue
        names.append(f"in.{i}")
        array = (
            given
            if isinstance(given, np.ndarray)
            else rng().standard_normal(given).astype(np.float32)
        )
        (feeds if i in fed else constants)[names[-1]] = array
    made = tuple(f"out/{i}" for i in range(outputs))
    graph = Graph(
        op,
        tuple(feeds),
        made,
        (Node(op, f"a {op}", tuple(names), made, attrs),),
        constants,
        {name: Info(array.shape, str(array.dtype)) for name, array in feeds.items()},
    )
    return inferred(graph), feeds


def case(*args: Any, **options: Any) -> Callable[[], Case]:
    """`one`, when it is wanted."""
    return partial(one, *args, **options)


def lowered(
    graph: Graph, feeds: Mapping[str, NDArray[Any]], folder: Path, **options: Any
) -> dict[str, NDArray[Any]]:
    """What a package of the graph gives."""
    path = folder / "model.mlpackage"
    coreml_lower.write(graph, path, options)
    runner = coreml_lower.open_runner(path)
    assert dict(runner.inputs) == {name: graph.info(name) for name in graph.inputs}
    found = runner(feeds)
    runner.close()
    return found


def number(value: float) -> NDArray[np.float32]:
    return np.array(value, np.float32)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


X = (2, 3, 8, 6)
FLAGS = np.arange(12).reshape(3, 4) % 3 == 0

CASES = {
    "conv": case("Conv", X, (5, 3, 3, 2), (5,), pads=[1, 0, 2, 1], strides=[2, 1]),
    "conv depthwise": case("Conv", X, (6, 1, 3, 3), group=3, dilations=[2, 1], pads=[2, 1, 2, 1]),
    "conv grouped": case("Conv", (1, 4, 5, 5), (6, 2, 1, 1), (6,), group=2),
    "conv 1-d": case("Conv", (1, 3, 9), (4, 3, 3), (4,), pads=[1, 1], strides=[2]),
    "conv 3-d": case("Conv", (1, 2, 4, 5, 6), (3, 2, 2, 2, 2)),
    "conv transpose": case(
        "ConvTranspose", (1, 4, 5, 3), (4, 6, 3, 3), (6,), strides=[2, 2], pads=[1, 1, 1, 1],
        output_padding=[1, 1],
    ),
    "conv transpose grouped": case(
        "ConvTranspose", (1, 4, 5, 3), (4, 3, 2, 4), (6,), group=2, strides=[2, 3],
        pads=[0, 1, 1, 0], dilations=[2, 1],
    ),
    "linear": case("Linear", (2, 5), (4, 5), (4,)),
    "linear of three": case("Linear", (2, 3, 5), (4, 5)),
    "linear of four": case("Linear", (1, 2, 3, 5), (4, 5), (4,)),
    "matmul": case("MatMul", (2, 3, 4, 5), (3, 5, 6), fed=(0, 1)),
    "matmul of matrices": case("MatMul", (4, 5), (5, 2), fed=(0, 1)),
    "max pool": case("MaxPool", X, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
    "average pool": case("AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "average pool counted": case(
        "AveragePool", X, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 1],
        count_include_pad=1,
    ),
    "average pool 1-d": case("AveragePool", (1, 3, 9), kernel_shape=[2], strides=[2]),
    "global average": case("GlobalAveragePool", X),
    "global max": case("GlobalMaxPool", X),
    "layer norm": case("LayerNormalization", (2, 4, 6), (6,), (6,), axis=-1, epsilon=1e-3),
    "layer norm of two": case("LayerNormalization", (2, 4, 6), (4, 6), axis=1),
    "relu": case("Relu", X),
    "clip 6": case("Clip", X, number(0), number(6)),
    "clip both": case("Clip", X, number(-0.5), number(0.5)),
    "clip below": case("Clip", X, number(0.5)),
    "clip above": case("Clip", X, None, number(0.5)),
    "clip at 0": case("Clip", X, number(0)),
    "elu": case("Elu", X, alpha=0.7),
    "gelu": case("Gelu", X),
    "gelu tanh": case("Gelu", X, approximate="tanh"),
    "hard sigmoid": case("HardSigmoid", X, alpha=0.3),
    "hard swish": case("HardSwish", X),
    "leaky": case("LeakyRelu", X, alpha=0.2),
    "log softmax": case("LogSoftmax", X, axis=1),
    "prelu": case("PRelu", X, (3, 1, 1)),
    "prelu of all": case("PRelu", (2, 3), (3,)),
    "sigmoid": case("Sigmoid", X),
    "softmax": case("Softmax", X, axis=1),
    "softplus": case("Softplus", X),
    "tanh": case("Tanh", X),
    "abs": case("Abs", X),
    "ceil": case("Ceil", X),
    "cos": case("Cos", X),
    "erf": case("Erf", X),
    "exp": case("Exp", X),
    "floor": case("Floor", X),
    "identity": case("Identity", X),
    "log": case("Log", rng().random((3, 4)).astype(np.float32) + np.float32(0.1)),
    "neg": case("Neg", X),
    "neg of integers": case("Neg", ints(1, -2, 3)),
    "not": case("Not", FLAGS),
    "round": case("Round", np.array([0.5, 1.5, -2.5, 0.2], np.float32)),
    "sign": case("Sign", X),
    "sin": case("Sin", X),
    "sqrt": case("Sqrt", rng().random((3, 4)).astype(np.float32)),
    "add": case("Add", X, (3, 1, 1)),
    "add scalar": case("Add", X, number(0.5)),
    "add two": case("Add", X, X, fed=(0, 1)),
    "sub": case("Sub", (6,), X, fed=(0, 1)),
    "mul": case("Mul", X, (2, 3, 1, 1), fed=(0, 1)),
    "mul integers": case("Mul", ints(1, 2, 3), ints(4)),
    "div": case("Div", X, np.full((3, 1, 1), 3, np.float32)),
    "max": case("Max", X, (3, 1, 1), fed=(0, 1)),
    "min": case("Min", X, (6,), fed=(0, 1)),
    "mod": case("Mod", ints(5, -7, 9), ints(4)),
    "square": case("Pow", X, number(2)),
    "root": case("Pow", rng().random((3, 4)).astype(np.float32), number(0.5)),
    "pow": case("Pow", rng().random((3, 4)).astype(np.float32), (4,)),
    "and": case("And", FLAGS, ~FLAGS, fed=(0, 1)),
    "or": case("Or", FLAGS, FLAGS.T.reshape(3, 4), fed=(0, 1)),
    "equal": case("Equal", ints(1, 2, 3), ints(3, 2, 1)),
    "equal flags": case("Equal", FLAGS, FLAGS[:1], fed=(0, 1)),
    "greater": case("Greater", X, X[1:], fed=(0, 1)),
    "greater or equal": case("GreaterOrEqual", ints(1, 2, 3), ints(2)),
    "less": case("Less", X, number(0.5)),
    "less or equal": case("LessOrEqual", X, number(0.5)),
    "where": case("Where", FLAGS, (3, 4), (1, 4), fed=(0, 1)),
    "cast to integers": case("Cast", X, to=7),
    "cast to flags": case("Cast", ints(0, 2, 0), to=9),
    "cast flags": case("Cast", FLAGS, to=1),
    **{
        f"{op} {keep}": case(op, X, ints(1, -1), keepdims=keep)
        for op in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2",
                   "ReduceProd")
        for keep in (0, 1)
    },
    "reduce all": case("ReduceMean", X, keepdims=0),
    "reduce nothing": case("ReduceSum", X, ints(), noop_with_empty_axes=1),
    "argmax": case("ArgMax", X, axis=1, keepdims=0),
    "argmin": case("ArgMin", X, axis=-1),
    "concat": case("Concat", X, X, (2, 1, 8, 6), fed=(0, 1), axis=1),
    "cumsum": case("CumSum", X, ints(1).reshape(()), reverse=1),
    "depth to space": case("DepthToSpace", (1, 8, 2, 3), blocksize=2),
    "depth to space CRD": case("DepthToSpace", (1, 8, 2, 3), blocksize=2, mode="CRD"),
    "space to depth": case("SpaceToDepth", (1, 2, 4, 6), blocksize=2),
    "expand": case("Expand", (3, 1), ints(2, 3, 4)),
    "expand flags": case("Expand", FLAGS[:1], ints(3, 4)),
    "tile": case("Tile", (3, 2), ints(2, 3)),
    "flatten": case("Flatten", X, axis=2),
    "reshape": case("Reshape", X, ints(6, 48)),
    "squeeze": case("Squeeze", (1, 3, 1), ints(0)),
    "unsqueeze": case("Unsqueeze", (3, 4), ints(0, -1)),
    "transpose": case("Transpose", X, perm=[0, 2, 3, 1]),
    "gather table": case("Gather", (4, 5), ints(1, 0, 3).reshape(1, 3), fed=(1,)),
    "gather value": case("Gather", X, ints(-1, 0), axis=2),
    "gather one": case("Gather", X, ints(2).reshape(()), axis=2),
    "gather computed": case("Gather", X, ints(1, 0), fed=(0, 1), axis=1),
    "gather flags": case("Gather", FLAGS, ints(1), axis=1),
    "gather elements": case("GatherElements", (3, 4), ints(0, -1, 2).reshape(3, 1), axis=1),
    "pad": case("Pad", X, ints(0, 0, 1, 2, 0, 1, 0, 3), number(0.5)),
    "pad axes": case("Pad", X, ints(1, 2), None, ints(-1)),
    "pad edge": case("Pad", X, ints(0, 0, 1, 2, 0, 0, 0, 3), mode="edge"),
    "pad reflect": case("Pad", X, ints(0, 0, 1, 2, 0, 0, 0, 3), mode="reflect"),
    "slice": case("Slice", X, ints(1, -4), ints(1 << 40, -1), ints(2, 3), ints(3, 1)),
    "slice backwards": case("Slice", X, ints(-1, 4), ints(-(1 << 40), 1), ints(2, 3), ints(-2, -1)),
    "split": case("Split", X, ints(1, 2, 5), outputs=3, axis=2),
    "topk": case("TopK", (3, 9), ints(4), outputs=2, axis=1),
    "topk smallest": case("TopK", (3, 9), ints(2), outputs=2, axis=0, largest=0),
    **{
        f"resize {mode} {way} {size}": case(
            "Resize", X, None, None, ints(2, 3, *size), mode=mode,
            coordinate_transformation_mode=way,
        )
        for mode, way, size in (
            ("nearest", "half_pixel", (16, 12)), ("nearest", "asymmetric", (16, 18)),
            ("nearest", "half_pixel", (5, 9)), ("nearest", "align_corners", (3, 13)),
            ("linear", "half_pixel", (16, 12)), ("linear", "half_pixel", (5, 9)),
            ("linear", "align_corners", (15, 1)), ("linear", "asymmetric", (12, 12)),
            ("linear", "pytorch_half_pixel", (16, 3)),
        )
    },
    "resize floor": case(
        "Resize", X, None, np.array([1, 1, 2, 2], np.float32), mode="nearest",
        nearest_mode="floor", coordinate_transformation_mode="asymmetric",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_operator_means_what_it_means_in_onnxruntime(name: str, tmp_path: Path) -> None:
    graph, feeds = CASES[name]()
    wanted = Session(graph)(feeds)
    found = lowered(graph, feeds, tmp_path, **FLOAT32)
    for output, want in wanted.items():
        assert (found[output].dtype, found[output].shape) == (want.dtype, want.shape)
        np.testing.assert_allclose(found[output], want, rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_case() -> None:
    tried = {node.op for make in CASES.values() for node in make()[0].nodes}
    assert tried == set(EMITTERS)


@pytest.mark.parametrize("target", coreml_graph.TARGETS)
@pytest.mark.parametrize("precision", coreml_graph.PRECISIONS)
def test_every_operator_is_known_to_every_system(target: str, precision: str) -> None:
    for make in CASES.values():
        graph, _ = make()
        coreml_lower.check(graph, {"target_os": target, "precision": precision})
        program = CoremlLowering(graph, target, precision, EMITTERS).program()
        made = [op.op_type for op in program.functions["main"].operations]
        assert set(made) <= SUPPORTED


@pytest.mark.parametrize("name", ["conv", "linear of four", "layer norm", "resize floor", "where"])
def test_a_program_of_float16_is_near(name: str, tmp_path: Path) -> None:
    graph, feeds = CASES[name]()
    found = lowered(graph, feeds, tmp_path, precision="float16")
    for output, want in Session(graph)(feeds).items():
        assert found[output].dtype == np.float32
        np.testing.assert_allclose(found[output], want, rtol=4e-3, atol=4e-3)


ZOO = sorted(graph_zoo.MODELS)


@pytest.mark.parametrize("name", ZOO)
def test_models_of_exporters_mean_what_they_mean_in_onnxruntime(name: str, tmp_path: Path) -> None:
    graph = graph_zoo.canonical(name, tmp_path)
    feeds = graph_zoo.feeds(graph)
    found = lowered(graph, feeds, tmp_path, **FLOAT32)
    for output, want in Session(graph)(feeds).items():
        scale = float(np.abs(want).max(initial=1))
        np.testing.assert_allclose(found[output] / scale, want / scale, rtol=1e-5, atol=1e-5)


# --- refusals ---------------------------------------------------------------------------------

REFUSED = {
    "computed weight": (case("Conv", X, (5, 3, 3, 2), fed=(0, 1)), "constant weight"),
    "output padding": (
        case("ConvTranspose", (1, 4, 5, 3), (4, 6, 3, 3), strides=[2, 2], output_padding=[1, 1]),
        "output_padding.*nearest",
    ),
    "dilated pool": (
        case("MaxPool", X, kernel_shape=[2, 2], dilations=[2, 2]), "dilations.*nearest",
    ),
    "indices of a pool": (case("MaxPool", X, kernel_shape=[2, 2], outputs=2), "indices"),
    "computed bounds": (case("Clip", X, number(0), fed=(0, 1)), "constant bounds"),
    "division of integers": (case("Div", ints(4, 2), ints(2)), "Cast"),
    "cubic": (case("Resize", X, None, None, ints(2, 3, 16, 12), mode="cubic"), "linear"),
    "linear of batches": (
        case("Resize", X, None, None, ints(4, 3, 8, 6), mode="linear"), "last two",
    ),
    "scale that does not divide": (
        case("Resize", X, None, np.array([1, 1, 1.3, 1], np.float32), mode="linear"), "sizes",
    ),
    "negative pads": (case("Pad", X, ints(0, 0, -1, 0, 0, 0, 0, 0)), "Slice"),
    "wrapped": (case("Pad", X, ints(0, 0, 1, 0, 0, 0, 0, 0), mode="wrap"), "reflect"),
    "reflected batches": (
        case("Pad", X, ints(1, 0, 0, 0, 0, 0, 0, 0), mode="reflect"), "last two",
    ),
    "six dimensions": (
        case("Reshape", X, ints(1, 2, 3, 2, 4, 6)), "6 dimensions.*at most 5",
    ),
    "last index": (case("ArgMax", X, axis=1, select_last_index=1), "first of equal"),
    "numbers past int32": (case("Add", ints(1, 2), ints(1 << 40)), "int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_operator_and_node(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    graph, _ = make()
    with pytest.raises(UnsupportedError, match=f"(?s){graph.nodes[0].op} 'a .*{words}"):
        coreml_lower.write(graph, tmp_path / "model.mlpackage", {})
    assert not list(tmp_path.iterdir())


def test_all_unsupported_operators_are_listed_at_once() -> None:
    nodes = tuple(
        Node(op, f"node {op}", (before,), (after,))
        for op, before, after in (("Sigmoyd", "x", "y"), ("Relu", "y", "z"), ("Nicate", "z", "u"))
    )
    values = {name: Info((2, 2)) for name in "xyzu"}
    graph = Graph("two", ("x",), ("u",), nodes, {}, values)
    with pytest.raises(UnsupportedError, match=r"(?s)Sigmoyd 'node .*Sigmoid.*Nicate 'node Nic"):
        coreml_lower.check(graph, {})


# --- ends -------------------------------------------------------------------------------------


def test_names_that_core_ml_does_not_take_are_kept(tmp_path: Path) -> None:
    names = ("0:image", "0.image", "state", "_x", "add_0")
    sums = ("sum_1", "sum_2", "sum_3", "add_1")
    nodes = (
        *(
            Node("Add", f"sum{i}", (f"sum_{i - 1}" if i > 1 else names[0], name), (out,))
            for i, (name, out) in enumerate(zip(names[1:], sums, strict=True), 1)
        ),
        Node("Add", "again", ("add_1", "add_1"), ("mul_0",)),
        Node("Mul", "less", ("mul_0", "add_2"), ("a/ b",)),
    )
    values = {name: Info((2, 3)) for name in (*names, *sums, "mul_0", "a/ b")}
    held = {"add_2": QuantWeight(np.full((2, 3), 2, np.int8), np.float32(0.5).reshape(()), 8)}
    graph = Graph("names", names, ("add_1", "a/ b", "state"), nodes, held, values)
    feeds = {name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)}
    found = lowered(graph, feeds, tmp_path)
    assert [n for n, _ in coreml_lower.read_weights(tmp_path / "model.mlpackage")] == ["add_2"]
    assert {name: float(a[0, 0]) for name, a in found.items()} == {
        "add_1": 10, "a/ b": 20, "state": 2,
    }  # fmt: skip


def test_inputs_are_checked(tmp_path: Path) -> None:
    graph, feeds = CASES["relu"]()
    path = tmp_path / "model.mlpackage"
    coreml_lower.write(graph, path, {})
    runner = coreml_lower.open_runner(path)
    with pytest.raises(UsageError, match=r"'in.0' is missing"):
        runner({})
    with pytest.raises(UsageError, match="'in0'"):
        runner({"in0": feeds["in.0"]})
    with pytest.raises(UsageError, match=r"\[1, 3, 8, 6\]"):
        runner({"in.0": feeds["in.0"][:1]})
