"""Bringing a .tflite file's values from channels last to channels first.

Every value of four axes is held as the operator that makes it gives it: images [N, C, H, W], all
else in the file's own axes. The other form is made, once, for an operator that needs it; where
the axes that move are of size one that is a Reshape and costs nothing. So no Transpose stands
between two convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UnsupportedError
from edgeq.graph.ir import Info, Node, Shape
from edgeq.graph.tflite.schema import TfliteModel, TfliteOperator, words

TO_FIRST = (0, 3, 1, 2)
TO_LAST = (0, 2, 3, 1)
"""Also: where an axis of the file stands among channels first."""
_ACTIVATIONS: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "RELU": ("Relu", ()),
    "RELU6": ("Clip", (0.0, 6.0)),
    "RELU_N1_TO_1": ("Clip", (-1.0, 1.0)),
    "TANH": ("Tanh", ()),
}


def permuted(shape: Sequence[int], order: Sequence[int]) -> Shape:
    """Return a shape with its axes in another order."""
    return tuple(shape[axis] for axis in order)


def moves_nothing(shape: Sequence[int], order: Sequence[int]) -> bool:
    """Whether an array's elements stay where they are when its axes are put in another order."""
    moved = [axis for axis in order if shape[axis] != 1]
    return moved == sorted(moved)


