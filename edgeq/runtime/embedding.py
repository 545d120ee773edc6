"""Embeddings of texts: pooled hidden states of a decoder, of length one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError, unknown
from edgeq.importers.pooling import POOLINGS
from edgeq.runtime.engine import Engine


def embedded(engine: Engine, tokens: Sequence[int], pooling: str) -> NDArray[np.float32]:
    """The embedding of a text; the engine's sequence is the text's afterwards.

    Args:
        engine: runs the model.
        tokens: of the text, at least one.
        pooling: "last" takes the last token's hidden state after the final norm, "mean" the mean of
            all tokens'.

    Returns:
        float32 [hidden], of length one.

    Raises:
        UsageError: an unknown pooling, no tokens, or more than the context.
        FormatError: the hidden states are not numbers, or all zero.
    """
    if pooling not in POOLINGS:
        raise UsageError(unknown("pooling", pooling, POOLINGS))
    engine.reset()
    states = engine.hidden(tokens).astype(np.float64)
    pooled = states[-1] if pooling == "last" else states.mean(axis=0)
    length = float(np.linalg.norm(pooled))
    if not length:
        raise FormatError("the model's hidden states are zero; its file is damaged")
    return np.asarray(pooled / length, np.float32)
