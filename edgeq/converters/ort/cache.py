"""An int8 cache for onnxruntime: its scales, and its place in a finished graph.

GroupQueryAttention holds int8 keys and values with scales that are part of the graph, one a
channel. They must suit text the graph has never seen, so they are taken from what the model
itself writes: `TEXTS` texts sampled from it, run through the same graph with a float cache.

    values   the largest magnitude of a channel
    keys     the range a channel has when each key seen is turned to `TURNS` positions of the
             whole context, for any key may come at any position. Its middle is subtracted from
             the keys before they are stored, which adds the same to all scores of a query and so
             changes no probability

Both are widened by `MARGIN`; what exceeds even that is clipped to the largest code. On
stories260K this loses 0.002 nats; scales from the keys' magnitudes where they were seen lose 0.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.converters.ort.run import OrtRunner
from edgeq.core.progress import Progress
from edgeq.model.config import ModelConfig
from edgeq.model.formulas import Array, apply_rope
from edgeq.model.rope_spec import RopeSpec
from edgeq.model.rotary import rope_tables

TEXTS, LENGTH = 4, 96
"""Texts sampled, and their tokens."""
TURNS = 64
"""Positions each key is turned to."""
MARGIN = 1.25
"""Width of the range that is held, of that seen."""


@dataclass(frozen=True)
class Range:
    """Quantization parameters of one layer's keys or values: value = ``middle + scale * code``.

    Args:
        middle: float32 [Hkv, D]; zeros for values.
        scale: float32 [Hkv, D].
    """

    middle: Array
    scale: Array


def calibrate(
    path: Path,
    config: ModelConfig,
    tokens: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Range]:
    """Ranges of every layer's keys and values.

    Args:
        path: the .onnx file with a float cache.
        config: of the model.
        tokens: a text to take them from; what the model samples if None.
        progress: called with ("texts", done, total).

    Returns:
        name of the cache's input -> its range, D padded as the cache is.
    """
    runner = OrtRunner(path)
    low: dict[str, Array] = {}
    high: dict[str, Array] = {}
    texts = TEXTS if tokens is None else 1
    for i in range(texts):
        runner.reset()
        if tokens is None:
            _sample(runner, config, np.random.default_rng(i))
        else:
            runner.forward(np.asarray(tokens, np.int64)[: runner.context])
        for name, values in runner.cache().items():
            if name.endswith(".key"):
                rope = config.blocks[int(name.split(".")[1])].rope
                lows, highs = _turned(values, rope and rope.for_keys, runner.context)
            else:
                highs = np.abs(values).max(axis=1)
                lows = -highs
            low[name] = np.minimum(low.get(name, lows), lows)
            high[name] = np.maximum(high.get(name, highs), highs)
        if progress:
            progress("texts", i + 1, texts)
    runner.close()
    return {
        name: Range(
            (high[name] + low[name]) * np.float32(0.5),
            # a channel that never changes may have any scale but zero
            np.maximum(high[name] - low[name], np.float32(1e-6)) * np.float32(MARGIN / 2 / 127),
        )
        for name in low
    }


def with_int8_cache(proto: Any, ranges: dict[str, Range]) -> Any:
    """Make the cache of a graph with a float32 one int8, in place.

    Args:
        proto: the graph, of `OrtBuilder`.
        ranges: of `calibrate`.

    Returns:
        the same.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = proto.graph
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.INT8
    nodes = list(graph.node)
    graph.ClearField("node")
    for node in nodes:
        if node.op_type == "GroupQueryAttention":
            keys, past = node.input[1], node.input[3:5]
            middle, moved = f"{past[0]}.middle", f"{keys}.moved"
            graph.node.append(helper.make_node("Sub", [keys, middle], [moved], name=f"Sub:{moved}"))
            graph.initializer.append(
                numpy_helper.from_array(ranges[past[0]].middle.reshape(-1), middle)
            )
            node.input[1] = moved
            # cos_cache, sin_cache, position_ids, attention_bias and head_sink come between
            node.input.extend([""] * (12 - len(node.input)) + [f"{name}.scale" for name in past])
            for name in past:
                scale = ranges[name].scale[None, :, None]
                graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
            for key in ("k_quant_type", "v_quant_type"):
                node.attribute.append(helper.make_attribute(key, "PER_CHANNEL"))
            node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
        graph.node.append(node)
    return proto


def _sample(runner: OrtRunner, config: ModelConfig, rng: np.random.Generator) -> None:
    """Extend an empty cache by a text that the model writes."""
    token = int(rng.integers(config.vocab)) if config.bos is None else config.bos
    for _ in range(min(LENGTH, runner.context)):
        logits = runner.forward([token])[-1]
        # the largest of logits with Gumbel noise is a sample of their softmax
        token = int((logits + rng.gumbel(size=logits.size)).argmax())


def _turned(keys: Array, rope: RopeSpec | None, context: int) -> tuple[Array, Array]:
    """The least and largest of each channel of keys [Hkv, positions, D] at any position."""
    if rope is None:
        return keys.min(axis=1), keys.max(axis=1)
    cos, sin = rope_tables(rope, context)
    n = keys.shape[1]
    square = cos[:n] ** 2 + sin[:n] ** 2  # of the factor on what is rotated
    plain = apply_rope(keys.transpose(1, 0, 2), cos[:n] / square, -sin[:n] / square)
    low = high = keys[:, 0]
    for position in np.unique(np.linspace(0, context - 1, TURNS).astype(int)):
        at = slice(position, position + 1)
        turned = apply_rope(plain, cos[at], sin[at])
        low, high = np.minimum(low, turned.min(axis=0)), np.maximum(high, turned.max(axis=0))
    return low, high
