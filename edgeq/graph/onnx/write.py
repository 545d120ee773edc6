"""Write a `Graph` as an ONNX file, with quantization as QuantizeLinear and DequantizeLinear.

    Linear      Gemm where x has two axes, else MatMul and Add
    QuantParams of a value that a node makes: the node makes NAME.float, DequantizeLinear NAME;
                of an input: whoever takes it takes NAME.rounded
    QuantWeight NAME.levels -> DequantizeLinear -> NAME; 4 bits are INT4 tensors, two to a byte
    float16     NAME.half -> Cast -> NAME; many scales, too

The file says in its metadata that it is ours, `edgeq.graph.qdq` reads it back exactly, and
onnxruntime runs it as it is. All lies in the one file, which protobuf limits to 2 GB.

Its opset is 20, or 21 where weights have 4 bits or blocks, which 20 has not. On x86 onnxruntime
(1.31) fails to load graphs of opset 21 with int8 activations ("output_dtype INT8 does not match
y_zero_point type UINT8", its issue 25526): those are written with uint8 ones, which mean the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Info, Node, QuantWeight
from edgeq.graph.onnx.file import OPSET, require
from edgeq.graph.operators import OPERATORS
from edgeq.graph.qdq import FORMAT, PALETTES, VERSION

IR_VERSION = 10
LIMIT = (1 << 31) - (1 << 16)
"""Bytes a model in one protobuf may have."""

_MANY = 64
"""Scales: two bytes saved of each are more than a Cast takes."""

Integers = Literal["int8", "uint8"]


def to_bytes(
    graph: Graph,
    *,
    activations: Integers = "int8",
    weights: Integers = "int8",
    watch: tuple[str, ...] = (),
) -> bytes:
    """Return the content of the file.

    Args:
        graph: canonical.
        activations: see `write_onnx`.
        weights: type of weights in 8 bits; "uint8" ones have the zero point 128 and mean the same,
            and take unsigned activations.
        watch: values that become outputs too.

    Raises:
        UnsupportedError: more than 2 GB.
        FormatError: the graph is not one that ONNX takes.
        UsageError: unknown ``activations``, ``weights`` or value, or unsigned weights with signed
            activations.
    """
    for what, given in (("activations", activations), ("weights", weights)):
        if given not in ("int8", "uint8"):
            raise UsageError(f"{what} is {given!r}; use int8 or uint8")
    if (activations, weights) == ("int8", "uint8"):
        raise UsageError("weights of uint8 take activations of uint8, not int8")
    onnx = require()
    nbytes = sum(c.nbytes for c in graph.constants.values())
    if nbytes > LIMIT:
        raise UnsupportedError(
            f"the graph {graph.name} has {nbytes / 1e9:.2f} GB of constants; one ONNX file holds "
            "2 GB: quantize its weights to fewer bits first"
        )
    model = to_model(graph, activations=activations, weights=weights, watch=watch)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as err:
        raise FormatError(f"the graph {graph.name} is not valid ONNX: {err}") from err
    content: bytes = model.SerializeToString()
    return content


def to_model(
    graph: Graph,
    *,
    activations: Integers = "int8",
    weights: Integers = "int8",
    watch: tuple[str, ...] = (),
) -> Any:
    """Return the ModelProto, unchecked; shapes need not be known."""
    return _Writer(require(), graph, activations, weights).model(watch)


@dataclass
class _Writer:
    """Makes one model. Names that it adds have a suffix behind a point."""

    onnx: ModuleType
    graph: Graph
    activations: Integers
    weights: Integers
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    palettes: dict[str, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    signed: bool = True

    def model(self, watch: tuple[str, ...]) -> Any:
        graph, helper = self.graph, self.onnx.helper
        self.taken = {*graph.values, *graph.constants, *graph.producers}
        self.named = {node.name for node in graph.nodes}
        modern = any(
            isinstance(c, QuantWeight) and (c.bits == 4 or c.block is not None)
            for c in graph.constants.values()
        )
        self.signed = self.activations == "int8" and not modern
        flipped = self._flipped()
        for name in graph.constants:
            self._constant(name, name in flipped)
        rounded: dict[str, str] = {}
        for name in (*graph.inputs, *graph.constants):
            if name in graph.quants:
                rounded[name] = self._name(f"{name}.rounded")
                self._round(name, name, rounded[name], graph.quants[name])
        for node in graph.nodes:
            inputs = [rounded.get(name, name) for name in node.inputs]
            unrounded = {o: self._name(f"{o}.float") for o in node.outputs if o in graph.quants}
            self._node(node, inputs, [unrounded.get(o, o) for o in node.outputs], flipped)
            for name, before in unrounded.items():
                self._round(name, before, name, graph.quants[name])
        outputs = [*graph.outputs, *(w for w in watch if w not in graph.outputs)]
        for name in outputs:
            if name not in graph.producers:
                raise UsageError(f"{name!r} is not a value that the graph {graph.name} computes")
        proto = helper.make_graph(
            self.nodes,
            graph.name or "graph",
            [self._value(name) for name in graph.inputs],
            [self._value(name) for name in outputs],
            self.initializers,
            value_info=[
                self._value(n) for n in graph.values if n not in outputs and n not in graph.inputs
            ],
        )
        domains = {node.attrs["domain"] for node in graph.nodes if "domain" in node.attrs}
        model = helper.make_model(
            proto,
            opset_imports=[helper.make_opsetid("", OPSET if modern else OPSET - 1)]
            + [helper.make_opsetid(domain, 1) for domain in sorted(domains)],
            ir_version=IR_VERSION,
            producer_name="edgeq",
            producer_version=__version__,
        )
        meta = {**graph.meta, FORMAT: VERSION}
        if self.palettes:
            meta[PALETTES] = json.dumps(self.palettes)
        helper.set_model_props(model, meta)
        return model

    def _flipped(self) -> set[str]:
        """Weights of Linears that the file holds transposed, for MatMul."""
        names = set()
        for name in self.graph.constants:
            users = self.graph.consumers.get(name, ())
            if users and all(
                n.op == "Linear" and n.inputs.count(name) == 1 and n.inputs[1] == name
                and not self._gemm(n)
                for n in users
            ):  # fmt: skip
                names.add(name)
        return names

    def _gemm(self, node: Node) -> bool:
        """Whether a Linear is written as Gemm; for blocks of weights only MatMul is fast."""
        weight = self.graph.constants.get(node.inputs[1])
        blocks = isinstance(weight, QuantWeight) and weight.block is not None
        return len(self.graph.info(node.inputs[0]).shape) == 2 and not blocks

    def _constant(self, name: str, flipped: bool) -> None:
        constant = self.graph.constants[name]
        if not isinstance(constant, QuantWeight):
            array = np.asarray(constant.T if flipped else constant, order="C")
            if constant.dtype != np.float16:
                self._initializer(name, array)
                return
            half = self._initializer(self._name(f"{name}.half"), array)
            self._add("Cast", f"{name}.widened", [half], [name], to=self.onnx.TensorProto.FLOAT)
            return
        weight = constant.transposed((1, 0)) if flipped else constant
        if weight.palette is not None:
            self.palettes[name] = {"bits": weight.bits, "levels": weight.palette.tolist()}
        packed = weight.bits == 4 and weight.palette is None
        multiplied = weight.block is None and weight.bits != 32  # in integer operators
        unsigned = self.weights == "uint8" and multiplied and not packed
        shift, kind = (128, np.uint8) if unsigned else (0, weight.levels.dtype)
        levels = self._name(f"{name}.levels")
        if packed:
            self._int4(levels, weight.levels)
        else:
            self._initializer(levels, np.add(weight.levels, shift, dtype=np.int32).astype(kind))
        inputs = [levels, self._scales(name, weight)]
        # onnxruntime fuses integer operators with zero points only; it asks for none of a bias
        if weight.block is None and weight.bits != 32:
            zero = self._name(f"{name}.zero")
            shape = weight.scales.shape
            if packed:
                self._int4(zero, np.zeros(shape, np.int8))
            else:
                self._initializer(zero, np.full(shape, shift, kind))
            inputs.append(zero)
        attrs: dict[str, int] = {} if weight.axis is None else {"axis": weight.axis}
        if weight.block is not None:
            attrs["block_size"] = weight.block
        self._add("DequantizeLinear", f"{name}.weight", inputs, [name], **attrs)

    def _scales(self, name: str, weight: QuantWeight) -> str:
        """Write a weight's scales; many of them as float16 if that is exact.

        onnxruntime widens them while it loads, before it fuses what they belong to.
        """
        label, half = self._name(f"{name}.scale"), weight.scales.astype(np.float16)
        if weight.scales.size < _MANY or (half != weight.scales).any():
            return self._initializer(label, weight.scales)
        narrow = self._initializer(self._name(f"{name}.scale.half"), half)
        self._add(
            "Cast", f"{name}.scale.widened", [narrow], [label], to=self.onnx.TensorProto.FLOAT
        )
        return label

    def _round(self, name: str, before: str, after: str, quant: QuantParams) -> None:
        shift, dtype = (0, np.int8) if self.signed else (128, np.uint8)
        zero = np.array(quant.zero_point + shift, dtype)
        grid = [
            self._initializer(self._name(f"{name}.scale"), np.array(quant.scale, np.float32)),
            self._initializer(self._name(f"{name}.zero"), zero),
        ]
        levels = self._name(f"{name}.levels")
        self._add("QuantizeLinear", f"{name}.quantize", [before, *grid], [levels])
        self._add("DequantizeLinear", f"{name}.dequantize", [levels, *grid], [after])

    def _node(self, node: Node, inputs: list[str], outputs: list[str], flipped: set[str]) -> None:
        if node.op != "Linear":
            self.nodes.append(
                self.onnx.helper.make_node(
                    node.op, inputs, self._outputs(node, outputs), name=node.name,
                    **self._attributes(node),
                )
            )  # fmt: skip
            return
        if self._gemm(node):
            self.nodes.append(
                self.onnx.helper.make_node("Gemm", inputs, outputs, name=node.name, transB=1)
            )
            return
        x, w, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else ""
        if node.inputs[1] not in flipped:
            turned = self._name(f"{outputs[0]}.turned")
            self._add("Transpose", f"{node.name}.turn", [w], [turned], perm=(1, 0))
            w = turned
        product = self._name(f"{outputs[0]}.product") if bias else outputs[0]
        self.nodes.append(self.onnx.helper.make_node("MatMul", [x, w], [product], name=node.name))
        if bias:
            self._add("Add", f"{node.name}.bias", [product, bias], outputs)

    def _add(self, op: str, name: str, inputs: list[str], outputs: list[str], **attrs: Any) -> None:
        while name in self.named:
            name += "_"
        self.named.add(name)
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outputs, name=name, **attrs))

    def _outputs(self, node: Node, outputs: list[str]) -> list[str]:
        """Name unused outputs where ONNX requires a name, and leave out those that it does not.

        onnxruntime (1.32) changes the layout of a pool with an output without a name, and then
        does not find it.
        """
        row = OPERATORS.get(node.op)
        if row is None:
            return outputs
        if row.outputs == 1:
            return outputs if any(outputs[1:]) else outputs[:1]
        return [o or self._name(f"{node.name}.unused{i}") for i, o in enumerate(outputs)]

    def _attributes(self, node: Node) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        for key, value in node.attrs.items():
            if "edgeq_" in key:  # a mark of ours, gone when the graph is canonical
                continue
            if node.op == "AveragePool" and key == "dilations" and set(value) == {1}:
                continue  # onnxruntime's integer pool does not know the attribute
            if isinstance(value, np.ndarray):
                value = self.onnx.numpy_helper.from_array(value)
            attributes[key] = list(value) if isinstance(value, tuple) else value
        return attributes

    def _name(self, name: str) -> str:
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _initializer(self, name: str, array: NDArray[Any]) -> str:
        self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def _int4(self, name: str, levels: NDArray[np.int8]) -> None:
        """Pack two levels into a byte, the first into its low half."""
        flat = (levels.reshape(-1) & 15).astype(np.uint8)
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
        proto = self.onnx.TensorProto(
            name=name,
            data_type=self.onnx.TensorProto.INT4,
            dims=levels.shape,
            raw_data=(flat[::2] | flat[1::2] << 4).tobytes(),
        )
        self.initializers.append(proto)

    def _value(self, name: str) -> Any:
        info: Info | None = self.graph.values.get(name)
        if info is None:  # onnxruntime finds out
            return self.onnx.helper.make_empty_tensor_value_info(name)
        elem = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(info.dtype))
        return self.onnx.helper.make_tensor_value_info(name, elem, info.shape)
