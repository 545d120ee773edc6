"""Run a model on a prompt in one call, or hold a conversation with it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgeq.api.conversation import Conversation
from edgeq.core.errors import EdgeqError, UsageError
from edgeq.importers import load
from edgeq.model.kv_bits import KvBits
from edgeq.model.model import Model
from edgeq.runtime.constraint import Grammar, GrammarVocabulary
from edgeq.runtime.draft import Draft, open_drafts
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import Chunk, Constraint, generate
from edgeq.runtime.sampling import SamplingParams
from edgeq.runtime.tokenizer import Tokenizer


def run(
    model: Model | str | Path,
    prompt: str,
    params: SamplingParams | None = None,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    raw: bool = False,
    lookup: int = 0,
    json_schema: Mapping[str, Any] | str | None = None,
    prompt_cache: str | Path | None = None,
    prompt_cache_all: bool = False,
    draft: Model | str | Path | None = None,
    mtp: bool = True,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    mmap: bool | None = None,
) -> Generator[Chunk, None, None]:
    """Answer a prompt, or continue it if the model has no chat template.

    The engine is closed when the iterator ends or is closed. To keep a model in memory between
    prompts, make an `Engine` and call `generate`.

    Args:
        model: a model or the path of one.
        prompt: a text.
        params: how tokens are chosen; the defaults of `SamplingParams` if None.
        max_tokens: the most tokens to generate; None continues until the context is full.
        stop: texts that end the answer and are not shown.
        raw: continue the prompt as plain text even if the model has a chat template.
        lookup: tokens to propose from earlier text, as `generate` takes it.
        json_schema: a JSON schema, as an object or a text, that the answer conforms to.
        prompt_cache: a file that the KV cache of the prompt is saved to. If it exists and its
            tokens are the beginning of the prompt, only the rest is processed.
        prompt_cache_all: save the cache of the generated text as well, once it has ended.
        draft: a small model with the same tokenizer, or its path. It drafts tokens, which the
            model verifies in one pass; the answer stays the same. See `Draft`.
        mtp: draft with the model's own multi-token-prediction head where it has one, as `generate`
            does.
        context, threads, kv_bits, backend, mmap: as `Engine` takes them.

    Returns:
        An iterator over pieces of text with their timings.

    Raises:
        FormatError: the model cannot be opened.
        FormatError: the file of a prompt cache is damaged, or is another model's.
        UsageError: an empty prompt, one longer than the context, or a wrong option.
        MissingDependencyError: a JSON schema is given and the extra "structured" is not installed.

    Example:
        >>> params = edgeq.SamplingParams(temperature=0)
        >>> chunks = edgeq.run("model.edgeq", "Once upon a time", params, max_tokens=4)
        >>> "".join(chunk.text for chunk in chunks)
        ', there was a'
    """
    if prompt_cache_all and prompt_cache is None:
        raise UsageError("prompt_cache_all needs prompt_cache, the file to save to")
    opened = model if isinstance(model, Model) else load(model)
    tokenizer = Tokenizer(opened)
    chat = tokenizer.has_chat_template and not raw
    ids = _encode_prompt(tokenizer, prompt) if chat else tokenizer.encode(prompt, add_eos=False)
    grammar = _schema_grammar(opened, tokenizer, json_schema)
    settings: dict[str, Any] = {
        "threads": threads, "kv_bits": kv_bits, "backend": backend, "mmap": mmap,
    }  # fmt: skip
    helper = None if draft is None else open_drafts(draft, opened, **settings)[0]
    closing = ExitStack()
    if helper is not None:
        closing.callback(helper.close)
    try:
        engine = closing.enter_context(Engine(opened, context=context, **settings))
        chunks = _continue_prompt(
            engine, tokenizer, ids, params, max_tokens=max_tokens, stop=stop, lookup=lookup,
            chat=chat, constraint=None if grammar is None else grammar.start(),
            prompt_cache=prompt_cache, prompt_cache_all=prompt_cache_all, draft=helper, mtp=mtp,
        )  # fmt: skip
    except BaseException:
        closing.close()
        raise
    return _closing(closing, chunks)


def _closing(engines: ExitStack, chunks: Iterator[Chunk]) -> Generator[Chunk, None, None]:
    with engines:
        yield from chunks


def _continue_prompt(
    engine: Engine,
    tokenizer: Tokenizer,
    ids: list[int],
    params: SamplingParams | None,
    *,
    max_tokens: int | None,
    stop: Sequence[str],
    lookup: int,
    chat: bool,
    constraint: Constraint | None = None,
    prompt_cache: str | Path | None = None,
    prompt_cache_all: bool = False,
    draft: Draft | None = None,
    mtp: bool = True,
) -> Iterator[Chunk]:
    """Generate after a prompt's tokens, and load and save the KV cache of the prompt.

    Args:
        engine: an engine with an empty cache.
        tokenizer: the model's tokenizer.
        ids: tokens of the prompt.
        params, max_tokens, stop, lookup, prompt_cache, prompt_cache_all: as for `run`.
        chat: whether the end of a turn ends the text.
        constraint: the grammar that the text follows; None allows any text.
        draft: a draft model, or None.
        mtp: as for `run`.

    Returns:
        An iterator over pieces of text. The prompt's cache is saved after the first piece.

    Raises:
        FormatError, UsageError: as for `run`.
    """
    if prompt_cache is not None and Path(prompt_cache).exists():
        engine.load_state(prompt_cache)
    unsaved = engine.tokens[: len(ids)] != ids
    chunks = generate(
        engine, tokenizer, engine.reuse(ids), params, max_tokens=max_tokens, stop=stop,
        lookup=lookup, end_ids=tokenizer.turn_end_ids if chat else (), constraint=constraint,
        draft=draft, mtp=mtp,
    )  # fmt: skip
    return (
        chunks
        if prompt_cache is None
        else _saving(engine, chunks, prompt_cache, prompt=unsaved, whole=prompt_cache_all)
    )


def _saving(
    engine: Engine, chunks: Iterator[Chunk], path: str | Path, *, prompt: bool, whole: bool
) -> Iterator[Chunk]:
    for chunk in chunks:
        yield chunk
        if prompt:  # at this point the cache contains the prompt and nothing else
            engine.save_state(path)
            prompt = False
    if whole:
        engine.save_state(path)


def _schema_grammar(
    model: Model, tokenizer: Tokenizer, schema: Mapping[str, Any] | str | None
) -> Grammar | None:
    """The grammar of a JSON schema; None without one.

    Raises:
        EdgeqError: the schema cannot be used, or the package for it is missing.
    """
    return None if schema is None else GrammarVocabulary.of(model, tokenizer).json_schema(schema)


def _encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a user's message in the model's chat template.

    Raises:
        EdgeqError: the template cannot be used.
    """
    try:
        return tokenizer.encode_chat([{"role": "user", "content": text}])
    except EdgeqError as err:
        raise type(err)(f"{err} (--raw continues the prompt without the template)") from err


