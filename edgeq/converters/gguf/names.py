"""Which of edgeq's tensors lie in which tensor of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.importers.gguf.architecture import Architecture
from edgeq.importers.gguf.value_heads import tiled_places, value_rows
from edgeq.importers.lazy import by_head_order
from edgeq.model.block import (
    B_PROJ,
    C_PROJ,
    CONV_OUT,
    DELTA_OUT,
    DOWN_PROJ,
    G_PROJ,
    GATE_PROJ,
    IN_A,
    IN_B,
    IN_QKV,
    IN_Z,
    K_PROJ,
    O_PROJ,
    Q_PROJ,
    ROUTER,
    UP_PROJ,
    V_PROJ,
    X_PROJ,
    DeltaSpec,
    expert_part,
    of_any_expert,
    tensor_name,
)

MOVED_COLUMNS = "edgeq.moved_value_heads"
"""The key that says that the columns of value heads lie in another order than in the source."""


@dataclass(frozen=True)
class ModelShape:
    """The hyperparameters of a file that its matrices depend on.

    Args:
        arch: what llama.cpp computes for the file's architecture.
        layers, heads, kv_heads, head_dim: numbers of them.
        rotated: values of a head that rotate, from its first.
        ffn: the feed-forward's true length.
        padded: its length in the file.
        tied: whether the head is the embedding.
        query_scale: what q's norm is multiplied by, in place of the scores.
        hidden: width of the residual stream.
        convolutions: the layers that are short convolutions.
        experts: how many a layer has; 0 without.
        expert_ffn, expert_padded: as ``ffn`` and ``padded``, of an expert.
        dense: layers, from the first, without experts in a model that has some.
        deltas: the layers that are gated delta nets.
        delta: their sizes, or None.
        moved_columns: whether the columns of their value heads were moved.
    """

    arch: Architecture
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: int
    ffn: int
    padded: int
    tied: bool
    query_scale: float = 1.0
    hidden: int = 0
    convolutions: frozenset[int] = frozenset()
    experts: int = 0
    expert_ffn: int = 0
    expert_padded: int = 0
    dense: int = 0
    deltas: frozenset[int] = frozenset()
    delta: DeltaSpec | None = None
    moved_columns: bool = False

    def parts(self, name: str) -> Iterator[tuple[str, int, int]]:
        """edgeq's matrices in one of the file's: (name, first row, rows without padding)."""
        first = 0
        for our, rows, padded in self._matrices():
            if self.arch.tensor_name(our) == name:
                yield our, first, rows
                first += padded

    def inner(self, our: str) -> int:
        """The true inner length of the feed-forward that one of edgeq's matrices is of."""
        return self.expert_ffn if of_any_expert(our)[1] else self.ffn

    def interleaved(self, our: str) -> int:
        """How many heads of one of edgeq's tensors have their rows interleaved, or 0."""
        if not self.arch.is_interleaved(our):
            return 0
        return self.heads if our.endswith("q_proj.weight") else self.kv_heads

    def by_head(self, our: str) -> NDArray[np.intp] | None:
        """Where the rows of one of edgeq's tensors lie in a tensor that holds several head by
        head; None where it holds them one after the other."""
        parts = [Q_PROJ, G_PROJ]
        part = our.removesuffix(".weight").split(".", 3)[-1]
        if not self.arch.output_gate or part not in parts:
            return None
        return by_head_order(self.heads * self.head_dim, self.heads, parts.index(part), len(parts))

    def value_rows(self, our: str) -> NDArray[np.intp] | None:
        """Where the rows of one of edgeq's tensors lie in the file's, where that is by its order of
        value heads."""
        return value_rows(self.delta, our.removesuffix(".weight").split(".", 3)[-1])

    def moved(self, our: str) -> NDArray[np.intp] | None:
        """Where the columns of each value head lie in the file, if they were moved."""
        if not self.moved_columns or self.delta is None or not our.endswith(f"{DELTA_OUT}.weight"):
            return None
        return tiled_places(self.delta)

    def is_fused(self, one: str, other: str) -> bool:
        """Whether the file stores two parts of a layer, as "mlp.up_proj", in one tensor."""
        names = (self.arch.tensor_name(tensor_name(0, part)) for part in (one, other))
        return len(set(names)) == 1

    def _matrices(self) -> Iterator[tuple[str, int, int]]:
        """(name, rows, rows with padding); -1 for all rows of a tensor that no other shares."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", -1, -1
        for i in range(self.layers):
            if i in self.convolutions:
                for part in (B_PROJ, C_PROJ, X_PROJ):
                    yield tensor_name(i, part), self.hidden, self.hidden
                yield tensor_name(i, CONV_OUT), -1, -1
            elif i in self.deltas:
                for part in (IN_QKV, IN_Z, IN_B, IN_A, DELTA_OUT):
                    yield tensor_name(i, part), -1, -1
            else:
                yield tensor_name(i, Q_PROJ), q, q
                yield tensor_name(i, K_PROJ), kv, kv
                yield tensor_name(i, V_PROJ), kv, kv
                if self.arch.output_gate:
                    yield tensor_name(i, G_PROJ), q, q
                yield tensor_name(i, O_PROJ), -1, -1
            if self.experts and i >= self.dense:
                yield tensor_name(i, ROUTER), -1, -1
                for e in range(self.experts):
                    inner = self.expert_ffn, self.expert_padded
                    yield tensor_name(i, expert_part(e, GATE_PROJ)), *inner
                    yield tensor_name(i, expert_part(e, UP_PROJ)), *inner
                    yield tensor_name(i, expert_part(e, DOWN_PROJ)), self.hidden, self.hidden
                continue
            yield tensor_name(i, GATE_PROJ), self.ffn, self.padded
            yield tensor_name(i, UP_PROJ), self.ffn, self.padded
            yield tensor_name(i, DOWN_PROJ), -1, -1
        if not self.tied:
            yield "lm_head.weight", -1, -1
