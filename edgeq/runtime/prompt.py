"""The prompts that `edgeq.generate` accepts: a text, messages, or token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeq.core.errors import UsageError

if TYPE_CHECKING:
    from edgeq.runtime.engine import Engine
    from edgeq.runtime.tokenizer import Tokenizer

_KINDS = (
    "a text, a list of token ids, or a list of messages such as "
    "{'role': 'user', 'content': 'Hello'}"
)


def prompt_ids(
    engine: Engine, tokenizer: Tokenizer, prompt: Any
) -> tuple[list[int], frozenset[int]]:
    """The tokens to run, and the tokens that end an answer in addition to the model's end tokens.

    Args:
        engine: whose cache the prompt continues. If the prompt is messages, those in the cache are
            not run again, and the cache is cut back to what it has in common with them.
        tokenizer: of the model; a text or messages need an `edgeq.Tokenizer`.
        prompt: a text to continue (without the chat template; with BOS, if the tokenizer has it
            and the cache is empty), messages for the chat template, or token ids as they are.

    Raises:
        UsageError: it is none of these, is empty, or holds a token outside the vocabulary.
        UnsupportedError: messages, and the model has no chat template.
    """
    if isinstance(prompt, str):
        _require_method(tokenizer, "encode", "a text")
        return tokenizer.encode(prompt, add_bos=not engine.n_past, add_eos=False), frozenset()
    if isinstance(prompt, Mapping | bytes) or not hasattr(prompt, "__iter__"):
        raise UsageError(f"the prompt is a {type(prompt).__name__}; give {_KINDS}")
    items = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        _require_method(tokenizer, "encode_chat", "messages")
        ids = tokenizer.encode_chat(items)
        fresh = engine.reuse(ids) if engine.n_past else ids
        return fresh, frozenset(tokenizer.turn_end_ids)
    vocab = engine.config.vocab
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | np.integer):
            raise UsageError(f"the prompt holds {item!r:.60}; give {_KINDS}")
        if not 0 <= item < vocab:
            raise UsageError(
                f"the prompt holds the token {item}, but the model's tokens are 0 to {vocab - 1}"
            )
    return [int(item) for item in items], frozenset()


def _require_method(tokenizer: Tokenizer, method: str, what: str) -> None:
    if not hasattr(tokenizer, method):
        raise UsageError(
            f"a {type(tokenizer).__name__} cannot encode {what}; give edgeq.Tokenizer(model), or "
            "token ids as the prompt"
        )
