"""Embeddings of texts: pooled hidden states of a model, as vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError, check_type, unknown
from edgeq.importers.sentence_modules import POOLINGS, Pooling, SentenceModules
from edgeq.model.memory_layout import BATCH
from edgeq.runtime.engine import Engine


class Encodes(Protocol):
    """What turns a text into tokens."""

    def encode(self, text: str, add_bos: bool = True, add_eos: bool | None = None) -> list[int]:
        """Token ids of a text."""


@dataclass(frozen=True)
class Embedding:
    """How texts become vectors; made by `embedding`.

    Args:
        modules: what the model's files say.
        pooling: how the tokens' states become one vector.
        dimensions: how many of its numbers are kept.
        normalize: whether its length is made one at the end.
        prompt: text put before each text.
    """

    modules: SentenceModules
    pooling: Pooling
    dimensions: int
    normalize: bool
    prompt: str

    def tokens(self, tokenizer: Encodes, text: str) -> tuple[list[int], int]:
        """Tokens of a text behind the prompt, and how many of them are not pooled."""
        skipped = 0
        if self.prompt and not self.modules.include_prompt:
            skipped = len(tokenizer.encode(self._cased(self.prompt), add_eos=False))
        return tokenizer.encode(self._cased(self.prompt + text), add_eos=True), skipped

    def check_length(self, count: int) -> None:
        """Refuse a text of more tokens than the model's files allow.

        Raises:
            UsageError: says how many there are.
        """
        longest = self.modules.max_tokens
        if longest is not None and count > longest:
            raise UsageError(
                f"a text has {count} tokens with its special tokens, and this model embeds at most "
                f"{longest} (max_seq_length of its files); split the text"
            )

    def vector(self, states: NDArray[np.float32], skipped: int = 0) -> NDArray[np.float32]:
        """The vector of a text.

        Args:
            states: hidden states of its tokens [T, hidden].
            skipped: the first so many are not pooled.

        Returns:
            float32 [dimensions].

        Raises:
            FormatError: the states are not numbers, or all zero.
        """
        wide = states[skipped if skipped < len(states) else 0 :].astype(np.float64)
        if not np.isfinite(wide).all():
            raise FormatError("the model's hidden states are not numbers; its file is damaged")
        if self.pooling == "mean":
            pooled = wide.mean(axis=0)
        else:
            pooled = wide[-1 if self.pooling == "last" else 0]
        for dense in self.modules.dense:
            pooled = dense(pooled)
        length = float(np.linalg.norm(pooled))
        if not length:
            raise FormatError("the model's hidden states are zero; its file is damaged")
        if self.modules.normalized:
            pooled = pooled / length
        kept = pooled[: self.dimensions]
        if self.normalize:
            kept = kept / (float(np.linalg.norm(kept)) or 1.0)
        return np.asarray(kept, np.float32)

    def _cased(self, text: str) -> str:
        return text.lower() if self.modules.lower else text


def embedding(
    modules: SentenceModules,
    hidden: int,
    *,
    causal: bool = True,
    pooling: str | None = None,
    dimensions: int | None = None,
    normalize: bool = True,
    prompt: str | None = None,
    prompt_name: str | None = None,
) -> Embedding:
    """Settle how texts become vectors, from a model's files and what a caller chose.

    Args:
        modules: what the files say.
        hidden: numbers of a hidden state.
        causal: whether a token's state depends on those before it alone, so that the last token's
            is the one that has read the text; it is pooled where files say nothing.
        pooling: one of `POOLINGS`; None takes what the files say.
        dimensions: numbers of a vector; None takes all.
        normalize: whether vectors are made of length one.
        prompt: text put before each text.
        prompt_name: one of the files' prompts, in place of a text. None of both takes the files'
            default, or nothing.

    Raises:
        UsageError: an unknown pooling or prompt, impossible dimensions, two prompts, or no pooling
            where the files name none.
        FormatError: the dense modules take vectors of another width.
    """
    width = modules.width or hidden
    if modules.dense and modules.dense[0].weight.shape[1] != hidden:
        raise FormatError(
            f"the first dense module takes {modules.dense[0].weight.shape[1]} numbers, and the "
            f"model's hidden states have {hidden}; fetch the model again"
        )
    chosen = modules.pooling or ("last" if causal else None) if pooling is None else pooling
    if chosen is None:
        raise UsageError(
            "the model's files do not say how its hidden states become a vector; choose a pooling: "
            f"{', '.join(POOLINGS)}"
        )
    if chosen not in POOLINGS:
        raise UsageError(unknown("pooling", str(chosen), POOLINGS))
    check_type("dimensions", dimensions, int, None)
    if dimensions is not None and not 1 <= dimensions <= width:
        raise UsageError(f"dimensions is {dimensions}; vectors of this model have 1 to {width}")
    return Embedding(
        modules,
        next(one for one in POOLINGS if one == chosen),
        dimensions or width,
        normalize,
        _prompt(modules, prompt, prompt_name),
    )


def _prompt(modules: SentenceModules, prompt: str | None, name: str | None) -> str:
    check_type("prompt", prompt, str, None)
    if prompt is not None and name is not None:
        raise UsageError("prompt and prompt_name are both given; give one of them")
    if prompt is not None:
        return prompt
    name = modules.default_prompt if name is None else name
    if name is None:
        return ""
    if name not in modules.prompts:
        if not modules.prompts:
            raise UsageError(
                f"prompt_name is {name!r}, and the model's files have no prompts; give prompt, "
                "the text itself"
            )
        raise UsageError(unknown("prompt", str(name), tuple(modules.prompts)))
    return modules.prompts[name]


def embedded(
    engine: Engine,
    tokens: Sequence[int],
    how: Embedding,
    skipped: int = 0,
    between: Callable[[], None] | None = None,
) -> NDArray[np.float32]:
    """The embedding of a text; the engine's sequence is the text's afterwards.

    Args:
        engine: runs the model.
        tokens: of the text, at least one.
        how: how states become a vector.
        skipped: how many of the first tokens are not pooled.
        between: called after each batch of tokens; what it raises ends the work. None runs the text
            as a whole, and no other sequence runs meanwhile. So does a model that sees all of a
            text at once.

    Returns:
        float32 [dimensions].

    Raises:
        UsageError: no tokens, or more than the context or the model's files allow.
        FormatError: the hidden states are not numbers, or all zero.
    """
    how.check_length(len(tokens))
    engine.reset()
    parts: list[NDArray[Any]] = []
    step = BATCH if between is not None and engine.config.causal else len(tokens)
    for start in range(0, max(1, len(tokens)), max(1, step)):
        parts.append(engine.hidden(tokens[start : start + step]))
        if between is not None:
            between()
    return how.vector(np.concatenate(parts), skipped)
