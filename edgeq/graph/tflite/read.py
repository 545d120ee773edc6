"""Read a float .tflite file as a graph, channels first.

edgeq.graph.tflite.schema   the file: tensors and operators, checked
edgeq.graph.tflite.layout   which value is held channels first, and the graph in the making
edgeq.graph.tflite.image    convolutions, pools, resizes
edgeq.graph.tflite.ops      all other operators, and the list of those that are read
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.graph.ir import Graph, Node, Shape
from edgeq.graph.operators import check_known
from edgeq.graph.passes import PASSES
from edgeq.graph.tflite.image import IMAGE
from edgeq.graph.tflite.layout import Layouts
from edgeq.graph.tflite.ops import OPERATORS, PASSED_ON
from edgeq.graph.tflite.schema import TfliteModel, parse


def read_tflite(
    path: str | Path,
    *,
    dequantize: bool = False,
    shapes: Mapping[str, Shape] | None = None,
    batch: int | None = None,
) -> Graph:
    """Read a model of one graph with float activations.

    Inputs and outputs that are images become [N, C, H, W]; ``meta["edgeq.channels_last"]`` lists
    those that the file has channels last. Names are the signature's, if there is one.

    Args:
        path: the file.
        dequantize: take weights that the file holds as integers back to float; else such a file
            is refused, as quantizing twice loses more than once.
        shapes: input -> its whole shape in the file's own axes, for inputs with open axes.
        batch: what an open first axis becomes; as the file has it if None.

    Raises:
        FormatError: it is damaged or no .tflite file.
        UnsupportedError: it is quantized, holds several graphs, or an operator that is not read.
        UsageError: an open axis that is not given, or a shape that contradicts the file.
        MissingDependencyError: LiteRT is not installed.
    """
    model = _folded(parse(path, dequantize=dequantize, shapes=shapes, batch=batch))
    _check(model)
    layouts = Layouts(model, _images(model))
    for op in model.operators:
        try:
            OPERATORS[op.op](layouts, op)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
            raise FormatError(
                f"{model.path} is damaged: {op.op}, operator {op.index}, is invalid: {err}"
            ) from err
    first = [layouts.base(i) for i in (*model.inputs, *model.outputs) if layouts.is_first(i)]
    meta = {"edgeq.source": "tflite", "edgeq.channels_last": json.dumps(first)}
    for i in model.outputs:
        layouts.give_constant(i)
    back = sum(tensor.dequantized for tensor in model.tensors)
    if back:
        meta["edgeq.dequantized"] = f"{back} weights were integers in the file"
    outputs = tuple(layouts.base(i) for i in model.outputs)
    nodes = _needed(layouts.nodes, outputs)
    used = {name for node in nodes for name in node.inputs}
    inputs = tuple(layouts.base(i) for i in model.inputs)
    live = {*inputs, *(name for node in nodes for name in node.outputs)}
    graph = Graph(
        name=model.path.stem,
        inputs=inputs,
        outputs=outputs,
        nodes=nodes,
        constants={name: data for name, data in layouts.constants.items() if name in used},
        values={name: info for name, info in layouts.values.items() if name in live},
        meta=meta,
    )
    for step in PASSES:
        graph = step(graph)
    check_known(graph)
    return graph


def _folded(model: TfliteModel) -> TfliteModel:
    """Make constants of shapes, and of weights that are stored in fewer bits."""
    tensors, left = list(model.tensors), []
    for op in model.operators:
        data = None
        if op.op == "SHAPE":
            data = np.array(tensors[op.inputs[0]].shape)
        elif op.op == "DEQUANTIZE":
            data = tensors[op.inputs[0]].data
        if data is None:
            left.append(op)
        else:
            out = tensors[op.outputs[0]]
            tensors[op.outputs[0]] = replace(out, data=data.astype(out.dtype))
    return replace(model, tensors=tuple(tensors), operators=tuple(left))


def _check(model: TfliteModel) -> None:
    wrong = []
    for op in model.operators:
        if op.op not in OPERATORS:
            near = difflib.get_close_matches(op.op, OPERATORS, n=1, cutoff=0.6)
            name = model.tensors[op.outputs[0]].name if op.outputs else ""
            hint = f" (the nearest that is read: {near[0]})" if near else ""
            wrong.append(f"{op.op} {name!r}, operator {op.index}{hint}")
    if wrong:
        raise UnsupportedError(
            f"{model.path} has operators that edgeq does not read: {'; '.join(wrong)}; "
            f"it reads {', '.join(sorted(OPERATORS))}"
        )


def _images(model: TfliteModel) -> frozenset[int]:
    """Inputs that reach an operator on images through others that keep the axes."""
    images = set()
    for start in model.inputs:
        reached = {start}
        if len(model.tensors[start].shape) != 4:
            continue
        for op in model.operators:
            if not reached.intersection(op.inputs):
                continue
            if op.op in IMAGE:
                images.add(start)
            elif op.op in PASSED_ON:
                reached.update(i for i in op.outputs if len(model.tensors[i].shape) == 4)
    return frozenset(images)


def _needed(nodes: Iterable[Node], outputs: Iterable[str]) -> tuple[Node, ...]:
    wanted, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return tuple(reversed(kept))
