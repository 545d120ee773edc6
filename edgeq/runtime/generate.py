"""Generation: prefill of a prompt, then decoding, as a stream of text.

Every chosen token gives one `Chunk`. A last chunk, without a token, has the reason for the end and
the remaining text. Text is withheld while it may be the start of a stop string, and while it ends
within a UTF-8 character, so that neither is ever shown.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.runtime.lookup import MAX_DRAFT, DraftLength, Lookup
from edgeq.runtime.prompt import prompt_ids
from edgeq.runtime.sampling import (
    Logits,
    Sampler,
    SamplingParams,
    log_probabilities,
    top_k_ids,
)

if TYPE_CHECKING:
    from edgeq.runtime.chat_template import Message
    from edgeq.runtime.draft import Draft
    from edgeq.runtime.drafting import DraftSource
    from edgeq.runtime.engine import Engine
    from edgeq.runtime.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]

BURST_S = 0.030
"""Greedy tokens are computed in bursts of about this long: short enough to look like a stream."""


MAX_LOGPROBS = 128
"""Most likely tokens that can be asked for at each step."""


class Constraint(Protocol):
    """What may be generated, token by token; `edgeq.runtime.constraint` makes them.

    A draft model goes ahead with a copy that ``copy.deepcopy`` makes.
    """

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, bool [V]; at least one, an end token at the end."""

    def accept(self, token: int) -> None:
        """Go on after this token, which was allowed."""


