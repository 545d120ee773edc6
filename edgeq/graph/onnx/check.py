"""Check an ONNX model before anything is made of it, and say in plain words what is wrong."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError

DOMAINS = ("", "ai.onnx")
"""The two names of the domain of ONNX's own operators."""


def check(onnx: ModuleType, model: Any, path: Path) -> None:
    """Bring what exporters leave out or write in another way to one form, and ask ONNX's checker.

    Args:
        onnx: the package.
        model: without initializers; it is changed.
        path: of the file, for messages.

    Raises:
        FormatError: the checker refuses it.
        UnsupportedError: operators of other domains.
    """
    if not model.opset_import:
        model.opset_import.append(onnx.helper.make_opsetid("", 1))
    model.ir_version = max(model.ir_version, 4)
    model.graph.name = model.graph.name or path.stem
    _one_name(model, model.graph.node)
    for function in model.functions:
        _one_name(function, function.node)
    custom = {n.domain for n in model.graph.node} - set(DOMAINS)
    custom -= {f.domain for f in model.functions}
    if custom:
        foreign = [n for n in model.graph.node if n.domain in custom][:8]
        listed = ", ".join(f"{n.domain}.{n.op_type} {node_text(n)}" for n in foreign)
        ml = "skl2onnx has the option zipmap=False; or " if custom == {"ai.onnx.ml"} else ""
        raise UnsupportedError(
            f"{path} has operators outside ONNX's default domain: {listed}; export it without them "
            f"({ml}without fused or quantized operators)"
        )
    del model.graph.value_info[:]
    for output in model.graph.output:  # many exporters leave shapes out, and nobody needs them
        output.type.tensor_type.shape.SetInParent()
        output.type.tensor_type.elem_type = output.type.tensor_type.elem_type or 1
    try:
        onnx.checker.check_model(_accepted(onnx, model))
    except onnx.checker.ValidationError as err:
        if "No Op registered" not in str(err):
            raise FormatError(f"{path} is not a valid ONNX model: {_short(err)}") from err


def _one_name(owner: Any, nodes: Any) -> None:
    """Call the default domain by its empty name, which is imported once."""
    for entry in (*owner.opset_import, *nodes):
        entry.domain = "" if entry.domain in DOMAINS else entry.domain
    default = [place for place, entry in enumerate(owner.opset_import) if not entry.domain]
    for place in reversed(default[1:]):
        del owner.opset_import[place]


def _accepted(onnx: ModuleType, model: Any) -> Any:
    """Make a copy of the model without what ONNX's checker refuses and this reader takes.

    That is GroupNormalization of opset 18, whose form was changed in 21 (an Identity stands for
    it), and inputs without a shape.
    """
    checked = onnx.ModelProto()
    checked.CopyFrom(model)
    for node in checked.graph.node:
        if node.op_type == "GroupNormalization":
            del node.attribute[:], node.input[1:]
            node.op_type = "Identity"
    for value in checked.graph.input:
        if value.type.WhichOneof("value") == "tensor_type":
            value.type.tensor_type.shape.SetInParent()
    return checked


def check_node(onnx: ModuleType, node: Any, opset: int, path: Path) -> None:
    """Refuse an operator that ONNX does not have, or that holds a graph, before any other work.

    Raises:
        FormatError: it leaves out an input that it needs.
        UnsupportedError: no opset has it, or it contains a graph.
    """
    version = min(opset, onnx.defs.onnx_opset_version())
    if not onnx.defs.has(node.op_type, max_inclusive_version=version):
        raise UnsupportedError(
            f"{path} has the operator {node.op_type} {node_text(node)}, which ONNX does not have "
            f"in opset {opset}"
        )
    _needed(onnx, node, onnx.defs.get_schema(node.op_type, version), path)
    graphs = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    if any(a.type in graphs for a in node.attribute):
        raise UnsupportedError(
            f"{path} has the operator {node.op_type} {node_text(node)}, which contains a "
            "subgraph; export the model without control flow (trace it with fixed shapes)"
        )


def _needed(onnx: ModuleType, node: Any, schema: Any, path: Path) -> None:
    """Refuse a missing input that the operator requires; runtimes crash on it."""
    for place, name in enumerate(node.input):
        about = schema.inputs[min(place, len(schema.inputs) - 1)] if schema.inputs else None
        if not name and about and about.option != onnx.defs.OpSchema.FormalParameterOption.Optional:
            raise FormatError(
                f"the {node.op_type} {node_text(node)} of {path} leaves out its input {place + 1}, "
                f"{about.name!r}, which it needs"
            )


def node_text(node: Any) -> str:
    """The name of a node, or of what it computes, for messages."""
    return repr(node.name or next((o for o in node.output if o), ""))


def _short(err: BaseException) -> str:
    """Shorten the message of another library."""
    return " ".join(str(err).split())[:300]
