"""The reference with every named result kept, to compare another backend with step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.model.decoder import key_step
from edgeq.model.formulas import Array, Linear
from edgeq.model.model import Model
from edgeq.model.reference import CacheRounding, Reference


class TracedReference(Reference):
    """A reference that keeps every named result; its cache goes on from pass to pass.

    With the results of another backend each step is computed from that backend's inputs to it, so
    an error appears at the step that makes it and at no other, however many layers follow.

    Args:
        model, linear, kv, keep, context: as for `Reference`.
    """

    def __init__(
        self,
        model: Model,
        *,
        linear: Linear | None = None,
        kv: CacheRounding | None = None,
        keep: bool = False,
        context: int | None = None,
    ) -> None:
        super().__init__(model, linear=linear, kv=kv, keep=keep, context=context)
        self._results: dict[str, Array] = {}
        self._replacements: Mapping[str, NDArray[np.float32]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._past = self.new_cache()

    def trace(
        self,
        tokens: Sequence[int] | NDArray[np.integer],
        replacements: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> dict[str, Array]:
        """All results of one pass over the next tokens.

        Args:
            tokens: int [T].
            replacements: another backend's results of the same pass. Where a name is in it, that
                value goes to the later steps and to the cache.

        Returns:
            This reference's results by their names in `edgeq.model.decoder`, in its order:
            float32, logits [T, V].
        """
        self._replacements, self._results = replacements or {}, {}
        self.forward(tokens, self._past)
        return self._results

    def append_past(
        self, tokens: Sequence[int], results: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Append another backend's keys and values of earlier tokens to the cache.

        Args:
            tokens: int [T].
            results: its results of that pass; of each layer the keys that are cached, for
                instance ``layers.{i}.k_rope``, and the values ``layers.{i}.v``. Where one is
                missing, as in a layer without attention, the pass is computed.
        """
        c, n = self.config, len(tokens)
        names = [
            (f"layers.{i}.{key_step(block)}", f"layers.{i}.{'v_norm' if block.v_norm else 'v'}")
            for i, block in enumerate(c.blocks)
        ]
        if not all(name in results for pair in names for name in pair):
            self.trace(tokens, results)
            return
        for i, pair in enumerate(names):
            k, v = (
                np.asarray(results[x], np.float32).reshape(n, c.kv_heads, c.head_dim_of(i))
                for x in pair
            )
            self._store(self._past, i, k, v)
        self._past.advance(n)

    def _result(self, name: str, value: Array) -> Array:
        self._take(name, value)
        other = self._replacements.get(name)
        if other is None or other.size != value.size:
            return value
        return np.asarray(other, np.float32).reshape(value.shape)

    def _take(self, name: str, value: Array) -> None:
        """A result of this reference, before another backend's replaces it."""
        self._results[name] = value
