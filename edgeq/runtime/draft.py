"""A draft model: a small model proposes the next tokens, a large one checks them in one pass.

The answer is the large model's own, token for token: at temperature 0, and with random numbers too,
as each token is drawn from the large model's logits with the random number that it would have had
without a draft. The small model draws its proposals with the same random numbers, so that the two
mostly agree where their distributions do. So a seed gives one answer, however many tokens are
drafted. (Rejection sampling, the usual way, gives the same distribution and accepts somewhat more,
but its answers change with the number of drafted tokens, which depends on measured times.)

Source: Leviathan et al. 2023 (arXiv 2211.17192). Common random numbers are a coupling of the two
distributions; rejection sampling is the one that accepts most.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edgeq.core.errors import FormatError, UnsupportedError, UsageError, check_type
from edgeq.model.kv_bits import KvBits
from edgeq.model.memory_layout import DRAFT_CONTEXT
from edgeq.model.model import Model
from edgeq.runtime.engine import Engine
from edgeq.runtime.payoff import MOST, Payoff
from edgeq.runtime.sampling import Logits, Sampler

SHORTEST = 64
"""The shortest context that is of use."""
TAIL, TRIAL_TAIL = 256, 64
"""Last tokens of a text that are read where little of it was, once drafting pays and before."""


class Draft:
    """A small model that drafts for a large one with the same tokenizer.

    It learns from answer to answer how many tokens are worth drafting, and stops for a while where
    none are. One answer at a time may use it.

    Args:
        engine: of the small model; a context of 1024 tokens is enough.
        target: the large model.
        tokens: how many to draft at once, 1 to 16; None chooses by measured times.

    Raises:
        UsageError: the tokenizers differ, or ``tokens`` is out of range.

    Example:
        >>> model = edgeq.load("model.edgeq")
        >>> greedy = edgeq.SamplingParams(temperature=0)
        >>> with edgeq.Engine(edgeq.load("model")) as large, edgeq.Engine(model) as small:
        ...     draft = edgeq.Draft(small, large.model, tokens=4)
        ...     chunks = edgeq.generate(
        ...         large, edgeq.Tokenizer(model), "Once upon a time", greedy, max_tokens=20,
        ...         draft=draft,
        ...     )
        ...     last = list(chunks)[-1]
        >>> 0 < last.n_accepted <= last.n_drafted
        True
    """

    def __init__(self, engine: Engine, target: Model, tokens: int | None = None) -> None:
        if tokens is not None and (type(tokens) is not int or not 1 <= tokens <= MOST):
            raise UsageError(f"tokens is {tokens!r}; use 1 to {MOST}, or none to choose")
        check_type("engine", engine, Engine)
        check_type("target", target, Model)
        if engine.context < SHORTEST:
            raise UsageError(
                f"the draft model's context is {engine.context} tokens; use {SHORTEST} or more"
            )
        check_same_tokens(engine.model, target)
        self.engine, self.tokens = engine, tokens
        self.payoff = Payoff()
        self._start = 0  # the place in the text where the engine's sequence begins

    def close(self) -> None:
        """Release the small model's engine."""
        self.engine.close()

    def begin(self, text: Sequence[int], sampler: Sampler) -> TextDraft:
        """Draft for a text.

        Args:
            text: its tokens, with the last one, which the large model has not run yet.
            sampler: that chooses the large model's tokens.
        """
        return TextDraft(self, list(text), sampler)

    def missing(self, text: list[int]) -> list[int]:
        """The tokens of a text that the engine has yet to run, the last one at least."""
        engine, start = self.engine, self._start
        ready = 0
        for held, other in zip(engine.tokens, text[start:-1], strict=False):
            if held != other:
                break
            ready += 1
        tail = min(TAIL if self.payoff.pays else TRIAL_TAIL, engine.context - MOST)
        left = len(text) - start
        if not ready or left - ready > tail or left + MOST > engine.context:
            self._start, ready = max(0, len(text) - tail), 0
        engine.truncate(ready)
        return text[self._start + ready :]


def open_drafts(
    source: Model | str | Path,
    target: Model,
    sequences: int = 1,
    *,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    mmap: bool | None = None,
) -> list[Draft]:
    """Draft models for several sequences, which share one copy of the small model's weights.

    Args:
        source: the small model, or its path.
        target: the large model.
        sequences: that the large model decodes at a time.
        threads, kv_bits, backend, mmap: as `Engine` takes them.

    Raises:
        FormatError: the small model cannot be opened.
        UsageError: the tokenizers differ.
    """
    from edgeq.importers import load

    model = source if isinstance(source, Model) else load(source)
    check_same_tokens(model, target)
    engines = Engine.batch(
        model, sequences, context=min(DRAFT_CONTEXT, model.config.context), threads=threads,
        kv_bits=kv_bits, backend=backend, mmap=mmap,
    )  # fmt: skip
    try:
        return [Draft(engine, target) for engine in engines]
    except BaseException:
        for engine in engines:
            engine.close()
        raise


