"""Records that compiled code and Python both read: the binary interface of the kernels.

Everything the compiled decoder needs lies in arrays of these NumPy record types, filled in by
`edgeq.runtime.compiled` and read by their fields in compiled code, so that one compiled function
serves every model:

    CALL  ->  PROGRAM  ->  STEP[...]        what is computed, in order
                       ->  LINEAR[...]      weights
                       ->  ROWS[...]        buffers of activations
                       ->  ATTENTION[...]   one of each layer: heads, rotary tables, window
          ->  CACHE[...]                    one of each layer: keys and values, or inputs and
                                            the state of a gated delta net

Fields are int64 (counts, bytes or addresses) unless they have a type. Addresses are valid in this
process only; nothing here is written to a file.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np

from edgeq.formats.schemes import FLOAT_TAGS, K_BLOCK, FloatType, QuantScheme
from edgeq.model.memory_layout import SYNC_BYTES as SYNC_BYTES
from edgeq.runtime.kernels.microkernel import NO_SHIFT


def _record(*fields: str | tuple[str, str]) -> np.dtype[Any]:
    """A C-like record of int64 fields; a field of another type is given as (name, type)."""
    return np.dtype([(f, "i8") if isinstance(f, str) else f for f in fields], align=True)


class Rows(NamedTuple):
    """Rows in memory, as compiled functions pass them: row m is at ``address + m * stride``."""

    address: int
    stride: int
    """Bytes between rows."""
    length: int
    """How many rows."""


class Thread(NamedTuple):
    """One of the threads that run the decoder side by side."""

    tid: int
    """Which one, from 0."""
    threads: int
    """How many there are."""
    sync: int
    """Address of the synchronization area that they share."""


# --- the matmul kernels ------------------------------------------------------------------------


class PackedWeights(NamedTuple):
    """Packed weights in memory, as compiled functions and the matmul kernels take them."""

    codes: int
    """Address of the first tile's codes; a tile is 16 rows (see `edgeq.formats.packing`)."""
    code_step: int
    """Bytes from one tile to the next."""
    scales: int
    """Address of the first tile's float16 scales, or records of two-level scales."""
    scale_step: int
    zeros: int
    """Address of the first tile's zero points or float16 minimums, or of the palette; 0 if the
    weights have none of these."""
    zero_step: int
    blocks: int
    """Blocks of 32 columns in a row."""
    shift: int
    """Blocks that share a scale, as a power of two; `NO_SHIFT` for one scale a row."""


MATMUL_ARGS = (
    *PackedWeights._fields, "acts", "act_stride", "tokens", "out", "out_stride", "first", "last",
)  # fmt: skip
"""What a matmul kernel takes, all int64: weights, rows of quantized activations, rows of float32
results, and the range of tiles to compute."""


class FloatWeights(NamedTuple):
    """Float weights in memory, row after row as they lie in a file."""

    address: int
    stride: int
    """Bytes between rows."""
    n: int
    k: int


FLOAT_ARGS = (
    *FloatWeights._fields, "x", "x_stride", "tokens", "out", "out_stride", "first", "last",
)  # fmt: skip
"""What a matmul kernel of float weights takes, all int64: weights, rows of float32 activations,
rows of float32 results that have room for whole tiles, and the range of tiles to compute."""


class MatmulKernel:
    """A compiled matmul kernel, to be called from Python.

    Args:
        address: from `edgeq.runtime.kernels.jit.kernel_address` or `float_kernel_address`.
    """

    def __init__(self, address: int) -> None:
        self._address = address

    def __call__(
        self, weights: PackedWeights | FloatWeights, x: Rows, out: Rows, first: int, last: int
    ) -> None:
        """Multiply tiles ``first:last`` with every row of ``x``.

        Args:
            weights: of the kind that the kernel was compiled for.
            x: rows of float32 for float weights; quantized for packed ones,
                `edgeq.model.memory_layout.ACT_BLOCK` bytes for 32 values.
            out: as many float32 rows; value n is that of row n of the weights.
            first, last: tiles of 16 rows.
        """
        values = (*weights, *x, out.address, out.stride, first, last)
        ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(values))(self._address)(*values)


# --- the decoder -------------------------------------------------------------------------------