@dataclass(frozen=True)
class Logprobs:
    """How likely the model held the chosen token and others to be, before any change to its logits.

    Args:
        chosen: natural logarithm of the chosen token's probability.
        top: the most likely tokens by falling probability, with their logarithms.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]

    @staticmethod
    def of(logits: Logits, token: int, n: int) -> Logprobs:
        """The log-probabilities of a token and the ``n`` most likely ones, from logits [V]."""
        logs = log_probabilities(logits)
        ids = top_k_ids(logits, n) if n else ()
        return Logprobs(float(logs[token]), tuple((int(i), float(logs[i])) for i in ids))


@dataclass(frozen=True)
class Chunk:
    """One step of a generation.

    Args:
        text: new text, to be shown after what came before; may be empty.
        token: the chosen token, or None in the last chunk.
        finish_reason: None but in the last chunk: "stop" (end token or stop string) or "length"
            (max_tokens reached, or the context full).
        n_prompt: tokens prefilled.
        n_generated: tokens chosen so far, without an end token.
        prefill_s: seconds from the start until the first token's logits.
        decode_s: seconds spent on the tokens after the first, without the consumer's time.
        n_reused: tokens before the prompt that were in the cache already.
        n_drafted: tokens drafted by prompt lookup or a draft model.
        n_accepted: how many of those were accepted.
        logprobs: of the token, if they were asked for.
    """

    text: str
    token: int | None
    finish_reason: FinishReason | None
    n_prompt: int
    n_generated: int
    prefill_s: float
    decode_s: float
    n_reused: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    logprobs: Logprobs | None = None

    def __repr__(self) -> str:
        if self.finish_reason is None:
            return f"Chunk({self.text!r}, token={self.token})"
        return (
            f"Chunk({self.text!r}, finish_reason={self.finish_reason!r}, "
            f"n_prompt={self.n_prompt}, n_generated={self.n_generated})"
        )

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens a second."""
        return self.n_prompt / self.prefill_s if self.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Generated tokens a second; the first, which prefill gives, is not counted."""
        return (self.n_generated - 1) / self.decode_s if self.decode_s else None


def generate(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int] | Sequence[Message] | NDArray[np.integer[Any]],
    params: SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    lookup: int = 0,
    end_ids: Sequence[int] = (),
    logprobs: int | None = None,
    constraint: Constraint | None = None,
    shown: Sequence[int] = (),
    draft: Draft | None = None,
    mtp: bool = True,
) -> Generator[Chunk, None, None]:
    """Continue a text or a conversation, token by token.

    The prompt is appended to the engine's cache. Whether the generation ends or is closed early,
    the cache then also has the prompt and the generated tokens, except perhaps the last one.

    Args:
        engine: with a cache of ``engine.context`` tokens.
        tokenizer: of the model.
        prompt: a text, which is continued as it is; messages ({"role": ..., "content": ...}
            each), which are answered by the model's chat template; or token ids, at least one.
            A text starts with BOS if the tokenizer puts it there and the cache is empty.
            Messages are the whole conversation; the part that is in the cache is not run again.
        params: how tokens are chosen (temperature 0 without a penalty decodes in bursts); the
            defaults of `SamplingParams` if None.
        max_tokens: the most to generate; None goes on until the context is full.
        stop: strings that end the text and are not shown; they may span tokens.
        lookup: most tokens to draft at once by prompt lookup (`edgeq.runtime.lookup`), 0 for
            none. The tokens are the same as without, with every setting.
        end_ids: tokens that end the text, in addition to the tokenizer's and the model's.
            Messages also end at the token that the chat template writes after an answer.
        logprobs: give each chunk the log-probabilities of its token and of this many most likely
            ones, 0 to 128; None gives none.
        constraint: what may be generated, such as JSON of a schema
            (`edgeq.runtime.constraint`); anything if None.
        shown: special tokens that are written out in the text.
        draft: a small model that drafts tokens, which are checked in one pass. The tokens are the
            same as without, with every setting.
        mtp: draft with the model's own multi-token-prediction head, if it has one and neither
            ``lookup`` nor ``draft`` is given. The tokens are the same as without, with every
            setting.

    Returns:
        A generator of chunks. Arguments are checked at once, not at the first chunk.

    Raises:
        UsageError: an empty prompt, one longer than the context, or a wrong option.
        UnsupportedError: messages, and the model has no chat template.

    Example:
        >>> model = edgeq.load("model.edgeq")
        >>> tokenizer = edgeq.Tokenizer(model)
        >>> greedy = edgeq.SamplingParams(temperature=0)
        >>> with edgeq.Engine(model) as engine:
        ...     chunks = edgeq.generate(engine, tokenizer, "Once upon a time", greedy, max_tokens=4)
        ...     text = "".join(chunk.text for chunk in chunks)
        >>> text
        ', there was a'
    """
    params = SamplingParams() if params is None else params
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise UsageError(f"max_tokens is {max_tokens}; use at least 1, or none for no limit")
    if isinstance(stop, str):
        raise UsageError(f"stop is the string {stop!r}; give a list of strings")
    if not all(isinstance(text, str) for text in stop):
        raise UsageError(f"stop is {stop!r}; give a list of strings")
    if "" in stop:
        raise UsageError("a stop string is empty; it would stop before the first token")
    if not 0 <= lookup <= MAX_DRAFT:
        raise UsageError(f"lookup is {lookup}; use 0 (off) to {MAX_DRAFT}")
    if lookup and draft is not None:
        raise UsageError("prompt lookup and a draft model do not work together; choose one")
    if draft is not None and draft.engine is engine:
        raise UsageError(
            "the draft's engine is the one that generates; a draft needs an engine of its own"
        )
    if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= MAX_LOGPROBS):
        raise UsageError(f"logprobs is {logprobs}; use 0 to {MAX_LOGPROBS}, or none")
    ids, further_ends = prompt_ids(engine, tokenizer, prompt)
    if not ids:
        raise UsageError("the prompt has no tokens; give it some text")
    if engine.n_past + len(ids) > engine.context:
        before = f" after {engine.n_past} in the cache" if engine.n_past else ""
        raise UsageError(
            f"the prompt has {len(ids)} tokens{before} and the context holds "
            f"{engine.context}; shorten the prompt, or use a larger context (this model supports "
            f"up to {engine.config.context})"
        )
    source: DraftSource | None = draft
    if mtp and draft is None and not lookup:
        source = engine.mtp
    ends = all_end_ids(engine, tokenizer).union(end_ids, further_ends)
    return _Generation(
        engine,
        tokenizer,
        ids,
        params,
        max_tokens,
        tuple(stop),
        lookup,
        ends,
        logprobs,
        constraint,
        tuple(shown),
        source,
    ).run()


class _Generation:
    """One call of `generate`: its arguments, and what was generated so far."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        max_tokens: int | None,
        stop: tuple[str, ...],
        lookup: int,
        ends: frozenset[int],
        logprobs: int | None,
        constraint: Constraint | None,
        shown: tuple[int, ...],
        draft: DraftSource | None,
    ) -> None:
        self.engine, self.draft = engine, draft
        self.prompt = list(prompt_ids)
        self.history = [*engine.tokens, *self.prompt]
        self.params = params
        self.sampler = Sampler(params, engine.config.vocab)
        self.greedy = params.plain_greedy and constraint is None and logprobs is None
        self.ends = ends
        self.stop = stop
        self.lookup = lookup
        self.wanted_logprobs, self.constraint = logprobs, constraint
        self.logprobs: Logprobs | None = None  # of the last token
        self.verified: list[Logprobs | None] = []  # of the tokens of the last verified draft
        self.stream = (
            tokenizer.stream(self.history, shown) if shown else tokenizer.stream(self.history)
        )
        room = engine.context - engine.n_past - len(self.prompt)
        # the last token needs no room in the cache: it is shown but not run
        self.limit = room + 1 if max_tokens is None else min(max_tokens, room + 1)
        self.n_generated = self.n_drafted = self.n_accepted = 0
        self.prefill_s = self.decode_s = 0.0

    def run(self) -> Generator[Chunk, None, None]:
        withheld, stopped = "", False
        finish: FinishReason = "length"
        with closing(self.tokens()) as tokens:
            for token in tokens:
                if token in self.ends:
                    finish = "stop"
                    break
                self.n_generated += 1
                text = withheld + self.stream.push(token)
                text, withheld, stopped = split_at_stop(text, self.stop)
                yield self.chunk(text, token)
                if stopped:
                    break
        # an unfinished character in the stream is dropped: half of one is not text
        yield self.chunk(withheld, None, "stop" if stopped else finish)

    def chunk(self, text: str, token: int | None, finish: FinishReason | None = None) -> Chunk:
        return Chunk(
            text=text,
            token=token,
            finish_reason=finish,
            n_prompt=len(self.prompt),
            n_generated=self.n_generated,
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            n_reused=len(self.history) - len(self.prompt),
            n_drafted=self.n_drafted,
            n_accepted=self.n_accepted,
            logprobs=None if token is None else self.logprobs,
        )

    def tokens(self) -> Generator[int, None, None]:
        """Up to `limit` tokens; once closed, the cache lacks only the last one yielded."""
        started = time.perf_counter()
        logits = self.engine.forward(self.prompt)
        self.prefill_s = time.perf_counter() - started
        self.sampler.accept(self.history)
        token = self._choose(logits)
        yield token
        decode = self._bursts if self.greedy else self._one_by_one
        if self.lookup:
            decode = self._looked_up
        elif self.draft is not None:
            decode = self._drafted
        with self.engine.running_answers.runs(self.engine):
            yield from decode(token, self.limit - 1)

    def _alone(self) -> bool:
        return self.engine.running_answers.alone(self.engine)

    def _choose(self, logits: Logits) -> int:
        """The next token, within what the constraint allows; keeps its log-probabilities."""
        allowed = None if self.constraint is None else self.constraint.allowed()
        token = self.sampler.sample(logits, allowed)
        if self.constraint is not None:
            self.constraint.accept(token)
        if self.wanted_logprobs is not None:
            self.logprobs = Logprobs.of(logits, token, self.wanted_logprobs)
        return token

    def _plain(self, token: int, n: int) -> list[int]:
        """The next tokens without a draft: up to ``n`` greedy ones, or one."""
        if self.greedy:
            return self.engine.greedy(token, n)
        return [self._choose(self.engine.forward([token]))]

    def _one_by_one(self, token: int, n: int) -> Generator[int, None, None]:
        for _ in range(n):
            started = time.perf_counter()
            (token,) = self._plain(token, 1)
            self.decode_s += time.perf_counter() - started
            yield token

    def _bursts(self, token: int, n: int) -> Generator[int, None, None]:
        burst, left = 1, n
        while left:
            burst = min(burst, left)
            before = self.engine.n_past
            started = time.perf_counter()
            chosen = self.engine.greedy(token, burst)
            elapsed = time.perf_counter() - started
            self.decode_s += elapsed
            yield from self._yield_tokens(chosen, before)
            token = chosen[-1]  # starts the next burst
            left -= burst
            burst = next_burst(burst, elapsed)

    def _looked_up(self, token: int, n: int) -> Generator[int, None, None]:
        """Like `_bursts`, but drafts by prompt lookup are verified, each in one pass."""
        text = Lookup([*self.history, token])
        length, left = DraftLength(self.lookup), n
        while left:
            wanted = length.next() if self._alone() else 0
            draft = text.draft(min(wanted, left - 1))
            before = self.engine.n_past
            started = time.perf_counter()
            chosen = self._verify(token, draft) if draft else self._plain(token, 1)
            self.decode_s += time.perf_counter() - started
            if wanted:
                length.record(len(draft), len(chosen) - 1)
            yield from self._yield_tokens(chosen, before)
            text.extend(chosen)
            token = chosen[-1]
            left -= len(chosen)

    def _drafted(self, token: int, n: int) -> Generator[int, None, None]:
        """Like `_bursts`, but drafts of a small model are verified where this is faster."""
        assert self.draft is not None
        text = self.draft.begin([*self.history, token], self.sampler)
        burst, left = 1, n
        while left:
            wanted, plain = text.next(self._alone())
            started = time.perf_counter()
            draft: list[int] = []
            if wanted and left > 1:
                draft = text.propose(min(wanted, left - 1), self.constraint, self.ends)
            before, drafted_at = self.engine.n_past, time.perf_counter()
            if draft:
                chosen = self._verify(token, draft)
                elapsed = time.perf_counter() - drafted_at
                if self._alone():  # or it has waited for others
                    text.checked(len(draft), len(chosen) - 1, elapsed)
            else:
                burst = min(burst, left, plain or 1)
                chosen = self._plain(token, burst)
                elapsed = time.perf_counter() - drafted_at
                if self._alone():
                    text.plain(len(chosen), elapsed)
                burst = next_burst(burst, elapsed)
            self.decode_s += time.perf_counter() - started
            yield from self._yield_tokens(chosen, before)
            text.extend(chosen)
            token = chosen[-1]
            left -= len(chosen)

    def _verify(self, token: int, draft: list[int]) -> list[int]:
        """The tokens after ``token``: the accepted tokens of the draft, and one more.

        Each token is chosen as it would be without a draft. A drafted token is accepted if it is
        the same.
        """
        before = self.engine.n_past
        rows = self.engine.forward([token, *draft], all_logits=True)
        chosen: list[int] = []
        self.verified = []
        for row, guess in zip(rows, [*draft, None], strict=True):
            chosen.append(self._choose(row))
            self.verified.append(self.logprobs)
            if chosen[-1] != guess or guess in self.ends:
                break
        self.engine.truncate(before + len(chosen))
        self.n_drafted += len(draft)
        self.n_accepted += len(chosen) - 1
        return chosen

    def _yield_tokens(self, chosen: list[int], before: int) -> Generator[int, None, None]:
        """The tokens of one step. If closed early, those not yielded leave the cache."""
        yielded = 0
        logprobs, self.verified = self.verified, []
        try:
            for token in chosen:
                if logprobs:
                    self.logprobs = logprobs[yielded]
                yielded += 1
                yield token
        finally:
            if yielded < len(chosen):
                self.engine.truncate(before + yielded)


def all_end_ids(engine: Engine, tokenizer: Tokenizer) -> frozenset[int]:
    """Every token that ends a text: the tokenizer's and those of the model's configuration."""
    return frozenset(tokenizer.eos_ids) | frozenset(engine.config.eos)


def next_burst(burst: int, elapsed_s: float) -> int:
    """How many greedy tokens fit in `BURST_S`, judged by the last burst; at most twice its size."""
    fitting = int(BURST_S * burst / elapsed_s) if elapsed_s > 0 else 2 * burst
    return max(1, min(fitting, 2 * burst))


def split_at_stop(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """Cut text at the first stop string, or before what may become one.

    Args:
        text: what was withheld so far, plus new text.
        stop: the stop strings.

    Returns:
        (text to show, text to withhold, whether there was a stop string).

    Example:
        >>> split_at_stop("to be or n", ["not"])
        ('to be or ', 'n', False)
    """
    places = [place for s in stop if (place := text.find(s)) >= 0]
    if places:
        return text[: min(places)], "", True
    for start in range(max(0, len(text) - max(map(len, stop), default=0) + 1), len(text)):
        if any(s.startswith(text[start:]) for s in stop):
            return text[:start], text[start:], False
    return text, "", False
