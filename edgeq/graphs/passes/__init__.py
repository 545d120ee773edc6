"""From what an exporter wrote to the canonical graph, step by step.

Each pass takes a graph of which every shape is known and gives one that computes the same.
"""

from __future__ import annotations

from collections.abc import Callable

from edgeq.graphs.ir import Graph
from edgeq.graphs.passes.activations import activations, gelu, hard_swish
from edgeq.graphs.passes.affine import affine, batch_norms
from edgeq.graphs.passes.clean import clean, duplicates
from edgeq.graphs.passes.explicit import explicit
from edgeq.graphs.passes.fold import fold, sums
from edgeq.graphs.passes.linear import biases, linear
from edgeq.graphs.passes.masks import masks
from edgeq.graphs.passes.norm import layer_norms
from edgeq.graphs.passes.pads import pads
from edgeq.graphs.passes.pools import pools
from edgeq.graphs.passes.simplify import simplify
from edgeq.graphs.rewrite import prune

PASSES: tuple[Callable[[Graph], Graph], ...] = (
    simplify,  # rare operators in terms of common ones
    explicit,  # pads, axes, shapes and defaults spelled out
    pools,  # of whole pictures
    clean,  # what does nothing is gone
    duplicates,  # what is computed twice is computed once
    gelu,  # spelled-out forms recognised
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
"""In order, for what an exporter wrote."""

RECORD_PASSES: tuple[Callable[[Graph], Graph], ...] = (explicit, linear, biases, prune)
"""In order, for what we wrote from a canonical graph: nothing else is touched."""

__all__ = ["PASSES", "RECORD_PASSES"]
