"""The memory that a running model takes in addition to its weights: the cache and every buffer.

The engine allocates these sizes, and a planner that has only a model's hyperparameters computes
with them, so that each size is defined once.

    cache     per layer, for `cache_length` positions; a windowed layer keeps only what its window,
              a batch and a guess that is taken back need, and a short convolution its inputs at
              the positions it sees and those of such a guess; so does a gated delta net, beside
              two copies of its state, one of them before such a guess
    scratch   float32 rows of a batch and of each thread (`Buffers`), rotary tables, norms, logits

All numbers of the cache are padded as the kernels want them: heads to 32 dimensions (values in
rows of 16), positions to whole chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeq.formats.packing import LANE, TILE, round_up
from edgeq.model.block import BlockSpec
from edgeq.model.config import ModelConfig

CHUNK = 256
"""Positions per chunk; a cache's length is a multiple of it.

A cache shorter than the context is a ring: position p lies at p modulo its length."""
BATCH = 128
"""Tokens per prefill pass: enough to reuse unpacked weights, few enough to keep buffers small."""
MAX_DRAFT = 64
"""Most tokens guessed at once."""
STATE_COPIES = 2
"""Copies of the state of a gated delta net: the current one, and one from before."""
DRAFT_CONTEXT = 1024
"""Context of a draft model, in tokens. When it is full, the model restarts on the last tokens."""
KEPT_STATES = 320
"""Positions whose states a multi-token-prediction head can read: those that a draft begins with,
and those of a guess that is taken back."""
MAX_SEQUENCES = 64
"""Most sequences that are decoded together, each with a cache of its own."""
PART_HEAD = 16
"""Floats before the output in a partial result: max, sum, then padding to a cache line."""
ACT_BLOCK = 48
"""Bytes per block of a quantized activation row."""
SYNC_BYTES = 384
"""Of the area where threads wait for each other."""
WIDTH = 256
"""Float rows are padded to this, the largest group: padding quantizes to zero."""
_FLOAT = 4


def pass_tokens(config: ModelConfig, context: int) -> int:
    """Most tokens of a prompt in one pass: a batch, or the context where a token sees all of it."""
    return min(BATCH, context) if config.causal else context


def center_span(kv_bits: int) -> int:
    """Positions of the cache that share a center, so that they are stored and dropped together.

    A center costs 16 bits a number: one key of 16 with 8 bits, and one of 64 with 4. A cache of
    float16 has no centers, and is handled in tiles all the same.
    """
    return 4 * TILE if kv_bits == 4 else TILE


def cache_length(block: BlockSpec, context: int, kv_bits: int = 8) -> int:
    """Positions a layer's cache holds: all, or its window and what may be added or rolled back.

    While a batch is read its first token still needs its whole window, as does the next token
    when a guess has been taken back; and positions that share a center are lost as a whole. The
    inputs of a short convolution are stored when its batch has been read.
    """
    if block.mixer != "attention":
        assert block.window is not None  # checked by the block
        return min(context, block.window + MAX_DRAFT)
    length = round_up(context, CHUNK)
    if block.window is None or not block.causal:
        return length
    beside = max(min(BATCH, context), MAX_DRAFT) + center_span(kv_bits)
    return min(length, round_up(block.window + beside, CHUNK))


def cache_arrays(
    config: ModelConfig, layer: int, length: int, kv_bits: int
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Name -> (NumPy type, shape) of the arrays of one layer's cache, as the kernels read them.

    A layer that reads the keys and values of another has none.
    """
    if config.blocks[layer].kv_from is not None:
        return {}
    heads, tiles = config.kv_heads, length // TILE
    head_dim = config.head_dim_of(layer)
    dim_k, dim_v = round_up(head_dim, 32), round_up(head_dim, TILE)
    if kv_bits == 16:
        return {
            "keys": (np.float16, (heads, tiles, TILE, dim_k)),
            "values": (np.float16, (heads, dim_v, tiles, TILE)),
        }
    rows, codes = (heads, tiles, TILE), 8 // kv_bits  # so many in a byte
    return {
        "keys": (np.uint8, (heads, tiles, dim_k // LANE // codes, TILE, LANE)),
        "key_scales": (np.float16, rows),
        "key_zeros": (np.uint8, rows),
        "centers": (np.float16, (heads, length // CHUNK, dim_k, CHUNK // center_span(kv_bits))),
        "values": (np.uint8, (heads, dim_v // TILE, tiles, TILE // LANE // codes, TILE, LANE)),
        "value_scales": (np.float32, rows),
    }


def kv_bytes(config: ModelConfig, context: int, kv_bits: int = 8) -> int:
    """Bytes of the whole cache as the engine allocates it.

    Args:
        config: of the model.
        context: positions.
        kv_bits: 4, 8 or 16.
    """
    return sum(
        cache_length(block, context, kv_bits) * layer_position_bytes(config, layer, kv_bits)
        + STATE_COPIES * state_bytes(config, layer)
        for layer, block in enumerate(config.blocks)
    ) + kept_states_bytes(config)


def kept_states_bytes(config: ModelConfig) -> int:
    """Bytes of the states that are kept for a multi-token-prediction head; 0 without one."""
    return 0 if config.mtp is None else KEPT_STATES * config.hidden * _FLOAT


def input_width(config: ModelConfig, layer: int) -> int:
    """Floats that a layer without attention keeps of a position: the inputs of its convolution.

    Those of a gated delta net are qkv, beta and decay.
    """
    delta = config.blocks[layer].delta
    return config.hidden if delta is None else delta.channels + 2 * delta.value_heads


def state_shape(config: ModelConfig, layer: int) -> tuple[int, int, int]:
    """Shape of the state of a layer that is a gated delta net: value heads, key_dim, value_dim."""
    delta = config.blocks[layer].delta
    assert delta is not None
    return delta.value_heads, delta.key_dim, delta.value_dim


def state_bytes(config: ModelConfig, layer: int) -> int:
    """Bytes of one copy of the state of a layer, rows padded to `TILE`; 0 for other mixers."""
    if config.blocks[layer].delta is None:
        return 0
    heads, keys, values = state_shape(config, layer)
    return heads * keys * round_up(values, TILE) * _FLOAT


def layer_position_bytes(config: ModelConfig, layer: int, kv_bits: int = 8) -> int:
    """Bytes that one position takes in the cache of a layer, whichever its mixer is.

    Of a short convolution or gated delta net: its inputs in float32.
    """
    if config.blocks[layer].mixer != "attention":
        return input_width(config, layer) * _FLOAT
    return position_bytes(config, kv_bits, layer)


def position_bytes(config: ModelConfig, kv_bits: int = 8, layer: int = 0) -> int:
    """Bytes that one position takes in the cache of a layer with attention.

    With 4 or 8 bits: codes of key and value; for each head the key's float16 scale and zero point
    and the value's float32 scale; and for every 64 or 16 positions one key in float16. A layer that
    reads the keys and values of another takes none.
    """
    arrays = cache_arrays(config, layer, CHUNK, kv_bits).values()
    whole = sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in arrays)
    return int(whole // CHUNK)  # exact: every array is a whole number of bytes for each position


def query_block(config: ModelConfig) -> int:
    """Tokens of a prompt whose queries go through attention together."""
    return max(1, min(16, 32 // config.group))


def part_bytes(head_dim: int) -> int:
    """Bytes of a partial result of attention: `PART_HEAD` floats, then the output's."""
    return (PART_HEAD + max(round_up(head_dim, 32), TILE)) * _FLOAT


def attention_work(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name -> (offset, bytes) of what attention needs of each thread's own memory.

    For the queries of `query_block` tokens that share a key/value head, called rows here:

        queries        float32 [rows + 1, D]; the last is room for what a rounding left
        codes          quantized [2 rows, D]: the queries, then the remainder of their rounding
        key            float32 [D]: one key, normed and rotated
        scores         float32 [2 rows + 1, CHUNK]
        probabilities  quantized [rows, CHUNK], or one partial result
        parts, totals  partial results [rows]: of a chunk, and of all chunks so far
        spans          int64 [2, rows]: the first position each row sees, and the end

    and for a gated delta net, padded to whole vectors:

        delta          float32: q, k, v and what is read of one head; strengths and decays
    """
    rows = query_block(config) * config.group
    dim, part = round_up(config.widest_head, 32), part_bytes(config.widest_head)
    sizes = {
        "queries": (rows + 1) * dim * _FLOAT,
        "codes": 2 * rows * (dim // 32) * ACT_BLOCK,
        "key": dim * _FLOAT,
        "scores": (2 * rows + 1) * CHUNK * _FLOAT,
        "probabilities": max(rows * (CHUNK // 32) * ACT_BLOCK, part),
        "parts": rows * part,
        "totals": rows * part,
        "spans": 2 * rows * 8,
    }
    deltas = {block.delta for block in config.blocks if block.delta}
    if deltas:
        sizes["delta"] = _FLOAT * max(
            2 * (round_up(d.key_dim, TILE) + round_up(d.value_dim, TILE) + round_up(d.group, TILE))
            for d in deltas
        )
    layout, offset = {}, 0
    for name, size in sizes.items():
        layout[name] = (offset, size)
        offset += size
    return layout


def layout_bytes(layout: dict[str, tuple[int, int]]) -> int:
    """Bytes of a layout as `attention_work` gives it, to the end of a pair of cache lines."""
    return round_up(max(offset + size for offset, size in layout.values()), 128)


@dataclass(frozen=True)
class Buffers:
    """Sizes of the decoder's rows and scratch.

    Attributes:
        hidden, ffn, att, mixed, kv: floats of a row; att is of attention's output, mixed of that
            of a gated delta net.
        acts: bytes of a row of quantized activations.
        part: bytes of a partial result of attention.
        chunks: chunks of the context.
        query_block: tokens whose queries go through attention together.
        work: bytes of a thread's own scratch.
        expert_ffn: floats of a row between an expert's matrices; 0 without experts.
        inputs: floats of a row of the inputs that layers have of their own; 0 without them.
        arrays: name -> shape of each float32 buffer.
    """

    hidden: int
    ffn: int
    att: int
    mixed: int
    kv: int
    acts: int
    part: int
    chunks: int
    query_block: int
    work: int
    expert_ffn: int
    inputs: int
    arrays: dict[str, tuple[int, ...]]


def buffers(config: ModelConfig, context: int, threads: int, sequences: int = 1) -> Buffers:
    """The decoder's buffers for a context, threads, and sequences that are decoded together."""
    c, batch = config, pass_tokens(config, context)
    rows = max(batch, threads, sequences)
    hidden, own = round_up(c.hidden, WIDTH), round_up(c.layer_input, WIDTH)
    ffn = max(round_up(c.widest_ffn, WIDTH), own)  # the gate of a layer's own input lies there
    q, kv = (round_up(heads * c.widest_head, WIDTH) for heads in (c.heads, c.kv_heads))
    if any(block.mixer == "short_conv" for block in c.blocks):
        q, kv = max(q, hidden), max(kv, hidden)  # its three inputs lie in the rows of q, k and v
    if c.is_mtp:
        q = max(q, hidden)  # what comes of the states lies in the rows of q
    att, gate, mixed = q, 0, 0
    for spec in c.blocks:
        if spec.output_gate:
            gate = max(gate, round_up(c.heads * c.widest_head, WIDTH))
        if spec.delta:  # its four inputs lie in the rows of q, k, v and g
            heads = round_up(spec.delta.value_heads + TILE, WIDTH)
            mixed = max(mixed, round_up(spec.delta.values, WIDTH))
            q, gate = max(q, round_up(spec.delta.channels, WIDTH)), max(gate, heads)
            kv = max(kv, mixed, heads)
    acts = max(hidden, ffn, att, mixed) // 32 * ACT_BLOCK
    part = part_bytes(c.widest_head)
    # the gate of a layer reads whole vectors of its part of the row
    inputs = round_up(c.layers * c.layer_input + TILE, WIDTH) if own else 0
    chunks = -(-context // CHUNK)
    block = query_block(c)
    work = layout_bytes(attention_work(c))
    arrays = {
        "x": (rows, hidden),
        "normed": (rows, hidden),
        "branch": (max(batch, sequences), hidden),
        "q": (max(batch, sequences), q),
        "k": (max(batch, sequences), kv),
        "v": (max(batch, sequences), kv),
        "att": (rows, att),
        "gate": (max(batch, sequences), ffn),
        "up": (max(batch, sequences), ffn),
        "acts": (rows, acts // _FLOAT),
        "part": (sequences * c.heads * chunks, part // _FLOAT),
        "work": (threads, work // _FLOAT),
        "sync": (SYNC_BYTES // _FLOAT,),
        "logits": (sequences, round_up(c.vocab, TILE)),
    }
    if gate:
        arrays["g"] = (max(batch, sequences), gate)
    if mixed:
        arrays["mixed"] = (max(batch, sequences), mixed)
    if own:
        arrays |= {"inputs": (max(batch, sequences), inputs), "own": (rows, own)}
    expert_ffn = round_up(c.experts.ffn, WIDTH) if c.experts else 0
    arrays |= _expert_arrays(c, max(batch, sequences), hidden, expert_ffn)
    return Buffers(
        hidden, ffn, att, mixed, kv, acts, part, chunks, block, work, expert_ffn, inputs, arrays
    )


def _expert_arrays(
    config: ModelConfig, tokens: int, hidden: int, ffn: int
) -> dict[str, tuple[int, ...]]:
    """Buffers of experts: of the router, and of a row for each token and expert it goes through."""
    experts = config.experts
    if experts is None:
        count, rows, plan = 0, 0, 0
    else:
        count, rows = round_up(experts.count, TILE), tokens * experts.chosen
        # three numbers of 8 bytes and a weight for each row, two for each expert and one more
        plan = 7 * rows + 4 * (experts.count + 1)
    return {
        "router": (tokens if experts else 0, count),
        "expert_x": (rows, hidden),
        "expert_acts": (rows, hidden // 32 * ACT_BLOCK // _FLOAT),
        "expert_gate": (rows, ffn),
        "expert_up": (rows, ffn),
        "expert_between": (rows, ffn // 32 * ACT_BLOCK // _FLOAT),
        "expert_out": (rows, hidden),
        "plan": (plan,),
    }


def scratch_bytes(config: ModelConfig, context: int, threads: int, sequences: int = 1) -> int:
    """Bytes of all buffers but the caches: rows, rotary tables, norms and logits."""
    c = config
    sizes = buffers(c, context, threads, sequences)
    rows = sum(math.prod(shape) for shape in sizes.arrays.values())
    rotary = sum(context * rope.dim for rope in c.ropes)  # cosines and sines of half of them
    norms = sum(math.prod(shape) for _, shape in c.floats())
    return _FLOAT * (rows + rotary + norms)


def draft_bytes(config: ModelConfig, threads: int, kv_bits: int = 8, sequences: int = 1) -> int:
    """Bytes that a draft model takes in addition to its weights: its KV caches and buffers.

    Args:
        config: config of the draft model.
        threads, kv_bits, sequences: those of the large model.
    """
    context = min(DRAFT_CONTEXT, config.context)
    caches = sequences * kv_bytes(config, context, kv_bits)
    return caches + scratch_bytes(config, context, threads, sequences)
