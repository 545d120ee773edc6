"""Embeddings of texts by a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.core.progress import Progress
from edgeq.importers import load
from edgeq.importers.pooling import pooling_of
from edgeq.model.kv_bits import KvBits
from edgeq.model.model import Model
from edgeq.runtime.embedding import embedded
from edgeq.runtime.engine import Engine
from edgeq.runtime.tokenizer import Tokenizer


def embed(
    model: Model | str | Path,
    texts: str | Sequence[str],
    *,
    pooling: str | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv_bits: KvBits = 8,
    backend: str = "numba",
    mmap: bool | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Embeddings of texts: vectors of length one whose products say how alike texts are.

    They are hidden states after the final norm. Models that were trained for it give good ones;
    others give some.

    Args:
        model: a model or the path of one.
        texts: a text or several.
        pooling: "last" takes the last token's state, "mean" the mean of all; None takes what the
            model's files say, or the last token's.
        context: longest text in tokens, as `Engine` takes it.
        threads, kv_bits, backend, mmap: as `Engine` takes them.
        progress: called after every text.

    Returns:
        float32 [n, hidden], or [hidden] of a single text.

    Raises:
        FormatError: the model cannot be opened.
        UsageError: a text is empty or longer than the context, or an unknown pooling.
        UnsupportedError: the model's files ask for another kind of pooling.

    Example:
        >>> first, second = edgeq.embed("model.edgeq", ["The sun is warm.", "The sun was hot."])
        >>> bool(0.5 < first @ second < 1)
        True
    """
    single = isinstance(texts, str)
    listed = [texts] if isinstance(texts, str) else list(texts)
    if not listed or not all(listed):
        raise UsageError("there is no text to embed: give at least one, and none that is empty")
    opened = model if isinstance(model, Model) else load(model)
    tokenizer = Tokenizer(opened)
    chosen = pooling_of(opened.files) if pooling is None else pooling
    encoded = [tokenizer.encode(text, add_eos=True) for text in listed]
    found = []
    with Engine(
        opened, context=context, threads=threads, kv_bits=kv_bits, backend=backend, mmap=mmap
    ) as engine:
        for done, ids in enumerate(encoded):
            found.append(embedded(engine, ids, chosen))
            if progress is not None:
                progress("embedding texts", done + 1, len(encoded))
    return found[0] if single else np.stack(found)
