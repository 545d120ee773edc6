"""A graph for onnxruntime: .onnx, or the .ort of its mobile builds.

    8-bit values and weights   QuantizeLinear and DequantizeLinear, which onnxruntime fuses into
                               its integer operators while it loads; "qoperator" has that done
    Linear of rounded values,  MatMulIntegerToFloat, which onnxruntime does not fuse by itself
    its result not rounded     where there is a bias
    Linear, values not rounded MatMulNBits, of 4 and 8 bits; it rounds the values by itself where
                               they are "dynamic"
    table of a Gather          GatherBlockQuantized
    other 4-bit weights        4 bits in the file, made 8 while it is loaded
    weights of float operators multiplied by their scales while an .onnx file is loaded, once; as
                               DequantizeLinear they would be at every run

An .ort file comes with NAME.required_operators.config, from which a build of onnxruntime can be
made that has these operators alone. The format has no numbers of 4 bits: what other runtimes hold
so takes 8 in it, but for MatMulNBits and GatherBlockQuantized.

Source: onnxruntime's docs/ContribOperators.md, and its documentation of quantization and of
reduced operator builds.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.metadata_blob import blob_text
from edgeq.converters.ort.file import pack_rows
from edgeq.converters.ort.graph_run import (
    HELD,
    OrtGraphRunner,
    has_known_axes,
    read_parts,
    read_quants,
    read_weights,
)
from edgeq.converters.ort.ort_format import to_ort_format
from edgeq.converters.ort.run import file_metadata, versions
from edgeq.converters.ort.session import require
from edgeq.converters.runners import GraphRunner
from edgeq.converters.target import GraphTarget
from edgeq.core.errors import UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.formats.packing import round_up
from edgeq.formats.qparams import QuantParams
from edgeq.formats.schemes import GROUP_SIZES
from edgeq.graph.ir import Constant, Graph, Node, QuantWeight
from edgeq.graph.onnx.write import to_bytes
from edgeq.graph.operators import ACTIVATIONS, WINDOWS
from edgeq.quant.graph.summary import arena_bytes

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "activations": ("uint8", "int8"),
    "weights": ("int8", "uint8"),
    "form": ("qdq", "qoperator"),
}
"""Option -> its values, the default first."""
_MICROSOFT = "com.microsoft"
_MADE = ".quantize"
"""What `edgeq.graph.onnx.write` puts behind a value's name to name its QuantizeLinear."""


