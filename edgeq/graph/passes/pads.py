"""Make a Pad of zeros before a convolution the convolution's pads."""

from __future__ import annotations

from dataclasses import replace

from edgeq.graph.ir import Graph, Node
from edgeq.graph.rewrite import Change, ints, rewrite, scalar


def pads(graph: Graph) -> Graph:
    """Move zero padding into the Conv that follows."""
    return rewrite(graph, _joined)


def _joined(graph: Graph, node: Node) -> Change | None:
    pad = graph.producers.get(node.inputs[0]) if node.op == "Conv" else None
    if pad is None or pad.op != "Pad" or pad.attrs["mode"] != "constant":
        return None
    if scalar(graph, pad.inputs[2]) != 0:
        return None
    rank = len(graph.info(pad.inputs[0]).shape)
    laid = ints(graph, pad.inputs[1]) or ()
    if min(laid) < 0 or any(laid[:2]) or any(laid[rank : rank + 2]):
        return None
    own = zip(node.attrs["pads"], (*laid[2:rank], *laid[rank + 2 :]), strict=True)
    attrs = {**node.attrs, "pads": tuple(a + b for a, b in own)}
    return Change(nodes=(replace(node, inputs=(pad.inputs[0], *node.inputs[1:]), attrs=attrs),))
