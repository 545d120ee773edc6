"""Small canonical graphs for tests of quantization, with weights by seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeq.formats.schemes import QuantScheme
from edgeq.graph.ir import Graph, Info, Node
from edgeq.quant.graph.options import GraphOptions
from edgeq.quant.graph.samples import Samples, samples_of
from edgeq.quant.recipe import Recipe
from edgeq.quant.rules import Activations


def weight_scheme(
    bits: Any = 8,
    granularity: Any = "channel",
    group_size: int | None = None,
    method: str | None = "mse",
) -> QuantScheme:
    """A scheme for weights of a graph; the method "palette" gives them a table of values."""
    if method == "palette":
        return QuantScheme(bits, True, granularity, group_size, "palette")
    return QuantScheme(bits, True, granularity, group_size, None, method)


def static_recipe(scheme: QuantScheme, **graph: Any) -> Recipe:
    """A recipe with static activations, and options of graphs."""
    return Recipe(
        (), scheme, activations=Activations("static", "auto"), graph=GraphOptions(**graph)
    )


class Made:
    """A graph put together node by node; shapes are said, not inferred."""

    def __init__(self, seed: int = 0, **inputs: Info) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self.values: dict[str, Info] = dict(inputs)
        self.inputs = tuple(inputs)

    def constant(self, array: Any, name: str = "") -> str:
        name = name or f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def weight(self, *shape: int) -> str:
        fan = np.sqrt(np.prod(shape[1:]))
        return self.constant((self.rng.standard_normal(shape) / fan).astype(np.float32))

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...], **attrs: Any) -> str:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(Node(op, name, tuple(inputs), (f"{name}_out",), attrs))
        self.values[f"{name}_out"] = Info(shape)
        return f"{name}_out"

    def conv(self, x: str, out: int, k: int = 3, stride: int = 1, group: int = 1) -> str:
        n, c, h, w = self.values[x].shape
        attrs = {
            "kernel_shape": [k, k], "pads": [k // 2] * 4, "strides": [stride] * 2,
            "dilations": [1, 1], "group": group,
        }  # fmt: skip
        bias = self.constant(self.rng.standard_normal(out).astype(np.float32) * 0.1)
        inputs = [x, self.weight(out, c // group, k, k), bias]
        return self.node("Conv", inputs, (n, out, -(-h // stride), -(-w // stride)), **attrs)

    def same(self, op: str, *inputs: str, **attrs: Any) -> str:
        return self.node(op, list(inputs), self.values[inputs[0]].shape, **attrs)

    def linear(self, x: str, out: int) -> str:
        *head, k = self.values[x].shape
        bias = self.constant(self.rng.standard_normal(out).astype(np.float32) * 0.1)
        return self.node("Linear", [x, self.weight(out, k), bias], (*head, out))

    def graph(self, *outputs: str) -> Graph:
        return Graph("made", self.inputs, outputs, tuple(self.nodes), self.constants, self.values)


def cnn(seed: int = 0) -> Graph:
    """Conv, depthwise and pointwise with a residual, pool, flatten, linear, softmax."""
    m = Made(seed, x=Info((1, 3, 8, 8)))
    a = m.same("Relu", m.conv("x", 8))
    b = m.same("Relu", m.conv(a, 8, group=8))
    c = m.conv(b, 8, k=1)
    d = m.same("Relu", m.same("Add", a, c))
    e = m.node("MaxPool", [d], (1, 8, 4, 4), kernel_shape=[2, 2], strides=[2, 2], pads=[0] * 4)
    f = m.node("GlobalAveragePool", [e], (1, 8, 1, 1))
    g = m.node("Flatten", [f], (1, 8), axis=1)
    return m.graph(m.same("Softmax", m.linear(g, 5), axis=-1))


def encoder(seed: int = 0, length: int = 6, width: int = 16) -> Graph:
    """Embedding, one layer of attention and feed forward with LayerNormalization."""
    m = Made(seed, ids=Info((1, length), "int64"))

    def norm(x: str) -> str:
        ones, zeros = np.ones(width, np.float32), np.zeros(width, np.float32)
        return m.same(
            "LayerNormalization", x, m.constant(ones), m.constant(zeros), axis=-1, epsilon=1e-5
        )

    def heads(x: str, perm: list[int], shape: tuple[int, ...]) -> str:
        split = m.constant(np.array([1, length, 2, width // 2]))
        return m.node(
            "Transpose",
            [m.node("Reshape", [x, split], (1, length, 2, width // 2))],
            shape,
            perm=perm,
        )

    table = m.constant(m.rng.standard_normal((50, width)).astype(np.float32), "table")
    x = norm(m.node("Gather", [table, "ids"], (1, length, width), axis=0))
    q, k, v = (m.linear(x, width) for _ in range(3))
    half = width // 2
    q = heads(q, [0, 2, 1, 3], (1, 2, length, half))
    k = heads(k, [0, 2, 3, 1], (1, 2, half, length))
    v = heads(v, [0, 2, 1, 3], (1, 2, length, half))
    scores = m.node("MatMul", [q, k], (1, 2, length, length))
    scores = m.same("Mul", scores, m.constant(np.float32(half**-0.5)))
    mixed = m.node("MatMul", [m.same("Softmax", scores, axis=-1), v], (1, 2, length, half))
    back = m.node("Transpose", [mixed], (1, length, 2, half), perm=[0, 2, 1, 3])
    joined = m.node("Reshape", [back, m.constant(np.array([1, length, width]))], (1, length, width))
    x = norm(m.same("Add", x, m.linear(joined, width)))
    inner = m.same("Gelu", m.linear(x, 2 * width), approximate="none")
    x = norm(m.same("Add", x, m.linear(inner, width)))
    mean = m.node("ReduceMean", [x, m.constant(np.array([1]))], (1, width), keepdims=0)
    return m.graph(mean)


def samples(graph: Graph, n: int = 16, seed: int = 1) -> Samples:
    """Random inputs of a graph."""
    rng = np.random.default_rng(seed)

    def one(info: Info) -> np.ndarray:
        if info.dtype == "float32":
            return rng.standard_normal(info.shape).astype(np.float32)
        return rng.integers(0, 50, info.shape).astype(info.dtype)

    return samples_of(
        graph, [{name: one(graph.info(name)) for name in graph.inputs} for _ in range(n)]
    )