class OrtGraphTarget(GraphTarget):
    """Graphs in onnxruntime."""

    def check(self, graph: Graph, options: Mapping[str, Any]) -> None:
        """Refuse options that are not known; onnxruntime takes every operator a graph may hold.

        Raises:
            UsageError: an unknown option or value.
        """
        for name, value in options.items():
            if name not in OPTIONS:
                raise UsageError(unknown("option of ort", name, tuple(OPTIONS)))
            if value not in OPTIONS[name]:
                raise UsageError(unknown(name, str(value), OPTIONS[name]))
        if (options.get("activations"), options.get("weights")) == ("int8", "uint8"):
            raise UsageError("weights=uint8 takes activations=uint8; leave activations out")

    def remarks(self, graph: Graph, options: Mapping[str, Any]) -> list[str]:
        """Which processors need a setting to add products of 8 bits exactly."""
        signed = any(isinstance(c, QuantWeight) and c.bits == 8 for c in graph.constants.values())
        if not graph.quants or not signed or options.get("weights") == "uint8":
            return []
        return [
            "On x86 processors without VNNI, onnxruntime's sums of 8-bit products saturate. "
            'There, set the session option "session.x64quantprecision" to "1" (.onnx files only), '
            "or convert with --set weights=uint8, which is exact everywhere and slower elsewhere."
        ]

    def write(
        self,
        graph: Graph,
        path: Path,
        options: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> None:
        """Write the file, and beside an .ort file the list of its operators.

        Args:
            graph: what to write.
            path: .onnx or .ort.
            options: of `OPTIONS`.
            progress: not called; a file of this kind is written at once.

        Raises:
            UnsupportedError: more than 2 GB.
            EdgeqError: onnxruntime's tool makes no .ort of it.
        """
        onnx, _ = require()
        chosen = {name: options.get(name, values[0]) for name, values in OPTIONS.items()}
        packed: dict[str, dict[str, Any]] = {}
        proto = onnx.load_from_string(
            to_bytes(
                _lowered(graph, packed),
                activations=chosen["activations"],
                weights=chosen["weights"],
            )
        )
        _widen(onnx, proto)
        places: dict[str, Any] = {
            "weights": packed | _weights(graph, proto),
            "quants": _quants(graph, proto),
        }
        _to_float(onnx, graph, proto, places["weights"])
        if (
            path.suffix == ".onnx" and chosen["form"] == "qdq"
        ):  # others hold what is computed at load
            _at_load(onnx, graph, proto)
        _shorten(proto, places)
        meta = {entry.key: entry.value for entry in proto.metadata_props} | {
            HELD: blob_text(places)
        }
        onnx_path = path.with_suffix(".onnx")
        if chosen["form"] == "qoperator":
            proto = _fused(onnx, proto)
        onnx.helper.set_model_props(proto, meta)
        onnx_path.write_bytes(proto.SerializeToString())
        if path.suffix == ".ort":
            to_ort_format(onnx_path, versions()["onnxruntime"])
            onnx_path.unlink()

    def wrote(self, path: Path) -> bool:
        """Whether the file's metadata says where its packed weights lie."""
        return HELD in file_metadata(path)

    def opens(self, path: Path) -> bool:
        """Whether the axes of all inputs and outputs are known; edgeq need not have written it."""
        return has_known_axes(path)

    def open_runner(self, path: Path, *, threads: int = 1) -> GraphRunner:
        """Open any .onnx or .ort file in onnxruntime.

        Raises:
            FormatError: onnxruntime refuses it.
            MissingDependencyError: onnxruntime is not installed.
        """
        return OrtGraphRunner(path, threads=threads)

    def read_weights(self, path: Path) -> Iterator[tuple[str, QuantWeight]]:
        """Every packed constant of the file, as the source had it."""
        return read_weights(path)

    def read_quants(self, path: Path) -> dict[str, QuantParams]:
        """Scale and zero point of each rounded value."""
        return read_quants(path)

    def read_parts(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Every constant and operator of the file."""
        return read_parts(path)

    def arena_bytes(self, graph: Graph, options: Mapping[str, Any]) -> int:
        """Bytes of the activations while the graph runs, if buffers are reused."""
        return arena_bytes(graph)

    def versions(self) -> dict[str, str]:
        """onnx and onnxruntime."""
        return versions()


def _lowered(graph: Graph, held: dict[str, dict[str, Any]]) -> Graph:
    """The graph with operators that compute on packed weights, which are recorded in ``held``."""
    level = 4 if graph.meta.get("edgeq.activations") == "dynamic" else 0
    nodes: list[Node] = []
    constants: dict[str, Constant] = dict(graph.constants)
    for node in graph.nodes:
        name = _packed(graph, node)
        weight = graph.constants.get(name or "")
        if name is None or not isinstance(weight, QuantWeight):
            nodes.append(node)
            continue
        block = _block(weight)
        codes, scales = f"{name}.codes", f"{name}.scales"
        packed, steps = _codes(weight, block)
        half = steps.astype(np.float16)  # widened while the file is loaded
        constants[scales] = half if (half == steps).all() else steps
        constants[codes] = packed.reshape(len(packed), -1) if node.op == "Gather" else packed
        held[name] = {
            "codes": codes, "scales": scales, "shape": weight.shape, "bits": weight.bits,
            "axis": weight.axis, "block": weight.block, "width": block,
        }  # fmt: skip
        attrs: dict[str, Any] = {"domain": _MICROSOFT, "bits": weight.bits, "block_size": block}
        if node.op == "Gather":
            inputs: tuple[str, ...] = (codes, node.inputs[1], scales)
            attrs |= {"gather_axis": 0, "quantize_axis": 1}
            nodes.append(replace(node, op="GatherBlockQuantized", inputs=inputs, attrs=attrs))
            continue
        inputs = (node.inputs[0], codes, scales, "", "", *node.inputs[2:])
        n, k = weight.shape
        attrs |= {"N": n, "K": k, "accuracy_level": level}
        nodes.append(
            replace(node, op="MatMulNBits", inputs=inputs[: 6 if inputs[5:] else 3], attrs=attrs)
        )
    used = {name for node in nodes for name in node.inputs}
    used_constants = {name: constant for name, constant in constants.items() if name in used}
    return replace(graph, nodes=tuple(nodes), constants=used_constants)


def _packed(graph: Graph, node: Node) -> str | None:
    """The weight that an operator of onnxruntime takes packed, if there is one for this node."""
    if node.op == "Linear" and node.inputs[0] not in graph.quants:
        weight = graph.constants[node.inputs[1]]
        return node.inputs[1] if isinstance(weight, QuantWeight) and _fits(weight) else None
    if node.op == "Gather" and node.attrs.get("axis", 0) == 0:
        table = graph.constants.get(node.inputs[0])
        if isinstance(table, QuantWeight) and _fits(table) and not table.shape[1] % _block(table):
            return node.inputs[0]
    return None


def _fits(weight: QuantWeight) -> bool:
    """Whether it has a scale for the whole, for each row, or for blocks of rows."""
    if weight.levels.ndim != 2 or (weight.palette is not None and weight.bits != 8):
        return False
    if weight.block is None:
        return weight.axis in (None, 0)
    return weight.axis == 1 and weight.block in GROUP_SIZES


def _block(weight: QuantWeight) -> int:
    """Levels that share a scale in the file: if a row has one, the block that pads it least."""
    k = weight.shape[1]
    return weight.block or min(reversed(GROUP_SIZES), key=lambda g: round_up(k, g))


def _codes(weight: QuantWeight, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [N, blocks, bytes] and scales [N, blocks]; rows are padded with zeros."""
    n, k = weight.shape
    blocks = -(-k // block)
    middle = 1 << (weight.bits - 1)
    codes = np.full((n, blocks * block), middle, np.uint8)
    codes[:, :k] = weight.levels.astype(np.int16) + middle
    rows = pack_rows(codes, weight.bits).reshape(n, blocks, -1)
    if weight.block is not None:
        return rows, weight.scales
    return rows, np.broadcast_to(weight.wide_scales(), (n, blocks)).copy()


def _widen(onnx: ModuleType, proto: Any) -> None:
    """Put a Cast to 8 bits behind 4-bit levels, which integer operators are then fused with."""
    narrow = {i.name: i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.INT4}
    nodes: list[Any] = []
    for node in proto.graph.node:
        blocks = any(entry.name == "block_size" for entry in node.attribute)
        if node.op_type == "DequantizeLinear" and node.input[0] in narrow and not blocks:
            wide = f"{node.input[0]}.wide"
            cast = {"to": onnx.TensorProto.INT8, "name": f"{node.name}.widen"}
            nodes.append(onnx.helper.make_node("Cast", [node.input[0]], [wide], **cast))
            zero = narrow.get(node.input[2])
            if zero is not None:
                zeros = np.zeros(tuple(zero.dims), np.int8)
                zero.CopyFrom(onnx.numpy_helper.from_array(zeros, zero.name))
            node.input[0] = wide
        nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _weights(graph: Graph, proto: Any) -> dict[str, dict[str, Any]]:
    """The names of the weights that a DequantizeLinear reads."""
    places = {}
    turned = {node.input[1] for node in proto.graph.node if node.op_type == "MatMul"}
    for node in proto.graph.node:
        weight = graph.constants.get(node.output[0])
        if node.op_type == "DequantizeLinear" and isinstance(weight, QuantWeight):
            places[node.output[0]] = {
                "levels": node.input[0], "scales": node.input[1], "shape": weight.shape,
                "bits": weight.bits, "axis": weight.axis, "block": weight.block,
                "turned": node.output[0] in turned,
            }  # fmt: skip
            if weight.bits == 32:  # its scale is not written again where operators are fused
                (user,) = graph.consumers[node.output[0]]
                step = graph.quants[user.inputs[0]].scale
                places[node.output[0]]["product"] = [step, user.inputs[1]]
    return places


def _quants(graph: Graph, proto: Any) -> dict[str, list[str]]:
    """Where the scale and the zero point of each rounded value lie."""
    places = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            name = node.input[0] if node.input[0] in graph.quants else node.name[: -len(_MADE)]
            places[name] = [node.input[1], node.input[2]]
    return {name: places[name] for name in graph.quants if name in places}


def _to_float(
    onnx: ModuleType, graph: Graph, proto: Any, weights: dict[str, dict[str, Any]]
) -> None:
    """Have Linears of rounded values whose results stay float multiply the integers.

    Args:
        onnx: the package.
        graph: the source.
        proto: its model.
        weights: what `_weights` found in it; told of matrices that are turned.
    """
    linears = {node.name: node for node in graph.nodes if _open_ended(graph, node)}
    producer = {node.output[0]: node for node in proto.graph.node}
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    done: set[str] = set()
    for node in proto.graph.node:
        linear = linears.get(node.name)
        if linear is None:
            continue
        x, w = (producer[name] for name in node.input[:2])
        if w.op_type != "DequantizeLinear":  # turned for this node, as others take it as it is
            continue
        if node.op_type == "Gemm":  # its matrix lies the other way around
            levels, name = initializers.get(w.input[0]), linear.inputs[1]
            if levels is None or len(graph.consumers[name]) > 1:
                continue
            turned = np.ascontiguousarray(onnx.numpy_helper.to_array(levels).T)
            levels.CopyFrom(onnx.numpy_helper.from_array(turned, levels.name))
            weights[name]["turned"] = True
        factors = [entry for pair in zip(x.input, w.input, strict=True) for entry in pair]
        inputs, about = [*factors, *linear.inputs[2:]], {"name": node.name, "domain": _MICROSOFT}
        made_of = onnx.helper.make_node("MatMulIntegerToFloat", inputs, [linear.output], **about)
        node.CopyFrom(made_of)
        done.add(linear.output)
    remaining = [n for n in proto.graph.node if n.op_type != "Add" or n.output[0] not in done]
    used = {name for node in remaining for name in node.input} | {
        o.name for o in proto.graph.output
    }
    remaining = [n for n in remaining if n.op_type != "DequantizeLinear" or n.output[0] in used]
    del proto.graph.node[:]
    proto.graph.node.extend(remaining)
    if done and all(entry.domain != _MICROSOFT for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(_MICROSOFT, 1))


def _at_load(onnx: ModuleType, graph: Graph, proto: Any) -> None:
    """Have weights that float operators take dequantized by operators that onnxruntime folds.

    It leaves every DequantizeLinear for fusions with rounded values and runs what is left of them
    each time; a convolution has the fast layout of its weights only where they are constants, too.
    """
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    sources = {node.output[0]: node.input[0] for node in proto.graph.node if node.op_type == "Cast"}
    nodes: list[Any] = []
    for node in proto.graph.node:
        name = node.output[0]
        weight = graph.constants.get(name)
        plain = isinstance(weight, QuantWeight) and weight.block is None and weight.bits <= 8
        users = graph.consumers.get(name, ())
        if (
            node.op_type != "DequantizeLinear"
            or not plain
            or any(value in graph.quants for user in users for value in user.inputs)
        ):
            nodes.append(node)
            continue
        assert isinstance(weight, QuantWeight)
        scales = tensors[sources.get(node.input[1], node.input[1])]
        if weight.axis is not None:  # a scale for each of its places
            scales.dims.extend([1] * (weight.levels.ndim - 1 - _axis(node)))
        wide = f"{name}.float"
        nodes.append(onnx.helper.make_node("Cast", [node.input[0]], [wide], to=1))
        zero = next((onnx.numpy_helper.to_array(tensors[z]) for z in node.input[2:]), np.zeros(1))
        if np.any(zero):  # the same for all: the middle of levels without a sign
            middle = np.array(zero.flat[0], np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(middle, f"{name}.middle"))
            nodes.append(onnx.helper.make_node("Sub", [wide, f"{name}.middle"], [f"{wide}.signed"]))
            wide = f"{wide}.signed"
        nodes.append(onnx.helper.make_node("Mul", [wide, node.input[1]], [name]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    used |= {value.name for value in proto.graph.output}
    for i in reversed(range(len(proto.graph.initializer))):
        if proto.graph.initializer[i].name not in used:  # zero points
            del proto.graph.initializer[i]


def _axis(node: Any) -> int:
    """The axis of a DequantizeLinear."""
    axes = [entry.i for entry in node.attribute if entry.name == "axis"]
    return int(axes[0]) if axes else 1


def _open_ended(graph: Graph, node: Node) -> bool:
    """Whether a node is a Linear of rounded values whose result stays float."""
    if node.op != "Linear" or node.inputs[0] not in graph.quants:
        return False
    weight = graph.constants[node.inputs[1]]
    after = graph.only_consumer(node.output)
    activated = after is not None and after.op in ACTIVATIONS and after.output in graph.quants
    whole = isinstance(weight, QuantWeight) and weight.block is None and weight.axis in (None, 0)
    biased = any(isinstance(graph.constants[b], QuantWeight) for b in node.inputs[2:])
    return whole and not biased and not activated and node.output not in graph.quants


def _shorten(proto: Any, places: dict[str, dict[str, Any]]) -> None:
    """Shorten names, store equal constants once, and leave out attributes that are ONNX's defaults.

    In a small network names are a fifth of the file. Inputs, outputs and operators keep theirs.

    Args:
        proto: the model.
        places: what it says of itself, in which the names are changed too.
    """
    graph = proto.graph
    ends = {value.name for value in (*graph.input, *graph.output)}
    first = _merge(graph, ends)
    short: dict[str, str] = {"": ""}

    def named(name: str) -> str:
        name = first.get(name, name)
        if name in ends:
            return name
        while name not in short:
            candidate = f"v{len(short)}"
            short[candidate if candidate in ends else name] = candidate
        return short[name]

    del graph.value_info[:]
    for node in graph.node:
        node.input[:] = [named(name) for name in node.input]
        node.output[:] = [named(name) for name in node.output]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            node.ClearField("name")
        if node.op_type in WINDOWS:
            attributes = [entry for entry in node.attribute if not _understood(entry)]
            del node.attribute[:]
            node.attribute.extend(attributes)
    for tensor in graph.initializer:
        tensor.name = named(tensor.name)
    for entry in places["weights"].values():
        for key in ("codes", "levels", "scales"):
            if key in entry:
                entry[key] = named(entry[key])
    places["quants"] = {name: [named(n) for n in at] for name, at in places["quants"].items()}


def _merge(graph: Any, ends: set[str]) -> dict[str, str]:
    """Remove constants equal to an earlier one; returns removed name -> name of the earlier one.

    Of 8 bits none: onnxruntime can make those unsigned only that one operator takes.
    """
    names: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    first: dict[str, str] = {}
    for tensor in graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(tensor.raw_data).digest())
        narrow = tensor.data_type == tensor.INT8
        alone = narrow or tensor.name in ends or not tensor.HasField("raw_data")
        if not alone and names.setdefault(key, tensor.name) != tensor.name:
            first[tensor.name] = names[key]
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name in first:
            del graph.initializer[i]
    return first


def _understood(entry: Any) -> bool:
    """Whether an attribute of a window says what ONNX takes it for without it."""
    usual = {"dilations": 1, "strides": 1, "pads": 0}.get(entry.name)
    alike = usual is not None and all(n == usual for n in entry.ints)
    return alike or (entry.name == "group" and entry.i == 1)


def _fused(onnx: ModuleType, proto: Any) -> Any:
    """The model with QLinear operators, as onnxruntime itself fuses them."""
    _, onnxruntime = require()
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return onnx.load(options.optimized_model_filepath)
