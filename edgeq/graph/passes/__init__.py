"""The passes that bring a graph as exporters write it to the canonical form.

Each pass takes a graph of which every shape is known and gives one that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeq.graph.ir import Graph
from edgeq.graph.passes.activations import activations, gelu, hard_swish
from edgeq.graph.passes.affine import affine, batch_norms
from edgeq.graph.passes.clean import clean, duplicates
from edgeq.graph.passes.explicit import explicit
from edgeq.graph.passes.fold import fold, sums
from edgeq.graph.passes.linear import biases, linear
from edgeq.graph.passes.masks import masks
from edgeq.graph.passes.norm import layer_norms
from edgeq.graph.passes.pads import pads
from edgeq.graph.passes.pools import pools
from edgeq.graph.passes.simplify import simplify
from edgeq.graph.rewrite import prune

PASSES: tuple[Callable[[Graph], Graph], ...] = (
    simplify,  # rare operators in terms of common ones
    explicit,  # pads, axes, shapes and defaults spelled out
    pools,  # of whole pictures
    clean,  # what does nothing is gone
    duplicates,  # what is computed twice is computed once
    gelu,  # spelled-out forms recognized
    layer_norms,
    hard_swish,
    activations,
    duplicates,
    linear,  # Gemm and MatMul with a constant
    biases,  # Add behind a Linear
    pads,  # of zeros, in the Conv behind them
    batch_norms,  # folded, or Mul and Add
    affine,  # Mul and Add by channel behind Conv and Linear folded
    masks,  # -inf in attention masks made finite
    fold,  # what the passes left to compute from constants
    sums,  # constants added one after the other joined
    clean,
    prune,
)
"""Passes for the graph of an exporter, in order."""

QDQ_PASSES: tuple[Callable[[Graph], Graph], ...] = (explicit, linear, biases, prune)
"""Passes for a QDQ file of edgeq, whose graph is canonical already, in order."""

__all__ = ["PASSES", "QDQ_PASSES"]
