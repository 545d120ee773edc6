"""Sample texts from a model in a batch, with the same tokens on every machine.

All sequences have the same length, so that a step is one product for each matrix. A step is
computed by `edgeq.quant.decoder.fixed_order`, probabilities are added in a fixed order, and the
random numbers are integers of NumPy's PCG64. The tokens therefore depend only on the model, the
beginnings and the seed.

Memory: see `sampling_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError
from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.tensor import Tensor
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import decoder
from edgeq.model.delta_rule import delta_inputs, delta_output, delta_step
from edgeq.model.formulas import Array, apply_rope, attention_shares, convolution
from edgeq.model.memory_layout import state_bytes, state_shape
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeSpec
from edgeq.model.rotary import rope_tables
from edgeq.model.whole_texts import check_generates
from edgeq.quant.decoder.fixed_order import FixedOrderReference
from edgeq.quant.decoder.layerwise import check_layerwise
from edgeq.quant.kernels.products import product, products, softcap, softmax
from edgeq.quant.rounders.qparams import check_finite

LEAST_LIKELY = 0.05
"""Tokens with less than this fraction of the largest probability are not sampled (as with min_p),
because the many unlikely tokens of a small model lead to nonsense."""


def sample_texts(
    model: Model,
    beginnings: Sequence[Sequence[int]],
    length: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """Continue each beginning with tokens drawn from the model, at a temperature of 1.

    Args:
        model: a float model; integers that were kept from the source count as floats.
        beginnings: the first tokens of each text, at least one; truncated to ``length``.
        length: tokens per text, including the beginning; at most the model's context.
        seed: seed of the random numbers.
        progress: called with ("sampling text", tokens done, number of tokens).

    Returns:
        token ids, int64 [texts, length].

    Raises:
        FormatError: a matrix or the logits are not finite.
        UsageError: there are no beginnings, one is empty, or the length is out of range.
    """
    check_generates(model.config)
    check_layerwise(model.config, "a calibration text of the model itself")
    if not beginnings or not all(len(tokens) for tokens in beginnings):
        raise UsageError("a text to sample has no beginning; give at least one token for each text")
    if not 1 <= length <= model.config.context:
        raise UsageError(
            f"length is {length} tokens; use 1 to {model.config.context}, the model's context"
        )
    count = len(beginnings)
    tokens = np.full((count, length), -1, np.int64)
    for row, beginning in zip(tokens, beginnings, strict=True):
        row[: len(beginning)] = beginning[:length]
    generator = np.random.Generator(np.random.PCG64(seed))
    builder = _Lockstep(model, count, length)
    for place in range(length - 1):
        if progress:
            progress("sampling text", count * place, count * length)
        drawn = generator.integers(0, 1 << 53, count)  # for all texts, so that they are independent
        following = tokens[:, place + 1]
        with np.errstate(all="ignore"):  # infinite and NaN logits are refused below
            logits = builder.step(tokens[:, place])
        following[:] = np.where(following < 0, _chosen(logits, drawn / 2.0**53), following)
    if progress:
        progress("sampling text", count * length, count * length)
    return tokens


def sampling_bytes(config: ModelConfig, count: int, length: int) -> int:
    """Most bytes of memory of `sample_texts`: the matrices in float32, keys, values and logits."""
    weights = sum(n * k for _, (n, k) in config.linears())
    past = 2 * count * length * config.kv_heads * config.head_dim * config.layers
    states = 3 * count * sum(state_bytes(config, layer) for layer in range(config.layers))
    return 4 * (weights + past) + states + 24 * count * config.vocab


def _chosen(logits: Array, at: NDArray[np.float64]) -> NDArray[np.int64]:
    """Sample a token for each row of logits [texts, V] by inverting the cumulative probabilities.

    Args:
        logits: float32 [texts, V].
        at: a random number of 0 to 1 for each text.
    """
    if not np.isfinite(logits).all():
        raise FormatError(
            "the model's logits are not finite: its weights are too large or its file is damaged; "
            "quantize with --fast, which names the tensor, or keep some tensors floating point"
        )
    shares = softmax(logits)
    shares = np.where(shares < np.float32(LEAST_LIKELY) * shares.max(axis=1)[:, None], 0, shares)
    sums = np.add.accumulate(shares, axis=1, dtype=np.float64)
    chosen: NDArray[np.int64] = (sums <= (at * sums[:, -1])[:, None]).sum(axis=1)
    return chosen


class _Lockstep(FixedOrderReference):
    """A decoder that runs one token of each of several sequences at the same position."""

    def __init__(self, model: Model, count: int, length: int) -> None:
        super().__init__(model, linear=self._wide)
        c = self.config
        self._length, self._place, self._count = length, 0, count
        self._known: dict[str, Array] = {}
        self._tables: dict[RopeSpec, tuple[Array, Array]] = {}
        self._past_inputs: dict[int, Array] = {}  # of a short convolution's last positions
        self._states: dict[int, Array] = {}  # of gated delta nets
        shape = (c.layers, count * c.kv_heads)
        # the axis order in which the products read keys and values contiguously
        self._past_keys = np.zeros((*shape, c.head_dim, length), np.float32)
        self._past_values = np.zeros((*shape, length, c.head_dim), np.float32)

    def step(self, tokens: NDArray[np.int64]) -> Array:
        """Run one token of each sequence and return the logits, float32 [sequences, V]."""
        self.begin(tokens)
        logits = decoder(self, self.config)
        self._place += 1
        return logits

    def rope(self, name: str, x: Array, rope: RopeSpec) -> Array:
        """Apply the rotary embedding of the current position to x [sequences, n, D]."""
        if rope not in self._tables:
            self._tables[rope] = rope_tables(rope, self._length)
        cos, sin = (table[self._place : self._place + 1] for table in self._tables[rope])
        return self._result(name, apply_rope(x, cos, sin))

    def attend(self, name: str, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Attention of each sequence to its own positions: [sequences, H*D]."""
        c, place = self.config, self._place
        keys, values = self._past_keys[layer], self._past_values[layer]
        keys[:, :, place] = k.reshape(-1, c.head_dim)
        values[:, place] = v.reshape(-1, c.head_dim)
        seen = slice(c.blocks[layer].first_seen(place), place + 1)
        scores = products(q.reshape(-1, c.group, c.head_dim), keys[:, :, seen].transpose(0, 2, 1))
        scores *= np.float32(c.attn_scale)
        if c.attn_softcap is not None:
            scores = softcap(scores, c.attn_softcap)
        sinks = self._sinks(layer)
        if sinks is not None:
            sinks = np.tile(sinks.reshape(c.kv_heads, c.group, 1), (self._count, 1, 1))
        shares = attention_shares(scores, sinks, softmax)
        mixed = products(shares, values[:, seen].transpose(0, 2, 1))
        return self._result(name, mixed.reshape(self._count, -1))

    def short_conv(self, name: str, layer: int, b: Array, c: Array, x: Array, weight: str) -> Array:
        """The convolution of each sequence's own positions: [sequences, hidden]."""
        return self._result(name, c * self._convolved(layer, b * x, self._vector(weight)))

    def delta_net(
        self, name: str, layer: int, qkv: Array, z: Array, beta: Array, decay: Array
    ) -> Array:
        """The gated delta rule on each sequence's own state: [sequences, values]."""
        weights, spec = self.delta_weights(layer), self.config.blocks[layer].delta
        assert spec is not None
        mixed = self._convolved(layer, qkv, weights.taps)
        inputs = delta_inputs(spec, weights, mixed, beta, decay)
        empty = np.zeros((self._count, *state_shape(self.config, layer)), np.float32)
        self._states[layer], read = delta_step(self._states.get(layer, empty), inputs)
        return self._result(name, delta_output(spec, weights, read, z))

    def _convolved(self, layer: int, x: Array, taps: Array) -> Array:
        """The convolution of inputs x [sequences, channels] at the current position."""
        before = np.zeros((self._count, taps.shape[2] - 1, x.shape[1]), np.float32)
        seen = np.concatenate([self._past_inputs.get(layer, before), x[:, None]], axis=1)
        self._past_inputs[layer] = seen[:, 1:]
        return np.stack([convolution(inputs, taps)[-1] for inputs in seen])

    def _wide(self, name: str, x: Array, tensor: Tensor) -> Array:
        if name not in self._known:
            # transposed, so that the product packs vectors of adjacent rows
            weights = tensor.numpy()
            check_finite(weights, name)
            self._known[name] = np.ascontiguousarray(weights.T)
            release(tensor)
        return product(x, self._known[name].T)
