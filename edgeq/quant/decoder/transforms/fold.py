"""Fold factors on the inputs of matrices into the weights that compute those inputs.

The input x [T, K] of a group of matrices (`edgeq.model.recording.LinearGroup`) may be divided by
s [K] if the columns of the matrices are multiplied by s. The division is folded into the weight
that computes x:

    attn_in, mlp_in    the weight of the norm before the group
    attn_out           rows of v and v's bias, which the query heads of a key/value head share
    mlp_out            rows of up, because the input is activation(gate) * up

Groups whose input is the residual stream itself (layers without a norm before) are left unchanged,
and so is the head, because a tied head is also the embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.tensor import Tensor
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.recording import LinearGroup

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


def can_fold(group: LinearGroup) -> bool:
    """Whether factors on the inputs of a group can be folded into another weight."""
    return group.kind != "head" and group.source is not None


def shared(
    config: ModelConfig, group: LinearGroup, values: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Make values for the inputs of a group equal where the inputs have the same source.

    Args:
        config: config of the model.
        group: the group of matrices.
        values: one value for each input, [K].

    Returns:
        float64 [K]. Where attention is the source these are the largest values over the query
        heads of each key/value head.
    """
    wide: NDArray[np.float64] = values.astype(np.float64)
    if not _after_attention(config, group):
        return wide
    by_head = wide.reshape(config.kv_heads, config.group, config.head_dim)
    most = by_head.max(axis=1, keepdims=True)
    return np.broadcast_to(most, by_head.shape).reshape(-1)


def _after_attention(config: ModelConfig, group: LinearGroup) -> bool:
    """Whether the inputs of a group are attention's mix of v."""
    return group.kind == "attn_out" and config.blocks[group.layer].mixer == "attention"


def folded(model: Model, factors: Mapping[LinearGroup, NDArray[np.float64]]) -> Model:
    """The equivalent model in which the inputs of groups are divided by factors.

    Args:
        model: the float model.
        factors: group -> positive factors s [K]. Those after attention must be equal for
            query heads that share a key/value head (see `shared`), and every group must satisfy
            `can_fold`.
    """
    config = model.config
    tensors = dict(model.tensors)

    def scale(
        name: str, rows: NDArray[np.float64] | None, columns: NDArray[np.float64] | None
    ) -> None:
        if name in tensors:
            tensors[name] = Scaled(tensors[name], rows, columns)

    for group, s in factors.items():
        assert group.source is not None  # guaranteed by `can_fold`
        for name in group.linears:
            scale(name, None, s)
        if _after_attention(config, group):
            one = s.reshape(config.kv_heads, config.group, config.head_dim)[:, 0].reshape(-1)
            scale(group.source, 1 / one, None)
            scale(group.source.removesuffix("weight") + "bias", 1 / one, None)
        elif group.kind in ("attn_out", "mlp_out"):
            scale(group.source, 1 / s, None)
        else:
            tensors[group.source] = Offset(tensors[group.source], 1 / s, config.norm_offset)
    return replace(model, tensors=tensors)
