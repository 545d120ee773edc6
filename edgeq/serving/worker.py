"""One answer: its prompt and how to generate, and the thread's part of the work."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError
from edgeq.model.memory_layout import BATCH
from edgeq.runtime.embedding import embedded
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import Constraint, FinishReason, Logprobs, generate
from edgeq.runtime.sampling import SamplingParams
from edgeq.runtime.tokenizer import Tokenizer
from edgeq.serving.failures import ApiError, of_model
from edgeq.serving.prefix_cache import PrefixCache
from edgeq.serving.slots import Slot, SlotPool

LOG = logging.getLogger("edgeq.serving")


@dataclass(frozen=True, kw_only=True)
class AnswerJob:
    """What an answer is made from.

    Args:
        prompt: token ids, at least one and at most the context.
        params: how tokens are chosen.
        max_tokens: the most to generate; None goes on until the context is full, 0 generates none.
        stop: strings that end the text.
        end_ids: tokens that end it in addition to the model's.
        logprobs: most likely tokens to report at each step; None reports none.
        score_prompt: report the log-probabilities of the prompt's tokens too.
        lookup: tokens to propose by prompt lookup.
        constraint: makes what the answer must obey; None if it is free.
        shown: special tokens whose text is part of the answer, such as the start of a tool call.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    max_tokens: int | None
    stop: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    lookup: int = 0
    constraint: Callable[[], Constraint] | None = None
    shown: tuple[int, ...] = ()


