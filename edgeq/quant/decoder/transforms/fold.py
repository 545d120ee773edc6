"""Factors moved from the inputs of matrices into what makes those inputs, and lazy results.

A site's inputs x [T, K] may be divided by s [K] and its matrices' columns multiplied by s. What
divides x is already there:

    attn_in, mlp_in    the norm before it: its weight is divided
    attn_out           rows of v and v's bias: shared by the query heads of a key/value head
    mlp_out            rows of up, as the output is activation(gate) * up

The head's site is left alone: a tied head is the embedding too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UnsupportedError
from edgeq.formats.tensor import Tensor
from edgeq.model.block import tensor_name
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.quant.decoder.replay import Site

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Lazy(ABC):
    """A tensor of the same shape as another, whose rows are computed when they are read.

    Args:
        data: the tensor that is read.
    """

    data: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that is read."""
        return tuple(self.data.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor that is read."""
        return self.data.nbytes

    @abstractmethod
    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` along the first axis as float32 (a copy)."""

    def numpy(self) -> Array:
        """The whole tensor as float32 (a copy)."""
        return self.rows(0, self.shape[0])


@dataclass(frozen=True, eq=False)
class Scaled(Lazy):
    """A tensor whose rows and columns are multiplied by factors when they are read.

    Args:
        data: matrix [N, K] or vector [N].
        row_factors: [N], or None for ones.
        column_factors: [K], or None for ones.
    """

    row_factors: NDArray[np.float64] | None = None
    column_factors: NDArray[np.float64] | None = None

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` as float32 (a copy)."""
        values = self.data.rows(start, stop).astype(np.float64)
        if self.row_factors is not None:
            factors = self.row_factors[start:stop]
            values *= factors.reshape(-1, *(1,) * (values.ndim - 1))
        if self.column_factors is not None:
            values *= self.column_factors
        return values.astype(np.float32)


@dataclass(frozen=True, eq=False)
class Offset(Lazy):
    """A norm's weight whose sum with the model's ``norm_offset`` is multiplied by factors.

    Args:
        data: the weight [K].
        factors: [K].
        offset: the config's ``norm_offset``.
    """

    factors: NDArray[np.float64]
    offset: float

    def rows(self, start: int, stop: int) -> Array:
        """Elements ``start:stop`` as float32 (a copy)."""
        whole = self.data.rows(start, stop).astype(np.float64) + self.offset
        return (whole * self.factors[start:stop] - self.offset).astype(np.float32)


def input_norm(config: ModelConfig, site: Site) -> str:
    """The norm that makes the inputs of an attn_in or mlp_in site."""
    block = config.blocks[site.layer]
    part = block.attention_norm if site.kind == "attn_in" else block.feed_forward_norm
    if part is None:
        raise UnsupportedError(
            f"the inputs at {site} come without a norm before them, so no norm can be divided by "
            "the factors; use a transform that leaves these inputs alone"
        )
    return tensor_name(site.layer, part)


def shared(config: ModelConfig, site: Site, values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Values of a site's inputs as the factors on them must be: equal where a producer is shared.

    Args:
        config: of the model.
        site: where.
        values: [K].

    Returns:
        float64 [K]; at attn_out the largest over the query heads of each key/value head.
    """
    wide: NDArray[np.float64] = values.astype(np.float64)
    if site.kind != "attn_out":
        return wide
    grouped = wide.reshape(config.kv_heads, config.group, config.head_dim)
    most = grouped.max(axis=1, keepdims=True)
    return np.broadcast_to(most, grouped.shape).reshape(-1)


def folded(model: Model, factors: Mapping[Site, NDArray[np.float64]]) -> Model:
    """The equal model whose site inputs are divided by factors.

    Args:
        model: float.
        factors: site -> s [K], positive; at attn_out as `shared` gives them. Not the head.
    """
    config = model.config
    tensors = dict(model.tensors)

    def scale(
        name: str, rows: NDArray[np.float64] | None, columns: NDArray[np.float64] | None
    ) -> None:
        if name in tensors:
            tensors[name] = Scaled(tensors[name], rows, columns)

    for site, s in factors.items():
        for name in site.linears:
            scale(name, None, s)
        layer = f"model.layers.{site.layer}."
        if site.kind == "attn_out":
            one = s.reshape(config.kv_heads, config.group, config.head_dim)[:, 0].reshape(-1)
            scale(layer + "self_attn.v_proj.weight", 1 / one, None)
            scale(layer + "self_attn.v_proj.bias", 1 / one, None)
        elif site.kind == "mlp_out":
            scale(layer + "mlp.up_proj.weight", 1 / s, None)
        else:
            norm = input_norm(config, site)
            tensors[norm] = Offset(tensors[norm], 1 / s, config.norm_offset)
    return replace(model, tensors=tensors)
