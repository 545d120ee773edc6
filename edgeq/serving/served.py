"""A model that is served, with its tokenizer, its slots and its capabilities."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeq.core.cpu import available_cores
from edgeq.core.errors import DoesNotFitError, EdgeqError, UsageError
from edgeq.core.memory import available_bytes
from edgeq.core.progress import Progress
from edgeq.core.units import human_bytes
from edgeq.importers import load
from edgeq.importers.sentence_modules import SentenceModules, sentence_modules
from edgeq.importers.tokenizer.chat_templates import chat_templates
from edgeq.model.kv_bits import KvBits
from edgeq.model.memory_layout import draft_bytes, kv_bytes, scratch_bytes
from edgeq.model.model import Model
from edgeq.model.mtp import mtp_config
from edgeq.model.rotary import default_context
from edgeq.runtime.chat_template import render_chat
from edgeq.runtime.constraint import GrammarVocabulary
from edgeq.runtime.draft import Draft, open_drafts
from edgeq.runtime.embedding import Embedding, embedding
from edgeq.runtime.engine import Engine
from edgeq.runtime.kv_state import fingerprint
from edgeq.runtime.reranking import RerankPrompts
from edgeq.runtime.tokenizer import Tokenizer
from edgeq.serving.harmony import ENDS, HARMONY, begun_answer, is_harmony, with_thinking
from edgeq.serving.parts import THINK, THOUGHT
from edgeq.serving.prefix_cache import PrefixCache, SnapshotStore
from edgeq.serving.settings import ServerSettings
from edgeq.serving.slots import SlotPool
from edgeq.serving.tool_families import syntax_of
from edgeq.serving.tool_messages import named_results, taught, with_short_ids
from edgeq.serving.tools import HERMES, MISTRAL, ToolSyntax
from edgeq.serving.worker import Worker


class ServedModel:
    """One model of a server. Its engines share one copy of the weights.

    Args:
        name: name of the model in requests.
        model: the opened model.
        settings: settings of the server.
        threads: executor whose threads generate answers.
        snapshots: where KV caches of earlier sequences are kept.
        draft: a small model that drafts tokens; None for no drafting.
        context: context of each slot, in tokens; limited by what the model supports.
        n_threads, kv_bits, backend, mmap: as for `Engine`.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        settings: ServerSettings,
        threads: ThreadPoolExecutor,
        snapshots: SnapshotStore,
        *,
        draft: Model | None = None,
        context: int | None = None,
        n_threads: int | None = None,
        kv_bits: KvBits = 8,
        backend: str = "numba",
        mmap: bool | None = None,
    ) -> None:
        self.name, self.model = name, model
        self._pooling = settings.pooling
        self.created = int(time.time())
        self._making_grammars = threading.Lock()
        self._grammars: GrammarVocabulary | None = None
        self.fingerprint = "edgeq-" + fingerprint(model)[:12]
        self.tokenizer = Tokenizer(model)
        if context is not None:
            context = min(context, model.config.context)
        _refuse_too_much(name, model, context, settings.parallel, kv_bits, n_threads, draft)
        self.engines = Engine.batch(
            model, settings.parallel, context=context, threads=n_threads, kv_bits=kv_bits,
            backend=backend, mmap=mmap,
        )  # fmt: skip
        self.context = self.engines[0].context
        self.drafts: list[Draft] = []
        if draft is not None:
            try:
                self.drafts = open_drafts(
                    draft, model, settings.parallel, threads=n_threads, kv_bits=kv_bits,
                    backend=backend, mmap=mmap,
                )  # fmt: skip
            except BaseException:
                self.close()
                raise
        self.slots = SlotPool(self.engines, settings.queue, self.drafts)
        self.cache = PrefixCache(snapshots)
        self.worker = Worker(
            self.tokenizer, self.slots, self.cache, threads, settings.timeout_s, settings.mtp
        )

    @cached_property
    def template(self) -> str:
        """The text of the model's chat templates; empty if it has none."""
        return "\n".join(chat_templates(self.model.files).values())

    @cached_property
    def _modules(self) -> SentenceModules:
        return sentence_modules(self.model.files)

    def embedding(self, dimensions: int | None, prompt_name: str | None) -> Embedding:
        """How texts become vectors of so many numbers, behind a prompt of the model's files.

        Raises:
            UsageError: more dimensions than a vector has, or there is no such prompt.
            UnsupportedError: the model's files ask for what edgeq does not compute.
        """
        config = self.model.config
        return embedding(
            self._modules, config.hidden, causal=config.causal, pooling=self._pooling,
            dimensions=dimensions, prompt_name=prompt_name,
        )  # fmt: skip

    @cached_property
    def rerank_prompts(self) -> RerankPrompts:
        """The prompts by which the model judges documents.

        Raises:
            UnsupportedError: it is none that does.
        """
        return RerankPrompts(self.model.config, self.tokenizer)

    @cached_property
    def thinks(self) -> bool:
        """Whether the chat template has markers of reasoning."""
        return self.harmony or THINK in self.template or THOUGHT in self.template

    @cached_property
    def harmony(self) -> bool:
        """Whether answers are messages in channels (`edgeq.serving.harmony`)."""
        return is_harmony(self.template)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Special tokens that end an answer, whatever the model lists.

        Of an answer in channels they are not what a template writes after a message.
        """
        if not self.harmony:
            return self.tokenizer.turn_end_ids
        special = sorted(self.tokenizer.special_ids)
        return tuple(i for i in special if self.tokenizer.token_name(i) in ENDS)

    @cached_property
    def own_syntax(self) -> ToolSyntax | None:
        """The syntax of tool calls of the chat template; None if it has none that is known."""
        return syntax_of(self.template)

    @property
    def syntax(self) -> ToolSyntax:
        """The syntax of tool calls: the template's own, or the one that the server describes."""
        return self.own_syntax or HERMES

    @cached_property
    def takes_system(self) -> bool:
        """Whether the chat template writes system messages."""
        system = "Answer in one word."
        talk = [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}]
        try:
            return system in render_chat(self.model.files, talk)
        except EdgeqError:
            return False

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any],
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            messages: as `edgeq.serving.messages.checked_messages` returns them.
            tools: those that the prompt describes.
            variables: further variables of the chat template.

        Raises:
            EdgeqError: the chat template refuses the conversation, or there is none.
        """
        if self.own_syntax is None:
            talk = taught(messages, tools, not tools or self.takes_system)
            return self.tokenizer.encode_chat(talk, **variables)
        talk = named_results(messages)
        if self.own_syntax is MISTRAL:
            talk = with_short_ids(talk)
        if self.own_syntax is HARMONY:
            talk = with_thinking(talk)
        if tools:
            variables = {**variables, "tools": list(tools)}
        return self.tokenizer.encode_chat(talk, **variables)

    @cached_property
    def shown(self) -> tuple[int, ...]:
        """Special tokens that mark reasoning or tool calls, whose text the splitter needs."""
        marks = {THINK, THOUGHT, *self.syntax.tokens}
        special = self.tokenizer.special_ids
        return tuple(i for i in sorted(special) if self.tokenizer.token_name(i) in marks)

    def ends_in_thought(self, prompt: list[int]) -> bool:
        """Whether a prompt ends with the marker that begins reasoning."""
        return self._last_text(prompt, 8).rstrip().endswith(THINK)

    def begun_answer(self, prompt: list[int]) -> str:
        """What a prompt holds of an answer in channels; empty for other answers."""
        return begun_answer(self._last_text(prompt, 64)) if self.harmony else ""

    def _last_text(self, prompt: list[int], tokens: int) -> str:
        stream = self.tokenizer.stream(shown=self.shown)
        return "".join(map(stream.push, prompt[-tokens:]))

    def grammars(self) -> GrammarVocabulary:
        """The vocabulary in the form that grammars need, made at the first call.

        Raises:
            EdgeqError: grammars cannot be used, because a package is missing or the tokenizer is
                not supported.
        """
        with self._making_grammars:
            if self._grammars is None:
                self._grammars = GrammarVocabulary.of(self.model, self.tokenizer)
            return self._grammars

    @property
    def can_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self.tokenizer.has_chat_template

    def described(self) -> dict[str, Any]:
        """The entry of the model in ``/v1/models``."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "edgeq"}

    def facts(self) -> dict[str, Any]:
        """The entry of the model in ``/props``."""
        config = self.model.config
        return {
            **self.described(),
            "context": self.context,
            "slots": len(self.slots.slots),
            "slots_in_use": self.slots.running,
            "waiting": self.slots.waiting,
            "chat_template": self.can_chat,
            "thinks": self.thinks,
            "tools": self.own_syntax.name if self.own_syntax else None,
            "family": config.family,
            "vocabulary": config.vocab,
            "hidden": config.hidden,
            "weights_bytes": self.model.nbytes,
            "kv_cache_bytes": sum(engine.kv_bytes for engine in self.engines),
            "prefix_cache_bytes": self.cache.nbytes,
        }

    def close(self) -> None:
        """Release the engines."""
        for engine in self.engines:
            engine.close()
        for draft in self.drafts:
            draft.close()


