"""Generates answers and embeddings of one model on threads."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import EdgeqError, UsageError
from edgeq.model.memory_layout import BATCH
from edgeq.runtime.embedding import Embedding, embedded
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import Constraint, FinishReason, Logprobs, generate
from edgeq.runtime.reranking import RerankPrompts
from edgeq.runtime.sampling import SamplingParams
from edgeq.runtime.tokenizer import Tokenizer
from edgeq.serving.failures import ApiError, of_model, of_request, shutting_down
from edgeq.serving.prefix_cache import PrefixCache
from edgeq.serving.slots import Slot, SlotPool

LOG = logging.getLogger("edgeq.serving")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class AnswerJob:
    """The prompt of an answer, and how to generate it.

    Args:
        prompt: token ids, at least one and at most the context.
        params: parameters of sampling.
        max_tokens: most tokens to generate. None generates until the context is full, 0 none.
        stop: strings that end the answer.
        end_ids: tokens that end the answer in addition to the model's end tokens.
        logprobs: number of most likely tokens to report at each step; None reports nothing.
        score_prompt: also report the log-probabilities of the prompt's tokens.
        lookup: number of tokens to draft by prompt lookup.
        constraint: makes the constraint that the answer must follow; None for no constraint.
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
    """The event that a slot is free and the prompt is being run.

    Args:
        n_prompt: number of tokens of the prompt.
        n_cached: number of these tokens that were in a KV cache.
    """

    n_prompt: int
    n_cached: int


@dataclass(frozen=True)
class Scored:
    """The event with the log-probabilities of the prompt's tokens.

    Args:
        logprobs: log-probabilities of each token given those before it; None for the first.
    """

    logprobs: tuple[Logprobs | None, ...]


@dataclass(frozen=True)
class Piece:
    """The event that a token was generated.

    Args:
        text: the text that the token adds, which may be empty.
        token: id of the token.
        logprobs: its log-probabilities; None if the request did not ask for them.
    """

    text: str
    token: int
    logprobs: Logprobs | None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The event that the answer is complete.

    Args:
        text: the last text of the answer, which may be empty.
        reason: why the answer ended.
        n_prompt, n_cached, n_generated: number of tokens of the prompt, of those in a KV cache, and
            of the answer.
        prefill_s: seconds until the logits of the first token.
        decode_s: seconds for the tokens after the first.
        n_drafted, n_accepted: number of drafted tokens, and of those that were accepted.
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
        """Mean seconds per token after the first; None if there was no second token."""
        return self.decode_s / (self.n_generated - 1) if self.n_generated > 1 else None


Event = Started | Scored | Piece | Ended


class _LeftError(Exception):
    """The client disconnected, so nobody reads the answer."""


