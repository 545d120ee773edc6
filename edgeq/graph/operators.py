"""The operators a canonical graph may hold, and what each must satisfy.

All targets are written against this table. An operator outside of it is refused by `check_known`
with its node and the names that come closest, before any other work.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgeq.core.errors import UnsupportedError
from edgeq.graph.ir import Graph, Node

Check = Callable[[Graph, Node], str | None]
"""What is wrong with a node, as "its kernel is no constant; ..."; None if nothing is."""


@dataclass(frozen=True)
class Operator:
    """What a node of one type must satisfy.

    Args:
        constant: places of inputs that must be constants, by what they are called.
        attrs: attribute -> values it may have.
        outputs: the most outputs that may be asked for.
    """

    constant: Mapping[int, str] = field(default_factory=dict)
    attrs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    outputs: int = 1

    def fault(self, graph: Graph, node: Node) -> str | None:
        """What is wrong with a node; None if nothing is."""
        for place, what in self.constant.items():
            name = node.inputs[place] if place < len(node.inputs) else ""
            if name and name not in graph.constants:
                return f"its {what} is computed; it must be a constant"
        for key, allowed in self.attrs.items():
            if key in node.attrs and node.attrs[key] not in allowed:
                words = " or ".join(repr(a) for a in allowed)
                return f"its {key} is {node.attrs[key]!r}; it must be {words}"
        for place, name in enumerate(node.outputs):
            if name and place >= self.outputs:
                return f"its output number {place + 1} is used; only the first is known"
        return None


_PLAIN = Operator()
_WEIGHTED = Operator(constant={1: "weight", 2: "bias"}, attrs={"auto_pad": ("NOTSET",)})
_POOL = {"auto_pad": ("NOTSET",), "ceil_mode": (0,)}

OPERATORS: Mapping[str, Operator] = {
    # weights
    "Conv": _WEIGHTED,
    "ConvTranspose": _WEIGHTED,
    "Linear": Operator(constant={1: "weight", 2: "bias"}),
    "MatMul": _PLAIN,
    "Gather": _PLAIN,
    # pools and sums
    "MaxPool": Operator(attrs={**_POOL, "storage_order": (0,)}),
    "AveragePool": Operator(attrs=_POOL),
    "GlobalAveragePool": _PLAIN,
    "GlobalMaxPool": _PLAIN,
    **dict.fromkeys(
        ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd"),
        Operator(constant={1: "list of axes"}),
    ),
    "ArgMax": Operator(attrs={"select_last_index": (0,)}),
    "ArgMin": Operator(attrs={"select_last_index": (0,)}),
    "TopK": Operator(constant={1: "k"}, outputs=2),
    "CumSum": Operator(constant={1: "axis"}),
    # element by element
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "Mod", "Sqrt", "Exp", "Log", "Neg", "Abs",
         "Erf", "Sin", "Cos", "Floor", "Ceil", "Round", "Sign", "Where", "Equal", "Greater", "Less",
         "GreaterOrEqual", "LessOrEqual", "Not", "And", "Or", "Cast"),
        _PLAIN,
    ),
    # activations
    **dict.fromkeys(
        ("Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Softplus"),
        _PLAIN,
    ),
    "Clip": Operator(constant={1: "least value", 2: "greatest value"}),
    "PRelu": Operator(constant={1: "slope"}),
    "Gelu": Operator(attrs={"approximate": ("none", "tanh")}),
    "Softmax": _PLAIN,
    "LogSoftmax": _PLAIN,
    "LayerNormalization": Operator(constant={1: "scale", 2: "bias"}),
    # shapes
    "Reshape": Operator(constant={1: "shape"}),
    "Squeeze": Operator(constant={1: "list of axes"}),
    "Unsqueeze": Operator(constant={1: "list of axes"}),
    "Expand": Operator(constant={1: "shape"}),
    "Tile": Operator(constant={1: "list of repeats"}),
    "Slice": Operator(constant={1: "start", 2: "end", 3: "list of axes", 4: "step"}),
    "Pad": Operator(
        constant={1: "list of pads", 2: "value"},
        attrs={"mode": ("constant", "reflect", "edge")},
    ),
    "Split": Operator(constant={1: "list of sizes"}, outputs=1 << 30),
    "Resize": Operator(
        constant={2: "scales", 3: "sizes"},
        attrs={
            "mode": ("nearest", "linear", "cubic"),
            "antialias": (0,),
            "exclude_outside": (0,),
            "keep_aspect_ratio_policy": ("stretch",),
            "coordinate_transformation_mode": (
                "half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric",
            ),
        },
    ),
    **dict.fromkeys(
        ("Concat", "Flatten", "Transpose", "DepthToSpace", "Identity"), _PLAIN
    ),
    "SpaceToDepth": Operator(attrs={"mode": ("DCR",)}),
    "GatherElements": _PLAIN,
}  # fmt: skip
"""Operator -> what a node of it must satisfy."""


_FORMS: Mapping[str, str] = {
    "BatchNormalization": "it is known for inference only, with one output and with a scale, bias, "
    "mean and variance that are constants",
    "Celu": "it is known with an alpha above 0",
    "LpNormalization": "it is known with p 1 or 2",
    "RMSNormalization": "it is known with a negative axis, or a constant scale",
    "LayerNormalization": "it is known with one output",
    "Dropout": "it is known for inference only",
    "Upsample": "it is known up to opset 9; use Resize",
}
"""Operator that is taken apart while a graph is read -> the form it must have for that."""


def faults(graph: Graph) -> list[str]:
    """What stands between a graph and the canonical form, a line for each node."""
    found = []
    for node in graph.nodes:
        operator = OPERATORS.get(node.op)
        if operator is None and node.op in _FORMS:
            found.append(f"{node}: {_FORMS[node.op]}")
        elif operator is None:
            near = ", ".join(difflib.get_close_matches(node.op, OPERATORS, n=3, cutoff=0.5))
            hint = f"; the nearest known: {near}" if near else ""
            found.append(f"{node}: no such operator is known{hint}")
        elif fault := operator.fault(graph, node):
            found.append(f"{node}: {fault}")
    return found


def check_known(graph: Graph) -> None:
    """Refuse a graph that is not canonical.

    Raises:
        UnsupportedError: lists every offending node.
    """
    if found := faults(graph):
        raise UnsupportedError(
            f"the graph {graph.name} has {len(found)} operators that edgeq does not support:\n  "
            + "\n  ".join(found)
            + f"\n(supported operators: {', '.join(sorted(OPERATORS))})"
        )
