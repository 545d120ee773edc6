"""Texts sampled from a model, the same on every machine: many at once, a token of each at a time.

All sequences are equally long, so that a step is one product for each matrix. A step is computed by
`edgeq.quant.decoder.fixed_order`, probabilities are added up in order, and random numbers are those
of NumPy's PCG64, which are integers: the tokens depend on nothing but the model, the beginnings and
the seed.

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
from edgeq.model.block import RopeSpec
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import decoder
from edgeq.model.formulas import Array, apply_rope, rope_tables
from edgeq.model.model import Model
from edgeq.quant.decoder.fixed_order import FixedOrderReference
from edgeq.quant.kernels.products import product, products, softmax
from edgeq.quant.rounders.qparams import check_finite

LEAST_LIKELY = 0.05
"""Tokens less likely than this part of the likeliest are not drawn: a small model's many unlikely
tokens lead it astray."""


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
        model: float; kept integers count as floats.
        beginnings: tokens of each text, at least one; what is past ``length`` is left out.
        length: tokens of each text, its beginning included; at most the model's context.
        seed: of the random numbers.
        progress: called with ("sampling text", tokens done, of how many).

    Returns:
        int64 [texts, length].

    Raises:
        FormatError: a matrix or the logits are not finite.
        UsageError: no beginnings, an empty one, or a length out of range.
    """
    if not beginnings or not all(len(tokens) for tokens in beginnings):
        raise UsageError("a text to be sampled has no beginning; give at least one token of each")
    if not 1 <= length <= model.config.context:
        raise UsageError(
            f"length is {length} tokens; use 1 to the model's context of {model.config.context}"
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
        drawn = generator.integers(0, 1 << 53, count)  # for all, so that no draw shifts another's
        following = tokens[:, place + 1]
        with np.errstate(all="ignore"):  # what comes of infinities is refused below
            logits = builder.step(tokens[:, place])
        following[:] = np.where(following < 0, _chosen(logits, drawn / 2.0**53), following)
    if progress:
        progress("sampling text", count * length, count * length)
    return tokens


def sampling_bytes(config: ModelConfig, count: int, length: int) -> int:
    """Most bytes that `sample_texts` holds: the matrices in float32, keys, values and logits."""
    weights = sum(n * k for _, (n, k) in config.linears())
    past = 2 * count * length * config.kv_heads * config.head_dim * config.layers
    return 4 * (weights + past) + 24 * count * config.vocab


def _chosen(logits: Array, at: NDArray[np.float64]) -> NDArray[np.int64]:
    """The token at each place, 0 <= place < 1, of the sum of probabilities."""
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
    """A decoder of one new token for each of several sequences, all at the same position."""

    def __init__(self, model: Model, count: int, length: int) -> None:
        super().__init__(model, linear=self._wide)
        c = self.config
        self._length, self._place, self._count = length, 0, count
        self._known: dict[str, Array] = {}
        self._tables: dict[RopeSpec, tuple[Array, Array]] = {}
        shape = (c.layers, count * c.kv_heads)
        # positions last, then first: as the products read them without gaps
        self._past_keys = np.zeros((*shape, c.head_dim, length), np.float32)
        self._past_values = np.zeros((*shape, length, c.head_dim), np.float32)

    def step(self, tokens: NDArray[np.int64]) -> Array:
        """Logits of the tokens that follow, float32 [sequences, V]."""
        self.begin(tokens)
        logits = decoder(self, self.config)
        self._place += 1
        return logits

    def rope(self, name: str, x: Array, rope: RopeSpec) -> Array:
        """x [sequences, n, D] rotated by the one position."""
        if rope not in self._tables:
            self._tables[rope] = rope_tables(rope, self._length)
        cos, sin = (table[self._place : self._place + 1] for table in self._tables[rope])
        return self._result(name, apply_rope(x, cos, sin))

    def attend(self, name: str, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Each sequence's attention to its own past: [sequences, H*D]."""
        c, place = self.config, self._place
        keys, values = self._past_keys[layer], self._past_values[layer]
        keys[:, :, place] = k.reshape(-1, c.head_dim)
        values[:, place] = v.reshape(-1, c.head_dim)
        seen = slice(c.blocks[layer].first_seen(place), place + 1)
        scores = products(q.reshape(-1, c.group, c.head_dim), keys[:, :, seen].transpose(0, 2, 1))
        scores *= np.float32(c.attn_scale)
        mixed = products(softmax(scores), values[:, seen].transpose(0, 2, 1))
        return self._result(name, mixed.reshape(self._count, -1))

    def _wide(self, name: str, x: Array, tensor: Tensor) -> Array:
        if name not in self._known:
            # columns first: rows side by side are packed a vector at a time
            weights = tensor.numpy()
            check_finite(weights, name)
            self._known[name] = np.ascontiguousarray(weights.T)
            release(tensor)
        return product(x, self._known[name].T)
