"""Graphs as exporters write them: of many opsets, with the habits of each.

`models` lists them, `save` writes one as an .onnx file, `canonical` reads it as a `Graph`,
`feeds` makes inputs for a graph, and `rounded` quantizes one in the plainest way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Constant, Graph, QuantWeight

MODELS: dict[str, Callable[[], onnx.ModelProto]] = {}
"""Name -> what makes the model; weights are random and always the same."""


class Exporter:
    """Writes a model operator by operator, as an exporter of one opset would."""

    def __init__(self, opset: int, seed: int = 0) -> None:
        self.opset = opset
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.count = 0

    def c(self, array: Any, dtype: Any = None) -> str:
        """An initializer; its name."""
        name = f"w{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def f(self, *shape: int, scale: float = 1.0, at: float = 0.0) -> str:
        """A float initializer with normal numbers."""
        return self.c(self.rng.standard_normal(shape) * scale + at, np.float32)

    def i(self, *numbers: int) -> str:
        """A list of integers as initializer."""
        return self.c(numbers, np.int64)

    def __call__(self, op: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        """A node; the name of its output, or a list of them."""
        self.count += 1
        made = [f"t{self.count}" if not k else f"t{self.count}_{k}" for k in range(outputs)]
        name = f"{op}_{self.count}"
        self.nodes.append(helper.make_node(op, inputs, made, name=name, **attrs))
        return made[0] if outputs == 1 else made

    def model(
        self,
        inputs: dict[str, tuple[Any, ...]],
        outputs: dict[str, str],
        types: dict[str, int] | None = None,
        listed: bool = False,
        constants: bool = False,
    ) -> onnx.ModelProto:
        """The model; ``outputs`` maps the graph's names to values, ``inputs`` to shapes."""
        for name, value in outputs.items():
            self.nodes.append(helper.make_node("Identity", [value], [name], name=f"out_{name}"))
        given = [
            helper.make_tensor_value_info(n, (types or {}).get(n, TensorProto.FLOAT), shape)
            for n, shape in inputs.items()
        ]
        if listed:  # files before IR 4 list initializers among the inputs
            given += [
                helper.make_tensor_value_info(t.name, t.data_type, t.dims)
                for t in self.initializers
            ]
        initializers = self.initializers
        if constants:
            made = [helper.make_node("Constant", [], [t.name], value=t) for t in self.initializers]
            self.nodes, initializers = made + self.nodes, []
        graph = helper.make_graph(
            self.nodes, "zoo", given, [helper.make_empty_tensor_value_info(n) for n in outputs],
            initializers,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8 if not listed else 3)
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        for place, name in enumerate(outputs):  # the types of outputs must be written
            found = inferred.graph.output[place]
            kind = found.type.tensor_type.elem_type or TensorProto.FLOAT
            dims = [d.dim_value or d.dim_param or None for d in found.type.tensor_type.shape.dim]
            known = dims if found.type.tensor_type.HasField("shape") else None
            model.graph.output[place].CopyFrom(helper.make_tensor_value_info(name, kind, known))
        return model

    # parts that several models share

    def conv(self, x: str, i: int, o: int, k: int = 3, bias: bool = True, **attrs: Any) -> str:
        """A convolution in two dimensions, padded to keep the size if nothing is said."""
        group = attrs.get("group", 1)
        if "auto_pad" not in attrs:
            attrs.setdefault("pads", [k // 2] * 4)
        weight = self.f(o, i // group, k, k, scale=(2 / (i // group * k * k)) ** 0.5)
        inputs = [x, weight, self.f(o, scale=0.1)] if bias else [x, weight]
        return str(self("Conv", *inputs, kernel_shape=[k, k], **attrs))

    def batch_norm(self, x: str, c: int) -> str:
        """A batch norm that does something."""
        return str(
            self(
                "BatchNormalization", x, self.f(c, scale=0.2, at=1), self.f(c, scale=0.2),
                self.f(c, scale=0.2), self.c(self.rng.uniform(0.5, 2, c), np.float32),
                epsilon=1e-3,
            )
        )  # fmt: skip

    def relu6(self, x: str) -> str:
        """Clip as this opset writes it."""
        if self.opset < 11:
            return str(self("Clip", x, min=0.0, max=6.0))
        return str(self("Clip", x, self.c(0, np.float32), self.c(6, np.float32)))

    def gemm(self, x: str, k: int, n: int) -> str:
        """A classifier's last layer."""
        return str(self("Gemm", x, self.f(n, k, scale=k**-0.5), self.f(n, scale=0.1), transB=1))

    def mean(self, x: str, *axes: int, keepdims: int = 1, op: str = "ReduceMean") -> str:
        """A reduction as this opset writes it."""
        if self.opset >= 18:
            return str(self(op, x, self.i(*axes), keepdims=keepdims))
        return str(self(op, x, axes=list(axes), keepdims=keepdims))

    def layer_norm(self, x: str, h: int, spelled: bool) -> str:
        """A layer norm, as one operator or in its parts."""
        scale, bias = self.f(h, scale=0.1, at=1), self.f(h, scale=0.1)
        if not spelled:
            return str(self("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-6))
        centered = self("Sub", x, self.mean(x, -1))
        square = self("Pow", centered, self.c(2, np.float32))
        deviation = self("Sqrt", self("Add", self.mean(square, -1), self.c(1e-6, np.float32)))
        return str(self("Add", self("Mul", self("Div", centered, deviation), scale), bias))

    def dense(self, x: str, k: int, n: int) -> str:
        """A product and a sum, as encoders have it."""
        product = self("MatMul", x, self.f(k, n, scale=k**-0.5))
        return str(self("Add", self.f(n, scale=0.1), product))

    def gelu(self, x: str, form: str) -> str:
        """A GELU in one of the forms it is spelled out in."""
        half, one = self.c(0.5, np.float32), self.c(1, np.float32)
        if form == "erf":
            e = self("Erf", self("Div", x, self.c(2**0.5, np.float32)))
            return str(self("Mul", self("Mul", x, self("Add", e, one)), half))
        if form == "half first":
            e = self("Erf", self("Mul", x, self.c(0.5**0.5, np.float32)))
            return str(self("Mul", self("Mul", half, x), self("Add", one, e)))
        cube = self("Pow", x, self.c(3, np.float32))
        inner = self("Add", x, self("Mul", cube, self.c(0.044715, np.float32)))
        t = self("Tanh", self("Mul", inner, self.c((2 / np.pi) ** 0.5, np.float32)))
        return str(self("Mul", half, self("Mul", x, self("Add", t, one))))

    def attention(self, x: str, mask: str, s: int, h: int, heads: int) -> str:
        """Self-attention over [1, s, h] with a mask that is added to the scores."""
        d = h // heads
        split = self.i(0, 0, heads, d)
        q, k, v = (self("Reshape", self.dense(x, h, h), split) for _ in range(3))
        q, v = (self("Transpose", y, perm=[0, 2, 1, 3]) for y in (q, v))
        scores = self("MatMul", q, self("Transpose", k, perm=[0, 2, 3, 1]))
        scores = self("Add", self("Div", scores, self.c(d**0.5, np.float32)), mask)
        mixed = self("MatMul", self("Softmax", scores, axis=-1), v)
        back = self("Transpose", mixed, perm=[0, 2, 1, 3])
        return self.dense(self("Reshape", back, self.i(0, -1, h)), h, h)


Made = Callable[[], onnx.ModelProto]


def zoo(made: Made) -> Made:
    """Adds a model to the zoo."""
    cached = functools.cache(made)
    MODELS[made.__name__] = cached
    return cached


@zoo
def mobilenet_v2() -> onnx.ModelProto:
    """Inverted residuals of depthwise convolutions, batch norms unfused, open batch."""
    e = Exporter(13)
    x = e.relu6(e.batch_norm(e.conv("x", 3, 8, strides=[2, 2], bias=False), 8))
    for i, o, stride in ((8, 8, 1), (8, 12, 2), (12, 12, 1)):
        y = e.relu6(e.batch_norm(e.conv(x, i, 4 * i, 1, bias=False), 4 * i))
        y = e.conv(y, 4 * i, 4 * i, bias=False, group=4 * i, strides=[stride, stride])
        y = e.relu6(e.batch_norm(y, 4 * i))
        y = e.batch_norm(e.conv(y, 4 * i, o, 1, bias=False), o)
        x = e("Add", x, y) if i == o and stride == 1 else y
    x = e("Flatten", e("GlobalAveragePool", x))
    return e.model({"x": ("N", 3, 32, 32)}, {"logits": e.gemm(e("Dropout", x), 12, 10)})


@zoo
def mobilenet_v3() -> onnx.ModelProto:
    """Squeeze and excitation, hard swish in three spellings."""
    e = Exporter(12)
    three, zero, six = (e.c(v, np.float32) for v in (3, 0, 6))

    def hard_sigmoid(x: str) -> str:
        return str(e("Div", e("Clip", e("Add", x, three), zero, six), six))

    x = e.conv("x", 3, 16, strides=[2, 2])
    x = e("Mul", x, hard_sigmoid(x))
    y = e.conv(x, 16, 16, group=16)
    y = e("Div", e("Mul", y, e("Clip", e("Add", y, three), zero, six)), six)
    gate = e("Relu", e.conv(e("GlobalAveragePool", y), 16, 4, 1))
    y = e("Mul", y, hard_sigmoid(e.conv(gate, 4, 16, 1)))
    x = e("Add", x, y)
    x = e("Mul", x, e("HardSigmoid", x, alpha=1 / 6, beta=0.5))
    x = e("Reshape", e.mean(x, 2, 3), e.i(0, -1))
    return e.model({"x": (1, 3, 24, 24)}, {"logits": e.gemm(x, 16, 10)})


@zoo
def resnet() -> onnx.ModelProto:
    """Residual blocks, a padded pool, a mean for a pool; opset 18."""
    e = Exporter(18)
    x = e("Relu", e.batch_norm(e.conv("x", 3, 8, 7, bias=False, strides=[2, 2]), 8))
    x = e("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    y = e("Relu", e.batch_norm(e.conv(x, 8, 16, bias=False, strides=[2, 2]), 16))
    y = e.batch_norm(e.conv(y, 16, 16, bias=False), 16)
    x = e.batch_norm(e.conv(x, 8, 16, 1, bias=False, strides=[2, 2]), 16)
    x = e.mean(e("Relu", e("Add", y, x)), -1, -2, keepdims=0)
    return e.model({"x": (1, 3, 32, 32)}, {"logits": e.gemm(x, 16, 10)})


@zoo
def efficientnet() -> onnx.ModelProto:
    """SAME_UPPER pads as TensorFlow has them, swish, squeeze and excitation; opset 11."""
    e = Exporter(11)

    def swish(x: str) -> str:
        return str(e("Mul", e("Sigmoid", x), x))

    x = swish(e.batch_norm(e.conv("x", 3, 8, strides=[2, 2], auto_pad="SAME_UPPER"), 8))
    y = e.conv(x, 8, 8, 5, group=8, strides=[2, 2], auto_pad="SAME_UPPER")
    y = swish(e.batch_norm(y, 8))
    gate = e.conv(swish(e.conv(e.mean(y, 2, 3), 8, 2, 1)), 2, 8, 1)
    y = e.conv(e("Mul", y, e("Sigmoid", gate)), 8, 12, 1)
    y = e("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER")
    y = e("Squeeze", e("GlobalAveragePool", y), axes=[2, 3])
    return e.model({"x": (1, 3, 29, 29)}, {"probs": e("Softmax", e.gemm(y, 12, 10))})


@zoo
def keyword_spotter() -> onnx.ModelProto:
    """A DS-CNN: odd kernels and pads, a big average pool; opset 8, initializers as inputs."""
    e = Exporter(8)
    weight = e.f(16, 1, 10, 4, scale=0.2)
    x = e("Conv", "x", weight, kernel_shape=[10, 4], strides=[2, 2], pads=[4, 1, 5, 1])
    x = e("Relu", e.batch_norm(x, 16))
    for _ in range(2):
        x = e("Relu", e.batch_norm(e.conv(x, 16, 16, group=16), 16))
        x = e("Relu", e.batch_norm(e.conv(x, 16, 16, 1), 16))
    x = e("AveragePool", x, kernel_shape=[25, 5], strides=[25, 5])
    x = e("Reshape", x, e.i(-1, 16))
    return e.model({"x": (1, 1, 49, 10)}, {"probs": e("Softmax", e.gemm(x, 16, 12))}, listed=True)


@zoo
def audio() -> onnx.ModelProto:
    """One dimension: dilated, strided, transposed, padded by an operator; opset 9."""
    e = Exporter(9)
    x = e("Pad", "x", pads=[0, 0, 2, 0, 0, 2], mode="constant", value=0.0)
    x = e("Conv", x, e.f(8, 2, 5, scale=0.3), e.f(8), kernel_shape=[5])
    x = e("LeakyRelu", e.batch_norm(x, 8), alpha=0.1)
    x = e("Conv", x, e.f(8, 4, 3, scale=0.3), group=2, dilations=[2], pads=[2, 2], strides=[2])
    x = e("MaxPool", e("Elu", x), kernel_shape=[3], strides=[2], pads=[1, 1])
    x = e("ConvTranspose", x, e.f(8, 4, 4, scale=0.3), e.f(4), strides=[2], pads=[1, 1])
    x = e("Tanh", e("PRelu", x, e.f(4, 1)))
    return e.model({"x": (1, 2, 64)}, {"y": e.mean(x, 2, op="ReduceMax", keepdims=0)})


@zoo
def detector() -> onnx.ModelProto:
    """A small YOLO: split and joined channels, upsampling, boxes decoded by slices; opset 17."""
    e = Exporter(17)

    def silu(x: str) -> str:
        return str(e("Mul", x, e("Sigmoid", x)))

    def c2f(x: str, c: int) -> str:
        a, b = e("Split", silu(e.conv(x, c, c, 1)), e.i(c // 2, c // 2), outputs=2, axis=1)
        b2 = e("Add", b, silu(e.conv(silu(e.conv(b, c // 2, c // 2)), c // 2, c // 2)))
        return silu(e.conv(e("Concat", a, b, b2, axis=1), c // 2 * 3, c, 1))

    p1 = c2f(silu(e.conv("x", 3, 8, strides=[2, 2])), 8)
    p2 = c2f(silu(e.conv(p1, 8, 8, strides=[2, 2])), 8)
    y = p2
    pools = [y]
    for _ in range(2):
        y = e("MaxPool", y, kernel_shape=[5, 5], pads=[2, 2, 2, 2], strides=[1, 1])
        pools.append(y)
    p2 = silu(e.conv(e("Concat", *pools, axis=1), 24, 8, 1))
    up = e(
        "Resize", p2, "", e.c([1, 1, 2, 2], np.float32), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    p1 = e("Concat", up, p1, axis=1)
    rows = []
    for x, c in ((p1, 16), (p2, 8)):
        rows.append(e("Reshape", e.conv(x, c, 8, 1), e.i(1, 8, -1)))
    y = e("Transpose", e("Concat", *rows, axis=2), perm=[0, 2, 1])
    center = e("Slice", y, e.i(0), e.i(2), e.i(2))
    size = e("Slice", y, e.i(2), e.i(4), e.i(-1), e.i(1))
    scores = e("Sigmoid", e("Slice", y, e.i(4), e.i(2**31 - 1), e.i(2)))
    size = e("Mul", e("Exp", size), e.c(0.5, np.float32))
    low, high = e("Sub", center, size), e("Add", center, size)
    boxes = e("Concat", low, high, scores, axis=-1)
    return e.model({"x": (1, 3, 32, 32)}, {"boxes": boxes})


@zoo
def unet() -> onnx.ModelProto:
    """Down and up with skips: transposed and dilated convolutions, linear resizing; opset 16."""
    e = Exporter(16)
    a = e("Relu", e.batch_norm(e.conv("x", 1, 8), 8))
    b = e("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
    b = e("Relu", e.conv(b, 8, 16, dilations=[2, 2], pads=[2, 2, 2, 2]))
    weight = e.f(16, 4, 2, 2, scale=0.2)
    up = e.batch_norm(e("ConvTranspose", b, weight, strides=[2, 2], group=2), 8)
    x = e("Relu", e.conv(e("Concat", a, up, axis=1), 16, 8))
    shape = e("Shape", x)
    half = e("Div", e("Slice", shape, e.i(2), e.i(4)), e.i(2))
    sizes = e("Concat", e("Slice", shape, e.i(0), e.i(2)), half, axis=0)
    x = e(
        "Resize", x, "", "", sizes, mode="linear",
        coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    x = e("Sigmoid", e.conv(x, 8, 1, 1))
    return e.model({"x": ("batch", 1, 24, 20)}, {"mask": x})


def _encoder(
    opset: int, spelled: bool, gelu: str, mask_value: float, dynamic: bool = False
) -> onnx.ModelProto:
    e = Exporter(opset)
    s, h, heads = 12, 32, 4
    x = e("Gather", e.f(50, h, scale=0.5), "ids", axis=0)
    x = e("Add", x, e.f(1, s, h, scale=0.3))
    x = e.layer_norm(x, h, spelled)
    if opset >= 13:
        mask = e("Unsqueeze", "mask", e.i(1, 2))
    else:
        mask = e("Unsqueeze", "mask", axes=[1, 2])
    mask = e("Sub", e.c(1, np.float32), e("Cast", mask, to=TensorProto.FLOAT))
    mask = e("Mul", mask, e.c(mask_value, np.float32))
    for _ in range(2):
        x = e.layer_norm(e("Add", e.attention(x, mask, s, h, heads), x), h, spelled)
        y = e.gelu(e.dense(x, h, 2 * h), gelu) if gelu else e("Gelu", e.dense(x, h, 2 * h))
        x = e.layer_norm(e("Add", x, e.dense(y, 2 * h, h)), h, spelled)
    first = e("Gather", x, e.c(0, np.int64), axis=1)
    pooled = e("Tanh", e.gemm(first, h, h))
    wide = e("Cast", e("Unsqueeze", "mask", e.i(2)) if opset >= 13 else e(
        "Unsqueeze", "mask", axes=[2]), to=TensorProto.FLOAT)  # fmt: skip
    total = (
        e("ReduceSum", e("Mul", x, wide), e.i(1), keepdims=0)
        if opset >= 13
        else e("ReduceSum", e("Mul", x, wide), axes=[1], keepdims=0)
    )
    norm = e.mean(total, 1, op="ReduceL2")
    sentence = e("Div", total, e("Max", norm, e.c(1e-12, np.float32)))
    batch = "batch" if dynamic else 1
    return e.model(
        {"ids": (batch, s), "mask": (batch, s)},
        {"hidden": x, "pooled": pooled, "sentence": sentence},
        {"ids": TensorProto.INT64, "mask": TensorProto.INT64},
    )


@zoo
def bert() -> onnx.ModelProto:
    """Norms and GELU spelled out, the least float32 as mask; opset 11."""
    return _encoder(11, True, "erf", float(np.finfo(np.float32).min))


@zoo
def bert_modern() -> onnx.ModelProto:
    """Norms and GELU as operators, open batch; opset 20."""
    return _encoder(20, False, "", -1e4, dynamic=True)


@zoo
def bert_tanh() -> onnx.ModelProto:
    """The GELU with tanh; opset 15."""
    return _encoder(15, True, "tanh", -1e9)


@zoo
def vit() -> onnx.ModelProto:
    """Patches by a convolution, a class token, one product for q, k and v; opset 17."""
    e = Exporter(17)
    h, heads = 24, 2
    x = e("Conv", "x", e.f(h, 3, 8, 8, scale=0.1), e.f(h), strides=[8, 8], kernel_shape=[8, 8])
    batch = e("Gather", e("Shape", x), e.c(0, np.int64), axis=0)
    x = e("Transpose", e("Reshape", x, e.i(0, h, -1)), perm=[0, 2, 1])
    shape = e("Concat", e("Unsqueeze", batch, e.i(0)), e.i(1, h), axis=0)
    x = e("Concat", e("Expand", e.f(1, 1, h), shape), x, axis=1)
    x = e("Add", x, e.f(1, 10, h, scale=0.2))
    for _ in range(2):
        y = e("Reshape", e.dense(e.layer_norm(x, h, True), h, 3 * h), e.i(0, 0, 3, heads, -1))
        y = e("Transpose", y, perm=[2, 0, 3, 1, 4])
        q, k, v = (e("Gather", y, e.c(n, np.int64), axis=0) for n in range(3))
        q = e("Mul", q, e.c((h // heads) ** -0.5, np.float32))
        scores = e("Softmax", e("MatMul", q, e("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
        y = e("Transpose", e("MatMul", scores, v), perm=[0, 2, 1, 3])
        x = e("Add", x, e.dense(e("Reshape", y, e.i(0, 0, h)), h, h))
        y = e.gelu(e.dense(e.layer_norm(x, h, True), h, 2 * h), "half first")
        x = e("Add", x, e.dense(y, 2 * h, h))
    x = e("Gather", e.layer_norm(x, h, True), e.c(0, np.int64), axis=1)
    return e.model({"x": ("N", 3, 24, 24)}, {"logits": e.gemm(x, h, 10)})


@zoo
def decoder_mask() -> onnx.ModelProto:
    """A causal mask chosen by Where with -inf, guarded against NaN; opset 14."""
    e = Exporter(14)
    q, k = e.dense("x", 16, 16), e.dense("x", 16, 16)
    scores = e("MatMul", q, e("Transpose", k, perm=[0, 2, 1]))
    kept = e("Trilu", e.c(np.ones((6, 6)), np.int64), upper=0)
    mask = e("Where", e("Cast", kept, to=TensorProto.BOOL), e.c(0, np.float32),
             e.c(-np.inf, np.float32))  # fmt: skip
    soft = e("Softmax", e("Add", scores, mask), axis=2)
    soft = e("Where", e("IsNaN", soft), e.c(0, np.float32), soft)
    return e.model({"x": (1, 6, 16)}, {"y": e("MatMul", soft, e.dense("x", 16, 16))})


@zoo
def gemms() -> onnx.ModelProto:
    """Every way Gemm and MatMul are written; opset 7, constants as nodes."""
    e = Exporter(7)
    a = e("Gemm", "x", e.f(8, 6), e.f(6), alpha=0.5, beta=2.0)
    b = e("Gemm", "t", e.f(5, 8), e.f(1, 5), transA=1, transB=1)
    c = e("Gemm", a, b, e.f(6, 5), transA=1, alpha=0.25, beta=0.5)
    d = e("Gemm", c, b, e("MatMul", c, e.f(5, 4)), transB=1, beta=3.0)
    d = e("Add", d, e.f(6, 1))
    shared = e.f(4, 4, scale=0.3)
    d = e("Add", e("MatMul", d, shared), e("Gemm", d, shared, e.f(4), transB=1))
    v = e("MatMul", d, e.f(4))
    w = e("MatMul", e("Unsqueeze", d, axes=[0]), e.f(1, 4, 3))
    return e.model(
        {"x": (4, 8), "t": (8, 4)}, {"d": d, "v": v, "w": e("Sub", w, e.f(3))}, constants=True
    )


@zoo
def resizes() -> onnx.ModelProto:
    """Resize in its modes; opset 13."""
    e = Exporter(13)
    made = []
    for mode, how, nearest in (
        ("nearest", "asymmetric", "floor"),
        ("nearest", "half_pixel", "round_prefer_floor"),
        ("linear", "half_pixel", ""),
        ("linear", "align_corners", ""),
        ("linear", "asymmetric", ""),
        ("linear", "pytorch_half_pixel", ""),
    ):
        more = {"nearest_mode": nearest} if nearest else {}
        scales = e.c([1, 1, 2, 2], np.float32)
        made.append(
            e("Resize", "x", "", scales, mode=mode, coordinate_transformation_mode=how, **more)
        )
    return e.model({"x": (1, 2, 5, 6)}, {"y": e("Concat", *made, axis=1)})


@zoo
def upsample() -> onnx.ModelProto:
    """The forerunner of Resize; opset 9."""
    e = Exporter(9)
    x = e("Upsample", "x", e.c([1, 1, 2, 2], np.float32), mode="nearest")
    return e.model({"x": (1, 2, 5, 6)}, {"y": e("Upsample", x, e.c([1, 1, 1.5, 2], np.float32),
                                                mode="linear")})  # fmt: skip


@zoo
def resize_ten() -> onnx.ModelProto:
    """Resize when it could not yet say how coordinates map; opset 10."""
    e = Exporter(10)
    x = e("Resize", "x", e.c([1, 1, 2, 3], np.float32), mode="nearest")
    return e.model({"x": (1, 2, 5, 6)}, {"y": e("Slice", x, e.i(-1, 0), e.i(-9, 9), e.i(3, 2),
                                                e.i(-2, 3))})  # fmt: skip


@zoo
def pools() -> onnx.ModelProto:
    """Pools with pads, rounding up, and pads that count; opset 19."""
    e = Exporter(19)
    kernel = {"kernel_shape": [3, 3], "strides": [2, 2]}
    made = [
        e("MaxPool", "x", pads=[1, 0, 1, 2], **kernel),
        e("MaxPool", "x", ceil_mode=1, **kernel),
        e("MaxPool", "x", auto_pad="SAME_LOWER", **kernel),
        e("AveragePool", "x", pads=[1, 1, 1, 1], count_include_pad=1, **kernel),
        e("AveragePool", "x", pads=[1, 1, 1, 1], **kernel),
        e("AveragePool", "x", ceil_mode=1, **kernel),
        e("AveragePool", "x", ceil_mode=1, count_include_pad=1, **kernel),
        e("GlobalMaxPool", "x"),
        e("ReduceMax", "x", e.i(1, 3)),
    ]
    flat = [e("Reshape", y, e.i(1, -1)) for y in made]
    return e.model({"x": (1, 2, 10, 9)}, {"y": e("Concat", *flat, axis=1)})


@zoo
def pixel_shuffle() -> onnx.ModelProto:
    """Super-resolution: depth to space written out, and back; opset 13."""
    e = Exporter(13)
    x = e("Relu", e.conv("x", 1, 8))
    x = e("DepthToSpace", x, blocksize=2, mode="CRD")
    y = e("Reshape", x, e.i(1, 2, 6, 2, 8, 2))
    y = e("Reshape", e("Transpose", y, perm=[0, 3, 5, 1, 2, 4]), e.i(1, 8, 6, 8))
    y = e("Add", y, e("SpaceToDepth", x, blocksize=2))
    return e.model({"x": (1, 1, 6, 8)}, {"y": e("Clip", y, e.c(-1, np.float32))})


@zoo
def norms() -> onnx.ModelProto:
    """Instance, group and batch norms that have nothing to be folded into; opset 14."""
    e = Exporter(14)
    x = e("InstanceNormalization", "x", e.f(4, at=1, scale=0.2), e.f(4), epsilon=1e-4)
    y = e("Reshape", x, e.i(0, 2, -1))
    y = e("InstanceNormalization", y, e.c([1, 1], np.float32), e.c([0, 0], np.float32))
    y = e("Reshape", y, e.i(0, 4, 5, 6))
    y = e("Add", e("Mul", y, e.f(4, 1, 1)), e.f(4, 1, 1))
    y = e("Relu", e.batch_norm(y, 4))
    return e.model({"x": (1, 4, 5, 6)}, {"y": e("LpNormalization", y, axis=1, p=2)})


@zoo
def elementwise() -> onnx.ModelProto:
    """One by one: arithmetic, comparisons and choices; opset 16."""
    e = Exporter(16)
    two = e.c(2, np.float32)
    x = e("Sqrt", e("Add", e("Pow", "x", two), e("Abs", "x")))
    y = e("Sum", x, e("Neg", "x"), e("Exp", e("Min", "x", two)), e("Reciprocal", e("Add", x, two)))
    z = e("Where", e("Not", e("Greater", x, y)), e("Log", e("Add", x, two)), e("Softsign", y))
    z = e("Mul", z, e("Softplus", e("Erf", e("Sin", y))))
    best = e("ArgMax", z, axis=-1, keepdims=0)
    z = e("Max", e("Mean", z, x, y), e.c(0, np.float32), e("Cos", x))
    top, _ = e("TopK", z, e.i(3), outputs=2, axis=1)
    return e.model({"x": (3, 7)}, {"z": z, "top": top, "best": best})


@zoo
def shared_embedding() -> onnx.ModelProto:
    """A language model's head that is its embedding, transposed; opset 13."""
    e = Exporter(13)
    table = e.f(20, 8)
    x = e("Gather", table, "ids")
    x = e("Relu", e.dense(x, 8, 8))
    y = e("MatMul", x, e("Transpose", table, perm=[1, 0]))
    return e.model({"ids": (2, 3)}, {"y": y}, {"ids": TensorProto.INT64})


@zoo
def half_precision() -> onnx.ModelProto:
    """A model of float16 weights that are widened where they are used; opset 21."""
    e = Exporter(21)
    e.initializers.append(
        numpy_helper.from_array(e.rng.standard_normal((4, 3, 3, 3)).astype(np.float16), "half")
    )
    x = e("Conv", "x", e("Cast", "half", to=TensorProto.FLOAT), e.f(4))
    return e.model({"x": (1, 3, 8, 8)}, {"y": e("Relu", x)})


@zoo
def newest() -> onnx.ModelProto:
    """Operators of opset 22 and later."""
    e = Exporter(24)
    x = e("HardSwish", e.conv("x", 3, 4))
    x = e("Swish", e("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2]))
    x = e("RMSNormalization", e("Reshape", x, e.i(1, 4, 16)), e.f(16), axis=-1)
    return e.model({"x": (1, 3, 8, 8)}, {"y": e("Flatten", x)})


def save(name: str, folder: Path) -> Path:
    """A model of the zoo as a file."""
    path = folder / f"{name}.onnx"
    onnx.save(MODELS[name](), path)
    return path


def canonical(name: str, folder: Path) -> Graph:
    """A model of the zoo as it is read."""
    from edgeq.graph.onnx.read import read_onnx

    return read_onnx(save(name, folder))


def feeds(graph: Graph, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs for a graph: normal numbers; for integers 0 and 1, at least one 1 among them."""
    rng = np.random.default_rng(seed)
    made: dict[str, NDArray[Any]] = {}
    for name in graph.inputs:
        info = graph.values[name]
        if info.dtype == "float32":
            made[name] = rng.standard_normal(info.shape).astype(np.float32)
        else:
            made[name] = rng.integers(0, 2, info.shape).astype(info.dtype)
            made[name].reshape(-1)[:1] = 1
    return made


_TIED = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "AveragePool", "Concat",
    "Pad", "Slice", "Split", "Resize", "DepthToSpace", "SpaceToDepth", "Expand",
)  # fmt: skip
_FUSED = ("Relu", "Clip")


def rounded(
    graph: Graph, bits: int = 8, *, block: int | None = None, activations: bool = True
) -> Graph:
    """The graph quantized in the plainest way: by channel or block, ranges of one random input.

    Every Conv, ConvTranspose, Linear and the pools and shapes between them compute in integers,
    by the rules of the recorded form; all else stays float.
    """
    constants: dict[str, Constant] = dict(graph.constants)
    weighted = [n for n in graph.nodes if n.op in ("Conv", "ConvTranspose", "Linear")]
    for node in weighted:
        held = graph.array(node.inputs[1])
        axis = 1 if node.op == "ConvTranspose" else 0
        if node.op == "ConvTranspose" and node.attrs["group"] > 1:
            axis = 0
        wanted = block if node.op == "Linear" and block else None
        constants[node.inputs[1]] = round_weight(held, bits, 1 if wanted else axis, wanted)
    quants: dict[str, QuantParams] = {}
    if activations:
        quants = _grids(graph, weighted)
        for node in weighted:
            w = constants[node.inputs[1]]
            bias = node.inputs[2] if len(node.inputs) > 2 else ""
            if node.inputs[0] in quants and bias and isinstance(w, QuantWeight) and not w.block:
                scale = np.float32(quants[node.inputs[0]].scale) * w.scales
                if w.axis == (1 if node.op == "ConvTranspose" else 0):
                    levels = np.rint(graph.array(bias) / scale).astype(np.int32)
                    constants[bias] = QuantWeight(levels, scale, 32, 0)
    kind = "static" if activations else "float"
    meta = {**graph.meta, "edgeq.activations": kind}
    return replace(graph, constants=constants, quants=quants, meta=meta)


def round_weight(
    w: NDArray[Any], bits: int, axis: int | None, block: int | None = None
) -> QuantWeight:
    """A weight to the nearest levels of the scales that its largest numbers want."""
    most = 7 if bits == 4 else 127
    if axis is None:
        peak = np.abs(w).max()
    elif block is None:
        peak = np.abs(w).max(tuple(a for a in range(w.ndim) if a != axis))
    else:
        starts = np.arange(0, w.shape[axis], block)
        peak = np.maximum.reduceat(np.abs(w), starts, axis)
    scales = np.asarray(np.maximum(peak, 1e-6) / most, np.float32)
    empty = QuantWeight(np.zeros(w.shape, np.int8), scales, bits, axis, block)
    levels = np.clip(np.rint(w / empty.wide_scales()), -most, most).astype(np.int8)
    return replace(empty, levels=levels)


def _grids(graph: Graph, weighted: list[Any]) -> dict[str, QuantParams]:
    from edgeq.graph.execute import Session

    names = [v for v, info in graph.values.items() if info.dtype == "float32"]
    seen = Session(graph, watch=names)(feeds(graph))

    def last(value: str) -> str:
        taker = graph.only_consumer(value)
        return taker.output if taker is not None and taker.op in _FUSED else value

    wanted = {n.inputs[0] for n in weighted} | {last(n.output) for n in weighted}
    found: dict[str, QuantParams] = {}
    for name in graph.values:
        if name in wanted:
            low, high = min(float(seen[name].min()), 0.0), max(float(seen[name].max()), 0.0)
            found[name] = QuantParams.from_range(low, max(high, low + 1e-6))
    for node in graph.nodes:  # what only moves values keeps their grid
        inputs = [i for i in node.inputs if i in graph.values]
        if node.op in _TIED and inputs and all(i in found for i in inputs):
            for out in node.outputs:
                if out:
                    found[out] = found[inputs[0]]
            found.update(dict.fromkeys(inputs, found[inputs[0]]))
    return found
