"""Embeddings of texts: pooled hidden states of a decoder, of length one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError, unknown
from edgeq.importers.pooling import POOLINGS
from edgeq.model.memory_layout import BATCH
from edgeq.runtime.engine import Engine


def embedded(
    engine: Engine,
    tokens: Sequence[int],
    pooling: str,
    between: Callable[[], None] | None = None,
) -> NDArray[np.float32]:
    """The embedding of a text; the engine's sequence is the text's afterwards.

    Args:
        engine: runs the model.
        tokens: of the text, at least one.
        pooling: "last" takes the last token's hidden state after the final norm, "mean" the mean of
            all tokens'.
        between: called after each batch of tokens; what it raises ends the work. None runs the text
            as a whole, and no other sequence runs meanwhile.

    Returns:
        float32 [hidden], of length one.

    Raises:
        UsageError: an unknown pooling, no tokens, or more than the context.
        FormatError: the hidden states are not numbers, or all zero.
    """
    if pooling not in POOLINGS:
        raise UsageError(unknown("pooling", pooling, POOLINGS))
    engine.reset()
    parts = []
    step = len(tokens) if between is None else BATCH
    for start in range(0, max(1, len(tokens)), max(1, step)):
        parts.append(engine.hidden(tokens[start : start + step]))
        if between is not None:
            between()
    states = np.concatenate(parts).astype(np.float64)
    pooled = states[-1] if pooling == "last" else states.mean(axis=0)
    length = float(np.linalg.norm(pooled))
    if not length:
        raise FormatError("the model's hidden states are zero; its file is damaged")
    return np.asarray(pooled / length, np.float32)
