"""What draft models and multi-token-prediction heads have in common: drafts for a growing text.

See `edgeq.runtime.draft` for what is drafted and why answers stay the same.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.model.config import ModelConfig
from edgeq.runtime.payoff import Payoff
from edgeq.runtime.sampling import Logits, Sampler

if TYPE_CHECKING:
    from edgeq.runtime.generate import Constraint

SHORTEST = 64
"""The shortest context that a draft model may have, in tokens."""
TOGETHER = 16
"""The most tokens that are decoded beside other answers before it is asked again whether there are
any."""
TAIL, TRIAL_TAIL = 256, 64
"""How many of the last tokens a draft model reads when most of the text is not in its KV cache:
once drafting is known to be faster, and before."""


class Drafter(Protocol):
    """What drafts tokens: the engine of a small model, or a multi-token-prediction head."""

    context: int

    @property
    def config(self) -> ModelConfig:
        """Hyperparameters."""

    @property
    def tokens(self) -> list[int]:
        """The tokens in the cache."""

    def truncate(self, n: int) -> None:
        """Keep the first ``n`` tokens."""

    def forward(self, tokens: Any) -> Logits:
        """Append tokens; logits [V] of what follows the last."""

    def greedy(self, token: int, n: int) -> list[int]:
        """Append ``token``, then the likeliest one ``n`` times; those are returned."""

    def close(self) -> None:
        """Release threads and memory."""


class DraftSource(ABC):
    """What drafts for one answer at a time, and measures how many tokens are worth drafting.

    Attributes:
        engine: drafts the tokens.
        tokens: number of tokens to draft at once; None chooses it from measured times.
        payoff: what was measured so far.
    """

    kind = "the draft model"  # what messages call it
    engine: Drafter
    tokens: int | None
    payoff: Payoff

    def close(self) -> None:
        """Release the engine."""
        self.engine.close()

    def begin(self, text: Sequence[int], sampler: Sampler) -> TextDraft:
        """Start drafting for a text.

        Args:
            text: its tokens, including the last one, which the large model has not processed yet.
            sampler: the sampler that chooses the large model's tokens.

        Returns:
            Drafts for this text, which the caller tells about every token that is added.
        """
        return TextDraft(self, list(text), sampler)

    @abstractmethod
    def missing(self, text: list[int]) -> list[int]:
        """The tokens of a text that the engine has not processed yet; none if it cannot draft."""


class TextDraft:
    """Drafts for one text, to which tokens are added."""

    def __init__(self, draft: DraftSource, text: list[int], sampler: Sampler) -> None:
        self._draft, self._text, self._sampler = draft, text, sampler
        self.draft_s = self.read_s = 0.0  # seconds of the last draft: to propose, and to read text

    def next(self, alone: bool) -> tuple[int, int]:
        """Number of tokens to draft now; where it is 0, also how many to decode without a draft.

        Args:
            alone: whether no other answer is generated in the same passes. Otherwise nothing is
                drafted: the rows of a pass that verify drafts give others' tokens instead.
        """
        if self._draft.tokens:
            return self._draft.tokens, 0
        return self._draft.payoff.next() if alone else (0, TOGETHER)

    def propose(
        self, n: int, constraint: Constraint | None = None, ends: Collection[int] = ()
    ) -> list[int]:
        """Propose at most ``n`` next tokens; none after a token that the small model does not have.

        Args:
            n: at least 1.
            constraint: what the next tokens may be; a copy of it is used.
            ends: tokens after which a text with a constraint ends.

        Raises:
            FormatError: the small model's logits contain NaN.
            UnsupportedError: the small model's keys or values are too large for its KV cache.
        """
        engine = self._draft.engine
        started = time.perf_counter()
        missing = self._draft.missing(self._text)
        if not missing or max(missing) >= engine.config.vocab:
            return []  # the vocabularies are padded to different lengths; this token is padding
        try:
            if len(missing) > 2:
                engine.forward(missing[:-2])
                missing = missing[-2:]
            self.read_s = time.perf_counter() - started
            guesses = self._guesses(missing, n, copy.deepcopy(constraint), ends)
        except (FormatError, UnsupportedError) as err:
            raise type(err)(f"{self._draft.kind}: {err}") from err
        self.draft_s = time.perf_counter() - started - self.read_s
        padding = (i for i, token in enumerate(guesses) if token >= self._sampler.vocab)
        return guesses[: next(padding, n)]

    def _guesses(
        self, missing: list[int], n: int, constraint: Constraint | None, ends: Collection[int]
    ) -> list[int]:
        engine, ahead = self._draft.engine, self._sampler.ahead()
        if ahead.params.plain_greedy and constraint is None:
            first = (
                [] if len(missing) == 1 else [int(self._known(engine.forward(missing)).argmax())]
            )
            rest = engine.greedy((missing + first)[-1], n - len(first))
            return [*first, *rest]
        guesses: list[int] = []
        while len(guesses) < n:
            logits = self._known(engine.forward(guesses[-1:] or missing))
            try:
                if constraint is not None and guesses:
                    constraint.accept(guesses[-1])
                allowed = None if constraint is None else constraint.allowed()
            except UsageError:  # of a token that the large model may not choose
                break
            if allowed is not None and not (logits[allowed] > -np.inf).any():
                break  # only tokens that the small model does not have
            guesses.append(ahead.sample(logits, allowed))
            if constraint is not None and guesses[-1] in ends:
                break
        return guesses

    def _known(self, logits: Logits) -> Logits:
        """Logits [V] for the large model's vocabulary, which may be padded to another length."""
        vocab = self._sampler.vocab
        if len(logits) >= vocab:
            return logits[:vocab]
        return np.pad(logits, (0, vocab - len(logits)), constant_values=-np.inf)

    def extend(self, chosen: Sequence[int]) -> None:
        """Add the tokens that the large model has chosen to the text."""
        self._text += chosen

    def plain(self, tokens: int, seconds: float) -> None:
        """Record the time of tokens that were decoded without a draft."""
        self._draft.payoff.plain(tokens, seconds)

    def checked(self, drafted: int, accepted: int, seconds: float) -> None:
        """Record how many drafted tokens were accepted, and the seconds for verifying them."""
        if drafted and not self._draft.tokens:
            self._draft.payoff.drafted(drafted, accepted, self.draft_s, seconds, self.read_s)