def chat(
    model: Model | str | Path,
    *,
    system: str | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    draft: Model | str | Path | None = None,
    mtp: bool = True,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    mmap: bool | None = None,
) -> Conversation:
    """Begin a conversation with a chat model.

    Args:
        model: a model with a chat template, or the path of one.
        system: the system prompt.
        json_schema: a JSON schema that every answer conforms to, as an object or a text.
        draft: a small model that drafts tokens, as for `run`.
        mtp: draft with the model's own multi-token-prediction head, as for `run`.
        context, threads, kv_bits, backend, mmap: as `Engine` takes them.

    Returns:
        A context manager that closes the engine.

    Raises:
        FormatError: the model cannot be opened.
        UnsupportedError: the model has no chat template.
        MissingDependencyError: a JSON schema is given and the extra "structured" is not installed.

    Example:
        >>> greedy = edgeq.SamplingParams(temperature=0)
        >>> with edgeq.chat("chat.edgeq", system="Be brief.") as conversation:
        ...     pieces = conversation.say("Tell me a story.", greedy, max_tokens=8)
        ...     answer = "".join(chunk.text for chunk in pieces)
        >>> [message["role"] for message in conversation.messages]
        ['system', 'user', 'assistant']
    """
    opened = model if isinstance(model, Model) else load(model)
    tokenizer = Tokenizer(opened)
    grammar = _schema_grammar(opened, tokenizer, json_schema)
    settings: dict[str, Any] = {
        "threads": threads, "kv_bits": kv_bits, "backend": backend, "mmap": mmap,
    }  # fmt: skip
    with ExitStack() as failing:
        helper = None if draft is None else open_drafts(draft, opened, **settings)[0]
        if helper is not None:
            failing.callback(helper.close)
        engine = Engine(opened, context=context, **settings)
        conversation = Conversation(engine, tokenizer, system, grammar, helper, mtp)
        failing.callback(engine.close)
        conversation.check()
        failing.pop_all()
    return conversation
