"""The decoder in NumPy through the same Builder as every target: the oracle of traces.

Each formula is `edgeq.model.reference`'s; what is added is the name of each result. Given a
target's own
results, every step is computed from the target's inputs to it, and its output is held against the
target's: an error shows at the step that makes it and nowhere else, however many layers follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.validate.kernels import CacheRounding
from edgeq.model.decoder import decoder
from edgeq.model.model import Model
from edgeq.model.reference import (
    KV,
    Array,
    Linear,
    Reference,
    activation,
    apply_rope,
    rope_tables,
)


class NumpyBuilder:
    """Runs a model's decoder and keeps every named result; its cache goes from pass to pass.

    Args:
        model: float or quantized.
        linear: called for every matrix product, as `Reference` does.
        cache: rounds keys and values as the target's cache does.
        keep: hold the weights that were turned to float32; for small models.
    """

    def __init__(
        self,
        model: Model,
        *,
        linear: Linear | None = None,
        cache: CacheRounding | None = None,
        keep: bool = False,
    ) -> None:
        self._reference = Reference(model, linear=linear, keep=keep)
        self._rounded = cache
        self._config = model.config
        self._theirs: Mapping[str, NDArray[np.float32]] = {}
        self._tokens: NDArray[np.int64] = np.empty(0, np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._cache: KV = self._reference.new_cache()
        self._results: dict[str, Array] = {}

    def run(
        self,
        tokens: Sequence[int] | NDArray[np.integer],
        theirs: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> dict[str, Array]:
        """One pass over the tokens that follow.

        Args:
            tokens: int [T].
            theirs: a target's results of the same pass; where it has one, that is what the later
                steps, and the cache, are given in place of ours.

        Returns:
            our results by their names in `decoder`, in its order: float32, logits [T, V].
        """
        self._tokens = np.asarray(tokens, np.int64)
        self._theirs = theirs or {}
        self._results = {}
        decoder(self, self._config)
        self._cache.advance(self._tokens.size)
        return self._results

    def recall(self, tokens: Sequence[int], theirs: Mapping[str, NDArray[np.float32]]) -> None:
        """Take a target's keys and values of earlier tokens into the cache.

        Args:
            tokens: int [T].
            theirs: its results ``layers.{i}.k_rope`` and ``layers.{i}.v`` of that pass; where one
                is missing, the pass is computed.
        """
        c, n = self._config, len(tokens)
        names = [(f"layers.{i}.k_rope", f"layers.{i}.v") for i in range(c.layers)]
        if not all(name in theirs for pair in names for name in pair):
            self.run(tokens, theirs)
            return
        for i, pair in enumerate(names):
            k, v = (
                np.asarray(theirs[x], np.float32).reshape(n, c.kv_heads, c.head_dim) for x in pair
            )
            self._store(i, k, v)
        self._cache.advance(n)

    def _store(self, layer: int, k: Array, v: Array) -> None:
        if self._rounded is not None:
            k, v = self._rounded("k", layer, k), self._rounded("v", layer, v)
        self._cache.append(layer, k, v)

    def _result(self, name: str, ours: Array) -> Array:
        self._results[name] = ours
        theirs = self._theirs.get(name)
        if theirs is None or theirs.size != ours.size:
            return ours
        return np.asarray(theirs, np.float32).reshape(ours.shape)

    def embed(self, name: str) -> Array:
        """Rows of the embedding of this pass's tokens: [T, hidden]."""
        return self._result(name, self._reference.embed(self._tokens))

    def norm(self, name: str, x: Array, weight: str) -> Array:
        """RMS norm along the last axis."""
        return self._result(name, self._reference.norm(weight, x))

    def linear(self, name: str, x: Array, weight: str) -> Array:
        """x [T, K] times the named matrix, plus its bias: [T, N]."""
        return self._result(name, self._reference.project(weight, x))

    def heads(self, name: str, x: Array, n: int) -> Array:
        """x [T, n*D] seen as [T, n, D]."""
        return x.reshape(x.shape[0], n, -1)

    def rope(self, name: str, x: Array, layer: int) -> Array:
        """x [T, n, D] rotated by its positions."""
        first, n = self._cache.n_past, x.shape[0]
        cos, sin = rope_tables(self._config, self._config.window_layers[layer], first + n)
        return self._result(name, apply_rope(x, cos[first:], sin[first:]))

    def attend(self, name: str, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Put k and v in the layer's cache; attention of q: [T, H*D]."""
        self._store(layer, k, v)
        return self._result(name, self._cache.attend(layer, q).reshape(q.shape[0], -1))

    def gated(self, name: str, gate: Array, up: Array) -> Array:
        """activation(gate) * up."""
        return self._result(name, activation(self._config.activation, gate) * up)

    def add(self, name: str, a: Array, b: Array) -> Array:
        """The sum of two."""
        return self._result(name, a + b)

    def logits(self, name: str, x: Array, weight: str) -> Array:
        """The head on all positions: [T, V]."""
        return self._result(name, self._reference.project(weight, x))
