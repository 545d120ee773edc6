"""Inputs that each layer has of its own, from a table of which only the tokens' rows are read.

The row of a token in the table holds the values of all layers one after the other. A part of a row
for one layer is a task; parts are independent of each other, so that no result depends on threads
or on which tokens are in a pass. See `edgeq.model.decoder.layer_inputs`.
"""

from __future__ import annotations

import numpy as np

from edgeq.formats.packing import TILE
from edgeq.runtime.kernels.primitives import compiled, floats, gate
from edgeq.runtime.kernels.row_ops import (
    add_rows,
    barrier,
    copy_row,
    embedding_part,
    multiply_row,
    next_task,
    quantize_padded,
    rms_norm,
)

_F32 = 4
_ONE = np.float32(1)


@compiled
def make_inputs(eps, step, table, x, ids, room, thread):
    """The inputs of all layers in place of the projections of the embeddings.

    Args:
        eps: of the norm.
        step: the `abi.STEP`.
        table: its `abi.LINEAR`: the table, of which rows are read.
        x: rows of projections, float32 [layers * width].
        ids: the tokens.
        room: address of float32 [width] that this thread alone uses.
        thread: which one it is.
    """
    width = step.width
    factors = floats(step.factors, 3)
    layers = table.k // width
    while True:
        task = next_task(thread)
        if task >= x.length * layers:
            break
        token, layer = task // layers, task % layers
        part = x.address + token * x.stride + layer * width * _F32
        multiply_row(part, factors[0], width)
        rms_norm(part, step.norm, part, width, eps)
        embedding_part(table, ids[token], layer * width, width, room, factors[1])
        add_rows(part, room, _ONE, width)
        multiply_row(part, factors[2], width)
    barrier(thread)


@compiled
def use_input(step, x, inputs, out, acts, thread):
    """out = activation(x) * the layer's part of the inputs, quantized to ``acts``.

    While one token is decoded, every thread does so in rows of its own.
    """
    if x.length == 1:
        _use_one(step, x.address, inputs.address, out.address, acts.address)
        return
    for t in range(thread.tid, x.length, thread.threads):
        _use_one(
            step,
            x.address + t * x.stride,
            inputs.address + t * inputs.stride,
            out.address + t * out.stride,
            acts.address + t * acts.stride,
        )
    barrier(thread)


@compiled
def _use_one(step, x, inputs, out, acts):
    """`use_input` for one row; whole vectors are multiplied, and what is past the width cleared."""
    width = step.width
    copy_row(x, out, width)
    vectors = (width + TILE - 1) // TILE * TILE
    gate(out, inputs + step.layer * width * _F32, vectors, step.activation)
    quantize_padded(out, width, acts, step.blocks)
