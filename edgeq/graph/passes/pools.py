"""Replace average pools of whole images by GlobalAveragePool.

A quantized GlobalAveragePool gives its output a scale of its own. AveragePool has the scale of its
input, with which one mean in as many as the image has places would fall halfway between two
integers, and runtimes round such ties to different sides.
"""

from __future__ import annotations

from edgeq.graph.ir import Graph, Node
from edgeq.graph.rewrite import Change, rewrite


def pools(graph: Graph) -> Graph:
    """Replace every AveragePool whose window is the whole image by GlobalAveragePool."""
    return rewrite(graph, _whole)


def _whole(graph: Graph, node: Node) -> Change | None:
    if node.op != "AveragePool" or any(node.attrs["pads"]):
        return None
    if tuple(node.attrs["kernel_shape"]) != graph.info(node.inputs[0]).shape[2:]:
        return None
    return Change(nodes=(Node("GlobalAveragePool", node.name, node.inputs, node.outputs),))
