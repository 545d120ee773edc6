"""A compiled program on a pool of threads, for one sequence or several that are decoded together.

Decoding reads every weight for each token, so tokens of several sequences in one pass cost little
more than one. Each sequence has a cache and its thread of Python; threads that ask for a token at
about the same time have their tokens run in one pass, by whichever came first. No result depends
on what else was in the pass: rows do not mix, and every sum has one order.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeq.model.memory_layout import pass_tokens
from edgeq.model.model import Model
from edgeq.model.mtp import mtp_model
from edgeq.runtime.compiled_program import CompiledProgram
from edgeq.runtime.engine_memory import EngineMemory
from edgeq.runtime.kernels import decoder
from edgeq.runtime.kernels.abi import CALL
from edgeq.runtime.thread_pool import ThreadPool
from edgeq.runtime.thread_tuner import ThreadTuner
from edgeq.runtime.weights import WeightArena, advise, in_place, worth_copying

SMALL = 4
"""A pass of at most this many tokens uses the number of threads that was chosen for decoding."""
WAIT_S = 0.002
"""The least time that a pass waits for sequences that were in the last one."""


@dataclass(eq=False)
class TokenRequest:
    """A token that a sequence has asked to run, and what came of it."""

    sequence: int
    token: int
    position: int
    logits: NDArray[np.float32] | None = None
    error: BaseException | None = None
    since: float = field(default_factory=time.perf_counter)

    @property
    def done(self) -> bool:
        """Whether it has logits, or an error."""
        return self.logits is not None or self.error is not None


class SharedDecoder:
    """A model's compiled decoder and the caches of its sequences. Threads may share it.

    Args:
        model: validated.
        context: positions that each cache holds.
        threads: how many run side by side.
        kv_bits: 4, 8 or 16.
        mmap: use weights in the mapped file (True), copy them to memory with huge pages
            (False), or whichever is better here (None).
        sequences: how many.

    Attributes:
        program: what is run.
        config: of the model.
        arena: where weights were copied to, or None.
        scratch_bytes: of all buffers but the caches.
    """

    def __init__(
        self,
        model: Model,
        context: int,
        threads: int,
        kv_bits: int,
        mmap: bool | None = None,
        sequences: int = 1,
    ) -> None:
        self._vocab = model.config.vocab
        self._batch = pass_tokens(model.config, context)
        self._threads = threads
        mmap = not worth_copying(model) if mmap is None else mmap
        self.arena = None if mmap else WeightArena.of(model)
        self._memory = EngineMemory()
        if self.arena is not None:
            model = self.arena.model
        else:
            advise(model)
            model = in_place(model, self._memory.array)
        self.config, self._model = model.config, model
        self._mtp: SharedDecoder | None = None
        self._making_mtp = threading.Lock()
        self.program = CompiledProgram(model, context, threads, kv_bits, self._memory, sequences)
        self.scratch_bytes = self._memory.scratch_bytes
        self._logits: NDArray[np.float32] = self.program.logits
        self._call_record = self._memory.zeros(1, CALL)
        self._no_tokens = np.zeros(0, np.int64)
        self._pool = ThreadPool(threads)
        self._tuner = ThreadTuner(threads)
        self._open = set(range(sequences))
        self._turn = threading.Condition()
        self._busy = False  # a thread runs the program
        self._requests: list[TokenRequest] = []
        self._together: set[int] = set()  # sequences of the last passes, which will ask again
        self._greedy: set[int] = set()  # sequences that decode without Python in between
        self._last_s = 0.0

    def forward(
        self, sequence: int, tokens: NDArray[np.int64], position: int, outputs: int
    ) -> NDArray[np.float32]:
        """Run tokens of a sequence in batches; logits [outputs, V] of the last of them."""
        n = len(tokens)
        if n == 1:
            return self._decode(sequence, int(tokens[0]), position)
        with self._exclusively():
            rows = (
                self._logits[:1]
                if outputs == 1
                else np.empty((outputs, self._logits.shape[1]), np.float32)
            )
            for start in range(0, n, self._batch):
                ids = tokens[start : start + self._batch]
                stop = start + len(ids)
                wanted = max(0, stop - max(start, n - outputs))
                into = rows[max(0, start - (n - outputs)) :] if wanted else rows
                # few tokens at once are limited by the same things as one
                threads = self._tuner.current if n <= SMALL else self._threads
                self._call(sequence, ids, position + start, wanted, into, 0, None, threads)
            return rows[:outputs, : self._vocab].copy()

    def hidden(
        self, sequence: int, tokens: NDArray[np.int64], position: int
    ) -> NDArray[np.float32]:
        """Run tokens of a sequence in batches; what the head would read, [T, rounded hidden]."""
        rows = np.empty((len(tokens), self.program.normed.shape[1]), np.float32)
        with self._exclusively():
            for start in range(0, len(tokens), self._batch):
                ids = tokens[start : start + self._batch]
                self._call(sequence, ids, position + start, 0, self._logits, 0, None, self._threads)
                rows[start : start + len(ids)] = self.program.normed[: len(ids)]
        return rows

    def mtp(self, context: int, kv_bits: int) -> SharedDecoder:
        """The model's multi-token-prediction head, for as many sequences; made at the first call.

        It shares the weights in memory.
        """
        with self._making_mtp:
            if self._mtp is None:
                self._mtp = SharedDecoder(
                    mtp_model(self._model), context, self._threads, kv_bits, True,
                    len(self.program.caches),
                )  # fmt: skip
            return self._mtp

    def ahead(
        self,
        sequence: int,
        tokens: NDArray[np.int64],
        position: int,
        states: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Run a multi-token-prediction head on tokens of a sequence and states [T, hidden].

        Returns:
            logits [V] and state [hidden] of the last.
        """
        states = np.ascontiguousarray(states, np.float32)
        with self._exclusively():
            for start in range(0, len(tokens), self._batch):
                ids = tokens[start : start + self._batch]
                last = start + len(ids) == len(tokens)
                threads = self._tuner.current if len(ids) <= SMALL else self._threads
                self._call(
                    sequence, ids, position + start, int(last), self._logits, 0, None, threads,
                    states=states[start : start + len(ids)],
                )  # fmt: skip
            row = len(ids) - 1
            state = self.program.normed[row, : self.config.hidden].copy()
            return self._logits[0, : self._vocab].copy(), state

    def greedy(
        self, sequence: int, token: int, position: int, steps: int
    ) -> tuple[list[int], bool]:
        """``steps`` greedy tokens after ``token``, and whether the last logits were numbers.

        They are computed without Python in between, unless other sequences decode too.
        """
        with self._turn:
            self._greedy.add(sequence)
        try:
            return self._chosen(sequence, token, position, steps)
        finally:
            with self._turn:
                self._greedy.discard(sequence)

    def _chosen(
        self, sequence: int, token: int, position: int, steps: int
    ) -> tuple[list[int], bool]:
        chosen: list[int] = []
        while len(chosen) < steps:
            at, last = position + len(chosen), chosen[-1] if chosen else token
            if self._others(sequence):
                logits = self._decode(sequence, last, at)[0]
                chosen.append(int(logits.argmax()))
                finite = bool(np.isfinite(logits.max()))
                continue
            with self._exclusively():
                room = np.zeros(steps - len(chosen), np.int64)
                done = self._burst(sequence, last, at, room)
                finite = bool(np.isfinite(self._logits[0, : self._vocab].max()))
            chosen += [int(one) for one in room[:done]]
        return chosen, finite

    def close(self, sequence: int) -> None:
        """A sequence is no longer used; the threads end with the last one."""
        self._open.discard(sequence)
        if not self._open:
            self._pool.close()

    # --- whose turn it is ---------------------------------------------------------------------

    def _exclusively(self) -> _Turn:
        return _Turn(self)

    def _others(self, sequence: int) -> bool:
        """Whether other sequences decode now."""
        if len(self.program.caches) == 1:
            return False
        with self._turn:
            asking = {request.sequence for request in self._requests}
            return bool((asking | self._together | self._greedy) - {sequence})

    def _decode(self, sequence: int, token: int, position: int) -> NDArray[np.float32]:
        """Logits [1, V] after one token, perhaps run together with those of other sequences."""
        request = TokenRequest(sequence, token, position)
        if len(self.program.caches) == 1:
            self.run_pass([request])
        else:
            self._await(request)
        if request.error is not None:
            raise request.error
        assert request.logits is not None
        return request.logits

    def _await(self, request: TokenRequest) -> None:
        """Have a request fulfilled, in a pass that this thread or another leads."""
        with self._turn:
            self._requests.append(request)
            self._turn.notify_all()
            while not request.done:
                missing = self._together - {one.sequence for one in self._requests}
                patience = max(WAIT_S, self._last_s / 2)
                waited = time.perf_counter() - min(one.since for one in self._requests or [request])
                if self._busy:
                    self._turn.wait()
                elif missing and waited < patience:
                    self._turn.wait(patience - waited)
                else:
                    self._lead()

    def _lead(self) -> None:
        """Run all tokens that are wished for. The caller holds the lock."""
        requests, self._requests = self._requests, []
        self._busy = True
        self._turn.release()
        started = time.perf_counter()
        try:
            self.run_pass(requests)
        except BaseException as err:  # noqa: BLE001  (every sequence of the pass gets it)
            for request in requests:
                request.error = err
        finally:
            self._last_s = time.perf_counter() - started
            self._turn.acquire()
            self._busy = False
            self._together = {request.sequence for request in requests}
            self._turn.notify_all()

    # --- running ------------------------------------------------------------------------------

    def run_pass(self, requests: list[TokenRequest]) -> None:
        """One pass of the program over the next token of each sequence."""
        if len(requests) == 1:
            request = requests[0]
            self._burst(request.sequence, request.token, request.position, self._no_tokens)
        else:
            ids = np.array([request.token for request in requests], np.int64)
            threads = self._tuner.current if len(requests) <= SMALL else self._threads
            self._call(
                requests[0].sequence,
                ids,
                0,
                len(requests),
                self._logits,
                0,
                None,
                threads,
                requests,
            )
        rows = self._logits[: len(requests), : self._vocab].copy()
        for number, request in enumerate(requests):
            request.logits = rows[number : number + 1]

    def _burst(self, sequence: int, token: int, position: int, chosen: NDArray[np.int64]) -> int:
        """One burst with the tuner's number of threads: greedy tokens into ``chosen`` (or, if
        that is empty, the logits after one token); returns how many."""
        threads, burst = self._tuner.next(max(1, len(chosen)))
        steps = burst if len(chosen) else 0
        start = time.perf_counter()
        ids = np.array([token], np.int64)
        self._call(sequence, ids, position, 1, self._logits, steps, chosen, threads)
        self._tuner.record(threads, burst, time.perf_counter() - start)
        return burst

    def _call(
        self,
        sequence: int,
        ids: NDArray[np.int64],
        position: int,
        outputs: int,
        logits: NDArray[np.float32],
        steps: int,
        chosen: NDArray[np.int64] | None,
        threads: int,
        batch: list[TokenRequest] | None = None,
        states: NDArray[np.float32] | None = None,
    ) -> None:
        """Run the compiled decoder on some threads side by side."""
        chosen = self._no_tokens if chosen is None else chosen
        tables = np.array([self.program.tables[one.sequence] for one in batch or ()], np.int64)
        positions = np.array([one.position for one in batch or ()], np.int64)
        call = self._call_record[0]
        call["program"] = self.program.record.ctypes.data
        call["threads"], call["tokens"], call["position"] = threads, len(ids), position
        call["ids"], call["outputs"] = ids.ctypes.data, outputs
        call["logits"], call["logits_stride"] = logits.ctypes.data, logits.strides[0]
        call["greedy"], call["chosen"] = steps, chosen.ctypes.data
        call["caches"] = self.program.tables[sequence]
        call["tables"] = tables.ctypes.data if batch else 0
        call["positions"] = positions.ctypes.data
        if states is not None:
            call["states"], call["states_stride"] = states.ctypes.data, states.strides[0]
        self._pool.call(decoder(), self._call_record.ctypes.data, threads)


class _Turn:
    """While it is entered, its thread alone runs the program."""

    def __init__(self, shared: SharedDecoder) -> None:
        self._shared = shared

    def __enter__(self) -> None:
        with self._shared._turn:
            self._shared._turn.wait_for(lambda: not self._shared._busy)
            self._shared._busy = True

    def __exit__(self, *_: object) -> None:
        with self._shared._turn:
            self._shared._busy = False
            self._shared._turn.notify_all()
