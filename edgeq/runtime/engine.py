"""The engine: runs a model on tokens, with a KV cache.

Weights are used from the memory-mapped file (or a copy of it) and never unpacked as a whole; every
buffer is allocated once. Memory beyond the weights is the KV cache plus `Engine.scratch_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.cpu import available_cores
from edgeq.core.errors import FormatError, UnsupportedError, UsageError, check_type, unknown
from edgeq.model.config import ModelConfig
from edgeq.model.kv_bits import KvBits, checked_kv_bits, overflow_message
from edgeq.model.memory_layout import MAX_SEQUENCES, center_span
from edgeq.model.model import Model
from edgeq.model.rotary import default_context
from edgeq.model.whole_texts import check_generates, check_whole
from edgeq.runtime import kv_state as state
from edgeq.runtime.backend import Backend
from edgeq.runtime.running_answers import RunningAnswers
from edgeq.runtime.sampling import NOT_FINITE

if TYPE_CHECKING:  # it names fields of the compiled kernels, which the NumPy backend does without
    from edgeq.runtime.mtp import MtpDraft
    from edgeq.runtime.step_times import StepTimes

BACKENDS = ("numba", "numpy")
_CHECK_EVERY = 16
"""Tokens after which a float16 cache is checked for values that float16 cannot represent."""


class Engine:
    """Runs a model token by token, with a KV cache.

    Args:
        model: from `edgeq.load`: packed, or floating point straight from its file.
        context: longest sequence in tokens; the model's own limit, at most 4096, if None.
            Rotary positions that depend on the length are those of this context, see
            `edgeq.model.rotary`.
        threads: how many; all cores this process may use if None.
        kv_bits: 8 (a scale per token and head), 16 (float16), or 4 (as 8, with heads rotated by a
            Hadamard matrix: half the memory, and answers that differ more).
        backend: "numba" (compiled) or "numpy" (slow, same answers, needs no compiler).
        mmap: True uses weights in their mapped file: memory the system can take back. False
            copies them to memory of huge pages, which decodes faster. None copies if the copy
            takes at most half of the free memory. (The NumPy backend never copies.)

    Raises:
        UsageError: an argument is out of range.
        FormatError: a tensor is missing or has the wrong shape.

    Example:
        >>> with edgeq.Engine(edgeq.load("model.edgeq"), context=64) as engine:
        ...     logits = engine.forward([1, 2, 3])
        >>> logits.shape == (engine.config.vocab,)
        True
    """

    _run: Backend

    def __init__(
        self,
        model: Model,
        *,
        context: int | None = None,
        threads: int | None = None,
        kv_bits: KvBits = 8,
        backend: str = "numba",
        mmap: bool | None = None,
    ) -> None:
        self._prepare(model, context, threads, kv_bits, backend)
        self._run = self._backends(1, mmap)[0]

    @classmethod
    def batch(
        cls,
        model: Model,
        sequences: int,
        *,
        context: int | None = None,
        threads: int | None = None,
        kv_bits: KvBits = 8,
        backend: str = "numba",
        mmap: bool | None = None,
    ) -> list[Engine]:
        """Engines of one model, for a thread of Python each, whose tokens are decoded together.

        They share weights, buffers and threads. Those that decode at about the same time have
        their next tokens run in one pass over the weights, which takes little longer than one
        token; each result is what the engine would give alone, bit for bit.

        Args:
            model: as for one engine.
            sequences: how many engines.
            context, threads, kv_bits, backend, mmap: as for one engine. With NumPy they share
                nothing but the weights.

        Raises:
            UsageError, FormatError: as for one engine.

        Example:
            >>> first, second = edgeq.Engine.batch(edgeq.load("model.edgeq"), 2, context=64)
            >>> first.forward([1, 2, 3]).shape == second.forward([4]).shape
            True
            >>> first.close(), second.close()
            (None, None)
        """
        if not 1 <= sequences <= MAX_SEQUENCES:
            raise UsageError(f"sequences is {sequences}; use 1 to {MAX_SEQUENCES}")
        engines = [cls.__new__(cls) for _ in range(sequences)]
        for engine in engines:
            engine._prepare(model, context, threads, kv_bits, backend)
        for engine, run in zip(engines, engines[0]._backends(sequences, mmap), strict=True):
            engine._run = run
            if backend == "numba":
                engine.running_answers = engines[0].running_answers
        return engines

    def _prepare(
        self,
        model: Model,
        context: int | None,
        threads: int | None,
        kv_bits: KvBits,
        backend: str,
    ) -> None:
        """Check the settings of an engine and set all but its backend."""
        check_type("model", model, Model)
        if backend not in BACKENDS:
            raise UsageError(unknown("backend", backend, BACKENDS))
        if threads is not None and not 1 <= threads <= 256:
            raise UsageError(f"threads is {threads}; use 1 to 256")
        limit = model.config.context
        if context is None:
            context = default_context(model.config)
        if not 1 <= context <= limit:
            raise UsageError(f"context is {context}; this model supports 1 to {limit} tokens")
        model.validate()
        self.model = model
        self.context = context
        self.threads = threads or available_cores()
        self.kv_bits = checked_kv_bits(kv_bits)
        self.backend = backend
        self._tokens: list[int] = []
        self._ready = 0  # how many of them are in the backend's cache
        self._checked = 0  # how many of them `_check_cache` has seen
        self._windowed = [
            i for i, block in enumerate(model.config.blocks) if block.window and not block.delta
        ]
        self._fingerprint: str | None = None
        self._mtp: MtpDraft | None = None
        self._closed = False
        self.running_answers = RunningAnswers()

    def _backends(self, sequences: int, mmap: bool | None) -> list[Backend]:
        """A backend for each of some sequences."""
        if self.backend != "numba":
            from edgeq.runtime.numpy_backend import NumpyBackend

            return [NumpyBackend(self.model, self.context, self.kv_bits) for _ in range(sequences)]
        from edgeq.runtime.compiled import CompiledBackend
        from edgeq.runtime.shared_decoder import SharedDecoder

        decoder = SharedDecoder(
            self.model, self.context, self.threads, self.kv_bits, mmap, sequences
        )
        return [CompiledBackend(decoder, sequence) for sequence in range(sequences)]

    @property
    def config(self) -> ModelConfig:
        """The model's hyperparameters."""
        return self.model.config

    @property
    def tokens(self) -> list[int]:
        """The sequence: a copy of the tokens whose keys and values are in the cache."""
        return list(self._tokens)

    @property
    def n_past(self) -> int:
        """How many tokens the sequence has."""
        return len(self._tokens)

    @property
    def mtp(self) -> MtpDraft | None:
        """Drafts of the model's own multi-token-prediction head; None if it has none that fits."""
        if self._mtp is None and self.config.mtp is not None and not self._closed:
            from edgeq.runtime.mtp import own_draft

            self._mtp = own_draft(self, self._run)
        return self._mtp

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache."""
        return self._run.kv_bytes

    @property
    def scratch_bytes(self) -> int:
        """Bytes of all other buffers."""
        return self._run.scratch_bytes

    def forward(self, tokens: Any, all_logits: bool = False) -> NDArray[np.float32]:
        """Append tokens to the sequence and run them (one: decode; several: prefill).

        Args:
            tokens: token ids, int [T], T >= 1.
            all_logits: logits of every token instead of the last.

        Returns:
            float32 [V], or [T, V] with ``all_logits``.

        Raises:
            UsageError: no tokens, an id outside the vocabulary, the context would overflow, or the
                engine is closed.
            UnsupportedError: the model's keys or values are too large for the KV cache, or it
                cannot generate text.
        """
        ids = np.atleast_1d(np.asarray(tokens, dtype=np.int64))
        check_generates(self.config)
        self._check(ids)
        self._catch_up()
        logits = self._run.forward(ids, self.n_past, len(ids) if all_logits else 1)
        self._extend(ids.tolist())
        self._check_cache(bool(np.isfinite(logits.max())))  # NaN if any is
        return logits if all_logits else logits[0]

    def hidden(self, tokens: Any) -> NDArray[np.float32]:
        """Append tokens to the sequence and run them, without logits.

        Args:
            tokens: token ids, int [T], T >= 1.

        Returns:
            float32 [T, hidden]: the final norm of each token, which the output head would read.

        Raises:
            UsageError: no tokens, an id outside the vocabulary, the context would overflow, or the
                engine is closed.
            UnsupportedError: the model's keys or values are too large for the KV cache.
            FormatError: they are not numbers.
        """
        ids = np.atleast_1d(np.asarray(tokens, dtype=np.int64))
        self._check(ids)
        self._catch_up()
        states = self._run.hidden(ids, self.n_past)[:, : self.config.hidden]
        self._extend(ids.tolist())
        finite = bool(np.isfinite(states).all())
        self._check_cache(finite)
        if not finite:
            raise FormatError(NOT_FINITE)
        return np.ascontiguousarray(states)

    def greedy(self, token: int, n: int) -> list[int]:
        """Append ``token``, then decode greedily; returns the next ``n`` tokens.

        The last of them is not yet in the cache, just as after `forward`.

        Raises:
            UsageError: an id outside the vocabulary, the context would overflow, or the engine is
                closed.
            UnsupportedError: the model's keys or values are too large for the KV cache.
            FormatError: the logits are not numbers.
        """
        if n < 1:
            return []
        check_generates(self.config)
        self._check(np.array([token], np.int64), n)
        self._catch_up()
        chosen = self._run.greedy(int(token), self.n_past, n)
        self._extend([int(token), *chosen[:-1]])
        finite = self._run.is_finite()
        self._check_cache(finite)
        if not finite:
            raise FormatError(NOT_FINITE)
        return chosen

    def truncate(self, n: int) -> None:
        """Keep the first ``n`` tokens of the sequence and remove the rest.

        The cache of a layer with a sliding window or a short convolution has little more than the
        positions it sees. If it no longer has
        what token ``n`` would see, the remaining tokens are run again when the sequence is
        continued. Removing up to `edgeq.runtime.lookup.MAX_DRAFT` tokens never costs that, but for
        gated delta nets, of which this holds for the tokens of the last `forward`.
        """
        if not 0 <= n <= self.n_past:
            raise UsageError(f"cannot truncate to {n} tokens; the sequence has {self.n_past}")
        self._ready = min(self._ready, n)
        self._checked = min(self._checked, n)
        self._run.truncate(self._ready)
        del self._tokens[n:]

    def reuse(self, tokens: Sequence[int]) -> list[int]:
        """Cut the sequence back to what it has in common with the beginning of ``tokens``.

        Returns:
            The tokens still to be run, at least one: its logits say what comes next.
        """
        common = 0
        most = min(self.n_past, len(tokens) - 1)
        while common < most and self._tokens[common] == tokens[common]:
            common += 1
        self.truncate(common)
        return list(tokens[common:])

    def reset(self) -> None:
        """Remove the whole sequence."""
        self.truncate(0)

    @contextmanager
    def timed_steps(self) -> Iterator[StepTimes]:
        """Sum up the time of every step of the decoder while the block runs.

        Raises:
            UnsupportedError: the backend is NumPy, whose steps are not timed.
        """
        if self.backend != "numba":
            raise UnsupportedError(
                "the NumPy backend is not timed inside; use the backend 'numba' for its steps"
            )
        from edgeq.runtime.compiled import CompiledBackend

        assert isinstance(self._run, CompiledBackend)
        times = self._run.new_times()
        self._run.time_steps(times)
        try:
            yield times
        finally:
            self._run.time_steps(None)

    def save_state(self, path: str | Path) -> int:
        """Write the sequence, its tokens and cache, to a file; see `edgeq.runtime.kv_state`.

        Args:
            path: the file to create or replace, atomically.

        Returns:
            Its size in bytes.

        Raises:
            UsageError: the sequence is empty.
            EdgeqError: the file cannot be written.
        """
        if not self._tokens:
            raise UsageError("the sequence is empty; run some tokens before saving its state")
        self._settle()
        starts = [self._run.first(i) for i in range(self.config.layers)]
        return state.save(
            path, self.config, self._model_id(), self.kv_bits, self._tokens, starts, self._run.read,
            self.context,
        )  # fmt: skip

    def load_state(self, path: str | Path) -> None:
        """Replace the sequence by one that `save_state` wrote.

        The number of threads and the backend may differ from those of the engine that saved, and
        the context if the model's rotary positions do not depend on it.

        Raises:
            FormatError: the file cannot be read, is damaged, or is not a saved state.
            UsageError: it is of another model or kv_bits, too long, or rotated for another context.
        """
        saved = state.load(path, self.config, self._model_id(), self.kv_bits, self.context)
        self._replace(saved.tokens, saved.layers())
        saved.file.close()

    def snapshot(self) -> state.Snapshot:
        """A copy of the sequence, its tokens and cache, in memory.

        Raises:
            UsageError: the sequence is empty.
        """
        if not self._tokens:
            raise UsageError("the sequence is empty; run some tokens before copying its state")
        self._settle()
        layers = []
        for layer in range(self.config.layers):
            start = self._run.first(layer)
            parts = self._run.read(layer, start, self.n_past)
            layers.append((start, {name: part.copy() for name, part in parts.items()}))
        return state.Snapshot(
            self._model_id(), self.kv_bits, tuple(self._tokens), tuple(layers), self.context
        )

    def restore(self, snapshot: state.Snapshot) -> None:
        """Replace the sequence by one that `snapshot` copied, perhaps from another engine.

        Raises:
            UsageError: it is of another model or kv_bits, too long, or rotated for another context.
        """
        snapshot.check(self.config, self._model_id(), self.kv_bits, self.context)
        self._replace(list(snapshot.tokens), snapshot.layers)

    def close(self) -> None:
        """Release threads and buffers; the engine runs no tokens afterwards."""
        self._closed = True
        if self._mtp is not None:
            self._mtp.close()
        self._run.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _replace(self, tokens: list[int], layers: Iterable[tuple[int, state.Parts]]) -> None:
        """Put a sequence that was kept elsewhere in the place of this one."""
        self.reset()
        for layer, (start, parts) in enumerate(layers):
            self._run.write(layer, start, parts)
        self._extend(tokens)

    def _extend(self, tokens: list[int]) -> None:
        self._tokens += tokens
        self._ready = len(self._tokens)

    def _check_cache(self, finite: bool) -> None:
        """Raise an error if the model's keys or values overflowed the KV cache.

        An infinity need not show in the logits, so a float16 cache is checked every few tokens; an
        one of integers, which represents far larger values, only if logits are not finite.
        """
        ahead = self.n_past - self._checked
        due = self.kv_bits == 16 and (not self._checked or ahead >= _CHECK_EVERY)
        if finite and not due:
            return
        start, span = self._checked if finite else 0, center_span(self.kv_bits)
        self._checked = self.n_past
        for layer, block in enumerate(self.config.blocks):
            if block.mixer != "attention":
                continue  # its state is float32 and overflows where the model's arithmetic does
            first = max(start, self._run.first(layer)) // span * span
            for name, part in self._run.read(layer, first, self.n_past).items():
                if part.dtype.kind != "f" or np.isfinite(part).all():
                    continue
                # NaN, and infinities from infinite weights, are faults of the model
                if not np.isnan(part).any() and state.is_sound(self.model, layer):
                    raise UnsupportedError(overflow_message(layer, name, self.kv_bits))
                return

    def _catch_up(self) -> None:
        """Run tokens again that are no longer in the backend's cache; see `truncate`.

        Raises:
            UsageError: the engine is closed, so that no thread would do the work.
        """
        if self._closed:
            raise UsageError("the engine is closed; make another one, or close it later")
        lost = any(
            self._run.first(i) > self.config.blocks[i].first_seen(self._ready)
            for i in self._windowed
        )
        if lost or not self._run.resumes(self._ready):
            self._ready = 0
            self._run.truncate(0)
        if self._ready < self.n_past:
            ids = np.array(self._tokens[self._ready :], np.int64)
            self._run.forward(ids, self._ready, 1)
            self._ready = self.n_past

    def _settle(self) -> None:
        """Catch up, and have the states of gated delta nets be those after the last token."""
        self._catch_up()
        if not self._run.settle(self.n_past):
            last = np.array(self._tokens[-1:], np.int64)
            self._run.forward(last, self.n_past - 1, 1)

    def _model_id(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = state.fingerprint(self.model)
        return self._fingerprint

    def _check(self, ids: NDArray[np.int64], steps: int | None = None) -> None:
        if ids.ndim != 1 or not len(ids):
            raise UsageError("there are no tokens to run; pass at least one")
        vocab = self.config.vocab
        if ids.min() < 0 or ids.max() >= vocab:
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise UsageError(f"token id {bad} is outside the vocabulary 0 .. {vocab - 1}")
        check_whole(self.config, self.n_past)
        more = len(ids) if steps is None else steps
        if self.n_past + more > self.context:
            raise UsageError(
                f"the context has {self.n_past} tokens and {more} more were given, but it "
                f"holds {self.context}; use a longer context (up to {self.config.context}) "
                "or fewer tokens"
            )
