"""GGUF files executed by edgeq's own reference, where llama.cpp is not installed.

The file is opened as any GGUF file of another's making is, and computed in NumPy and float32 from
what it holds. That shows that its tensors, their order and the keys mean what they should, but not
what llama.cpp's kernels cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.gguf.names import ModelShape
from edgeq.converters.gguf.trace import moved_back
from edgeq.converters.runners import Past, Precision, pieces
from edgeq.core.errors import UsageError, require
from edgeq.importers.gguf.importer import load
from edgeq.model.config import ModelConfig
from edgeq.model.formulas import Array
from edgeq.model.reference import Reference
from edgeq.model.trace import TracedReference


class ReadBackRunner:
    """A GGUF file in edgeq's reference.

    Args:
        path: the file.
        context: tokens it has room for.
        shape: what the file says of its matrices.

    Raises:
        FormatError: it cannot be read.
        MissingDependencyError: the gguf package, which dequantizes, is not installed.
    """

    precision: Precision = "float32"
    config: ModelConfig | None = None
    runtime = "edgeq's own reference, reading the file back"

    def __init__(self, path: Path, context: int, shape: ModelShape) -> None:
        require("gguf", ("gguf",), "to compute what a GGUF file holds")
        self._model = load(path, headers_only=True)
        self._shape = shape
        self._reference = Reference(self._model, context=context)
        self.context = context
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self._cache = self._reference.new_cache()

    def close(self) -> None:
        """Release everything."""
        self.reset()

    def forward(self, tokens: NDArray[np.int64]) -> Array:
        """Logits of the tokens that follow: float32 [T, V]."""
        if self._cache.n_past + len(tokens) > self.context:
            raise UsageError(f"the file's context is {self.context} tokens; give fewer")
        return self._reference.forward(tokens, self._cache)

    def traced(self, tokens: Sequence[int], past: Past = ()) -> dict[str, Array]:
        """Results of the pass over ``tokens``, after ``past``, by their names in `decoder`."""
        builder = TracedReference(self._model, context=self.context)
        for piece in pieces(past):
            builder.trace(piece)
        results = builder.trace(tokens)
        for name in results:
            step = name.rpartition(".")[2]
            if step in ("gate", "up", "act"):
                # of an expert, or of a feed-forward without any
                inner = self._shape.expert_ffn if ".expert" in name else self._shape.ffn
                results[name] = results[name][:, :inner]
            elif step in ("q_norm", "q_rope"):
                results[name] = results[name] / np.float32(self._shape.query_scale)
            elif step == "mix":
                layer = int(name.split(".")[1])
                results[name] = cast(Array, moved_back(self._shape, layer, results[name]))
        return results
