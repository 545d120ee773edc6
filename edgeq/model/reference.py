"""The decoder in plain NumPy, float32: the specification every other part is held against.

Read it from top to bottom. First the formulas, each a pure function and the only copy in the
project; then the cache; then `Reference`, which is one loop over the layers:

    x [T, hidden] = embedding of T tokens, times embed_scale
    for each layer:
        h = rms_norm(x)                      q, k, v = h @ Wq.T, h @ Wk.T, h @ Wv.T  (+ biases)
        q, k = rms_norm of each head         where the family has it (Qwen 3, Gemma 3)
        q, k = rotated by their positions    k, v go to the cache
        x += Wo @ softmax(q . k * attn_scale) v          over the positions the layer may see
        x += Wdown @ (activation(Wgate h) * (Wup h))     with h = rms_norm(x)
    logits [T, V] = rms_norm(x) @ Whead.T

Where `config.post_norms` is set (Gemma 3) both additions are normed once more before they are
added. It runs float and quantized models alike: a `Tensor` gives its rows as float32.

Source: Touvron et al. 2023 (arXiv 2307.09288); Su et al. 2021 (arXiv 2104.09864) for rotary
positions, in the half-split order of the Hugging Face checkpoints; Zhang & Sennrich 2019 (arXiv
1910.07467) for the RMS norm; Shazeer 2020 (arXiv 2002.05202) for the gated feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError, check_type
from edgeq.formats.tensor import Tensor
from edgeq.model.config import Activation, ModelConfig
from edgeq.model.model import Model

Array = NDArray[np.float32]
Linear = Callable[[str, Array, Tensor], Array]
"""(tensor name, x [T, K], weight [N, K]) -> x @ weight.T [T, N]"""
Rounding = Callable[[Array], Array]
"""k or v [T, Hkv, D] -> the values a cache gives back for it."""

BLOCK_ELEMENTS = 1 << 22
"""Weights turned to float32 at once (16 MiB): a large head is multiplied block of rows by block."""
QUERY_BLOCK = 128
"""Query positions attended at once, so that scores take [H, 128, S] rather than [H, T, S]."""


# --- formulas ---------------------------------------------------------------------------------


def rms_norm(x: Array, weight: Array, eps: float, offset: float = 0.0) -> Array:
    """Divide by the root mean square along the last axis, times ``weight + offset``.

    Args:
        x: float32 [..., n].
        weight: float32 [n].
        eps: added to the mean square.
        offset: 1.0 for Gemma, whose checkpoints hold the weight less one.
    """
    square: Array = np.mean(x * x, axis=-1, keepdims=True)
    return cast(Array, x / np.sqrt(square + np.float32(eps)) * (weight + np.float32(offset)))


def rope_frequencies(config: ModelConfig, layer_is_local: bool) -> NDArray[np.float64]:
    """Radians per position of each rotated pair, float64 [rope_dim / 2].

    A local (sliding-window) layer has the base `rope_theta_local` and no stretching where the
    family sets that base; otherwise all layers share one table.
    """
    local_base = config.rope_theta_local if layer_is_local else None
    base = config.rope_theta if local_base is None else local_base
    frequencies = base ** -(np.arange(0, config.rope_dim, 2, dtype=np.float64) / config.rope_dim)
    scaling = config.rope_scaling
    if scaling is None or local_base is not None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    # Llama 3.1: how many turns a pair makes in the original context decides how much of the
    # stretching it gets: all below low_freq_factor turns, none above high_freq_factor.
    turns = scaling.original_context * frequencies / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    unstretched = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - unstretched) * stretched + unstretched * frequencies


def rope_tables(config: ModelConfig, layer_is_local: bool, n_positions: int) -> tuple[Array, Array]:
    """Cosines and sines of positions 0 .. n_positions-1.

    Computed in float64 and rounded once.

    Returns:
        (cos, sin), each float32 [n_positions, rope_dim / 2].
    """
    angles = np.outer(np.arange(n_positions), rope_frequencies(config, layer_is_local))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def apply_rope(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate each head by its position.

    Dimension i is paired with i + rope_dim/2 (half-split order); dimensions past rope_dim pass
    unchanged (partial rotary).

    Args:
        x: float32 [T, H, D].
        cos, sin: float32 [T, rope_dim / 2], rows of `rope_tables` for the T positions.
    """
    half = cos.shape[1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = x[..., :half], x[..., half : 2 * half]
    out = x.copy()
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    return out


def activation(kind: Activation, x: Array) -> Array:
    """The gate's nonlinearity: "silu" is x * sigmoid(x), "gelu_tanh" GELU's tanh form."""
    if kind == "silu":
        with np.errstate(over="ignore"):  # exp(-x) = inf makes the quotient the right -0
            return cast(Array, x / (np.float32(1) + np.exp(-x)))
    inner = np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)
    return cast(Array, np.float32(0.5) * x * (np.float32(1) + np.tanh(inner)))


