"""What `edgeq.generate` may be given to continue: a text, messages, or token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edgeq.core.errors import UsageError

if TYPE_CHECKING:
    from edgeq.runtime.generate import Decoder, Decodes

_KINDS = (
    "a text, a list of token ids, or a list of messages such as "
    "{'role': 'user', 'content': 'Hello'}"
)


def prompt_ids(
    engine: Decoder, tokenizer: Decodes, prompt: Any
) -> tuple[list[int], frozenset[int]]:
    """The tokens to run, and the tokens that end an answer beside the model's own end tokens.

    Args:
        engine: whose cache the prompt goes on from. Of messages, what the cache already holds is
            not run again, and what it holds of another conversation is forgotten.
        tokenizer: of the model; a text or messages need an `edgeq.Tokenizer`.
        prompt: a text to continue (without the chat template; with BOS, if the tokenizer has it
            and the cache is empty), messages for the chat template, or token ids as they are.

    Raises:
        UsageError: it is none of these, is empty, or holds a token outside the vocabulary.
        UnsupportedError: messages, and the model has no chat template.
    """
    full = cast("Any", tokenizer)
    if isinstance(prompt, str):
        _needs(tokenizer, "encode", "a text")
        return full.encode(prompt, add_bos=not engine.n_past, add_eos=False), frozenset()
    if isinstance(prompt, Mapping | bytes) or not hasattr(prompt, "__iter__"):
        raise UsageError(f"the prompt is a {type(prompt).__name__}; give {_KINDS}")
    items = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        _needs(tokenizer, "encode_chat", "messages")
        ids = full.encode_chat(items)
        fresh = cast("Any", engine).reuse(ids) if engine.n_past else ids
        return fresh, frozenset(full.turn_end_ids)
    vocab = engine.config.vocab
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int | np.integer):
            raise UsageError(f"the prompt holds {item!r:.60}; give {_KINDS}")
        if not 0 <= item < vocab:
            raise UsageError(
                f"the prompt holds the token {item}, but the model's tokens are 0 to {vocab - 1}"
            )
    return [int(item) for item in items], frozenset()


def _needs(tokenizer: Decodes, method: str, what: str) -> None:
    if not hasattr(tokenizer, method):
        raise UsageError(
            f"a {type(tokenizer).__name__} cannot encode {what}; give edgeq.Tokenizer(model), or "
            "token ids as the prompt"
        )
