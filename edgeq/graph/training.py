"""Refusing operators in training mode."""

from __future__ import annotations

from edgeq.core.errors import UnsupportedError
from edgeq.graph.ir import Graph, Node

_EXPORT = "export the model for inference (in PyTorch: model.eval() and training=EVAL)"


def refuse_training(graph: Graph, opset: int) -> None:
    """Refuse a graph that normalizes with batch statistics or drops values at random.

    Args:
        graph: as it was read, with the unused outputs of its nodes still named.
        opset: what its operators mean.

    Raises:
        UnsupportedError: names the first such node.
    """
    for node in graph.nodes:
        if node.op == "BatchNormalization" and _batch_statistics(node, opset):
            raise UnsupportedError(
                f"{node} normalizes by the mean and variance of the batch it is given, as in "
                f"training; {_EXPORT}"
            )
        if node.op == "Dropout" and opset < 12 and _mask_taken(graph, node):
            raise UnsupportedError(
                f"{node} is of opset {opset}, and its mask is used, which runtimes fill in "
                f"different ways; {_EXPORT} and opset 12 or newer"
            )
        if node.op == "Dropout" and _drops(graph, node, opset):
            raise UnsupportedError(
                f"{node} sets values to zero at random, as in training; {_EXPORT}"
            )


def _batch_statistics(node: Node, opset: int) -> bool:
    if opset >= 14:
        return bool(node.attrs.get("training_mode", 0))
    if opset < 7:
        return "is_test" in node.attrs and not node.attrs["is_test"]
    return False  # the further outputs of those days are used by nobody, or refused


def _mask_taken(graph: Graph, node: Node) -> bool:
    return any(out in graph.consumers or out in graph.outputs for out in node.outputs[1:] if out)


def _drops(graph: Graph, node: Node, opset: int) -> bool:
    if opset < 7:
        return "is_test" in node.attrs and not node.attrs["is_test"]
    training = node.inputs[2] if len(node.inputs) > 2 else ""
    if not training:
        return False
    constant = graph.constants.get(training)
    return constant is None or bool(graph.array(training).any())
