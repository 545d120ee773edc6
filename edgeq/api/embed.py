"""Embeddings of texts, and the relevance of documents to a query."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.api.embed_graph import embed_by_graph
from edgeq.core.errors import UsageError, check_type
from edgeq.core.progress import Progress
from edgeq.importers import load, source_kind
from edgeq.importers.sentence_modules import sentence_modules
from edgeq.model.kv_bits import KvBits
from edgeq.model.model import Model
from edgeq.runtime.embedding import embedded, embedding
from edgeq.runtime.engine import Engine
from edgeq.runtime.reranking import RerankPrompts
from edgeq.runtime.tokenizer import Tokenizer


def embed(
    model: Model | str | Path,
    texts: str | Sequence[str],
    *,
    pooling: str | None = None,
    dimensions: int | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    normalize: bool = True,
    tokenizer: str | Path | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    mmap: bool | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Embeddings of texts: vectors of length one whose products say how alike texts are.

    They are pooled hidden states, and go through the modules that the model's files list, as in
    Sentence Transformers. Models that were trained for it give good ones; others give some.

    Args:
        model: a model or the path of one; or an .onnx, .ort or .tflite file of an encoder.
        texts: a text or several.
        pooling: "last" takes the last token's state, "mean" the mean of all, "cls" the first
            token's; None takes what the model's files say, or the last token's of a decoder.
        dimensions: keep only the first so many numbers of a vector, for models that were trained
            so (Matryoshka); None keeps all.
        prompt: text put before each text, such as "Instruct: ...\\nQuery: ".
        prompt_name: one of the prompts of the model's files, such as "query", in place of
            ``prompt``. None of both takes the files' default prompt, or nothing.
        normalize: make the length of vectors one, after ``dimensions``.
        tokenizer: of an encoder's file: the folder of its tokenizer.json and the files of
            Sentence Transformers; None takes the file's own folder, or the one above it.
        context: longest text in tokens, as `Engine` takes it.
        threads, kv_bits, backend, mmap: as `Engine` takes them.
        progress: called after every text.

    Returns:
        float32 [n, dimensions], or [dimensions] of a single text.

    Raises:
        FormatError: the model cannot be opened.
        UsageError: a text is empty or longer than the context; a setting is impossible.
        UnsupportedError: the model's files ask for what edgeq does not compute.

    Example:
        >>> first, second = edgeq.embed("model.edgeq", ["The sun is warm.", "The sun was hot."])
        >>> bool(0.5 < first @ second < 1)
        True
    """
    single = isinstance(texts, str)
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed or not all(listed):
        raise UsageError("there is no text to embed: give at least one, and none that is empty")
    for text in listed:
        check_type("a text", text, str)
    chosen: dict[str, Any] = {
        "pooling": pooling, "dimensions": dimensions, "normalize": normalize, "prompt": prompt,
        "prompt_name": prompt_name,
    }  # fmt: skip
    if isinstance(model, str | Path) and source_kind(model) != "model":
        found = embed_by_graph(Path(model), listed, tokenizer, threads or 1, chosen, progress)
        return found[0] if single else np.stack(found)
    if tokenizer is not None:
        raise UsageError("tokenizer is for the file of an encoder; this model has its own")
    opened = model if isinstance(model, Model) else load(model)
    own = Tokenizer(opened)
    config = opened.config
    how = embedding(sentence_modules(opened.files), config.hidden, causal=config.causal, **chosen)
    encoded = [how.tokens(own, text) for text in listed]
    found = []
    with Engine(
        opened, context=context, threads=threads, kv_bits=kv_bits, backend=backend, mmap=mmap
    ) as engine:
        for done, (ids, skipped) in enumerate(encoded):
            found.append(embedded(engine, ids, how, skipped))
            if progress is not None:
                progress("embedding texts", done + 1, len(encoded))
    return found[0] if single else np.stack(found)


def rerank(
    model: Model | str | Path,
    query: str,
    documents: Sequence[str],
    *,
    instruction: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    mmap: bool | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """How relevant documents are to a query, as Qwen3-Reranker judges it.

    Other models of the family Qwen 3 take the prompt too, and were not trained for it.

    Args:
        model: a model or the path of one, of the family qwen3.
        query: what is looked for.
        documents: what is judged, each by itself.
        instruction: how it is judged; None for "Given a web search query, retrieve relevant
            passages that answer the query".
        context: longest prompt in tokens, as `Engine` takes it.
        threads, kv_bits, backend, mmap: as `Engine` takes them.
        progress: called after every document.

    Returns:
        float32 [n], in the order of the documents: the probability that one is relevant.

    Raises:
        FormatError: the model cannot be opened.
        UsageError: there are no documents, or a prompt is longer than the context.
        UnsupportedError: the model is of another family.

    Example:
        >>> edgeq.rerank("model.edgeq", "the sun", ["The sun is warm."])
        Traceback (most recent call last):
        edgeq.core.errors.UnsupportedError: the model is of the family llama; edgeq reranks with \
models of qwen3, as Qwen3-Reranker, whose prompt and scores it knows
    """
    check_type("query", query, str)
    if isinstance(documents, str) or not len(documents):
        raise UsageError("there are no documents to rank: give a list of at least one text")
    for document in documents:
        check_type("a document", document, str)
    opened = model if isinstance(model, Model) else load(model)
    prompts = RerankPrompts(opened.config, Tokenizer(opened))
    encoded = [prompts.tokens(query, document, instruction) for document in documents]
    scores = []
    with Engine(
        opened, context=context, threads=threads, kv_bits=kv_bits, backend=backend, mmap=mmap
    ) as engine:
        for done, tokens in enumerate(encoded):
            scores.append(prompts.score(engine, tokens))
            if progress is not None:
                progress("ranking documents", done + 1, len(encoded))
    return np.array(scores, np.float32)
