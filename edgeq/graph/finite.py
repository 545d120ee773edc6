"""Weights that are no numbers are named before work begins."""

from __future__ import annotations

import numpy as np

from edgeq.core.errors import FormatError
from edgeq.graph.ir import Graph, QuantWeight
from edgeq.graph.operators import WEIGHTED, weight_of


def check_finite_weights(graph: Graph) -> None:
    """Refuse a weight, or the bias of a layer, that holds NaN.

    Infinities pass: an additive mask may have become the bias of a layer, or a table that is
    looked up.

    Args:
        graph: in canonical form.

    Raises:
        FormatError: one holds NaN; the text names it, and its layer.
    """
    for node in graph.nodes:
        if node.op not in WEIGHTED:
            continue
        for name in node.inputs[weight_of(node).input :]:
            constant = graph.constants.get(name)
            values = constant.scales if isinstance(constant, QuantWeight) else constant
            if values is None or values.dtype.kind != "f":
                continue
            count = int(np.isnan(values).sum())
            if count:
                what = "scales" if isinstance(constant, QuantWeight) else "values"
                raise FormatError(
                    f"{node}: {count} of the {values.size} {what} of its constant {name!r} "
                    "are NaN, which makes its results NaN for every input; the file is damaged, or "
                    "the training diverged: export the model again"
                )