class TextDraft:
    """Drafts for one text as it grows."""

    def __init__(self, draft: Draft, text: list[int], sampler: Sampler) -> None:
        self._draft, self._text, self._sampler = draft, text, sampler
        self.draft_s = self.read_s = 0.0  # of the last draft

    def next(self) -> tuple[int, int]:
        """As `Payoff.next`."""
        fixed = self._draft.tokens
        return (fixed, 0) if fixed else self._draft.payoff.next()

    def propose(self, n: int) -> list[int]:
        """At most ``n`` tokens that may follow; none after a token that the small model lacks.

        Raises:
            FormatError: the small model's logits are not numbers.
            UnsupportedError: its keys or values are too large for its KV cache.
        """
        engine = self._draft.engine
        started = time.perf_counter()
        missing = self._draft.missing(self._text)
        if max(missing) >= engine.config.vocab:
            return []  # models of one tokenizer pad it differently, and this is padding
        try:
            if len(missing) > 2:
                engine.forward(missing[:-2])
                missing = missing[-2:]
            self.read_s = time.perf_counter() - started
            guesses = self._guesses(missing, n)
        except (FormatError, UnsupportedError) as err:
            raise type(err)(f"the draft model: {err}") from err
        self.draft_s = time.perf_counter() - started - self.read_s
        padding = (place for place, one in enumerate(guesses) if one >= self._sampler.vocab)
        return guesses[: next(padding, n)]

    def _guesses(self, missing: list[int], n: int) -> list[int]:
        engine, ahead = self._draft.engine, self._sampler.ahead()
        if ahead.params.plain_greedy:
            first = (
                [] if len(missing) == 1 else [int(self._known(engine.forward(missing)).argmax())]
            )
            rest = engine.greedy((missing + first)[-1], n - len(first))
            return [*first, *rest]
        guesses: list[int] = []
        while len(guesses) < n:
            logits = engine.forward(guesses[-1:] or missing)
            guesses.append(ahead.sample(self._known(logits)))
        return guesses

    def _known(self, logits: Logits) -> Logits:
        """Logits [V] of the large model's tokens; models of one tokenizer pad it differently."""
        vocab = self._sampler.vocab
        if len(logits) >= vocab:
            return logits[:vocab]
        return np.pad(logits, (0, vocab - len(logits)), constant_values=-np.inf)

    def extend(self, chosen: Sequence[int]) -> None:
        """The text has grown."""
        self._text += chosen

    def plain(self, tokens: int, seconds: float) -> None:
        """As `Payoff.plain`."""
        self._draft.payoff.plain(tokens, seconds)

    def checked(self, drafted: int, right: int, seconds: float) -> None:
        """The large model took so many seconds to check the last draft."""
        if drafted and not self._draft.tokens:
            self._draft.payoff.drafted(drafted, right, self.draft_s, seconds, self.read_s)


def check_same_tokens(draft: Model, target: Model) -> None:
    """Refuse a draft model whose tokens are not those of the large one.

    Raises:
        UsageError: names the first token that differs.
    """
    from edgeq.runtime.tokenizer import Tokenizer

    if not draft.files and not target.files:  # no tokenizers at all
        if draft.config.vocab != target.config.vocab:
            raise UsageError(
                f"the draft model has {draft.config.vocab} tokens and the model "
                f"{target.config.vocab}; a draft model needs the same tokenizer"
            )
        return
    small, large = Tokenizer(draft), Tokenizer(target)
    advice = "use a smaller model of the same family as draft"
    if small.vocab_size != large.vocab_size:
        raise UsageError(
            f"the tokenizer of the draft model has {small.vocab_size} tokens and that of the model "
            f"{large.vocab_size}; they must be the same: {advice}"
        )
    for token in range(large.vocab_size):
        if (small.token_name(token), small.token_bytes(token)) != (
            large.token_name(token),
            large.token_bytes(token),
        ):
            raise UsageError(
                f"token {token} is {small.token_name(token)!r} in the draft model and "
                f"{large.token_name(token)!r} in the model; they must have the same tokenizer: "
                f"{advice}"
            )
