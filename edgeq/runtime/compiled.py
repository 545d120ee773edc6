"""The compiled backend: runs a `CompiledProgram` on a pool of threads."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.packing import round_up
from edgeq.model.memory_layout import BATCH
from edgeq.model.model import Model
from edgeq.runtime.compiled_program import CompiledProgram
from edgeq.runtime.engine_memory import EngineMemory
from edgeq.runtime.kernels import decoder
from edgeq.runtime.kernels.abi import CALL
from edgeq.runtime.kv_state import Parts
from edgeq.runtime.step_times import StepTimes
from edgeq.runtime.thread_pool import ThreadPool
from edgeq.runtime.thread_tuner import ThreadTuner
from edgeq.runtime.weights import WeightArena, advise, worth_copying

SMALL = 4
"""A pass of at most this many tokens uses the number of threads that was chosen for decoding."""


class CompiledBackend:
    """See `edgeq.runtime.engine.Backend`.

    Args:
        model: validated.
        context: positions the cache holds.
        threads: how many run side by side.
        kv_bits: 4, 8 or 16.
        mmap: use weights in the mapped file (True), copy them to memory with huge pages
            (False), or whichever is better here (None).
    """

    def __init__(
        self, model: Model, context: int, threads: int, kv_bits: int, mmap: bool | None = None
    ) -> None:
        self._vocab = model.config.vocab
        self._batch = min(BATCH, context)
        self._threads = threads
        mmap = not worth_copying(model) if mmap is None else mmap
        self._arena = None if mmap else WeightArena(model)
        if mmap:
            advise(model)
        self._memory = EngineMemory()
        self._program = CompiledProgram(model, context, threads, kv_bits, self._arena, self._memory)
        self._caches = self._program.caches
        self.kv_bytes = sum(cache.nbytes for cache in self._caches)
        self.scratch_bytes = self._memory.scratch_bytes
        self._starts, self._written = [0] * len(self._caches), 0
        self._logits: NDArray[np.float32] = self._program.logits
        self._call_record = self._memory.zeros(1, CALL)
        self._no_tokens = np.zeros(0, np.int64)
        self._pool = ThreadPool(threads)
        self._tuner = ThreadTuner(threads)

    def forward(
        self, tokens: NDArray[np.int64], position: int, outputs: int
    ) -> NDArray[np.float32]:
        """Run tokens in batches; logits [outputs, V] of the last ``outputs`` of them."""
        n = len(tokens)
        if n == 1:
            self._decode(int(tokens[0]), position, self._no_tokens)
            return self._logits[:, : self._vocab].copy()
        rows = (
            self._logits if outputs == 1 else np.empty((outputs, self._logits.shape[1]), np.float32)
        )
        for start in range(0, n, self._batch):
            ids = tokens[start : start + self._batch]
            stop = start + len(ids)
            wanted = max(0, stop - max(start, n - outputs))
            into = rows[max(0, start - (n - outputs)) :] if wanted else rows
            # few tokens at once are limited by the same things as one
            threads = self._tuner.current if n <= SMALL else self._threads
            self._call(ids, position + start, wanted, into, 0, self._no_tokens, threads)
        return rows[:outputs, : self._vocab].copy()

    def greedy(self, token: int, position: int, steps: int) -> list[int]:
        """``steps`` greedy tokens after ``token``, without Python in between."""
        chosen = np.zeros(steps, np.int64)
        done = 0
        while done < steps:
            first = chosen[done - 1] if done else token
            done += self._decode(int(first), position + done, chosen[done:])
        return [int(t) for t in chosen]

    def is_finite(self) -> bool:
        """Whether the last logits were numbers."""
        return bool(np.isfinite(self._logits[0, : self._vocab].max()))

    def _decode(self, token: int, position: int, chosen: NDArray[np.int64]) -> int:
        """One burst with the tuner's number of threads: greedy tokens into ``chosen`` (or, if
        that is empty, the logits after one token); returns how many."""
        threads, burst = self._tuner.next(max(1, len(chosen)))
        steps = burst if len(chosen) else 0
        start = time.perf_counter()
        self._call(np.array([token], np.int64), position, 1, self._logits, steps, chosen, threads)
        self._tuner.record(threads, burst, time.perf_counter() - start)
        return burst

    def _call(
        self,
        ids: NDArray[np.int64],
        position: int,
        outputs: int,
        logits: NDArray[np.float32],
        steps: int,
        chosen: NDArray[np.int64],
        threads: int,
    ) -> None:
        """Run the compiled decoder on some threads side by side."""
        self._written = max(self._written, position + max(len(ids), steps))
        call = self._call_record[0]
        call["program"] = self._program.record.ctypes.data
        call["threads"], call["tokens"], call["position"] = threads, len(ids), position
        call["ids"], call["outputs"] = ids.ctypes.data, outputs
        call["logits"], call["logits_stride"] = logits.ctypes.data, logits.strides[0]
        call["greedy"], call["chosen"] = steps, chosen.ctypes.data
        self._pool.call(decoder(), self._call_record.ctypes.data, threads)

    def new_times(self) -> StepTimes:
        """Sums for `time_steps`."""
        return StepTimes.new(self._program.labels)

    def time_steps(self, times: StepTimes | None) -> None:
        """Add the time of every step to these sums, until it is called with None."""
        self._times = times  # keeps the memory that the program points to
        self._program.record["times"] = 0 if times is None else times.raw.ctypes.data

    def truncate(self, position: int) -> None:
        """Nothing past the sequence is ever read, so only a whole reset changes anything."""
        if position == 0:
            self._starts, self._written = [0] * len(self._starts), 0

    def first(self, layer: int) -> int:
        """The first position of the sequence whose key and value are still in the layer's cache."""
        # positions are lost with the first of their span, which is the center of all
        oldest = round_up(self._written - self._caches[layer].length, self._caches[layer].span)
        return max(self._starts[layer], oldest, 0)

    def read(self, layer: int, start: int, stop: int) -> Parts:
        """A layer's keys and values of positions ``start:stop``, whole center spans."""
        return self._caches[layer].read(start, stop)

    def write(self, layer: int, start: int, parts: Parts) -> None:
        """Put a saved sequence's last positions, from ``start`` to its end, into a layer."""
        cache, stop = self._caches[layer], start + len(parts["keys"])
        self._written = max(self._written, stop)
        self._starts[layer] = start
        skip, span = self.first(layer) - start, cache.span
        rows = {name: skip // span if name == "centers" else skip for name in parts}
        cache.write(start + skip, {name: part[rows[name] :] for name, part in parts.items()})

    def close(self) -> None:
        """End the threads."""
        self._pool.close()