class Layouts:
    """The graph that is being read.

    Args:
        model: the file.
        images: its inputs that become channels first.
    """

    def __init__(self, model: TfliteModel, images: frozenset[int]) -> None:
        self.model = model
        self.nodes: list[Node] = []
        self.constants: dict[str, NDArray[Any]] = {}
        self.values: dict[str, Info] = {}
        self.flat: dict[int, Shape] = {}
        """Tensors that hold a flattened image channels first -> its shape in the file."""
        self._taken: set[str] = set()
        self._base: dict[int, str] = {}
        self._held: dict[tuple[int, bool], str] = {}
        self._first: set[int] = set()
        self._made: dict[str, Node] = {}
        for i, name in (*model.inputs.items(), *model.outputs.items()):
            if i not in self._base:
                self._base[i] = self.unique(name)
        for i in model.inputs:
            self._hold(i, i in images)

    # What the file says.

    def shape(self, i: int) -> Shape:
        """The shape of a tensor, in the file's axes."""
        return self.model.tensors[i].shape

    def size(self, i: int) -> int:
        """Elements of a tensor."""
        return math.prod(self.shape(i))

    def out_shape(self, op: TfliteOperator, first: bool) -> Shape:
        """The shape of an operator's first output, channels first or in the file's axes."""
        shape = self.shape(op.outputs[0])
        return permuted(shape, TO_FIRST) if first else shape

    def constant(self, i: int) -> NDArray[Any] | None:
        """A tensor's data, None if it is computed."""
        return self.model.tensors[i].data if i >= 0 else None

    def fixed(self, op: TfliteOperator, position: int) -> NDArray[Any]:
        """An operand that must be a constant.

        Raises:
            UnsupportedError: it is computed.
        """
        constant = self.constant(op.inputs[position])
        if constant is None:
            raise self.refusal(op, f"its operand {position} is computed; edgeq reads constants")
        return constant

    def ints(self, op: TfliteOperator, position: int) -> list[int]:
        """A constant operand of whole numbers."""
        return [int(n) for n in self.fixed(op, position).reshape(-1)]

    def refusal(self, op: TfliteOperator, why: str) -> UnsupportedError:
        """An error that names an operator."""
        name = self.base(op.outputs[0]) if op.outputs else ""
        return UnsupportedError(f"{self.model.path}: {op.op} {name!r} (operator {op.index}): {why}")

    # Where values are.

    def is_first(self, i: int) -> bool:
        """Whether a tensor is held channels first."""
        return i in self._first

    def axis(self, i: int, axis: int) -> int:
        """Where an axis of the file's is in the form a tensor is held in."""
        axis %= max(len(self.shape(i)), 1)
        return TO_LAST[axis] if self.is_first(i) else axis

    def get(self, i: int, first: bool) -> str:
        """The name of a tensor's value in a form; "" for an operand left out."""
        if i < 0:
            return ""
        if (i, first) not in self._held:
            data = self.constant(i)
            if data is not None:
                self._held[i, first] = self.add_constant(
                    self.base(i), data.transpose(TO_FIRST) if first else data
                )
            else:
                name, order = self._held[i, not first], TO_FIRST if first else TO_LAST
                self._held[i, first] = self.transpose(name, order)
        return self._held[i, first]

    def together(self, op: TfliteOperator) -> tuple[list[str], bool]:
        """The operands of an elementwise operator in one order of axes, and which.

        Returns:
            Names that broadcast as the file's tensors do; whether they are channels first.
        """
        rank = len(self.shape(op.outputs[0]))
        first = rank == 4 and any(self.is_first(i) for i in op.inputs)
        return [self.operand(i, first) for i in op.inputs], first

    def operand(self, i: int, first: bool) -> str:
        """A tensor of at most four axes, in an order of axes in which it broadcasts."""
        shape = self.shape(i)
        if not first or len(shape) == 4:
            return self.get(i, first)
        wide = (1,) * (4 - len(shape)) + shape
        data = self.constant(i)
        if data is not None:
            data = data.reshape(()) if data.size == 1 else data.reshape(wide).transpose(TO_FIRST)
            return self.add_constant(self.base(i), data)
        return self.transpose(self.reshape(self.get(i, False), wide), TO_FIRST)

    # What is made.

    def base(self, i: int) -> str:
        """The name of a tensor, unique and short."""
        if i not in self._base:
            name = self.model.tensors[i].name.split(";")[0].removesuffix(":0")
            self._base[i] = self.unique(name or f"tensor_{i}")
        return self._base[i]

    def unique(self, name: str) -> str:
        """A name like this one that nothing has yet."""
        unused, n = name, 1
        while unused in self._taken or not unused:
            unused, n = f"{name}_{n}", n + 1
        self._taken.add(unused)
        return unused

    def add_constant(self, name: str, data: NDArray[Any]) -> str:
        """Take in a constant; the name if nothing has it, else one like it."""
        if name in self.constants or name in self.values:
            name = self.unique(name)
        self._taken.add(name)
        self.constants[name] = np.asarray(data, order="C")
        return name

    def give_constant(self, i: int) -> None:
        """Make an output of the file that is a constant a value of the graph."""
        data, name = self.constant(i), self.base(i)
        if data is not None and name not in self.values:
            constant = self.add_constant(self.unique(f"{name}/constant"), data)
            self._add("Identity", [constant], {name: Info(data.shape, str(data.dtype))}, {})

    def number(self, value: float) -> str:
        """A float32 constant without axes."""
        return self._shared(f"const_{value:g}", np.array(value, np.float32))

    def numbers(self, values: Sequence[int]) -> str:
        """An int64 constant with one axis."""
        return self._shared("shape_" + "_".join(map(str, values)), np.array(values, np.int64))

    def _shared(self, name: str, data: NDArray[Any]) -> str:
        constant = self.constants.get(name)
        if constant is not None and constant.dtype == data.dtype and np.array_equal(constant, data):
            return name
        return self.add_constant(name, data)

    def step(
        self,
        kind: str,
        inputs: Sequence[str],
        shape: Sequence[int],
        name: str,
        dtype: str = "float32",
        **attrs: Any,
    ) -> str:
        """An operator between two of the file's; gives its value's name, made from ``name``."""
        out = self.unique(f"{name}/{kind.lower()}")
        return self._add(kind, inputs, {out: Info(tuple(shape), dtype)}, attrs)

    def reshape(self, name: str, shape: Sequence[int]) -> str:
        """A value in another shape."""
        info = self._info(name)
        if info.shape == tuple(shape):
            return name
        producer = self._made.get(name)
        if producer is not None and producer.op == "Reshape":
            name = producer.inputs[0]  # one after another is one; what nobody takes is removed
            if self._info(name).shape == tuple(shape):
                return name
        out = self.unique(f"{name}/reshape")
        inputs = [name, self.numbers(shape)]
        return self._add("Reshape", inputs, {out: Info(tuple(shape), info.dtype)}, {})

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """A value with its axes in another order."""
        info = self._info(name)
        shape = permuted(info.shape, order)
        if moves_nothing(info.shape, order):
            return self.reshape(name, shape)
        out = self.unique(f"{name}/transpose")
        info = Info(shape, info.dtype)
        return self._add("Transpose", [name], {out: info}, {"perm": list(order)})

    def result(
        self,
        op: TfliteOperator,
        kind: str,
        inputs: Sequence[str],
        *,
        first: bool = False,
        fused: bool = False,
        **attrs: Any,
    ) -> None:
        """The operator that makes an operator's outputs.

        Args:
            op: of the file.
            kind, inputs, attrs: of the graph's.
            first: whether it gives them channels first.
            fused: the file's operator may have an activation, which becomes one of its own.
        """
        outs = {self._hold(i, first): self._info(self._held[i, first]) for i in op.outputs}
        number = op.options.fusedActivationFunction if fused and op.options else 0
        if not number:
            self._add(kind, inputs, outs, attrs)
            return
        word = words("ActivationFunctionType").get(number, str(number))
        if word not in _ACTIVATIONS:
            raise self.refusal(op, f"the activation {word} is not known")
        activation, bounds = _ACTIVATIONS[word]
        ((name, info),) = outs.items()
        before = self.unique(f"{name}/{kind.lower()}")
        self._add(kind, inputs, {before: info}, attrs)
        self._add(activation, [before, *map(self.number, bounds)], {name: info}, {})

    def alias(self, op: TfliteOperator, name: str, first: bool) -> bool:
        """Let an operator's output be a value that is there; not if it leaves the graph."""
        i = op.outputs[0]
        if i in self.model.outputs:
            return False
        self._held[i, first] = name
        if first:
            self._first.add(i)
        return True

    def _hold(self, i: int, first: bool) -> str:
        tensor, name = self.model.tensors[i], self.base(i)
        if first:
            self._first.add(i)
        self._held[i, first] = name
        shape = permuted(tensor.shape, TO_FIRST) if first else tensor.shape
        self.values[name] = Info(shape, tensor.dtype)
        return name

    def _info(self, name: str) -> Info:
        data = self.constants.get(name)
        return self.values[name] if data is None else Info(data.shape, str(data.dtype))

    def _add(
        self, kind: str, inputs: Sequence[str], outs: Mapping[str, Info], attrs: Mapping[str, Any]
    ) -> str:
        node = Node(kind, next(iter(outs)), tuple(inputs), tuple(outs), dict(attrs))
        self.nodes.append(node)
        self.values.update(outs)
        self._made.update(dict.fromkeys(outs, node))
        return node.output
