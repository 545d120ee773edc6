"""Build the MIL program of a graph, with values rounded where the graph says so.

A value with `QuantParams` is followed by quantize and dequantize, int8 with the very same scale and
zero point, wherever it comes from; a node computes on what dequantize gives. Apple's compiler
fuses the pairs around an operator into one of integers where it has one.

In a program of float16 a number that float16 does not hold stays float32: a scale, with the
rounding that it belongs to and the operators between such roundings. So the scales are always
those of the graph; scales that float16 holds make the whole program float16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.blob import KINDS
from edgeq.converters.coreml.lower import weights
from edgeq.converters.coreml.lower.names import Names, make_distinct, shorten
from edgeq.converters.coreml.lower.weights import PackedWeight, Var
from edgeq.converters.coreml.weights import narrowed
from edgeq.core.errors import EdgeqError, UnsupportedError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node, QuantWeight, Shape
from edgeq.graph.operators import ACTIVATIONS

MAX_RANK = 5
"""Dimensions that Core ML has at most."""


def refuses_nothing(graph: Graph, node: Node) -> str:
    """Refuse no node."""
    return ""


Build = Callable[["CoremlLowering", Node], Var | Sequence[Var]]
"""From the lowering and a node to a value, or one for each output."""
Refuse = Callable[[Graph, Node], str]
"""Why a node cannot be built, with the nearest form that can be; empty if it can."""


@dataclass(frozen=True)
class CoremlEmitter:
    """How an operator is built in MIL.

    Args:
        build: makes its values.
        refuse: why a node cannot be built.
    """

    build: Build
    refuse: Refuse = refuses_nothing


def stored_kind(scales: NDArray[np.float32] | float, precision: str) -> str:
    """The type in which scales are stored: "fp16" or "fp32"."""
    return "fp16" if precision == "float16" and weights.float16_exact(scales) else "fp32"


def output_kind(graph: Graph, name: str, precision: str) -> str:
    """The float type of a value behind the node that makes it.

    It is that of the scale it is rounded with, at once or behind its activation.
    """
    if name in graph.quants:
        return stored_kind(graph.quants[name].scale, precision)
    node = graph.only_consumer(name)
    if node is not None and node.op in ACTIVATIONS:
        return output_kind(graph, node.output, precision)
    return "fp16" if precision == "float16" else "fp32"


def _past_half(array: NDArray[Any]) -> bool:
    """Whether float16 would turn a constant into infinity, or all of it into zero."""
    if array.dtype != np.float32 or not array.size:
        return False
    size, half = float(np.abs(array[np.isfinite(array)]).max(initial=0)), np.finfo(np.float16)
    return bool(size > float(half.max) or 0 < size < float(half.tiny))


def _held_float(name: str, exact: NDArray[np.float32], kind: str) -> NDArray[Any]:
    """Convert a float constant to a type of MIL, keeping infinities."""
    finite = np.isfinite(exact)
    narrow = narrowed(name, np.where(finite, exact, np.float32(0)), kind)
    narrow = np.where(finite, narrow, exact.astype(narrow.dtype))
    if narrow.ndim == 0 and exact > 0 and narrow == 0:
        # what keeps a divisor from zero does so in float16, too, as in coremltools
        return np.asarray(np.nextafter(narrow, narrow.dtype.type(1)))
    return narrow


class CoremlLowering:
    """Builds the program of one graph.

    Args:
        graph: it.
        target: "ios16", "ios17" or "ios18".
        precision: "float16" or "float32".
        emitters: how each operator is built.
    """

    def __init__(
        self, graph: Graph, target: str, precision: str, emitters: Mapping[str, CoremlEmitter]
    ) -> None:
        from coremltools.converters.mil.mil import Builder, types

        self.mb, self.types = Builder, types
        self.graph, self.target, self.precision = graph, target, precision
        self.plain = "fp16" if precision == "float16" else "fp32"
        self.kind = self.plain  # of the node that is being lowered
        self._emitters = emitters
        self._names = Names()
        self.inputs = {name: self._names.new(name) for name in graph.inputs}
        self.outputs = {name: self._names.new(name) for name in graph.outputs}
        # quantized ones -> what gives them, and its scales if they are apart
        self.constants: dict[str, tuple[str, str]] = {}
        self.quants: dict[str, str] = {}  # value -> its quantize
        self.biases: dict[str, dict[str, str]] = {}  # see `bias`
        self.vars: dict[str, Var] = {}
        self._told: set[str] = set()  # names of operators that make values of the graph
        self._memo: dict[tuple[str, str], Any] = {}

    # --- the whole ----------------------------------------------------------------------------

    def program(self) -> Any:
        """Build coremltools' ``Program``."""
        import coremltools as ct
        from coremltools.converters.mil.mil import Builder, Function, Program

        Builder.name_count.clear()  # that the same graph make the same file
        result = Program()
        specs = {}
        for name, label in self.inputs.items():
            info = self.graph.info(name)
            kind = self.types.fp32 if info.dtype == "float32" else self.types.int32
            specs[label] = Builder.TensorSpec(info.shape or (1,), kind)
        opset = {"ios16": ct.target.iOS16, "ios17": ct.target.iOS17, "ios18": ct.target.iOS18}
        with Function(specs, opset_version=opset[self.target]) as function:
            for name, label in self.inputs.items():
                self._put(name, self._entered(name, function.inputs[label]))
            for node in self.graph.nodes:
                self._node(node)
            function.set_outputs([self._output(name) for name in self.graph.outputs])
        ends = {*self.inputs.values(), *self.outputs.values()}
        make_distinct(function, ends, self._names)
        self._tell(shorten(function, ends, self._told, self._names))
        result.add_function("main", function)
        return result

    def _tell(self, named: Mapping[str, str]) -> None:
        """Take over the final names."""
        given = {
            name: (named.get(label, label), named.get(scales, scales))
            for name, (label, scales) in self.constants.items()
        }
        self.constants = given
        self.quants = {name: named.get(label, label) for name, label in self.quants.items()}
        for bias in self.biases.values():
            bias["id"] = named.get(bias["id"], bias["id"])

    def _entered(self, name: str, var: Var) -> Var:
        info = self.graph.info(name)
        if info.dtype == "bool":
            var = self.mb.cast(x=var, dtype="bool")
        if not info.shape:
            var = self.mb.squeeze(x=var, axes=[0])
        return var

    def _output(self, name: str) -> Var:
        """Make a value an output: float32 or int32, with at least one dimension."""
        var = self.take(name)
        info = self.graph.info(name)
        var = self.cast(var, "fp32" if info.dtype == "float32" else "int32")
        if not info.shape:
            var = self.mb.reshape(x=var, shape=[1])
        return self.mb.identity(x=var, name=self.outputs[name])

    def _node(self, node: Node) -> None:
        self.kind = self._kind(node)
        try:
            results = self._emitters[node.op].build(self, node)
        except UnsupportedError as err:
            raise UnsupportedError(f"{node}: {err}") from err
        except EdgeqError:
            raise
        except Exception as err:  # coremltools checks with errors of many kinds
            raise UnsupportedError(
                f"{node} cannot be written for Core ML: coremltools refuses it: {err}"
            ) from err
        for name, var in zip(
            node.outputs, results if isinstance(results, list | tuple) else [results], strict=False
        ):
            if name:
                self._put(name, self._named(name, var))

    def _kind(self, node: Node) -> str:
        """The float type in which a node computes."""
        kinds = [output_kind(self.graph, name, self.precision) for name in node.outputs if name]
        for name in node.inputs:
            var = self.vars.get(name)
            if var is not None and var.dtype == self.types.fp32:
                kinds.append("fp32")
            constant = self.graph.constants.get(name)
            # bounds past float16 bound nothing in it
            if isinstance(constant, np.ndarray) and node.op != "Clip" and _past_half(constant):
                kinds.append("fp32")
            # before iOS 17 a product's factors are of one type
            if self.target == "ios16" and isinstance(constant, QuantWeight) and constant.bits != 32:
                kinds.append(self._held_kind(constant))
        return "fp32" if "fp32" in kinds else self.plain

    def _put(self, name: str, var: Var) -> None:
        """Store a value, rounded if the graph says so."""
        if name in self.graph.quants:
            var = self._rounded(name, var, self.graph.quants[name])
        elif var.dtype == self.types.fp32:
            var = self.cast(var, output_kind(self.graph, name, self.precision))
        self.vars[name] = var

    def _rounded(self, name: str, var: Var, quant: QuantParams) -> Var:
        kind = stored_kind(quant.scale, self.precision)
        scale = KINDS[kind].dtype(quant.scale)
        zero = np.int8(quant.zero_point)
        label = self.quants[name] = self._names.inner(f"{name}_q")
        levels = self.mb.quantize(
            input=self.cast(var, kind),
            scale=scale,
            zero_point=zero,
            output_dtype="int8",
            name=label,
        )
        return self.mb.dequantize(input=levels, scale=scale, zero_point=zero)

    def _named(self, name: str, var: Var) -> Var:
        """Name a node's output after its value, unless an output has that name."""
        if name not in self.outputs and var.op is not None and len(var.op.outputs) == 1:
            label = self._names.inner(name)
            var.op.name = label
            var.set_name(label)
            self._told.add(label)
        return var

    # --- what operators take ------------------------------------------------------------------

    def take(self, name: str, kind: str | None = None) -> Var:
        """Return a value or constant; floats in the node's type or another."""
        kind = kind or self.kind
        if name in self.vars:
            return self.cast(self.vars[name], kind)
        if name in self.graph.quants:  # a constant that is rounded as values are
            self._put(name, self._constant(name, kind))
            return self.cast(self.vars[name], kind)
        return self._constant(name, kind)

    def weight(self, name: str) -> PackedWeight:
        """Return a quantized or float constant, in its own float type where possible."""
        weight = self.graph.constants[name]
        if not isinstance(weight, QuantWeight) or weight.bits == 32:
            return PackedWeight(self._constant(name, self.kind))
        kind = "fp32" if self.kind == "fp32" else self._held_kind(weight)
        return self._quantized(name, weight, kind)

    def bias(self, node: Node, var: Var) -> Var:
        """Return a bias in the type of its weight.

        Of one in integers that can be read back it is noted what its scales are the product of.
        """
        value, weight, name = node.inputs[:3]
        var = self._constant(name, "fp16" if var.dtype == self.types.fp16 else "fp32")
        bias, factor = self.graph.constants[name], self.graph.constants[weight]
        quant = self.graph.quants.get(value)
        if isinstance(bias, QuantWeight) and isinstance(factor, QuantWeight) and quant:
            scales = weights.bias_scales(quant.scale, factor.scales, bias.shape)
            same = var.dtype == self.types.fp32 and np.array_equal(bias.scales, scales)
            if same and np.array_equal(weights.bias_levels(bias.numpy(), scales), bias.levels):
                self.biases[name] = {"id": var.name, "value": value, "weight": weight}
        return var

    def const(self, values: Any, kind: str | None = None, name: str = "a constant") -> Any:
        """Convert numbers; floats to the node's type or another."""
        array = np.asarray(values)
        if array.dtype.kind == "f":
            array = _held_float(name, array.astype(np.float32), kind or self.kind)
        elif array.dtype.kind in "iu":
            array = array.astype(np.int32)
        return array if array.ndim else array[()]

    def info_shape(self, name: str) -> Shape:
        """Shape of a value or constant."""
        return self.graph.info(name).shape

    def numbers(self, name: str) -> NDArray[Any]:
        """Numbers of a constant."""
        return self.graph.array(name)

    def ints(self, name: str) -> list[int]:
        """Integers of a constant."""
        return [int(v) for v in self.numbers(name).reshape(-1)]

    def cast(self, var: Var, kind: str) -> Var:
        """Cast a value, once for each type; to a float type only from floats."""
        types = self.types
        if var.dtype == getattr(types, kind):
            return var
        if kind in ("fp16", "fp32") and var.dtype not in (types.fp16, types.fp32):
            return var
        key = ("cast", f"{id(var)} {kind}")
        if key not in self._memo:  # with the value, that its id stay its own
            self._memo[key] = (var, self.mb.cast(x=var, dtype=kind))
        return self._memo[key][1]

    def _held_kind(self, constant: QuantWeight) -> str:
        return stored_kind(constant.scales, self.precision)

    def _constant(self, name: str, kind: str) -> Var:
        constant = self.graph.constants[name]
        if isinstance(constant, QuantWeight) and constant.bits != 32:
            own = "fp32" if kind == "fp32" else self._held_kind(constant)
            return self.cast(self._quantized(name, constant, own).var, kind)
        key = (name, kind)
        if key not in self._memo:
            label = self._names.inner(name)
            if isinstance(constant, np.ndarray) and constant.dtype == np.float16 and kind == "fp32":
                var = self.mb.constexpr_cast(source_val=constant, output_dtype="fp32", name=label)
            else:
                values = self.const(self.graph.array(name), kind, name)
                var = self.mb.const(val=values, name=label)
            self._memo[key] = var
        return self._memo[key]

    def _quantized(self, name: str, weight: QuantWeight, kind: str) -> PackedWeight:
        key = (name, kind)
        if key not in self._memo:
            label, scale = self._names.inner(name), self._names.inner(f"{name}_scale")
            self.constants.setdefault(name, (label, scale))
            self._memo[key] = weights.build(
                self.mb, self.types, label, scale, weight, kind, self.target
            )
        packed: PackedWeight = self._memo[key]
        return packed
