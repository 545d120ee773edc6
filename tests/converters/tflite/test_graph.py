"""Every operator in LiteRT computes what onnxruntime does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.tflite.graph import LiteRTGraphTarget
from edgeq.graph.ir import Graph
from tests.lowering import Builder, feeds, reference

lower = LiteRTGraphTarget()

pytest.importorskip("ai_edge_litert")
pytest.importorskip("onnxruntime")
Make = Callable[[Builder], str | tuple[str, ...]]


def convs(**how: Any) -> Make:
    return lambda b: b.conv(b.input(1, 4, 9, 8), 4, 6, **how)


def one(kind: str, *shape: int, **attrs: Any) -> Make:
    return lambda b: b.op(kind, b.input(*shape), **attrs)


def positive(kind: str) -> Make:
    return lambda b: b.op(
        kind, b.op("Add", b.op("Abs", b.input(1, 3, 4, 5)), b.constant(0.5, "f4"))
    )


def two(kind: str, *shapes: tuple[int, ...], dtype: str = "float32") -> Make:
    return lambda b: b.op(
        kind, *(b.input(*s, dtype=dtype, name=f"x{i}") for i, s in enumerate(shapes))
    )


def transposed(k: int, s: int, p: int, over: int = 0, ci: int = 3) -> Make:
    return lambda b: b.op(
        "ConvTranspose", b.input(1, ci, 5, 4), b.random(ci, 6, k, k), b.random(6),
        kernel_shape=[k, k], strides=[s, s], pads=[p] * 4, output_padding=[over] * 2, group=1,
        dilations=[1, 1],
    )  # fmt: skip


def pool(kind: str, k: int, s: int, pads: tuple[int, ...], size: int = 9, **attrs: Any) -> Make:
    return lambda b: b.op(
        kind, b.input(1, 4, size, size), kernel_shape=[k, k], strides=[s, s], pads=list(pads),
        **attrs,
    )  # fmt: skip


def resized(mode: str, sizes: tuple[int, int], **attrs: Any) -> Make:
    return lambda b: b.op(
        "Resize", b.input(1, 3, 6, 5), "", "", b.ints(1, 3, *sizes), mode=mode, **attrs
    )


def reduced(kind: str, axes: tuple[int, ...], keep: int) -> Make:
    return lambda b: b.op(kind, b.conv(b.input(1, 3, 6, 5), 3, 4), b.ints(*axes), keepdims=keep)


def padded(mode: str, *pads: int, value: float = 0.0) -> Make:
    return lambda b: b.op(
        "Pad", b.input(1, 3, 6, 5), b.ints(*pads), b.constant(value, "f4"), mode=mode
    )


def sliced(starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...],
           steps: tuple[int, ...]) -> Make:  # fmt: skip
    return lambda b: b.op(
        "Slice", b.conv(b.input(1, 3, 8, 9), 3, 8), b.ints(*starts), b.ints(*ends), b.ints(*axes),
        b.ints(*steps),
    )  # fmt: skip


def activated(kind: str, *limits: float) -> Make:
    def make(b: Builder) -> str:
        x = b.conv(b.input(1, 3, 6, 5), 3, 4)
        return str(b.op(kind, x, *(b.constant(v, "f4") for v in limits)))

    return make


FLOAT: dict[str, Make] = {
    "conv": convs(),
    "conv without bias": convs(bias=False),
    "conv valid": convs(pads=[0, 0, 0, 0]),
    "conv stride 2, symmetric pads": convs(strides=2),
    "conv stride 2, like SAME": convs(strides=2, pads=[1, 0, 1, 1]),
    "conv uneven pads": convs(pads=[2, 0, 0, 1]),
    "conv dilated": convs(dilations=2, pads=[2, 2, 2, 2]),
    "conv grouped": lambda b: b.conv(b.input(1, 4, 9, 8), 4, 6, group=2),
    "conv 1 of 1 channel": lambda b: b.conv(b.input(1, 1, 9, 8), 1, 4),
    "depthwise": lambda b: b.conv(b.input(1, 4, 9, 8), 4, 4, group=4),
    "depthwise multiplied": lambda b: b.conv(b.input(1, 4, 9, 8), 4, 8, group=4, strides=2),
    "depthwise dilated": lambda b: b.conv(
        b.input(1, 4, 9, 8), 4, 4, group=4, dilations=2, pads=[2] * 4
    ),
    "conv 1-d": lambda b: b.conv(b.input(1, 4, 16), 4, 6, axes=1),
    "depthwise 1-d": lambda b: b.conv(b.input(1, 4, 16), 4, 4, 5, group=4, axes=1, strides=2),
    "transposed 2x2": transposed(2, 2, 0),
    "transposed 4x4": transposed(4, 2, 1),
    "transposed 3x3, more": transposed(3, 2, 1, 1),
    "transposed 3x3": transposed(3, 1, 1),
    "linear": lambda b: b.linear(b.input(2, 7), 7, 5),
    "linear of three axes": lambda b: b.linear(b.input(2, 3, 7), 7, 5),
    "linear without bias": lambda b: b.op("Linear", b.input(1, 7), b.random(5, 7)),
    "matmul": two("MatMul", (2, 3, 4, 5), (2, 3, 5, 6)),
    "matmul broadcast": two("MatMul", (2, 3, 4, 5), (5, 6)),
    "matmul transposed": lambda b: b.op(
        "MatMul", b.input(1, 2, 4, 5), b.op("Transpose", b.input(1, 2, 3, 5, name="y"),
                                            perm=[0, 1, 3, 2])
    ),
    "maxpool": pool("MaxPool", 2, 2, (0, 0, 0, 0)),
    "maxpool padded": pool("MaxPool", 3, 2, (1, 1, 1, 1), 8),
    "maxpool like SAME": pool("MaxPool", 3, 2, (1, 1, 1, 1), 9),
    "maxpool 1-d": lambda b: b.op(
        "MaxPool", b.input(1, 4, 16), kernel_shape=[3], strides=[2], pads=[1, 1]
    ),
    "averagepool": pool("AveragePool", 2, 2, (0, 0, 0, 0)),
    "averagepool of some": pool("AveragePool", 3, 1, (1, 1, 1, 1), count_include_pad=0),
    "averagepool of all": pool("AveragePool", 3, 1, (1, 1, 1, 1), count_include_pad=1),
    "averagepool uneven": pool("AveragePool", 3, 2, (1, 1, 1, 1), 8, count_include_pad=0),
    "globalaveragepool": one("GlobalAveragePool", 1, 4, 5, 6),
    "globalmaxpool": one("GlobalMaxPool", 1, 4, 5, 6),
    **{f"{k} over {a}, {keep}": reduced(k, a, keep)
       for k in ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceL1",
                 "ReduceProd")
       for a, keep in (((2, 3), 0), ((1,), 1), ((-1,), 0))},
    "add": two("Add", (1, 3, 4, 5), (1, 3, 4, 5)),
    "add channel": lambda b: b.op("Add", b.conv(b.input(1, 3, 6, 5), 3, 4), b.random(1, 4, 1, 1)),
    "add a row": lambda b: b.op("Add", b.conv(b.input(1, 3, 6, 5), 3, 4), b.random(5)),
    "add of fewer axes": two("Add", (1, 3, 4, 5), (4, 1)),
    "sub": two("Sub", (2, 3, 4), (3, 1)),
    "mul": two("Mul", (2, 3, 4), (1, 3, 4)),
    "div": lambda b: b.op("Div", b.input(2, 3), b.constant(3.0, "f4")),
    "a number over x": lambda b: b.op("Div", b.constant(3.0, "f4"), b.op("Exp", b.input(2, 3))),
    "min": two("Min", (2, 3, 4), (3, 1)),
    "max of three": two("Max", (2, 3, 4), (3, 1), (4,)),
    "square": lambda b: b.op("Pow", b.input(2, 3, 4), b.constant(2.0, "f4")),
    "pow .5": lambda b: b.op("Pow", b.op("Abs", b.input(2, 3)), b.constant(0.5, "f4")),
    "pow 3": lambda b: b.op("Pow", b.input(2, 3, 4), b.constant(3.0, "f4")),
    **{k.lower(): positive(k) for k in ("Sqrt", "Log")},
    **{k.lower(): one(k, 1, 3, 4, 5) for k in (
        "Exp", "Neg", "Abs", "Floor", "Ceil", "Round", "Sin", "Cos", "Sign", "Erf", "Relu",
        "LeakyRelu", "Elu", "Softplus", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid")},
    "erf of little": lambda b: b.op("Erf", b.op("Mul", b.input(64), b.constant(1e-3, "f4"))),
    "softplus of much": lambda b: b.op("Softplus", b.op("Mul", b.input(64), b.constant(90, "f4"))),
    "hardsigmoid of torch": one("HardSigmoid", 2, 3, 4, alpha=1 / 6, beta=0.5),
    "leaky .3": one("LeakyRelu", 2, 30, alpha=0.3),
    "elu .5": one("Elu", 2, 30, alpha=0.5),
    "gelu": one("Gelu", 2, 30, approximate="none"),
    "gelu by tanh": one("Gelu", 2, 30, approximate="tanh"),
    "prelu": lambda b: b.op("PRelu", b.conv(b.input(1, 3, 6, 5), 3, 4), b.random(4, 1, 1)),
    "prelu of one slope": lambda b: b.op("PRelu", b.input(1, 3, 6, 5), b.random(1)),
    "relu behind conv": activated("Relu"),
    "relu6 behind conv": activated("Clip", 0.0, 6.0),
    "clip -1..1 behind conv": activated("Clip", -1.0, 1.0),
    "clip behind conv": activated("Clip", -0.3, 0.7),
    "clip from below": lambda b: b.op("Clip", b.input(2, 30), b.constant(-0.2, "f4")),
    "clip from above": lambda b: b.op("Clip", b.input(2, 30), "", b.constant(0.2, "f4")),
    **{f"{k.lower()} {axis}": one(k, 2, 3, 4, 5, axis=axis)
       for k in ("Softmax", "LogSoftmax") for axis in (1, -1)},
    "softmax of five axes": one("Softmax", 1, 2, 3, 4, 5, axis=2),
    "layernorm": lambda b: b.op(
        "LayerNormalization", b.input(2, 3, 8), b.random(8), b.random(8), axis=-1, epsilon=1e-5
    ),
    "layernorm of an image": lambda b: b.op(
        "LayerNormalization", b.conv(b.input(1, 3, 6, 5), 3, 4), b.random(4, 6, 5), axis=1
    ),
    "embedding": lambda b: b.op("Gather", b.random(9, 5), b.input(1, 6, dtype="int64"), axis=0),
    "gather one": lambda b: b.op("Gather", b.input(1, 6, 4), b.constant(0, "i8"), axis=1),
    "gather from the end": lambda b: b.op("Gather", b.input(1, 6, 4), b.ints(-1, 2), axis=-1),
    "reshape": lambda b: b.op("Reshape", b.input(2, 3, 4), b.ints(6, 4)),
    "flatten": lambda b: b.op("Flatten", b.conv(b.input(1, 3, 6, 5), 3, 4), axis=1),
    "flatten and linear": lambda b: b.linear(
        b.op("Flatten", b.conv(b.input(2, 3, 6, 5), 3, 4), axis=1), 120, 7
    ),
    "flatten, used twice": lambda b: _twice(b),
    "tokens of an image": lambda b: b.op(
        "Transpose", b.op("Reshape", b.conv(b.input(1, 3, 6, 5), 3, 4), b.ints(1, 4, 30)),
        perm=[0, 2, 1],
    ),
    "channel shuffle": lambda b: b.conv(b.op(
        "Reshape", b.op("Transpose", b.op(
            "Reshape", b.conv(b.input(1, 3, 6, 5), 3, 8), b.ints(1, 2, 4, 6, 5)),
            perm=[0, 2, 1, 3, 4]), b.ints(1, 8, 6, 5)), 8, 4),
    "transpose": one("Transpose", 2, 3, 4, 5, perm=[0, 3, 1, 2]),
    "squeeze": lambda b: b.op("Squeeze", b.conv(b.input(1, 3, 6, 1), 3, 4), b.ints(3)),
    "unsqueeze": lambda b: b.op("Unsqueeze", b.input(3, 4), b.ints(0, 2)),
    "concat": lambda b: b.op(
        "Concat", b.conv(b.input(1, 3, 6, 5), 3, 4), "x", b.random(1, 2, 6, 5), axis=1
    ),
    "split": lambda b: b.op(
        "Split", b.conv(b.input(1, 3, 6, 5), 3, 8), b.ints(2, 1, 5), axis=1, outputs=3
    ),
    "slice": sliced((1, 2), (-1, 99), (2, -1), (1, 1)),
    "slice in steps": sliced((0, 1), (8, 9), (2, 3), (2, 3)),
    "slice backwards": sliced((-1,), (-99,), (3,), (-1,)),
    "slice channels": sliced((0,), (4,), (1,), (1,)),
    "pad": padded("constant", 0, 0, 1, 2, 0, 0, 3, 4),
    "pad with 2": padded("constant", 0, 1, 1, 2, 0, 0, 3, 4, value=2.0),
    "pad and cut": padded("constant", 0, 0, -1, 2, 0, 0, 3, -2),
    "pad reflected": padded("reflect", 0, 0, 1, 2, 0, 0, 3, 4),
    **{f"nearest {way} {size}": resized(
        "nearest", size, coordinate_transformation_mode=way, nearest_mode=mode)
       for way, mode in (("half_pixel", "round_prefer_floor"), ("asymmetric", "floor"),
                         ("align_corners", "round_prefer_ceil"),
                         ("half_pixel", "round_prefer_ceil"))
       for size in ((12, 10), (3, 5), (7, 8))},
    **{f"linear {way}": resized("linear", (12, 9), coordinate_transformation_mode=way)
       for way in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")},
    "depth to space": one("DepthToSpace", 1, 8, 3, 4, blocksize=2, mode="DCR"),
    "depth to space, CRD": one("DepthToSpace", 1, 8, 3, 4, blocksize=2, mode="CRD"),
    "space to depth": one("SpaceToDepth", 1, 2, 6, 4, blocksize=2),
    "expand": lambda b: b.op("Expand", b.input(3, 1), b.ints(2, 3, 4)),
    "tile": lambda b: b.op("Tile", b.input(2, 3), b.ints(2, 3)),
    "cumsum": lambda b: b.op("CumSum", b.input(2, 6), b.constant(1, "i8")),
    "cast": lambda b: b.op("Cast", b.input(2, 6, dtype="int64"), to=1),
    "cast to whole": lambda b: b.op("Cast", b.input(2, 6), to=7),
    "cast to bool": lambda b: b.op("Cast", b.input(2, 6, dtype="int64"), to=9),
    "where": lambda b: b.op(
        "Where", b.op("Greater", b.input(2, 6), b.constant(0.0, "f4")), "x",
        b.constant(-1.0, "f4"),
    ),
    **{k.lower(): two(k, (2, 6), (6,), dtype="int64") for k in (
        "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")},
    **{k.lower(): two(k, (2, 6), (2, 6), dtype="bool") for k in ("And", "Or")},
    "not": lambda b: b.op("Not", b.input(2, 6, dtype="bool")),
    "argmax": lambda b: b.op("ArgMax", b.conv(b.input(1, 3, 6, 5), 3, 4), axis=1, keepdims=0),
    "argmin, kept": lambda b: b.op("ArgMin", b.input(2, 6), axis=-1, keepdims=1),
    "half weights": lambda b: _half(b),
}  # fmt: skip


def _twice(b: Builder) -> tuple[str, str]:
    flat = b.op("Flatten", b.conv(b.input(1, 3, 6, 5), 3, 4), axis=1)
    return b.linear(flat, 120, 7), b.op("Relu", flat)


def _half(b: Builder) -> str:
    y = b.conv(b.input(1, 3, 6, 5), 3, 4)
    for name, array in b.constants.items():
        b.constants[name] = np.asarray(array).astype(np.float16)
    return y


def made(make: Make) -> Graph:
    b = Builder()
    outputs = make(b)
    return b.graph(*(outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.parametrize("name", FLOAT)
def test_operator_in_float(name: str, tmp_path: Path) -> None:
    graph = made(FLOAT[name])
    given = feeds(graph)
    lower.check(graph, {})
    lower.write(graph, tmp_path / "m.tflite", {})
    run = lower.open_runner(tmp_path / "m.tflite")
    found, want = run(given), reference(graph, given)
    for out in graph.outputs:
        assert found[out].dtype == want[out].dtype
        assert found[out].shape == want[out].shape
        if want[out].dtype.kind == "f":
            np.testing.assert_allclose(found[out], want[out], rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(found[out], want[out])
