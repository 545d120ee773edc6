"""Emitters of products, pools and norms.

Each operator has a function that builds it, and one that gives the reason if it cannot; see
`edgeq.converters.coreml.lower.build.CoremlEmitter`.

Source: the ONNX operators' definitions at opset 21, and coremltools' of MIL, ops/defs/iOS15
(conv, linear, pool, normalization) to iOS17.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edgeq.converters.coreml.lower.build import MAX_RANK, CoremlLowering
from edgeq.converters.coreml.lower.emitters import emits, mil_name
from edgeq.converters.coreml.lower.weights import Var
from edgeq.graph.ir import Graph, Node, QuantWeight


def _pads(node: Node, rank: int) -> list[int]:
    """Convert ONNX's pads, all before and all after, to MIL's order, dimension by dimension."""
    pads = list(node.attrs.get("pads", [0] * (2 * rank)))
    return [p for pair in zip(pads[:rank], pads[rank:], strict=True) for p in pair]


def _window(b: CoremlLowering, node: Node, rank: int) -> dict[str, Any]:
    return {
        "strides": list(node.attrs.get("strides", [1] * rank)),
        "dilations": list(node.attrs.get("dilations", [1] * rank)),
        "groups": int(node.attrs.get("group", 1)),
        "pad_type": "custom",
    }


# --- products ---------------------------------------------------------------------------------


def _product(
    b: CoremlLowering, node: Node, make: Callable[..., Var], axis: int, repeat: int = 1
) -> Var:
    """Build a product with its bias, and with its scales if the weight does not include them.

    Args:
        b: the lowering.
        node: with the weight as second and the bias as third input.
        make: the product from the weight and a bias or None.
        axis: of the output channels in the result.
        repeat: how often the weight's scales are repeated along that axis.
    """
    weight = b.weight(node.inputs[1])
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    bias = b.bias(node, weight.var) if name else None
    if weight.scale is None:
        return make(weight.var, bias)
    y = make(weight.var, None)
    shape = [1] * y.rank
    shape[axis] = -1
    scale = weight.scale
    if scale.rank:
        scale = b.mb.tile(x=scale, reps=[repeat]) if repeat > 1 else scale
        scale = b.mb.reshape(x=scale, shape=shape)
    y = b.mb.mul(x=b.cast(y, b.kind), y=b.cast(scale, b.kind))
    if bias is not None:
        y = b.mb.add(x=y, y=b.mb.reshape(x=b.take(name), shape=shape))
    return y


def _constant_weight(graph: Graph, node: Node) -> str:
    for name in node.inputs[1:3]:
        if name and name not in graph.constants:
            return f"{name!r} is computed; nearest: a constant weight and bias"
    rank = len(graph.info(node.inputs[0]).shape)
    if node.op != "Linear" and not 3 <= rank <= MAX_RANK:
        return f"an input of {rank} dimensions; nearest: 3 to {MAX_RANK}"
    return ""


@emits("Conv", refuse=_constant_weight)
def _conv(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    rank = x.rank - 2
    window = _window(b, node, rank)

    def make(weight: Var, bias: Var | None) -> Var:
        extra = {} if bias is None else {"bias": bias}
        return b.mb.conv(x=x, weight=weight, pad=_pads(node, rank), **window, **extra)

    return _product(b, node, make, 1)


def _refuse_transpose(graph: Graph, node: Node) -> str:
    rank = len(graph.info(node.inputs[0]).shape) - 2
    after = list(node.attrs.get("pads", [0] * 2 * rank))[rank:]
    more = node.attrs.get("output_padding", [0] * rank)
    if any(m > p for m, p in zip(more, after, strict=True)):
        return (
            f"output_padding {list(more)} past the pads {after} it is taken from; nearest: larger "
            "pads, or Resize and Conv"
        )
    return _constant_weight(graph, node)


@emits("ConvTranspose", refuse=_refuse_transpose)
def _conv_transpose(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    rank = x.rank - 2
    window = _window(b, node, rank)
    pads = _pads(node, rank)
    for i, more in enumerate(node.attrs.get("output_padding", [])):
        pads[2 * i + 1] -= more
    shape = list(b.info_shape(node.output))

    def make(weight: Var, bias: Var | None) -> Var:
        extra = {} if bias is None else {"bias": bias}
        return b.mb.conv_transpose(
            x=x, weight=weight, pad=pads, output_shape=shape, **window, **extra
        )

    return _product(b, node, make, 1, window["groups"])


@emits("Linear", refuse=_constant_weight)
def _linear(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])

    def make(weight: Var, bias: Var | None) -> Var:
        extra = {} if bias is None else {"bias": bias}
        if x.rank <= 3:
            return b.mb.linear(x=x, weight=weight, **extra)
        y = b.mb.matmul(x=x, y=weight, transpose_y=True)
        return y if bias is None else b.mb.add(x=y, y=b.cast(bias, b.kind))

    return _product(b, node, make, -1)


# --- pools ------------------------------------------------------------------------------------


def _refuse_pool(graph: Graph, node: Node) -> str:
    if node.attrs.get("ceil_mode", 0):
        return "ceil_mode; nearest: pads at the end"
    if any(d != 1 for d in node.attrs.get("dilations", [])):
        return "dilations; nearest: a pool without them"
    if len(node.outputs) > 1 and node.outputs[1]:
        return f"indices, {node.outputs[1]!r}; nearest: MaxPool of one output"
    if not 3 <= len(graph.info(node.inputs[0]).shape) <= MAX_RANK:
        return f"an input of other than 3 to {MAX_RANK} dimensions"
    return ""


@emits("MaxPool", "AveragePool", refuse=_refuse_pool)
def _pool(b: CoremlLowering, node: Node) -> Var:
    kernel = list(node.attrs["kernel_shape"])
    given = {
        "x": b.take(node.inputs[0]),
        "kernel_sizes": kernel,
        "strides": list(node.attrs.get("strides", [1] * len(kernel))),
        "pad_type": "custom",
        "pad": _pads(node, len(kernel)),
    }
    if node.op == "MaxPool":
        return b.mb.max_pool(**given)
    counted = bool(node.attrs.get("count_include_pad", 0))
    return b.mb.avg_pool(exclude_padding_from_average=not counted, **given)


@emits("GlobalAveragePool", "GlobalMaxPool")
def _global(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    axes = list(range(2, x.rank))
    return getattr(b.mb, mil_name(node))(x=x, axes=axes, keep_dims=True)


# --- norms -------------------------------------------------------------------------------------


def _constant_affine(graph: Graph, node: Node) -> str:
    if any(node.outputs[1:]):
        return "a second output; nearest: the normalized values alone"
    if computed := [n for n in node.inputs[1:] if n and n not in graph.constants]:
        return f"{computed[0]!r} is computed; nearest: a constant scale and bias"
    if any(isinstance(graph.constants[n], QuantWeight) for n in node.inputs[1:] if n):
        return "a quantized scale or bias; nearest: of floats"
    return ""


@emits("LayerNormalization", refuse=_constant_affine)
def _layer_norm(b: CoremlLowering, node: Node) -> Var:
    x = b.take(node.inputs[0])
    axis = node.attrs.get("axis", -1) % x.rank
    shape = list(b.info_shape(node.inputs[0])[axis:])
    affine = {
        key: b.const(np.broadcast_to(b.numbers(name), shape))
        for key, name in zip(("gamma", "beta"), node.inputs[1:3], strict=False)
        if name
    }
    return b.mb.layer_norm(
        x=x,
        axes=list(range(axis, x.rank)),
        epsilon=b.const(float(node.attrs.get("epsilon", 1e-5))),
        **affine,
    )