LINEAR = _record(
    "kind",  # a place in `FLOAT_KINDS`, or `quant_kind(scheme)`
    "n", "k", "tiles",
    *PackedWeights._fields,  # of float weights the codes are the floats, and a step is a row's
    "bias",  # address of float32 [n], or 0
    "kernel",  # address of the compiled matmul kernel
)  # fmt: skip
ROWS = _record(
    "address",
    "stride",
    "private",  # whether each thread has a row of its own while one token is decoded
)
CACHE = _record(
    "bits", "length", "dim",
    "span",  # positions that share a center
    "dim_k", "dim_v",  # dimensions of a head, padded for keys and for values
    "keys", "key_scales", "key_zeros", "centers", "values", "value_scales",
    "key_kernel", "value_kernel",
    "inputs",  # address of float32 [length, width]: a layer without attention alone has them
    # of a gated delta net: addresses of its state, a copy from before, and two int64, the positions
    # after which they are; below 0 for no copy
    "state", "saved", "marks",
)  # fmt: skip
ATTENTION = _record(
    "heads", "kv_heads", "dim",
    "rope_half",  # pairs of dimensions that are rotated; 0 for no rotary embedding
    "cos_q", "sin_q", "cos_k", "sin_k",  # float32 [context, rope_half]
    "window",  # positions a token sees, itself included; 0 for all
    "both_ways",  # whether it sees as many after it too, of a pass that holds the whole text
    "norm_q", "norm_k",  # weights of the norms of queries and keys, or 0
    "norm_spans_heads",  # whether one norm spans all heads, rather than each its own
    "norm_last",  # whether each head is normed after it is rotated
    "norm_values",  # whether each head of the values is normed, without a weight
    "borrowed",  # whether keys and values are another layer's, which has appended them already
    "scale",  # address of the float32 factor on the scores
    "softcap",  # address of float32 [scale / cap, cap, 1] if scores are capped, or 0
    "sinks",  # address of float32 [heads], or 0
    "query_block",  # tokens whose queries go through attention together
)  # fmt: skip


DELTA = _record(
    "key_heads", "value_heads", "key_dim", "value_dim",
    "channels",  # of the convolution
    "width",  # floats of a position in `CACHE.inputs`
    "taps", "tap_count",  # address of float32 [tap_count, channels], the oldest tap first
    "rate", "dt_bias",  # addresses of float32 [value_heads + 16]
    "norm",  # address of float32 [value_dim]
    "tiled_out",  # whether the output lists the first value head of every key head before others
)  # fmt: skip


class Step(IntEnum):
    """Kinds of steps."""

    EMBED = 0
    """out = rows of an embedding matrix for the tokens, times `PROGRAM.embed_scale`."""
    NORM = 1
    """x += branch (normed by ``post_norm`` first, if there is one) times ``scale``, and x is
    multiplied by ``stream_scale``, if there is one; out = norm of x; acts = out quantized. Without
    ``norm``, acts = x quantized."""
    QUANTIZE = 2
    """acts = x quantized, with zeros past its ``width`` values."""
    LINEARS = 3
    """out, the rows after it, ... = ``linears`` matrices times x: one range of tiles is shared."""
    GATED = 4
    """out = activation(gate of x) * up of x, for two matrices with as many rows."""
    ATTENTION = 5
    """The queries, keys and values in the rows of ``x`` and the two after it: normed, rotated,
    appended to the cache; out = attention."""
    HEAD = 6
    """logits = a matrix times the last tokens' x, times ``scale`` or capped by ``softcap``."""
    SHORT_CONV = 7
    """x, the rows after it and those after them are b, c and x of a short convolution: b * x is
    appended to the layer's cache; out = c * convolution of b * x."""
    DELTA_NET = 8
    """x and the rows after it are qkv, z, beta and decay of a gated delta net; out = its output."""
    OUTPUT_GATE = 9
    """x *= sigmoid of branch."""
    EXPERTS = 10
    """out = the sum of weight * down of (activation(gate) * up) over the experts of each token of
    x, by the router's logits in the rows that ``experts`` names."""
    LAYER_INPUTS = 11
    """x, a projection of the embeddings, becomes the inputs that all layers have of their own:
    times the first of ``factors`` and normed, plus the tokens' rows of a table times the second,
    times the third."""
    OWN_INPUT = 12
    """out = activation(x) * the layer's part of branch; acts = out quantized."""
    STATES = 13
    """out = the rows at `CALL.states`."""
    SUM = 14
    """out = x + branch."""


