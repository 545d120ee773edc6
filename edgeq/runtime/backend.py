"""What the engine runs tokens with."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.model.config import ModelConfig
from edgeq.model.kv_bits import KvBits
from edgeq.runtime import kv_state as state


class Backend(Protocol):
    """What the engine runs tokens with: compiled code or NumPy."""

    scratch_bytes: int
    kv_bytes: int

    def forward(
        self, tokens: NDArray[np.int64], position: int, outputs: int
    ) -> NDArray[np.float32]:
        """Run tokens at ``position``; logits [outputs, V] of the last ``outputs`` of them."""

    def hidden(self, tokens: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        """Run tokens at ``position``; the final norm of each, [T, hidden or more]."""

    def greedy(self, token: int, position: int, steps: int) -> list[int]:
        """``steps`` greedy tokens after ``token``."""

    def states(self) -> range:
        """The positions whose states are kept for a multi-token-prediction head."""

    def state_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """The final norms of positions ``start:stop`` of `states`, [T, hidden]."""

    def mtp(self, context: int, kv_bits: KvBits) -> tuple[Backend, ModelConfig]:
        """The model's multi-token-prediction head, for this sequence, and its hyperparameters."""

    def ahead(
        self, tokens: NDArray[np.int64], position: int, states: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Run such a head on tokens and states; logits [V] and state [hidden] of the last."""

    def is_finite(self) -> bool:
        """Whether the last logits were numbers."""

    def truncate(self, position: int) -> None:
        """Remove everything at and past ``position``."""

    def resumes(self, position: int) -> bool:
        """Whether gated delta nets can go on at ``position``, which is not past the sequence."""

    def settle(self, position: int) -> bool:
        """Make the states of gated delta nets those after ``position`` tokens where that takes no
        pass; whether all are."""

    def first(self, layer: int) -> int:
        """The first position that is still in a layer's cache; with attention a multiple of 16."""

    def read(self, layer: int, start: int, stop: int) -> state.Parts:
        """A layer's cache of positions ``start:stop``, in the arrays of `state.state_parts`."""

    def write(self, layer: int, start: int, parts: state.Parts) -> None:
        """Put a saved sequence's last positions, from ``start`` to its end, into a layer."""

    def close(self) -> None:
        """Release threads and memory."""
