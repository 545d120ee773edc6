"""Warnings about calibration samples that are unlike the model's real inputs.

A quantized model is compared with the float model on the samples that it was calibrated on. If the
samples are not like real inputs, the two models may agree on them and differ on all other inputs.
Such samples are identical, hold a single number, or are images with pixels of 0 to 255 for a model
that was trained on pixels of 0 to 1.
"""

from __future__ import annotations

import hashlib

import numpy as np

from edgeq.core.errors import UsageError
from edgeq.graph.feeds import Feeds, OpenSession
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import channel_axis
from edgeq.quant.graph.hessians import ROW_PRODUCTS
from edgeq.quant.graph.samples import Samples

LOOKED_AT = 64
"""Most samples that are examined."""
SCALED = 40.0
"""Ratio between the products and the biases of a first layer (or its inverse) above which the
samples seem to have another scale than those of training. With a fused batch norm the two are of
similar size."""
_PIXELS = 60.0
"""Inputs above this look like pixels from 0 to 255."""
_UNIT = 1.5
"""Inputs up to this look like pixels from 0 to 1 or from -1 to 1."""
_CHANCE = 1.5
"""A top-1 accuracy of at most this many times that of guessing counts as guessing."""
_LEAST_LABELED = 32
_INDIFFERENT = 0.8
"""If at least this fraction of the samples keeps its class on another scale, the scale does not
matter."""
_MOVES = frozenset({"Transpose", "Reshape", "Pad", "Identity", "Squeeze", "Unsqueeze"})


def sample_warnings(graph: Graph, samples: Samples, session_of: OpenSession) -> tuple[str, ...]:
    """Warnings about doubtful samples, one sentence each.

    Args:
        graph: the float graph.
        samples: inputs of the graph.
        session_of: opens a session that runs a graph.
    """
    rows = list(samples.first(LOOKED_AT))
    warnings = [*_alike(rows, samples.source), *_flat(graph, rows, samples.source)]
    if not warnings:
        warnings += _scale(graph, rows, samples.source, session_of)
    return (*warnings, *_labels(graph, rows, samples, session_of))


def _alike(rows: list[Feeds], source: str) -> list[str]:
    digests = {
        hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in row.values())).digest()
        for row in rows
    }
    if len(rows) < 2 or 2 * len(digests) > len(rows):
        return []
    if len(digests) == 1:
        what = f"all {len(rows)} samples of {source} are identical"
    else:
        what = f"only {len(digests)} of {len(rows)} samples of {source} are different"
    return [
        f"{what}, so the ranges fit only them and the figures below say nothing about other "
        "inputs; calibrate on real inputs that differ"
    ]


def _flat(graph: Graph, rows: list[Feeds], source: str) -> list[str]:
    warnings = []
    for name in graph.inputs:
        if graph.info(name).dtype != "float32" or np.prod(graph.info(name).shape) < 2:
            continue
        if all(float(row[name].min()) == float(row[name].max()) for row in rows):
            warnings.append(
                f"every sample of {source} holds a single number for the input {name!r} "
                f"({rows[0][name].flat[0]:g} in the first sample); calibrate on real inputs"
            )
    return warnings


def _scale(graph: Graph, rows: list[Feeds], source: str, session_of: OpenSession) -> list[str]:
    warnings = []
    for name in graph.inputs:
        first = _first_layer(graph, name)
        if first is None:
            continue
        bias = np.abs(graph.array(first.inputs[2]))
        run = session_of(graph, [first.output])
        outputs = np.stack([run(row)[first.output] for row in rows[:8]])
        axis = 1 + channel_axis(graph, first)  # the axis of samples is first
        spread = np.moveaxis(outputs, axis, 0).reshape(len(bias), -1).std(axis=1)
        live = (bias > 0) & (spread > 0)
        if not live.any():
            continue
        ratio = float(np.median(spread[live] / bias[live]))
        most = max(float(np.abs(row[name]).max()) for row in rows)
        reach = f"the samples of {source} reach {most:.4g} for the input {name!r}"
        large, small = ratio > SCALED and most > _PIXELS, ratio < 1 / SCALED and most <= _UNIT
        if (large or small) and _indifferent(
            graph, list(rows[:16]), name, 1 / 255 if large else 255, session_of
        ):
            continue
        if large:
            warnings.append(
                f"{reach}, and the products of the first layer ({first.name}) are {ratio:.0f} "
                "times its biases: the model seems to be trained on smaller numbers, such as "
                "pixels from 0 to 1; scale the samples as in training (--scale 1/255 for images)"
            )
        elif small:
            warnings.append(
                f"{reach}, and the biases of the first layer ({first.name}) are {1 / ratio:.0f} "
                "times its products: the model seems to be trained on larger numbers, such as "
                "pixels from 0 to 255; scale the samples as in training (--scale 1 for images)"
            )
    return warnings


def _indifferent(
    graph: Graph, rows: list[Feeds], name: str, factor: float, session_of: OpenSession
) -> bool:
    """Whether a model gives most samples the same class when an input is scaled."""
    output = graph.outputs[0]
    if len(graph.info(output).shape) != 2 or graph.info(output).dtype != "float32":
        return False
    run = session_of(graph, ())
    scaled = [{**row, name: row[name] * np.float32(factor)} for row in rows]
    same = [
        run(row)[output].argmax() == run(other)[output].argmax()
        for row, other in zip(rows, scaled, strict=True)
    ]
    return float(np.mean(same)) >= _INDIFFERENT


def _first_layer(graph: Graph, name: str) -> Node | None:
    """The Conv or Linear with a bias that is the only consumer of an input; None without one."""
    if graph.info(name).dtype != "float32":
        return None
    while (node := graph.only_consumer(name)) is not None:
        if node.op in ROW_PRODUCTS:
            constant = len(node.inputs) > 2 and node.inputs[2] in graph.constants
            return node if constant and node.inputs[0] == name else None
        if node.op not in _MOVES or node.inputs[0] != name:
            return None
        name = node.output
    return None


def _labels(
    graph: Graph,
    rows: list[Feeds],
    samples: Samples,
    session_of: OpenSession,
) -> list[str]:
    shape = graph.info(graph.outputs[0]).shape
    if len(shape) != 2 or shape[0] != 1 or shape[1] < 2 or len(rows) < _LEAST_LABELED:
        return []
    try:
        labels = [label for _, label in samples.first(LOOKED_AT).pairs()]
    except UsageError:
        return []
    if len(set(labels)) < 2:
        return []
    run = session_of(graph, ())
    right = [
        int(run(row)[graph.outputs[0]].argmax()) == label
        for row, label in zip(rows, labels, strict=True)
    ]
    top1, chance = float(np.mean(right)), 1 / shape[1]
    if top1 > _CHANCE * chance or top1 > 0.5:
        return []
    return [
        f"the float model predicts {top1:.0%} of the labels of {samples.source}, and guessing "
        f"predicts {chance:.0%}: either the samples are not preprocessed as in training (scale, "
        "mean, order of channels), or the labels number the classes differently"
    ]