STEP = _record(
    "kind",
    "x", "out", "acts", "branch",  # places in the program's rows; branch is -1 for none
    "norm", "post_norm",  # addresses of float32 weights, or 0
    "width",  # values of a row of x that are normed or quantized; of a layer's own input
    "blocks",  # blocks of 32 of a row that are quantized
    "linear", "linears",  # the first in the program's linears, and how many
    "activation",  # a place in `ACTIVATIONS`
    "layer",  # place in the program's attentions and caches
    "softcap",  # of HEAD: address of float32 [scale / cap, cap] if logits are capped, or 0
    ("scale", "f4"),  # of NORM: the factor on branch; of HEAD: that on logits that are not capped
    "taps", "tap_count",  # address of float32 [tap_count, width], the oldest position's tap first
    "delta",  # address of the `DELTA` of DELTA_NET
    "experts",  # address of an `EXPERTS`, or 0
    "stream_scale",  # of NORM: address of the float32 factor on x, or 0
    "factors",  # of LAYER_INPUTS: address of three float32
)  # fmt: skip
EXPERTS = _record(
    "count", "chosen",  # how many experts there are, and how many a token goes through
    "sigmoid", "normalize",  # see `edgeq.model.block.ExpertsSpec`
    "bias",  # address of float32 [count], added to scores to choose; or 0
    "rows",  # place in the program's rows of the router's; those of the experts follow
    "plan", "room",  # address of the plan, and how many rows of tokens and experts it has room for
    "width", "words",  # floats of a token's row, and int64 of its quantized one
    "floats", "quantized",  # whether gate and up of some expert are floats, and of some quantized
    "blocks",  # blocks of 32 between an expert's matrices that are quantized; 0 if down is floats
    ("scale", "f4"),
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu")


class AttentionWork(NamedTuple):
    """Addresses of a thread's own memory in attention.

    `edgeq.model.memory_layout.attention_work` lays them out and says what each is for.
    """

    queries: int
    codes: int
    key: int
    scores: int
    probabilities: int
    parts: int
    totals: int
    spans: int


PROGRAM = _record(
    "steps", "step_count", "linears", "linear_count", "rows", "row_count",
    "attentions", "layer_count",
    "sync",
    "times",  # sums of the steps' times, then that of choosing greedy tokens; 0 if not wanted
    "parts", "part_stride", "chunks",  # partial results of attention, by sequence, head and chunk
    "work", "work_stride",  # memory of each thread
    *(f"work_{name}" for name in AttentionWork._fields),  # bytes from the begin of that
    "work_delta",  # the same of what a gated delta net needs
    # whether final norms are kept in the `CACHE.inputs` of a record after those of the layers, the
    # place of their rows, and the floats of a row
    "keeps_states", "normed", "hidden",
    "ones",  # 16 float16 ones
    ("eps", "f4"), ("embed_scale", "f4"),
)  # fmt: skip
CALL = _record(
    "program", "threads", "tokens", "position", "ids",
    "outputs",  # logits are wanted of so many of the last tokens
    "logits", "logits_stride",
    "greedy", "chosen",  # number of greedy tokens to compute after ids[0], and where they go
    "caches",  # of the sequence, one of each layer
    "tables", "positions",  # of a batch: the caches and the position of the sequence of each token
    "states", "states_stride",  # rows that a multi-token-prediction head reads beside its tokens
)  # fmt: skip

TIMES_LAST, TIMES_CLOCK, TIMES_SUMS = 0, 1, 3
"""Places of the times: when the last step ended, room for the clock, and where the sums begin."""
SYNC_ARRIVED, SYNC_GENERATION, SYNC_WORK = 0, 128, 256
"""Byte offsets in the synchronization area of `SYNC_BYTES`, a cache line pair apart."""
FLOAT_KINDS: dict[FloatType, int] = {kind: code for code, kind in enumerate(FLOAT_TAGS)}
"""Kinds of `LINEAR` with float weights."""
FIRST_QUANT = 16
"""Kinds of `LINEAR` below this are float types."""
KIND_HALF, KIND_ASYMMETRIC, KIND_PALETTE, KIND_MINIMUM, KIND_TWO_LEVEL, KIND_NIBBLES = (
    1 << i for i in range(6)
)
"""Flags of a kind above it: groups of 16, zero points, codes that are places in a table, minimums,
two-level scales, and those with two numbers in a byte."""


def quant_kind(scheme: QuantScheme) -> int:
    """The kind code of a quantized linear."""
    return FIRST_QUANT + sum(
        flag
        for flag, holds in (
            (KIND_HALF, scheme.group_size == 16),
            (KIND_ASYMMETRIC, scheme.has_zero_points),
            (KIND_PALETTE, scheme.codebook is not None),
            (KIND_MINIMUM, scheme.minimum),
            (KIND_TWO_LEVEL, scheme.two_level),
            (KIND_NIBBLES, scheme.packs_nibbles),
        )
        if holds
    )


def group_shift(scheme: QuantScheme) -> int:
    """Blocks per group as a power of two; `NO_SHIFT` where a row has one scale."""
    if not scheme.group_size:
        return NO_SHIFT
    return max(0, (scheme.group_size // K_BLOCK).bit_length() - 1)


# --- the thread pool ---------------------------------------------------------------------------

CACHE_LINES = 128
"""Bytes that two threads should not both write to: a pair of cache lines."""
JOB = np.dtype(
    {
        "names": ["function", "args", "left", "failed"],
        "formats": ["i8"] * 4,
        "offsets": [0, 8, 16, 24],
        "itemsize": CACHE_LINES,
    }
)
"""A job: the compiled function, the address of its arguments, workers still at it, and whether any
failed. A `WORKER` for each thread follows."""
WORKER = np.dtype(
    {
        "names": ["posted", "awake", "clock", "result", "mutex", "condition"],
        "formats": ["i8", "i8", ("i8", 2), ("i8", 4), ("i8", 8), ("i8", 16)],
        "offsets": [0, 8, 16, 32, 64, 128],
        "itemsize": 256,
    }
)
"""A worker: jobs posted to it, whether it is awake, room for the clock and for what a compiled
function returns, and the mutex and condition it sleeps at."""


def offset(record: np.dtype[Any], field: str) -> int:
    """Byte offset of a field."""
    assert record.fields is not None
    return int(record.fields[field][1])
