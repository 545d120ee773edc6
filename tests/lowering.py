"""Small graphs for the tests of what lowers them: built by hand, run and rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.qparams import QuantParams
from edgeq.graph.execute import Session
from edgeq.graph.ir import Constant, Graph, Info, Node, QuantWeight
from edgeq.graph.onnx.infer import inferred

Feeds = dict[str, NDArray[Any]]
FIXED = {
    "Softmax": QuantParams(1 / 256, -128),
    "Sigmoid": QuantParams(1 / 256, -128),
    "Tanh": QuantParams(1 / 128, 0),
}
SAME_GRID = frozenset(
    {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "AveragePool", "Concat",
     "Pad", "Slice", "Gather", "Split", "Resize", "DepthToSpace", "SpaceToDepth"}
)  # fmt: skip
FUSES = frozenset({"Conv", "ConvTranspose", "Linear", "Add", "AveragePool"})


@dataclass
class Builder:
    """A graph in the making: `input`, then operators, then `graph`."""

    seed: int = 0
    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Constant] = field(default_factory=dict)
    inputs: dict[str, Info] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def input(self, *shape: int, dtype: str = "float32", name: str = "x") -> str:
        self.inputs[name] = Info(shape, dtype)
        return name

    def constant(self, array: Any, dtype: Any = None) -> str:
        name = f"w{len(self.constants)}"
        self.constants[name] = np.asarray(array, dtype)
        return name

    def ints(self, *numbers: int) -> str:
        return self.constant(numbers, np.int64)

    def random(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant((self.rng.standard_normal(shape) * scale).astype(np.float32))

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attrs: Any) -> Any:
        n = len(self.nodes)
        names = tuple(f"v{n}_{i}" if i else f"v{n}" for i in range(outputs))
        self.nodes.append(Node(kind, f"{kind.lower()}_{n}", inputs, names, attrs))
        return names[0] if outputs == 1 else names

    def conv(
        self, x: str, ci: int, co: int, k: int | tuple[int, ...] = 3, *, group: int = 1,
        pads: Sequence[int] | None = None, strides: int = 1, dilations: int = 1, axes: int = 2,
        bias: bool = True,
    ) -> str:  # fmt: skip
        kernel = (k,) * axes if isinstance(k, int) else k
        w = self.random(co, ci // group, *kernel, scale=(ci // group * np.prod(kernel)) ** -0.5)
        given = (x, w, self.random(co, scale=0.1)) if bias else (x, w)
        pads = [n // 2 for n in kernel] * 2 if pads is None else list(pads)
        return str(self.op(
            "Conv", *given, kernel_shape=list(kernel), pads=pads, group=group,
            strides=[strides] * len(kernel), dilations=[dilations] * len(kernel),
        ))  # fmt: skip

    def linear(self, x: str, k: int, n: int) -> str:
        w = self.random(n, k, scale=k**-0.5)
        return str(self.op("Linear", x, w, self.random(n, scale=0.1)))

    def graph(self, *outputs: str) -> Graph:
        given = dict(self.inputs)
        made = Graph("test", tuple(given), outputs, tuple(self.nodes), self.constants, given)
        # shapes are ONNX's to tell, which knows no Linear
        known, constants = [], dict(self.constants)
        for node in self.nodes:
            if node.op == "Linear":
                constants[f"{node.inputs[1]}.T"] = made.array(node.inputs[1]).T
                factors = (node.inputs[0], f"{node.inputs[1]}.T")
                node = Node("MatMul", node.name, factors, node.outputs)
            known.append(node)
        values = inferred(replace(made, nodes=tuple(known), constants=constants)).values
        return replace(made, values=values)


def feeds(graph: Graph, seed: int = 1) -> Feeds:
    """Random inputs."""
    rng = np.random.default_rng(seed)
    made: Feeds = {}
    for name in graph.inputs:
        info = graph.info(name)
        if info.dtype == "float32":
            made[name] = rng.standard_normal(info.shape).astype(np.float32)
        elif info.dtype == "bool":
            made[name] = rng.random(info.shape) < 0.5
        else:
            made[name] = rng.integers(0, 4, info.shape).astype(info.dtype)
    return made


def rounded_weight(
    w: NDArray[np.float32], bits: int = 8, axis: int | None = 0, block: int | None = None
) -> QuantWeight:
    """Levels of a weight by its largest values."""
    top = 2 ** (bits - 1) - 1
    if axis is None:
        scales = np.float32(np.abs(w).max() / top) * np.ones((), np.float32)
    elif block is None:
        other = tuple(i for i in range(w.ndim) if i != axis)
        scales = (np.abs(w).max(other) / top).astype(np.float32)
    else:
        assert axis == 1
        assert w.ndim == 2
        groups = -(-w.shape[1] // block)
        wide = np.pad(w, ((0, 0), (0, groups * block - w.shape[1])))
        scales = np.abs(wide).reshape(w.shape[0], groups, block).max(2) / top
        # what bfloat16 and float16 both hold
        scales = (scales.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    scales = np.maximum(scales, np.float32(2**-12))
    held = QuantWeight(np.zeros(w.shape, np.int8), scales, bits, axis, block)
    levels = np.clip(np.rint(w / held.wide_scales()), -top, top).astype(np.int8)
    return replace(held, levels=levels)


def weights_rounded(graph: Graph, bits: int = 8, block: int | None = None) -> Graph:
    """The graph with integer weights, its values float."""
    constants = dict(graph.constants)
    for node in graph.nodes:
        if node.op in ("Conv", "ConvTranspose", "Linear", "Gather"):
            name = node.inputs[0 if node.op == "Gather" else 1]
            if name not in constants or isinstance(constants[name], QuantWeight):
                continue
            axis = 1 if node.op == "ConvTranspose" else 0
            if node.op in ("Linear", "Gather") and block:
                constants[name] = rounded_weight(graph.array(name), bits, 1, block)
            else:
                constants[name] = rounded_weight(graph.array(name), bits, axis)
    return replace(graph, constants=constants)


def quantized(graph: Graph, samples: Feeds, bits: int = 8) -> Graph:
    """The graph with all values and weights rounded, by the range of one sample.

    Values that only an activation takes have no grid, and operators that only move values keep
    their input's.
    """
    floats = [n for n, info in graph.values.items() if info.dtype == "float32"]
    seen = {
        **samples,
        **Session(graph, watch=[n for n in floats if n not in graph.inputs])(samples),
    }
    quants: dict[str, QuantParams] = {}
    for name in floats:
        node = graph.producers.get(name)
        after = graph.only_consumer(name)
        if node and node.op in FUSES and after and after.op in ("Relu", "Clip"):
            continue
        if node and node.op in FIXED:
            quants[name] = FIXED[node.op]
            continue
        quants[name] = grid_of(seen[name])
    for node in graph.nodes:  # in their order, so that chains follow
        if node.op == "Concat":
            for name in node.inputs:
                if name in quants:
                    quants[name] = quants[node.output]
        elif node.op in SAME_GRID and node.inputs[0] in quants:
            quants.update({out: quants[node.inputs[0]] for out in node.outputs if out in quants})
    made = weights_rounded(graph, bits)
    constants = dict(made.constants)
    for node in made.nodes:
        weight = constants.get(node.inputs[1]) if len(node.inputs) > 2 else None
        if isinstance(weight, QuantWeight) and node.op != "Gather":
            constants[node.inputs[2]] = int_bias(
                graph.array(node.inputs[2]), quants[node.inputs[0]], weight
            )
        if node.op in ("Add", "Sub", "Mul", "PRelu"):
            for name in node.inputs:
                if name in constants:
                    constants[name] = rounded_weight(graph.array(name), 8, None)
    return replace(made, constants=constants, quants=quants, meta={"edgeq.activations": "static"})


def grid_of(array: NDArray[np.float32]) -> QuantParams:
    """The grid of a value's range, zero on it."""
    low, high = min(0.0, float(array.min())), max(0.0, float(array.max()))
    scale = float(np.float32(max(high - low, 1e-6) / 255))
    return QuantParams(scale, int(np.clip(round(-128 - low / scale), -128, 127)))


def int_bias(b: NDArray[np.float32], x: QuantParams, w: QuantWeight) -> QuantWeight:
    """A bias on the grid of products."""
    scales = np.broadcast_to(np.float32(x.scale) * w.scales, b.shape).astype(np.float32)
    return QuantWeight(np.rint(b / scales).astype(np.int32), scales, 32, 0)


def reference(graph: Graph, samples: Mapping[str, NDArray[Any]]) -> Feeds:
    """What onnxruntime computes, each operator as it stands."""
    return Session(graph, optimize=False)(samples)