class Worker:
    """Generates answers of one model on threads.

    Args:
        tokenizer: tokenizer of the model.
        slots: slots of the model.
        cache: KV caches of earlier sequences of the model.
        threads: executor with one thread for each slot.
        timeout_s: most seconds of waiting for a slot and generating together.
        mtp: draft with the model's own multi-token-prediction head where it has one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        slots: SlotPool,
        cache: PrefixCache,
        threads: ThreadPoolExecutor,
        timeout_s: float,
        mtp: bool = True,
    ) -> None:
        self._tokenizer, self._slots, self._cache = tokenizer, slots, cache
        self._threads, self._timeout_s, self._mtp = threads, timeout_s, mtp
        self._end = math.inf  # when all answers end

    def end_by(self, end: float) -> None:
        """Let answers end at this time of the monotonic clock, with the tokens that they have.

        Requests that wait for a slot then are refused.
        """
        self._end = end

    def _late(self, deadline: float) -> bool:
        return time.monotonic() > min(deadline, self._end)

    async def events(self, job: AnswerJob) -> AsyncGenerator[Event, None]:
        """Generate an answer and yield its events: `Started` first and `Ended` last.

        Closing the generator cancels the answer. The slot is free once the thread has finished the
        current token or the current batch of the prompt.

        Raises:
            ApiError: no slot became free, or generation failed.
        """
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + self._timeout_s
        slot = await self._slots.take(job.prompt, self._timeout_s)
        self._refuse_at_the_end(slot)
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
            except UsageError as err:  # a grammar that cannot be followed to its end
                slot.engine.reset()
                loop.call_soon_threadsafe(events.put_nowait, of_request(err, None))
            except Exception as err:
                LOG.exception("generating an answer failed")
                slot.engine.reset()
                loop.call_soon_threadsafe(events.put_nowait, of_model(err))
            finally:
                loop.call_soon_threadsafe(self._slots.release, slot)

        try:
            self._threads.submit(work)
        except RuntimeError as err:  # the executor was shut down
            self._slots.release(slot)
            raise shutting_down() from err
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

    async def embed(
        self, texts: Sequence[tuple[int, ...]], skipped: Sequence[int], how: Embedding
    ) -> NDArray[np.float32]:
        """Compute the embeddings [n, dimensions] of texts on one slot.

        Raises:
            ApiError: see `_each`.
        """

        def one(engine: Engine, number: int, check: Callable[[], None]) -> NDArray[np.float32]:
            return embedded(engine, texts[number], how, skipped[number], check)

        return np.stack(await self._each(len(texts), one, "embedded"))

    async def rank(self, prompts: Sequence[list[int]], by: RerankPrompts) -> list[float]:
        """The relevance of the document of each prompt, on one slot.

        Raises:
            ApiError: see `_each`.
        """

        def one(engine: Engine, number: int, check: Callable[[], None]) -> float:
            return by.score(engine, prompts[number], check)

        return await self._each(len(prompts), one, "ranked")

    async def _each(
        self, count: int, run: Callable[[Engine, int, Callable[[], None]], T], what: str
    ) -> list[T]:
        """What a function makes of each of some texts on one slot.

        Canceling the coroutine ends the work after the current batch of tokens.

        Args:
            count: how many texts.
            run: takes the engine, the number of a text, and what to call after each batch.
            what: what is done with them, for the message.

        Raises:
            ApiError: no slot became free, the time limit was exceeded, or the model failed.
        """
        deadline = time.monotonic() + self._timeout_s
        slot = await self._slots.take((), self._timeout_s)
        self._refuse_at_the_end(slot)
        left = threading.Event()
        loop = asyncio.get_running_loop()

        def work() -> list[T] | ApiError:
            found: list[T] = []

            def check() -> None:
                if left.is_set() or self._late(deadline):
                    raise ApiError(
                        503, "timeout",
                        f"{len(found)} of {count} texts were {what} in "
                        f"{self._timeout_s:.0f} s; send fewer or shorter ones at once",
                    )  # fmt: skip

            try:
                self._cache.prepare(slot.engine, ())  # keeps a snapshot of the last conversation
                for number in range(count):
                    check()
                    found.append(run(slot.engine, number, check))
                return found
            except ApiError as err:
                return err
            except Exception as err:
                LOG.exception("a text could not be %s", what)
                return of_model(err)
            finally:
                slot.engine.reset()
                loop.call_soon_threadsafe(self._slots.release, slot)

        try:
            running = loop.run_in_executor(self._threads, work)
        except RuntimeError as err:  # the executor was shut down
            self._slots.release(slot)
            raise shutting_down() from err
        try:
            await asyncio.wait([running])  # the thread continues if this is canceled
        finally:
            left.set()
        result = running.result()
        if isinstance(result, ApiError):
            raise result
        return result

    def _refuse_at_the_end(self, slot: Slot) -> None:
        """Give a slot back where answers have ended.

        Raises:
            ApiError: they have.
        """
        if self._late(math.inf):
            self._slots.release(slot)
            raise shutting_down()

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
            if left.is_set() or self._late(deadline):
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
        """Run the last batch of the prompt and generate the answer."""
        before = time.perf_counter() - started
        chunks = generate(
            slot.engine, self._tokenizer, list(last), job.params, max_tokens=job.max_tokens,
            stop=job.stop, lookup=job.lookup, end_ids=job.end_ids, logprobs=job.logprobs,
            shown=job.shown, constraint=None if job.constraint is None else job.constraint(),
            draft=slot.draft, mtp=self._mtp,
        )  # fmt: skip
        with closing(chunks):
            for chunk in chunks:
                late = self._late(deadline)
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
    """Log-probabilities of a prompt's tokens, each given the tokens before it."""
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
    """Refuse a prompt that is empty or longer than the context.

    Args:
        prompt: token ids.
        context: context of the model, in tokens.
        param: field of the request, for the message.

    Raises:
        ApiError: the prompt is empty or too long.
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


def encoded(make: Callable[[], T], param: str) -> T:
    """Encode a text of a request.

    Args:
        make: encodes the text.
        param: field of the request, for the message.

    Raises:
        ApiError: the text cannot be encoded.
    """
    try:
        return make()
    except EdgeqError as err:
        raise of_request(err, param) from err
