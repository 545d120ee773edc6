"""Recognize activations that exporters write as several smaller operators."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import single
from edgeq.graph.rewrite import Change, floats, rewrite, scalar, unique

_CLOSE = 2e-5
"""How far, relatively, a written constant may be from the one it stands for."""
_DEPTH = 8


def close(a: float | None, b: float) -> bool:
    """Whether a number is a constant, up to the rounding of decimals in exported files."""
    return a is not None and abs(a - b) <= _CLOSE * abs(b)


def product(graph: Graph, name: str, depth: int = _DEPTH) -> tuple[float, list[str]]:
    """Write a value as a number times values, through multiplications with a single use."""
    node = graph.producers.get(name)
    if node is None or node.op not in ("Mul", "Div") or not depth:
        return 1.0, [name]
    number, others = 1.0, []
    for place, factor in enumerate(node.inputs):
        value = scalar(graph, factor)
        if value is not None:
            if node.op == "Div" and (place == 0 or value == 0):
                return 1.0, [name]
            number *= 1 / value if node.op == "Div" else value
        elif node.op == "Div" and place == 1:
            return 1.0, [name]
        elif graph.only_consumer(factor) is not None:
            inner, factors = product(graph, factor, depth - 1)
            number *= inner
            others += factors
        else:
            others.append(factor)
    return number, others


def plus(graph: Graph, name: str) -> tuple[float, str] | None:
    """Write a value as a number plus a value; None if it is not such a sum."""
    node = graph.producers.get(name)
    if node is None or node.op not in ("Add", "Sub"):
        return None
    number = scalar(graph, node.inputs[1])
    if number is not None:
        return (number if node.op == "Add" else -number), node.inputs[0]
    number = scalar(graph, node.inputs[0])
    return (number, node.inputs[1]) if number is not None and node.op == "Add" else None


def gelu(graph: Graph) -> Graph:
    """Replace x/2 (1 + erf(x/sqrt 2)), and its form with tanh, by Gelu."""
    return rewrite(graph, _gelu)


def _gelu(graph: Graph, node: Node) -> Change | None:
    if node.op not in ("Mul", "Div"):
        return None
    half, factors = product(graph, node.output)
    if len(factors) != 2 or not close(half, 0.5):
        return None
    for x, gate in (factors, factors[::-1]):
        raised = plus(graph, gate)
        if raised is None or raised[0] != 1:
            continue
        inner = graph.producers.get(raised[1])
        if inner is None or inner.op not in ("Erf", "Tanh"):
            continue
        exact = inner.op == "Erf"
        if _is_erf(graph, inner.inputs[0], x) if exact else _is_tanh(graph, inner.inputs[0], x):
            attrs = {"approximate": "none" if exact else "tanh"}
            return Change(nodes=(Node("Gelu", node.name, (x,), node.outputs, attrs),))
    return None


def _is_erf(graph: Graph, z: str, x: str) -> bool:
    number, factors = product(graph, z)
    return factors == [x] and close(number, math.sqrt(0.5))


def _is_tanh(graph: Graph, z: str, x: str) -> bool:
    """Whether z is sqrt(2/pi) (x + 0.044715 x^3), or that with x in front."""
    number, factors = product(graph, z)
    if not close(number, math.sqrt(2 / math.pi)):
        return False
    if len(factors) == 1:
        node = graph.producers.get(factors[0])
        return node is not None and node.op == "Add" and any(
            a == x and _is_power(graph, b, x, 3)
            for a, b in (node.inputs, node.inputs[::-1])
        )  # fmt: skip
    if len(factors) == 2 and x in factors:
        rest = factors[1] if factors[0] == x else factors[0]
        raised = plus(graph, rest)
        return raised is not None and raised[0] == 1 and _is_power(graph, raised[1], x, 2)
    return False


def _is_power(graph: Graph, name: str, x: str, power: int) -> bool:
    """Whether a value is 0.044715 times a power of x."""
    number, factors = product(graph, name)
    exponent = 0.0
    for factor in factors:
        node = graph.producers.get(factor)
        if factor == x:
            exponent += 1
        elif node is not None and node.op == "Pow" and node.inputs[0] == x:
            exponent += scalar(graph, node.inputs[1]) or 0.0
        elif node is not None and node.op == "Mul" and set(node.inputs) == {x}:
            exponent += 2
        else:
            return False
    return close(number, 0.044715) and exponent == power


def hard_swish(graph: Graph) -> Graph:
    """Replace clip(x + 3, 0, 6) / 6 by HardSigmoid, and x times that by HardSwish."""
    return rewrite(graph, _hard)


def _hard(graph: Graph, node: Node) -> Change | None:
    if node.op not in ("Mul", "Div"):
        return None
    number, factors = product(graph, node.output)
    if len(factors) == 1 and close(number, 1 / 6):
        x = _clipped(graph, factors[0])
        if x is not None:
            attrs = {"alpha": single(1 / 6), "beta": 0.5}
            return Change(nodes=(Node("HardSigmoid", node.name, (x,), node.outputs, attrs),))
    if len(factors) != 2:
        return None
    for x, gate in (factors, factors[::-1]):
        gate_node = graph.producers.get(gate)
        spelled = close(number, 1 / 6) and _clipped(graph, gate) == x
        named = (
            close(number, 1)
            and gate_node is not None
            and gate_node.op == "HardSigmoid"
            and gate_node.inputs[0] == x
            and close(gate_node.attrs["alpha"], 1 / 6)
            and gate_node.attrs["beta"] == 0.5
        )
        if spelled or named:
            return Change(nodes=(Node("HardSwish", node.name, (x,), node.outputs),))
    return None


def _clipped(graph: Graph, name: str) -> str | None:
    """The x of clip(x + 3, 0, 6); None if it is not that."""
    node = graph.producers.get(name)
    if node is None or node.op != "Clip" or _bounds(graph, node) != (0, 6):
        return None
    raised = plus(graph, node.inputs[0])
    return raised[1] if raised is not None and raised[0] == 3 else None


def _bounds(graph: Graph, node: Node) -> tuple[float, float] | None:
    """The bounds of a Clip or Relu; None for other nodes and computed bounds."""
    if node.op == "Relu":
        return 0.0, float(np.finfo(np.float32).max)
    if node.op != "Clip" or len(node.inputs) < 3:
        return None
    least, most = (scalar(graph, name) for name in node.inputs[1:3])
    return None if least is None or most is None else (least, most)


def activations(graph: Graph) -> Graph:
    """Replace Clip from 0 by Relu, and PRelu of one slope by LeakyRelu."""
    return rewrite(graph, _plain)


def _plain(graph: Graph, node: Node) -> Change | None:
    if node.op == "PRelu":
        slope = floats(graph, node.inputs[1])
        if slope is None or not slope.size or (slope != slope.flat[0]).any():
            return None
        attrs = {"alpha": float(slope.flat[0])}
        return Change(nodes=(Node("LeakyRelu", node.name, node.inputs[:1], node.outputs, attrs),))
    bounds = _bounds(graph, node)
    if bounds is None:
        return None
    before = graph.producers.get(node.inputs[0])
    first = _bounds(graph, before) if before is not None else None
    if before is not None and first is not None:
        least = min(max(first[0], bounds[0]), bounds[1])
        most = max(min(first[1], bounds[1]), bounds[0])
        return _clip(graph, replace(node, inputs=before.inputs[:1]), least, most)
    if node.op == "Clip" and bounds[0] == 0 and bounds[1] >= np.finfo(np.float32).max:
        return Change(nodes=(Node("Relu", node.name, node.inputs[:1], node.outputs),))
    return None


def _clip(graph: Graph, node: Node, least: float, most: float) -> Change:
    names = [unique(graph, f"{node.output}.{what}") for what in ("least", "most")]
    bounds = {n: np.array(v, np.float32) for n, v in zip(names, (least, most), strict=True)}
    new = Node("Clip", node.name, (node.inputs[0], *names), node.outputs)
    return Change(nodes=(new,), constants=bounds)
