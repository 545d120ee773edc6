"""The cache of the reference: as many positions as are appended, all of them kept.

That is the keys and values of attention, and the inputs of short convolutions and of gated delta
nets, whose state is computed from them again where positions are taken back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.model.config import ModelConfig
from edgeq.model.delta_rule import DeltaInputs, DeltaWeights, delta_inputs, delta_step
from edgeq.model.formulas import Array, attend_blocks, attention_shares, convolution, softcap
from edgeq.model.memory_layout import input_width, state_shape


class KV:
    """Keys and values of the positions seen so far, growing as needed.

    The contract a cache fulfils (the INT8 one of the runtime is another): `n_past`, `append`,
    `attend`, `convolve`, `recur`, `advance`, `truncate`.

    Args:
        config: of the model.
        dtype: what keys and values are stored as; all arithmetic is float32, and so are the inputs
            of short convolutions.
        capacity: positions to make room for at once.
    """

    def __init__(
        self, config: ModelConfig, dtype: type[np.generic] = np.float32, capacity: int = 0
    ) -> None:
        self.config = config
        self.n_past = 0
        self.rope_context = 0
        """The context that keys are rotated for (`edgeq.model.rotary`); the reference sets it."""
        attends = [block.mixer == "attention" for block in config.blocks]
        shapes = self.shapes(capacity)
        self._k: list[NDArray[Any]] = [np.empty(shape, dtype) for shape in shapes]
        self._v: list[NDArray[Any]] = [np.empty(shape, dtype) for shape in shapes]
        self._inputs = [
            np.empty((0 if attend else capacity, input_width(config, i)), np.float32)
            for i, attend in enumerate(attends)
        ]
        self._states = {
            i: DeltaState(np.zeros(state_shape(config, i), np.float32))
            for i, block in enumerate(config.blocks)
            if block.delta
        }

    def shapes(self, capacity: int) -> list[tuple[int, int, int]]:
        """Shapes of the keys and of the values of each layer with room for some positions: no room
        in a layer without keys and values of its own."""
        c = self.config
        own = [block.mixer == "attention" and block.kv_from is None for block in c.blocks]
        return [(capacity * has, c.kv_heads, c.head_dim_of(i)) for i, has in enumerate(own)]

    def arrays(self, layer: int) -> dict[str, NDArray[Any]]:
        """What is stored of a layer, by position: keys and values [capacity, Hkv, D].

        Of a short convolution or gated delta net: its inputs [capacity, `input_width`]. Of a layer
        that reads the keys and values of another: nothing.
        """
        if self.config.blocks[layer].mixer != "attention":
            return {"inputs": self._inputs[layer]}
        if self.config.blocks[layer].kv_from is not None:
            return {}
        return {"keys": self._k[layer], "values": self._v[layer]}

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        states = (state.values.nbytes for state in self._states.values())
        return sum(a.nbytes for a in (*self._k, *self._v, *self._inputs)) + sum(states)

    def convolve(self, layer: int, x: Array, weight: Array) -> Array:
        """Store x [T, hidden] at positions n_past .. n_past+T-1; its causal convolution.

        Args:
            layer: a short convolution.
            x: its inputs.
            weight: float32 [hidden, 1, taps].

        Returns:
            float32 [T, hidden].
        """
        self._keep_inputs(layer, x)
        stop = self.n_past + x.shape[0]
        first = self.config.blocks[layer].first_seen(self.n_past)
        return convolution(self._inputs[layer][first:stop], weight)[self.n_past - first :]

    def recur(self, layer: int, inputs: Array, weights: DeltaWeights) -> Array:
        """Store the inputs of a gated delta net at positions n_past ..; what it reads there.

        Args:
            layer: of the model.
            inputs: [T, `input_width`]: qkv, beta and decay of each position.
            weights: of the layer.

        Returns:
            float32 [T, value_heads, value_dim].
        """
        self._keep_inputs(layer, inputs)
        block, stop = self.config.blocks[layer], self.n_past + inputs.shape[0]
        assert block.delta is not None
        kept = self._states[layer]
        if kept.position != self.n_past:
            kept.go_back(self.n_past)
        begin, channels = kept.position, block.delta.channels
        first = block.first_seen(begin)
        seen = self._inputs[layer][first:stop]
        mixed = convolution(seen[:, :channels], weights.taps)[begin - first :]
        beta, decay = np.split(seen[begin - first :, channels:], 2, axis=-1)
        rows = delta_inputs(block.delta, weights, mixed, beta, decay)
        return kept.run(rows)[self.n_past - begin :]

    def state_at_end(self, layer: int, weights: DeltaWeights) -> Array:
        """The state of a gated delta net after the positions of the sequence."""
        kept = self._states[layer]
        if kept.position != self.n_past:
            self.recur(layer, self._inputs[layer][:0], weights)
        assert kept.position == self.n_past
        return kept.values

    def resumes(self, position: int) -> bool:
        """Whether the states of gated delta nets can be those after ``position`` positions."""
        return all(state.reaches(position) for state in self._states.values())

    def set_state(self, layer: int, position: int, values: Array) -> None:
        """Put a state after ``position`` positions in place; none before it can be gone back to."""
        self._states[layer] = DeltaState(values.copy(), position)

    def _keep_inputs(self, layer: int, x: Array) -> None:
        stop = self.n_past + x.shape[0]
        self._inputs[layer] = grown(self._inputs[layer], stop)
        self._inputs[layer][self.n_past : stop] = x

    def append(self, layer: int, k: Array, v: Array) -> None:
        """Store k and v [T, Hkv, D] at positions n_past .. n_past+T-1 of one layer."""
        self._store(layer, k, v)

    def _store(self, layer: int, k: NDArray[Any], v: NDArray[Any]) -> None:
        stop = self.n_past + k.shape[0]
        self._k[layer] = grown(self._k[layer], stop)
        self._v[layer] = grown(self._v[layer], stop)
        self._k[layer][self.n_past : stop] = k
        self._v[layer][self.n_past : stop] = v

    def attend(self, layer: int, q: Array, sinks: Array | None = None) -> Array:
        """Attention of q [T, H, D] at positions n_past .. n_past+T-1, after `append` to the layer
        whose keys and values this one reads.

        Query head h reads key/value head h // group.

        Args:
            layer: of the model.
            q: the queries.
            sinks: of the layer, float32 [H], or None where it has none.

        Returns:
            float32 [T, H, D].
        """
        c = self.config
        n, source = q.shape[0], c.kv_layer(layer)
        grouped = q.reshape(n, c.kv_heads, c.group, q.shape[2])
        out = np.empty(grouped.shape, np.float32)
        if sinks is not None:
            sinks = sinks.reshape(c.kv_heads, c.group).T[:, :, None, None]
        for rows, seen, visible in attend_blocks(c.blocks[layer], self.n_past, n):
            k = self._k[source][seen].transpose(1, 2, 0)  # [Hkv, D, S]
            v = self._v[source][seen].transpose(1, 0, 2)  # [Hkv, S, D]
            block = grouped[rows].transpose(2, 1, 0, 3)  # [group, Hkv, rows, D]
            scores = (block @ k) * np.float32(c.attn_scale)
            if c.attn_softcap is not None:
                scores = softcap(scores, c.attn_softcap)
            weights = attention_shares(np.where(visible, scores, np.float32(-np.inf)), sinks)
            out[rows] = (weights @ v).transpose(2, 1, 0, 3)
        return out.reshape(q.shape)

    def advance(self, n: int) -> None:
        """Count ``n`` more positions as seen, once every layer has stored them."""
        self.n_past += n

    def truncate(self, n: int) -> None:
        """Forget all but the first ``n`` positions.

        Raises:
            UsageError: n is negative or more than there are.
        """
        if not 0 <= n <= self.n_past:
            raise UsageError(f"cannot truncate a cache of {self.n_past} tokens to {n}")
        self.n_past = n
        if n == 0:
            for layer, state in self._states.items():
                self.set_state(layer, 0, np.zeros_like(state.values))


class DeltaState:
    """The state of a gated delta net after a number of positions.

    Args:
        values: float32 `state_shape`.
        position: how many positions it has seen.

    Attributes:
        values, position: as they are now.
    """

    def __init__(self, values: Array, position: int = 0) -> None:
        self.values, self.position = values, position
        self._first = (values, position)

    def reaches(self, position: int) -> bool:
        """Whether the state after ``position`` positions can be computed."""
        return position >= self._first[1]

    def go_back(self, position: int) -> None:
        """Return to the first state, from which ``position`` can be reached again."""
        assert self.reaches(position)
        self.values, self.position = self._first

    def run(self, rows: DeltaInputs) -> Array:
        """Go on over some positions; what is read at each, [T, value_heads, value_dim]."""
        read = np.empty_like(rows.v)
        for t in range(len(rows.v)):
            one = DeltaInputs(rows.q[t], rows.k[t], rows.v[t], rows.strength[t], rows.decay[t])
            self.values, read[t] = delta_step(self.values, one)
        self.position += len(read)
        return read


def grown(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """The array with room for ``rows`` rows; at least doubled when it must grow."""
    if rows <= array.shape[0]:
        return array
    bigger = np.empty((max(rows, 2 * array.shape[0]), *array.shape[1:]), array.dtype)
    bigger[: array.shape[0]] = array
    return bigger