@dataclass(frozen=True)
class Started:
    """The prompt is being run.

    Args:
        n_prompt: its tokens.
        n_cached: how many of them were in a cache.
    """

    n_prompt: int
    n_cached: int


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of the prompt's tokens.

    Args:
        logprobs: of each token; None of the first, which nothing comes before.
    """

    logprobs: tuple[Logprobs | None, ...]


@dataclass(frozen=True)
class Piece:
    """The text that a token added, which may be empty.

    Args:
        text: new text.
        token: the token.
        logprobs: if they were asked for.
    """

    text: str
    token: int
    logprobs: Logprobs | None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The answer is complete.

    Args:
        text: the last of it.
        reason: why it ended.
        n_prompt, n_cached, n_generated: tokens.
        prefill_s: seconds until the first token's logits.
        decode_s: seconds for the tokens after the first.
        n_drafted, n_accepted: tokens that a draft proposed, and those that were right.
    """

    text: str
    reason: FinishReason
    n_prompt: int
    n_cached: int
    n_generated: int
    prefill_s: float
    decode_s: float
    n_drafted: int = 0
    n_accepted: int = 0

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token after the first; None if there was no second one."""
        return self.decode_s / (self.n_generated - 1) if self.n_generated > 1 else None


Event = Started | Scored | Piece | Ended


class _LeftError(Exception):
    """Nobody waits for the answer any more."""


class Worker:
    """Generates answers of one model on threads.

    Args:
        tokenizer: of the model.
        slots: of its engines.
        cache: of its sequences.
        threads: that generate; one for each slot.
        timeout_s: how long waiting and generating may take together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        slots: SlotPool,
        cache: PrefixCache,
        threads: ThreadPoolExecutor,
        timeout_s: float,
    ) -> None:
        self._tokenizer, self._slots, self._cache = tokenizer, slots, cache
        self._threads, self._timeout_s = threads, timeout_s

    async def events(self, job: AnswerJob) -> AsyncGenerator[Event, None]:
        """What happens while an answer is generated, `Started` first and `Ended` last.

        Closing the generator ends the work, and the slot is free as soon as the thread has noticed:
        after the token or the batch of the prompt that it is at.

        Raises:
            ApiError: no slot is to be had, or generating failed.
        """
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + self._timeout_s
        slot = await self._slots.take(job.prompt, self._timeout_s)
        events: asyncio.Queue[Event | ApiError] = asyncio.Queue()
        left = threading.Event()

        def emit(event: Event | ApiError) -> None:
            if left.is_set():
                raise _LeftError
            loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                self._run(slot, job, emit, left, deadline)
            except _LeftError:
                pass
            except Exception as err:
                LOG.exception("generating an answer failed")
                slot.engine.reset()
                loop.call_soon_threadsafe(events.put_nowait, of_model(err))
            finally:
                loop.call_soon_threadsafe(self._slots.release, slot)

        try:
            self._threads.submit(work)
        except RuntimeError as err:  # the threads were ended
            self._slots.release(slot)
            raise ApiError(503, "shutting_down", "the server is ending") from err
        try:
            while True:
                event = await events.get()
                if isinstance(event, ApiError):
                    raise event
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            left.set()

    async def embed(self, texts: Sequence[tuple[int, ...]], pooling: str) -> NDArray[np.float32]:
        """Embeddings of texts, [n, hidden], on a slot of their own.

        Canceling it ends the work after the text that it is at.

        Raises:
            ApiError: no slot is to be had, it took too long, or the model failed.
        """
        deadline = time.monotonic() + self._timeout_s
        slot = await self._slots.take((), self._timeout_s)
        left = threading.Event()
        loop = asyncio.get_running_loop()

        def work() -> NDArray[np.float32] | ApiError:
            found: list[NDArray[np.float32]] = []
            try:
                self._cache.prepare(slot.engine, ())  # keeps the conversation that was there
                for text in texts:
                    if left.is_set() or time.monotonic() > deadline:
                        return ApiError(
                            503, "timeout",
                            f"{len(found)} of {len(texts)} texts were embedded in "
                            f"{self._timeout_s:.0f} s; send fewer at once",
                        )  # fmt: skip
                    found.append(embedded(slot.engine, text, pooling))
                return np.stack(found)
            except Exception as err:
                LOG.exception("embedding a text failed")
                return of_model(err)
            finally:
                slot.engine.reset()
                loop.call_soon_threadsafe(self._slots.release, slot)

        try:
            running = loop.run_in_executor(self._threads, work)
        except RuntimeError as err:  # the threads were ended
            self._slots.release(slot)
            raise ApiError(503, "shutting_down", "the server is ending") from err
        try:
            await asyncio.wait([running])  # which goes on if this is canceled
        finally:
            left.set()
        result = running.result()
        if isinstance(result, ApiError):
            raise result
        return result

    def _run(
        self,
        slot: Slot,
        job: AnswerJob,
        emit: Callable[[Event], None],
        left: threading.Event,
        deadline: float,
    ) -> None:
        engine, started = slot.engine, time.perf_counter()
        if job.score_prompt:
            engine.reset()
            fresh: Sequence[int] = job.prompt
        else:
            fresh = self._cache.prepare(engine, job.prompt)
        n_cached = len(job.prompt) - len(fresh)
        emit(Started(len(job.prompt), n_cached))
        counts = {"n_prompt": len(job.prompt), "n_cached": n_cached}
        if job.score_prompt:
            emit(Scored(_score(engine, job, left)))
        if job.max_tokens == 0:
            seconds = time.perf_counter() - started
            emit(Ended(text="", reason="length", n_generated=0, prefill_s=seconds, decode_s=0.0,
                       **counts))  # fmt: skip
            return
        if job.score_prompt:
            engine.truncate(engine.n_past - 1)
            fresh = job.prompt[-1:]
        for start in range(0, len(fresh) - BATCH, BATCH):
            engine.forward(fresh[start : start + BATCH])
            if left.is_set() or time.monotonic() > deadline:
                break
        else:
            start = max(0, -(-len(fresh) // BATCH) - 1) * BATCH
            self._decode(slot, job, fresh[start:], emit, deadline, started, counts)
            return
        if left.is_set():
            raise _LeftError
        emit(Ended(text="", reason="length", n_generated=0, decode_s=0.0,
                   prefill_s=time.perf_counter() - started, **counts))  # fmt: skip

    def _decode(
        self,
        slot: Slot,
        job: AnswerJob,
        last: Sequence[int],
        emit: Callable[[Event], None],
        deadline: float,
        started: float,
        counts: dict[str, int],
    ) -> None:
        """Run the last batch of the prompt and generate."""
        before = time.perf_counter() - started
        chunks = generate(
            slot.engine, self._tokenizer, list(last), job.params, max_tokens=job.max_tokens,
            stop=job.stop, lookup=job.lookup if job.params.plain_greedy else 0,
            end_ids=job.end_ids, logprobs=job.logprobs, shown=job.shown,
            constraint=None if job.constraint is None else job.constraint(),
            draft=slot.draft,
        )  # fmt: skip
        with closing(chunks):
            for chunk in chunks:
                late = time.monotonic() > deadline
                if chunk.token is not None:
                    emit(Piece(chunk.text, chunk.token, chunk.logprobs))
                if chunk.token is None or late:
                    emit(
                        Ended(
                            text="" if chunk.token is not None else chunk.text,
                            reason=chunk.finish_reason or "length",
                            n_generated=chunk.n_generated,
                            prefill_s=before + chunk.prefill_s,
                            decode_s=chunk.decode_s,
                            n_drafted=chunk.n_drafted,
                            n_accepted=chunk.n_accepted,
                            **counts,
                        )
                    )
                    return


def _score(engine: Engine, job: AnswerJob, left: threading.Event) -> tuple[Logprobs | None, ...]:
    """Log-probabilities of a prompt's tokens, each given those before it."""
    found: list[Logprobs | None] = [None]
    for start in range(0, len(job.prompt), BATCH):
        ids = job.prompt[start : start + BATCH]
        rows = engine.forward(ids, all_logits=True)
        following = job.prompt[start + 1 : start + 1 + BATCH]
        found += [
            Logprobs.of(row, token, job.logprobs or 0)
            for row, token in zip(rows, following, strict=False)
        ]
        if left.is_set():
            raise _LeftError
    return tuple(found)


def check_prompt(prompt: Sequence[int], context: int, param: str) -> None:
    """Refuse a prompt that the context cannot hold.

    Raises:
        ApiError: it is empty or too long.
    """
    if not prompt:
        raise ApiError(400, "empty_prompt", "the prompt has no tokens; give it some text", param)
    if len(prompt) > context:
        raise ApiError(
            400,
            "context_length_exceeded",
            f"the prompt has {len(prompt)} tokens and the context of this server holds {context}; "
            "shorten it, or start the server with a larger --ctx-size",
            param,
        )


def encoded(make: Callable[[], list[int]], param: str) -> list[int]:
    """Tokens of a request's text, with what is wrong with it as the request's error.

    Raises:
        ApiError: it cannot be encoded.
    """
    from edgeq.serving.failures import of_request

    try:
        return make()
    except EdgeqError as err:
        raise of_request(err, param) from err
