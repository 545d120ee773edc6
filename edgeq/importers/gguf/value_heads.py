"""The order of the value heads of gated delta nets in GGUF files.

Where a key head serves several value heads, a checkpoint lists the value heads of one key head
after the other: grouped. llama.cpp repeats the key heads as a whole, so that its files list the
first value head of every key head, then the second of every one: tiled. Whatever has a part for
each value head lies in that order: the rows of the value part of in_proj_qkv and of conv1d, the
rows of in_proj_z, in_proj_b and in_proj_a, A_log, dt_bias, and the columns of out_proj.

Rows can be moved in any type of GGUF, columns only as whole blocks. A model that is read from a
file has its rows moved and its columns left (`DeltaSpec.tiled_out`).

Source: `_LinearAttentionVReorderBase` of llama.cpp's converter (conversion/qwen.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.model.block import (
    A_LOG,
    DELTA_CONV,
    DELTA_OUT,
    DT_BIAS,
    IN_A,
    IN_B,
    IN_QKV,
    IN_Z,
    DeltaSpec,
)
from edgeq.model.config import ModelConfig

Order = NDArray[np.intp]


def is_tiled(spec: DeltaSpec) -> bool:
    """Whether the two orders differ."""
    return spec.group > 1 and spec.key_heads > 1


def tiled_places(spec: DeltaSpec) -> Order:
    """The place in tiled order of each value head in grouped order.

    Example:
        >>> from edgeq.importers.gguf.value_heads import tiled_places
        >>> tiled_places(edgeq.DeltaSpec(key_heads=2, value_heads=6, key_dim=4, value_dim=4))
        array([0, 2, 4, 1, 3, 5])
    """
    return np.arange(spec.value_heads).reshape(spec.group, spec.key_heads).T.reshape(-1)


def file_rows(config: ModelConfig, name: str) -> Order | None:
    """The row in a file of each row of one of edgeq's tensors; None where these are the same.

    Args:
        config: of the model.
        name: edgeq's name of the tensor.
    """
    return value_rows(*_spec_and_part(config, name))


def value_rows(spec: DeltaSpec | None, part: str) -> Order | None:
    """As `file_rows`, of a part of a layer, such as "linear_attn.in_proj_z"."""
    if spec is None or not is_tiled(spec):
        return None
    sizes = {IN_B: 1, IN_A: 1, A_LOG: 1, DT_BIAS: 1}
    sizes |= dict.fromkeys((IN_Z, IN_QKV, DELTA_CONV), spec.value_dim)
    size = sizes.get(part)
    if size is None:
        return None
    before = 2 * spec.keys if part in (IN_QKV, DELTA_CONV) else 0
    places = tiled_places(spec)[:, None] * size + np.arange(size)
    return np.concatenate([np.arange(before), before + places.reshape(-1)])


def moved_columns(config: ModelConfig, name: str) -> DeltaSpec | None:
    """The gated delta net of a tensor whose columns a file has in another order than the model."""
    spec, part = _spec_and_part(config, name)
    if part != DELTA_OUT or spec is None or spec.tiled_out or not is_tiled(spec):
        return None
    return spec


def by_heads(values: NDArray[np.generic], spec: DeltaSpec, order: Order) -> NDArray[np.generic]:
    """Columns in another order of the value heads, of which each has as many: [rows, n]."""
    heads = values.reshape(len(values), spec.value_heads, -1)
    return np.ascontiguousarray(heads[:, order]).reshape(values.shape)


def _spec_and_part(config: ModelConfig, name: str) -> tuple[DeltaSpec | None, str]:
    if not name.startswith("model.layers."):
        return None, ""
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return config.blocks[int(layer)].delta, part
