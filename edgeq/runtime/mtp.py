"""Speculative decoding with the model's own multi-token-prediction head.

The head (`edgeq.model.mtp`) drafts the next tokens as a draft model does, and the model verifies
them in one pass; see `edgeq.runtime.draft` for why the answer is the same. The head reads the
states of the model at the positions before, of which the engine keeps the last ones. It guesses the
first token from those alone, and each further one from its own state. Entries of its cache that
were made from its own states are made again once the model has verified their tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgeq.model.memory_layout import DRAFT_CONTEXT
from edgeq.runtime.backend import Backend
from edgeq.runtime.drafting import SHORTEST, TAIL, TRIAL_TAIL, DraftSource
from edgeq.runtime.payoff import MOST, Payoff

if TYPE_CHECKING:
    from edgeq.runtime.engine import Engine


class MtpHead:
    """A multi-token-prediction head with a cache of its own.

    It has the methods of an engine that drafts. An entry of its cache is of a token and of the
    state at the position before; `tokens` are those whose states are the model's.

    Args:
        engine: the engine of the model that has the head.
        run: what that engine runs tokens with.
        context: tokens that the head has room for.

    Attributes:
        start: position in the model's sequence of the first token.
    """

    def __init__(self, engine: Engine, run: Backend, context: int) -> None:
        self._engine, self._model_run = engine, run
        self._run, self.config = run.mtp(context, engine.kv_bits)
        self.context = context
        self.start = 1
        self._tokens: list[int] = []
        self._sound = 0  # how many of them have states of the model
        self._state = np.empty(0, np.float32)  # the head's own, after the last token

    @property
    def tokens(self) -> list[int]:
        """The tokens whose entries were made from states of the model."""
        return self._tokens[: self._sound]

    @property
    def first_start(self) -> int:
        """The first position that a sequence of the head may start at."""
        return self._model_run.states().start + 1

    @property
    def end(self) -> int:
        """The position after the last one that has a state of the model before it."""
        return min(self._model_run.states().stop, self._engine.n_past) + 1

    def truncate(self, n: int) -> None:
        """Keep the first ``n`` tokens."""
        del self._tokens[n:]
        self._sound = min(self._sound, n)
        self._run.truncate(n)

    def forward(self, tokens: Iterable[int]) -> NDArray[np.float32]:
        """Append tokens; logits [V] of what follows the last.

        There is a state of the model for each of them; or one token follows those that have one.
        """
        ids = np.asarray(list(tokens), np.int64)
        place = self.start + len(self._tokens) - 1  # of the state that the first token goes with
        sound = place + len(ids) <= self.end - 1
        states = self._model_run.state_rows(place, place + len(ids)) if sound else self._state[None]
        logits, self._state = self._run.ahead(ids, len(self._tokens), states)
        self._tokens += ids.tolist()
        if sound:
            self._sound = len(self._tokens)
        return logits

    def greedy(self, token: int, n: int) -> list[int]:
        """Append ``token``, then the likeliest one ``n`` times; those are returned."""
        chosen: list[int] = []
        for _ in range(n):
            chosen.append(int(self.forward([chosen[-1] if chosen else token]).argmax()))
        return chosen

    def close(self) -> None:
        """Release its threads and buffers."""
        self._run.close()


class MtpDraft(DraftSource):
    """Drafts of a multi-token-prediction head; `Engine.mtp` makes them.

    As a draft model it measures how many tokens are worth drafting, and pauses while drafting is
    not faster or other engines of the same batch generate answers.

    Args:
        head: the head.
        tokens: number of tokens to draft at once; None chooses it from measured times.

    Example:
        >>> with edgeq.Engine(edgeq.load("model.edgeq")) as engine:
        ...     engine.mtp is None  # this model has no such head
        True
    """

    kind = "the multi-token-prediction head (--no-mtp leaves it out)"
    engine: MtpHead

    def __init__(self, head: MtpHead, tokens: int | None = None) -> None:
        self.engine, self.tokens = head, tokens
        self.payoff = Payoff()

    def missing(self, text: list[int]) -> list[int]:
        """The tokens of a text that the head has not processed yet; none if it cannot go on."""
        head = self.engine
        if head.end != len(text):
            return []
        n_cached = 0
        for cached, token in zip(head.tokens, text[head.start : -1], strict=False):
            if cached != token:
                break
            n_cached += 1
        tail = min(TAIL if self.payoff.pays else TRIAL_TAIL, head.context - MOST)
        length = len(text) - head.start
        lost = head.start + n_cached < head.first_start
        if not n_cached or lost or length - n_cached > tail or length + MOST > head.context:
            head.start, n_cached = max(head.first_start, len(text) - tail), 0
        if head.start + n_cached >= len(text):
            return []
        head.truncate(n_cached)
        return text[head.start + n_cached :]


def own_draft(engine: Engine, run: Backend) -> MtpDraft | None:
    """Drafts of the head of an engine's model; None if its context is too short to draft in.

    Args:
        engine: the engine of a model that has a head.
        run: what it runs tokens with.
    """
    context = min(DRAFT_CONTEXT, engine.config.context)
    return MtpDraft(MtpHead(engine, run, context)) if context >= SHORTEST else None