def _refuse_too_much(
    name: str,
    model: Model,
    context: int | None,
    parallel: int,
    kv_bits: KvBits,
    n_threads: int | None,
    draft: Model | None,
) -> None:
    """Refuse KV caches that would exceed the free memory as answers grow, at the start.

    Raises:
        DoesNotFitError: the KV caches and their buffers need more memory than is free.
    """
    config, free = model.config, available_bytes()
    tokens = default_context(config) if context is None else context
    needed = parallel * kv_bytes(config, tokens, kv_bits)
    needed += scratch_bytes(config, tokens, n_threads or available_cores(), parallel)
    if config.mtp is not None:
        needed += draft_bytes(mtp_config(config), n_threads or available_cores(), kv_bits, parallel)
    if draft is not None:
        needed += draft_bytes(draft.config, n_threads or available_cores(), kv_bits, parallel)
    if free is not None and needed > free:
        raise DoesNotFitError(
            f"{name}: the KV caches of {parallel} answers of {tokens} tokens and their buffers "
            f"need {human_bytes(needed)}, and {human_bytes(free)} are free; use fewer answers at "
            "the same time (--parallel) or a shorter context (--ctx-size)"
        )


def named_models(models: list[str | Path | Model | tuple[str, Any]]) -> dict[str, Any]:
    """Names and sources of the models of a server.

    Args:
        models: paths (``NAME=PATH`` names the model; otherwise the file name does), opened models,
            or pairs of a name and one of them.

    Raises:
        UsageError: there is no model, or two models have the same name.
    """
    found: dict[str, Any] = {}
    for one in models:
        if isinstance(one, tuple):
            name, source = one
        elif isinstance(one, Model):
            name, source = (one.origin.path.name if one.origin else one.config.family), one
        elif not isinstance(one, str | Path):
            raise UsageError(f"a model to serve is {one!r:.60}; give a path or a Model")
        else:
            text = str(one)
            given, equals, rest = text.partition("=")
            if equals and given and not Path(text).exists():
                name, source = given, rest
            else:
                path = Path(text)
                name = (path.resolve() if path.name in ("", ".", "..") else path).name
                name = name.removesuffix(".edgeq").removesuffix(".gguf").removesuffix(".bin")
                source = text
        if name in found:
            raise UsageError(
                f"two models have the name {name!r}; give them different names: NAME=PATH, such as "
                f"small={source}"
            )
        found[name] = source
    if not found:
        raise UsageError("there is no model to serve; give at least one")
    return found


def open_models(sources: dict[str, Any], progress: Progress | None = None) -> dict[str, Model]:
    """Open the models of a server.

    Raises:
        EdgeqError: a model cannot be opened.
    """
    opened = {}
    for step, (name, source) in enumerate(sources.items()):
        if progress is not None:
            progress(f"opening {name}", step, len(sources))
        opened[name] = source if isinstance(source, Model) else load(source)
    return opened
