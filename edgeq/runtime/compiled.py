"""The compiled backend: one sequence of a decoder."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.packing import round_up
from edgeq.model.config import ModelConfig
from edgeq.model.kv_bits import KvBits
from edgeq.runtime.kept_states import cut_states, kept_states
from edgeq.runtime.kv_state import Parts, positions_in
from edgeq.runtime.layer_cache import DeltaCache
from edgeq.runtime.shared_decoder import SharedDecoder
from edgeq.runtime.step_times import StepTimes


class CompiledBackend:
    """See `edgeq.runtime.backend.Backend`: one sequence of a decoder that others may share.

    Args:
        decoder: runs the tokens.
        sequence: which of its sequences this is.
    """

    def __init__(self, decoder: SharedDecoder, sequence: int = 0) -> None:
        self._decoder, self._sequence = decoder, sequence
        self._caches = decoder.program.caches[sequence]
        self.kv_bytes = sum(cache.nbytes for cache in self._caches)
        self.scratch_bytes = decoder.scratch_bytes
        self._deltas = [cache for cache in self._caches if isinstance(cache, DeltaCache)]
        self._starts, self._written = [0] * len(self._caches), 0
        self._kept = decoder.program.states[sequence] if decoder.program.states else None
        self._states = range(0)  # positions whose states are kept
        if self._kept is not None:
            self.kv_bytes += self._kept.nbytes
        self._finite = True

    def forward(
        self, tokens: NDArray[np.int64], position: int, outputs: int
    ) -> NDArray[np.float32]:
        """Run tokens in batches; logits [outputs, V] of the last ``outputs`` of them."""
        self._ran(position, len(tokens))
        return self._decoder.forward(self._sequence, tokens, position, outputs)

    def hidden(self, tokens: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        """Run tokens in batches; the final norm of each, [T, hidden or more]."""
        self._ran(position, len(tokens))
        return self._decoder.hidden(self._sequence, tokens, position)

    def greedy(self, token: int, position: int, steps: int) -> list[int]:
        """``steps`` greedy tokens after ``token``, without Python in between."""
        self._ran(position, steps)
        chosen, self._finite = self._decoder.greedy(self._sequence, token, position, steps)
        return chosen

    def _ran(self, position: int, tokens: int) -> None:
        """Note that a pass runs some tokens."""
        self._written = max(self._written, position + tokens)
        self._states = kept_states(self._states, position, tokens)

    def states(self) -> range:
        """The positions whose states are kept, which `state_rows` gives."""
        return self._states

    def state_rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """The final norms of positions ``start:stop``, [T, hidden]."""
        assert self._kept is not None  # or there is no head that asks for them
        return self._kept.read(start, stop)["inputs"]

    def mtp(self, context: int, kv_bits: KvBits) -> tuple[CompiledBackend, ModelConfig]:
        """This sequence's multi-token-prediction head, and its hyperparameters."""
        head = self._decoder.mtp(context, kv_bits)
        return CompiledBackend(head, self._sequence), head.config

    def ahead(
        self, tokens: NDArray[np.int64], position: int, states: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Run a head on tokens and states; logits [V] and state [hidden] of the last."""
        self._ran(position, len(tokens))
        return self._decoder.ahead(self._sequence, tokens, position, states)

    def is_finite(self) -> bool:
        """Whether the last logits of `greedy` were numbers."""
        return self._finite

    def new_times(self) -> StepTimes:
        """Sums for `time_steps`."""
        return StepTimes.new(self._decoder.program.labels)

    def time_steps(self, times: StepTimes | None) -> None:
        """Add the time of every step to these sums, until it is called with None."""
        self._times = times  # keeps the memory that the program points to
        self._decoder.program.record["times"] = 0 if times is None else times.raw.ctypes.data

    def truncate(self, position: int) -> None:
        """Nothing past the sequence is ever read, so only a whole reset changes anything."""
        self._states = cut_states(self._states, position)
        if position == 0:
            self._starts, self._written = [0] * len(self._starts), 0

    def resumes(self, position: int) -> bool:
        """Whether gated delta nets can go on at a position."""
        return all(cache.resumes(position) for cache in self._deltas)

    def settle(self, position: int) -> bool:
        """Whether the states of gated delta nets are, or could be made, those after a position."""
        settled = [cache.settle(position) for cache in self._deltas]
        return all(settled)

    def first(self, layer: int) -> int:
        """The first position of the sequence that is still in the layer's cache."""
        cache = self._caches[layer]
        if isinstance(cache, DeltaCache):
            return cache.first
        # positions are lost with the first of their span, which is the center of all
        oldest = round_up(self._written - self._caches[layer].length, self._caches[layer].span)
        return max(self._starts[layer], oldest, 0)

    def read(self, layer: int, start: int, stop: int) -> Parts:
        """A layer's cache of positions ``start:stop``, whole center spans."""
        return self._caches[layer].read(start, stop)

    def write(self, layer: int, start: int, parts: Parts) -> None:
        """Put a saved sequence's last positions, from ``start`` to its end, into a layer."""
        if not parts:
            return  # of a layer that reads the cache of another
        cache, stop = self._caches[layer], start + positions_in(parts)
        self._written = max(self._written, stop)
        self._starts[layer] = start
        if isinstance(cache, DeltaCache):
            cache.write(start, parts)
            return
        skip, span = self.first(layer) - start, cache.span
        rows = {name: skip // span if name == "centers" else skip for name in parts}
        cache.write(start + skip, {name: part[rows[name] :] for name, part in parts.items()})

    def close(self) -> None:
        """End the threads, once every sequence has been closed."""
        self._decoder.close(self._sequence)