def window_start(config: ModelConfig, layer: int, pos: int) -> int:
    """The first position that position ``pos`` sees in ``layer``: 0, or window-1 before it."""
    if config.window is None or not config.window_layers[layer]:
        return 0
    return max(0, pos - config.window + 1)


def softmax(scores: Array) -> Array:
    """Softmax along the last axis; -inf marks what may not be seen."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return cast(Array, weights / weights.sum(axis=-1, keepdims=True))


def attend_blocks(
    config: ModelConfig, layer: int, first: int, n: int
) -> list[tuple[slice, slice, NDArray[np.bool_]]]:
    """Cut causal attention of ``n`` new positions into blocks of queries.

    Args:
        config, layer: decide the window.
        first: position of the first new token.
        n: how many there are.

    Returns:
        For each block: the queries' rows (of n), the cached positions any of them sees, and
        bool [rows, positions] of what each sees.
    """
    blocks = []
    for a in range(0, n, QUERY_BLOCK):
        b = min(a + QUERY_BLOCK, n)
        seen = slice(window_start(config, layer, first + a), first + b)
        where = np.arange(seen.start, seen.stop)
        query = np.arange(first + a, first + b)
        starts = np.array([window_start(config, layer, int(pos)) for pos in query])
        visible = (where[None, :] <= query[:, None]) & (where[None, :] >= starts[:, None])
        blocks.append((slice(a, b), seen, visible))
    return blocks


def dense(name: str, x: Array, weight: Tensor) -> Array:
    """The default `Linear`: x [T, K] @ weight.T in float32, a block of rows at a time."""
    n, k = weight.shape
    step = max(1, BLOCK_ELEMENTS // k)
    if step >= n:
        return x @ weight.numpy().T
    out = np.empty((x.shape[0], n), np.float32)
    for a in range(0, n, step):
        out[:, a : a + step] = x @ weight.rows(a, min(a + step, n)).T
    return out


# --- the cache --------------------------------------------------------------------------------


class KV:
    """Keys and values of the positions seen so far, growing as needed.

    The contract a cache fulfils (the INT8 one of the runtime is another): `n_past`, `append`,
    `attend`, `advance`, `truncate`.

    Args:
        config: of the model.
        dtype: what they are stored as; all arithmetic is float32.
        capacity: positions to make room for at once.
    """

    def __init__(
        self, config: ModelConfig, dtype: type[np.generic] = np.float32, capacity: int = 0
    ) -> None:
        self.config = config
        self.n_past = 0
        shape = (capacity, config.kv_heads, config.head_dim)
        self._k: list[NDArray[Any]] = [np.empty(shape, dtype) for _ in range(config.layers)]
        self._v: list[NDArray[Any]] = [np.empty(shape, dtype) for _ in range(config.layers)]

    def arrays(self, layer: int) -> dict[str, NDArray[Any]]:
        """What is stored of a layer, by position: keys and values [capacity, Hkv, D]."""
        return {"keys": self._k[layer], "values": self._v[layer]}

    @property
    def nbytes(self) -> int:
        """Bytes held, room to grow included."""
        return sum(a.nbytes for a in (*self._k, *self._v))

    def append(self, layer: int, k: Array, v: Array) -> None:
        """Store k and v [T, Hkv, D] at positions n_past .. n_past+T-1 of one layer."""
        self._store(layer, k, v)

    def _store(self, layer: int, k: NDArray[Any], v: NDArray[Any]) -> None:
        stop = self.n_past + k.shape[0]
        self._k[layer] = grown(self._k[layer], stop)
        self._v[layer] = grown(self._v[layer], stop)
        self._k[layer][self.n_past : stop] = k
        self._v[layer][self.n_past : stop] = v

    def attend(self, layer: int, q: Array) -> Array:
        """Attention of q [T, H, D] at positions n_past .. n_past+T-1, after `append`.

        Query head h reads key/value head h // group.

        Returns:
            float32 [T, H, D].
        """
        c = self.config
        n = q.shape[0]
        out = np.empty((n, c.kv_heads, c.group, c.head_dim), np.float32)
        grouped = q.reshape(n, c.kv_heads, c.group, c.head_dim)
        for rows, seen, visible in attend_blocks(c, layer, self.n_past, n):
            k = self._k[layer][seen].transpose(1, 2, 0)  # [Hkv, D, S]
            v = self._v[layer][seen].transpose(1, 0, 2)  # [Hkv, S, D]
            block = grouped[rows].transpose(2, 1, 0, 3)  # [group, Hkv, rows, D]
            scores = (block @ k) * np.float32(c.attn_scale)
            weights = softmax(np.where(visible, scores, np.float32(-np.inf)))
            out[rows] = (weights @ v).transpose(2, 1, 0, 3)
        return out.reshape(n, c.heads, c.head_dim)

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


def grown(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """The array with room for ``rows`` rows; at least doubled when it must grow."""
    if rows <= array.shape[0]:
        return array
    bigger = np.empty((max(rows, 2 * array.shape[0]), *array.shape[1:]), array.dtype)
    bigger[: array.shape[0]] = array
    return bigger


# --- the decoder ------------------------------------------------------------------------------


def checked_tokens(
    config: ModelConfig, tokens: Sequence[int] | NDArray[np.integer]
) -> NDArray[np.int64]:
    """The tokens as int64 [T].

    Raises:
        UsageError: not one row, no tokens, or one outside the vocabulary.
    """
    given = np.asarray(tokens)
    if given.size and given.dtype.kind not in "iu":
        raise UsageError(
            f"tokens must be whole numbers, not {type(tokens).__name__} of {given.dtype}; "
            "a text is turned into tokens by Tokenizer.encode"
        )
    ids = given.astype(np.int64)
    if ids.ndim != 1 or not ids.size:
        raise UsageError(f"tokens has shape {list(ids.shape)}; give one row of at least one")
    if ids.min() < 0 or ids.max() >= config.vocab:
        bad = int(ids[(ids < 0) | (ids >= config.vocab)][0])
        raise UsageError(
            f"token {bad} is outside the vocabulary of {config.vocab}; "
            "was the text tokenized for another model?"
        )
    return ids


class Reference:
    """A model's decoder in float32.

    Args:
        model: float or quantized.
        linear: called for every matrix product in place of `dense` (biases stay with the
            caller): to watch activations, or to compute as a kernel does.
        kv: rounds k and v [T, Hkv, D] as a cache would, before they are stored.
        keep: hold every weight that was turned to float32 (4 bytes a weight) rather than turn it
            again at each call; for small models. Not with ``linear``, which is given the tensor.
    """

    def __init__(
        self,
        model: Model,
        *,
        linear: Linear | None = None,
        kv: Rounding | None = None,
        keep: bool = False,
    ) -> None:
        check_type("model", model, Model)
        if keep and linear is not None:
            raise UsageError("keep holds the weights of the default product; leave out linear")
        self.model = model
        self.config = model.config
        self._linear = linear or (self._kept if keep else dense)
        self._kv = kv
        self._small: dict[str, Array] = {}  # norms and biases, as float32
        self._weights: dict[str, Array] = {}
        self._rope: dict[bool, tuple[Array, Array]] = {}

    def new_cache(self) -> KV:
        """An empty cache for `forward`."""
        return KV(self.config)

    def forward(
        self,
        tokens: Sequence[int] | NDArray[np.integer],
        cache: KV | None = None,
        all_logits: bool = True,
    ) -> Array:
        """Logits of the tokens that follow.

        Args:
            tokens: int [T], T >= 1; placed after what the cache holds.
            cache: extended by T positions; None starts afresh.
            all_logits: every position's logits, or only the last one's.

        Returns:
            float32 [T, V], or [V] if not all_logits.

        Raises:
            UsageError: no tokens, or one outside the vocabulary.
        """
        ids = checked_tokens(self.config, tokens)
        cache = self.new_cache() if cache is None else cache
        x = self.embed(ids)
        for layer in range(self.config.layers):
            x = x + self.attention(layer, x, cache)
            x = x + self.feed_forward(layer, x)
        cache.advance(ids.size)
        if not all_logits:
            x = x[-1:]
        logits = self.head(self.head_in(x))
        return logits if all_logits else cast(Array, logits[0])

    def embed(self, ids: NDArray[np.int64]) -> Array:
        """Rows of the embedding matrix, times `embed_scale`: float32 [T, hidden].

        Only the rows asked for are read. The scale is used as float32: a checkpoint trained with
        a scale of lower precision has it rounded by its importer.
        """
        table = self._tensor("model.embed_tokens.weight")
        unique, where = np.unique(ids, return_inverse=True)
        rows = np.concatenate([table.rows(int(i), int(i) + 1) for i in unique])
        return cast(Array, rows[where] * np.float32(self.config.embed_scale))

    # Each half of a layer in three steps, so that what a matrix is multiplied with can be had
    # apart: the input of the first matrices, that of the last one, and what is added to x.

    def attention(self, layer: int, x: Array, cache: KV) -> Array:
        """The layer's attention on x [T, hidden], which extends the cache: float32 [T, hidden]."""
        return self.attention_out(layer, self.mix(layer, self.attention_in(layer, x), cache))

    def attention_in(self, layer: int, x: Array) -> Array:
        """What q, k and v are projected from: float32 [T, hidden]."""
        return self.norm(f"model.layers.{layer}.input_layernorm.weight", x)

    def mix(self, layer: int, h: Array, cache: KV) -> Array:
        """Values mixed by attention, from `attention_in`'s h: float32 [T, H*D]."""
        c, t = self.config, h.shape[0]
        p = f"model.layers.{layer}."
        q = self.project(p + "self_attn.q_proj.weight", h).reshape(t, c.heads, c.head_dim)
        k = self.project(p + "self_attn.k_proj.weight", h).reshape(t, c.kv_heads, c.head_dim)
        v = self.project(p + "self_attn.v_proj.weight", h).reshape(t, c.kv_heads, c.head_dim)
        if c.qk_norm:
            q = self.norm(p + "self_attn.q_norm.weight", q)
            k = self.norm(p + "self_attn.k_norm.weight", k)
        cos, sin = self._rotation(c.window_layers[layer], cache.n_past, t)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if self._kv is not None:
            k, v = self._kv(k), self._kv(v)
        cache.append(layer, k, v)
        return cache.attend(layer, q).reshape(t, c.heads * c.head_dim)

    def attention_out(self, layer: int, mixed: Array) -> Array:
        """What attention adds to x, from `mix`'s values: float32 [T, hidden]."""
        p = f"model.layers.{layer}."
        out = self.project(p + "self_attn.o_proj.weight", mixed)
        after = p + "post_attention_layernorm.weight"
        return self.norm(after, out) if self.config.post_norms else out

    def feed_forward(self, layer: int, x: Array) -> Array:
        """The layer's gated feed-forward on x [T, hidden]: float32 [T, hidden]."""
        return self.feed_forward_out(layer, self.gate(layer, self.feed_forward_in(layer, x)))

    def feed_forward_in(self, layer: int, x: Array) -> Array:
        """What gate and up are projected from: float32 [T, hidden]."""
        before = "pre_feedforward" if self.config.post_norms else "post_attention"
        return self.norm(f"model.layers.{layer}.{before}_layernorm.weight", x)

    def gate(self, layer: int, h: Array) -> Array:
        """Activation of the gate times up, from `feed_forward_in`'s h: float32 [T, ffn]."""
        p = f"model.layers.{layer}."
        gate = activation(self.config.activation, self.project(p + "mlp.gate_proj.weight", h))
        return gate * self.project(p + "mlp.up_proj.weight", h)

    def feed_forward_out(self, layer: int, gated: Array) -> Array:
        """What the feed-forward adds to x, from `gate`'s values: float32 [T, hidden]."""
        p = f"model.layers.{layer}."
        out = self.project(p + "mlp.down_proj.weight", gated)
        after = p + "post_feedforward_layernorm.weight"
        return self.norm(after, out) if self.config.post_norms else out

    def head_in(self, x: Array) -> Array:
        """What the head is multiplied with: the last norm of x, float32 [T, hidden]."""
        return self.norm("model.norm.weight", x)

    def head(self, h: Array) -> Array:
        """Logits from `head_in`'s h: float32 [T, V]."""
        return self.project(self.config.head_name, h)

    def norm(self, name: str, x: Array) -> Array:
        """`rms_norm` along the last axis with the named weight."""
        return rms_norm(x, self._vector(name), self.config.norm_eps, self.config.norm_offset)

    def project(self, name: str, x: Array) -> Array:
        """x [T, K] times the named matrix [N, K], plus its bias if the model has one: [T, N]."""
        out = self._linear(name, x, self._tensor(name))
        bias = name.removesuffix("weight") + "bias"
        return out + self._vector(bias) if bias in self.model.tensors else out

    def _rotation(self, layer_is_local: bool, first: int, n: int) -> tuple[Array, Array]:
        tables = self._rope.get(layer_is_local)
        if tables is None or tables[0].shape[0] < first + n:
            room = max(64, 2 * (first + n))
            tables = self._rope[layer_is_local] = rope_tables(self.config, layer_is_local, room)
        return tables[0][first : first + n], tables[1][first : first + n]

    def _tensor(self, name: str) -> Tensor:
        try:
            return self.model.tensors[name]
        except KeyError as err:
            raise FormatError(f"tensor {name} is missing from the model") from err

    def _vector(self, name: str) -> Array:
        if name not in self._small:
            self._small[name] = self._tensor(name).numpy()
        return self._small[name]

    def _kept(self, name: str, x: Array, weight: Tensor) -> Array:
        if name not in self._weights:
            self._weights[name] = weight.numpy()
        return x @ self._weights[name].T
