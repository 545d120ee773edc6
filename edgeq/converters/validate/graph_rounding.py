"""Adds the rounding errors of a correct runtime to a graph, to measure how its outputs change.

    float     every value is multiplied by 1 + `FLOAT` times a random number of unit variance, for
              sums in another order and other approximations of functions
    half      every value is rounded to float16
    static    a random number with a standard deviation of `STEP` steps is added to every value
              before it is quantized, because sums between two levels may be rounded to either
    dynamic   the inputs of operators with integer weights are quantized to 8 bits over their own
              range: of each row of a matrix, or of a whole image

A real fault changes the outputs much more; by how much depends on the model alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeq.graph.ir import Constant, Graph, Info, Node, QuantWeight
from edgeq.graph.operators import LAYERS

FLOAT = 1e-6
"""Relative error of a float32 operator, as of a sum of some hundred products."""
STEP = 0.0125
"""Standard deviation, in quantization steps, of the number added before rounding: about 1 of 100
values is then rounded to the neighboring level."""
_FLOAT16 = 10
_FLOAT32 = 1


def perturbed(
    graph: Graph, *, seed: int, half: bool = False, static: bool = False, dynamic: bool = False
) -> Graph:
    """The graph with these errors added; its values keep their names.

    Args:
        graph: canonical.
        seed: of the random numbers.
        half: floats are rounded to float16.
        static: a random number is added to quantized values before they are rounded.
        dynamic: inputs of operators with integer weights are rounded to 8 bits.
    """
    return _Perturber(graph, seed, half, static, dynamic).graph()


class _Perturber:
    def __init__(self, graph: Graph, seed: int, half: bool, static: bool, dynamic: bool) -> None:
        self._source, self._rng = graph, np.random.default_rng(seed)
        self._half, self._static, self._dynamic = half, static, dynamic
        self._nodes: list[Node] = []
        self._constants: dict[str, Constant] = dict(graph.constants)
        self._values = dict(graph.values)
        self._rounded: dict[str, str] = {}
        self._n = 0

    def graph(self) -> Graph:
        source = self._source
        if self._half:
            for name, constant in source.constants.items():
                self._constants[name] = _halved(constant)
        fed = {name: name for name in source.inputs}
        if self._half:
            for name in source.inputs:
                if self._float(name) and name not in source.quants:
                    fed[name] = self._name(name)
                    self._values[fed[name]] = source.info(name)
                    self._cast(name, fed[name])
        quants = dict(source.quants)
        if self._static:
            for name in source.inputs:
                if name in quants:
                    fed[name] = self._name(name)
                    self._values[fed[name]] = source.info(name)
                    self._moved(name, fed[name], name)
                    quants[fed[name]] = quants.pop(name)
        for node in source.nodes:
            inputs = [fed.get(name, name) for name in node.inputs]
            if self._dynamic and node.op in LAYERS and self._meets_integers(node):
                inputs[0] = self._as_8_bits(inputs[0], node)
            outputs = [self._before(name) for name in node.outputs]
            self._nodes.append(replace(node, inputs=tuple(inputs), outputs=tuple(outputs)))
            for before, name in zip(outputs, node.outputs, strict=True):
                if before != name:
                    self._moved(before, name, name)
        return replace(
            source, nodes=tuple(self._nodes), constants=self._constants, values=self._values,
            quants=quants,
        )  # fmt: skip

    def _float(self, name: str) -> bool:
        return bool(name) and self._source.info(name).dtype == "float32"

    def _before(self, name: str) -> str:
        """Name of a node's output before the error is added."""
        if not name or not self._float(name):
            return name
        if name in self._source.quants and not self._static and not self._half:
            return name
        before = self._name(name)
        self._values[before] = self._source.info(name)
        return before

    def _moved(self, before: str, name: str, source: str) -> None:
        """Add an error to a node's output; the nodes that read it get the sum."""
        quant, info = self._source.quants.get(source), self._source.info(source)
        if self._half:
            halved = self._name(name) if quant is not None and self._static else name
            self._values[halved] = info
            self._cast(before, halved)
            before = halved
        if quant is not None and self._static:
            term = self._noise(info.shape) * quant.scale * STEP
            self._add("Add", (before, self._constant(term.astype(np.float32))), name)
        elif not self._half:
            term = 1 + self._noise(info.shape) * FLOAT
            self._add("Mul", (before, self._constant(term.astype(np.float32))), name)

    def _noise(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Random numbers for the first and second and the last axis; the others share them."""
        rank = len(shape)
        wide = [n if i in (0, 1, rank - 1) else 1 for i, n in enumerate(shape)]
        return np.asarray(self._rng.standard_normal(wide))

    def _cast(self, x: str, out: str) -> None:
        info = self._source.info(x) if x in self._source.values else self._values[x]
        small = self._name(out)
        self._values[small] = Info(info.shape, "float16")
        self._add("Cast", (x,), small, to=_FLOAT16)
        self._add("Cast", (small,), out, to=_FLOAT32)

    def _meets_integers(self, node: Node) -> bool:
        weight = self._source.constants.get(node.inputs[1])
        x = node.inputs[0]
        return isinstance(weight, QuantWeight) and x not in self._source.quants and self._float(x)

    def _as_8_bits(self, x: str, node: Node) -> str:
        """x rounded to 255 steps from its least to its largest number, zero included."""
        shape = self._source.info(node.inputs[0]).shape
        axes = [len(shape) - 1] if node.op == "Linear" else list(range(1, len(shape)))
        key = f"{x}:{axes}"
        if key in self._rounded:
            return self._rounded[key]
        rest = tuple(1 if i in axes else n for i, n in enumerate(shape))
        over = self._constant(np.array(axes, np.int64))
        zero = self._constant(np.float32(0))

        def made(op: str, *inputs: str, wide: bool = False, **attrs: int) -> str:
            out = self._name(x)
            self._values[out] = Info(shape if wide else rest)
            self._add(op, inputs, out, **attrs)
            return out

        high = made("Max", made("ReduceMax", x, over, keepdims=1), zero)
        low = made("Min", made("ReduceMin", x, over, keepdims=1), zero)
        step = made("Mul", made("Sub", high, low), self._constant(np.float32(1 / 255)))
        step = made("Max", step, self._constant(np.float32(1e-30)))
        level = made("Round", made("Div", x, step, wide=True), wide=True)
        self._rounded[key] = made("Mul", level, step, wide=True)
        return self._rounded[key]

    def _add(self, op: str, inputs: tuple[str, ...], out: str, **attrs: int) -> None:
        self._n += 1
        self._nodes.append(Node(op, f"edgeq.perturb{self._n}", inputs, (out,), attrs))

    def _constant(self, array: NDArray[np.generic] | np.generic) -> str:
        self._n += 1
        name = f"edgeq.perturb.c{self._n}"
        self._constants[name] = np.asarray(array)
        return name

    def _name(self, name: str) -> str:
        self._n += 1
        return f"{name}.edgeq{self._n}"


def _halved(constant: Constant) -> Constant:
    if isinstance(constant, QuantWeight):
        if constant.bits == 32:
            return constant
        return replace(constant, scales=constant.scales.astype(np.float16).astype(np.float32))
    if constant.dtype != np.float32:
        return constant
    with np.errstate(over="ignore"):
        return constant.astype(np.float16).astype(np.float32)
