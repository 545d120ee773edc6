"""Speculative decoding with a draft model.

A small model, the draft model, proposes the next tokens. The large model, the target, verifies all
of them in one pass and accepts those that it would have chosen itself.

The answer is the same as without a draft model, token for token, at temperature 0 and with
sampling: each token is sampled from the large model's logits with the random numbers that it would
have had without a draft. The small model samples its proposals with the same random numbers, one
for each token of the vocabulary (`edgeq.runtime.sampling.exponentials`), with the same filters,
penalties, biases and constraint. So the two models usually choose the same token where their
distributions are similar. A seed therefore gives one answer, however many tokens are drafted.

Rejection sampling, the usual method, accepts a share of 1 - d of the tokens, where d is the total
variation distance of the two distributions. No method accepts more. This one accepts at least
(1 - d) / (1 + d), and on real pairs of models nearly as many as rejection sampling
(`benchmarks/serving/couplings.py`). With rejection sampling the answer would depend on the number
of drafted tokens, which depends on measured times.

Source: Leviathan et al. 2023 (arXiv 2211.17192); Daliri, Musco and Suresh 2024 (arXiv 2408.07978),
"Coupling without communication and drafter-invariant speculative decoding".
"""

from __future__ import annotations

from pathlib import Path

from edgeq.core.errors import UsageError, check_type
from edgeq.model.kv_bits import KvBits
from edgeq.model.memory_layout import DRAFT_CONTEXT
from edgeq.model.model import Model
from edgeq.runtime.drafting import SHORTEST, TAIL, TRIAL_TAIL, DraftSource
from edgeq.runtime.engine import Engine
from edgeq.runtime.payoff import MOST, Payoff


class Draft(DraftSource):
    """A small model that drafts for a large one with the same tokenizer.

    It measures how many tokens are worth drafting and keeps this from one answer to the next. While
    drafting is not faster, or other engines of the same batch generate answers, it pauses. Only one
    answer at a time may use it.

    Args:
        engine: the engine of the small model; a context of 1024 tokens is enough.
        target: the large model.
        tokens: number of tokens to draft at once, 1 to 16; None chooses it from measured times.

    Raises:
        UsageError: the tokenizers differ, ``tokens`` is out of range, or the engine's context is
            shorter than 64 tokens.

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
            raise UsageError(
                f"tokens is {tokens!r}; give an integer from 1 to {MOST}, or None to choose it "
                "from measured times"
            )
        check_type("engine", engine, Engine)
        check_type("target", target, Model)
        if engine.context < SHORTEST:
            raise UsageError(
                f"the draft model's context is {engine.context} tokens; give its engine a context "
                f"of {SHORTEST} or more"
            )
        check_same_tokens(engine.model, target)
        self.engine = engine
        self.tokens = tokens
        self.payoff = Payoff()
        self._start = 0  # position in the text of the first token in the engine's KV cache

    def missing(self, text: list[int]) -> list[int]:
        """The tokens of a text that the engine has not processed yet; at least the last one."""
        engine, start = self.engine, self._start
        n_cached = 0
        for cached, token in zip(engine.tokens, text[start:-1], strict=False):
            if cached != token:
                break
            n_cached += 1
        tail = min(TAIL if self.payoff.pays else TRIAL_TAIL, engine.context - MOST)
        length = len(text) - start
        if not n_cached or length - n_cached > tail or length + MOST > engine.context:
            self._start, n_cached = max(0, len(text) - tail), 0
        engine.truncate(n_cached)
        return text[self._start + n_cached :]


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
    """Open one draft model for each of several sequences; all share one copy of the weights.

    Args:
        source: the small model, or its path.
        target: the large model.
        sequences: number of sequences that the large model decodes at the same time.
        threads, kv_bits, backend, mmap: as for `Engine`.

    Returns:
        One draft model for each sequence; the caller closes them.

    Raises:
        FormatError: the small model cannot be opened.
        UsageError: the tokenizers differ, or the context of the small model is too short.
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


def check_same_tokens(draft: Model, target: Model) -> None:
    """Refuse a draft model whose tokenizer is not that of the large model.

    Raises:
        UsageError: the vocabularies differ; the message names the first token that differs.
    """
    from edgeq.runtime.tokenizer import Tokenizer

    if not draft.files and not target.files:  # neither model includes a tokenizer
        if draft.config.vocab != target.config.vocab:
            raise UsageError(
                f"the draft model has a vocabulary of {draft.config.vocab} tokens and the model "
                f"one of {target.config.vocab}; use a draft model with the same tokenizer"
            )
        return
    small, large = Tokenizer(draft), Tokenizer(target)
    advice = "use a smaller model of the same family as the draft model"
    if small.vocab_size != large.vocab_size:
        raise UsageError(
            f"the tokenizer of the draft model has {small.vocab_size} tokens and that of the model "
            f"has {large.vocab_size}; both must have the same tokenizer: {advice}"
        )
    for token in range(large.vocab_size):
        if (small.token_name(token), small.token_bytes(token)) != (
            large.token_name(token),
            large.token_bytes(token),
        ):
            raise UsageError(
                f"token {token} is {small.token_name(token)!r} in the draft model and "
                f"{large.token_name(token)!r} in the model; both must have the same tokenizer: "
                f"{advice}"
            )
