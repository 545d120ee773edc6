"""The decoder in plain NumPy, float32: the reference that every other backend is compared with.

`Reference` is the NumPy builder of `edgeq.model.decoder`; formulas are in `edgeq.model.formulas`
and the cache is `edgeq.model.reference_cache.KV`. It runs float and quantized models alike,
because a `Tensor` gives its rows as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError, check_type
from edgeq.formats.tensor import Tensor
from edgeq.model.block import (
    A_LOG,
    CHOICE_BIAS,
    DELTA_CONV,
    DELTA_NORM,
    DT_BIAS,
    LAYER_TABLE,
    SINKS,
    ExpertsSpec,
    tensor_name,
)
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import decoder
from edgeq.model.delta_rule import DeltaWeights, delta_output, sigmoid
from edgeq.model.formulas import (
    Array,
    Linear,
    apply_rope,
    dense,
    divided_by_rms,
    expert_weights,
    gated,
    rms_norm,
    softcap,
)
from edgeq.model.model import Model
from edgeq.model.reference_cache import KV
from edgeq.model.rope_spec import RopeSpec
from edgeq.model.rotary import config_at, default_context, rope_at, rope_tables, same_ropes
from edgeq.model.whole_texts import check_whole

CacheRounding = Callable[[Literal["k", "v"], int, Array], Array]
"""("k" or "v", layer, values [T, Hkv, D]) -> the values that a cache returns for them."""


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
    """A model's decoder in float32; an `edgeq.model.decoder.Builder` of NumPy arrays.

    `forward` runs the whole decoder. To run some of its parts, call `begin` and then the functions
    of `edgeq.model.decoder` with this object as the builder. An object runs one pass at a time.

    Args:
        model: float or quantized.
        linear: called for every matrix product in place of `dense` (biases are added after it):
            to watch activations, or to compute as a kernel does.
        kv: rounds keys and values as a cache would, before they are stored.
        keep: keep every weight that was converted to float32 (4 bytes a weight) rather than
            convert it again at each call; for small models. Not with ``linear``, which receives
            the tensor.
        context: tokens of the session whose rotary positions are computed, for models whose
            frequencies depend on it (`edgeq.model.rotary`); None chooses for each cache: the
            default context, or the length of its first pass if that is longer.

    Raises:
        UsageError: keep and linear are both given.
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
        check_type("model", model, Model)
        if keep and linear is not None:
            raise UsageError("keep holds the weights of the default product; leave out linear")
        self.model = model
        self.config = model.config if context is None else config_at(model.config, context)
        self._usual_context = default_context(self.config)
        self._product = linear or (self._product_of_stored if keep else dense)
        self._kv = kv
        self._small: dict[str, Array] = {}  # norms, biases and convolutions, as float32
        self._weights: dict[str, Array] = {}
        self._rope: dict[RopeSpec, tuple[Array, Array]] = {}
        self._tokens: NDArray[np.int64] = np.empty(0, np.int64)
        self._cache = self.new_cache()
        self._all_logits = True
        self._given_states: Array | None = None

    def new_cache(self) -> KV:
        """An empty cache for `forward`."""
        return KV(self.config)

    def forward(
        self,
        tokens: Sequence[int] | NDArray[np.integer],
        cache: KV | None = None,
        all_logits: bool = True,
        states: Array | None = None,
    ) -> Array:
        """Logits of the tokens that follow.

        Args:
            tokens: int [T], T >= 1; their positions follow those in the cache.
            cache: extended by T positions; None starts with an empty one.
            all_logits: every position's logits, or only the last one's.
            states: of a multi-token-prediction head: float32 [T, hidden], the final norm of the
                model at the position before each token.

        Returns:
            float32 [T, V], or [V] if not all_logits.

        Raises:
            UsageError: no tokens, one outside the vocabulary, or no state for each of them.
        """
        self.begin(tokens, cache, all_logits)
        self._given_states = states
        logits = decoder(self, self.config)
        self._cache.advance(self._tokens.size)
        return logits if all_logits else cast(Array, logits[0])

    def begin(
        self,
        tokens: Sequence[int] | NDArray[np.integer],
        cache: KV | None = None,
        all_logits: bool = True,
    ) -> None:
        """Set the tokens and the cache that the builder's methods work on.

        The caller calls ``cache.advance`` when every layer has stored its keys and values.

        Args:
            tokens, cache, all_logits: as for `forward`.

        Raises:
            UsageError: no tokens, one outside the vocabulary, or tokens that follow others in a
                model that sees all of a text at once.
        """
        self._tokens = checked_tokens(self.config, tokens)
        self._cache = self.new_cache() if cache is None else cache
        check_whole(self.config, self._cache.n_past)
        self._all_logits = all_logits
        self._choose_ropes(self._cache.n_past + self._tokens.size)

    # --- the steps of `edgeq.model.decoder` ---------------------------------------------------

    def embed(self, name: str) -> Array:
        """Rows of the embedding matrix, times `embed_scale`: float32 [T, hidden].

        Only the rows asked for are read. The scale is used as float32: a checkpoint trained with
        a scale of lower precision has it rounded by its importer.
        """
        rows = self._token_rows("model.embed_tokens.weight")
        return self._result(name, rows * np.float32(self.config.embed_scale))

    def layer_embed(self, name: str) -> Array:
        """Rows of the table of all layers, times the root of `layer_input`: float32 [T, L, P]."""
        c = self.config
        rows = self._token_rows(LAYER_TABLE) * np.float32(c.layer_input**0.5)
        return self._result(name, rows.reshape(-1, c.layers, c.layer_input))

    def layer_input(self, name: str, x: Array, layer: int) -> Array:
        """The values of a layer in x [T, L, P]."""
        return self._result(name, np.ascontiguousarray(x[:, layer]))

    def weighted(self, name: str, x: Array, weight: str) -> Array:
        """x times the named number."""
        return self._result(name, x * self._vector(weight))

    def _token_rows(self, name: str) -> Array:
        """The rows of a matrix that the tokens of this pass name; no other is read."""
        table = self._tensor(name)
        unique, where = np.unique(self._tokens, return_inverse=True)
        rows = np.concatenate([table.rows(int(i), int(i) + 1) for i in unique])
        return cast(Array, rows[where])

    def states(self, name: str) -> Array:
        """The states that `forward` was given."""
        if self._given_states is None or self._given_states.shape != (
            self._tokens.size,
            self.config.hidden,
        ):
            raise UsageError(
                "a multi-token-prediction head needs states, float32 "
                f"[{self._tokens.size}, {self.config.hidden}]: one for each token"
            )
        return self._result(name, self._given_states)

    def norm(self, name: str, x: Array, weight: str) -> Array:
        """`rms_norm` along the last axis with the named weight."""
        c = self.config
        return self._result(name, rms_norm(x, self._vector(weight), c.norm_eps, c.norm_offset))

    def plain_norm(self, name: str, x: Array) -> Array:
        """x divided by the root mean square of its last axis."""
        return self._result(name, divided_by_rms(x, self.config.norm_eps))

    def linear(self, name: str, x: Array, weight: str) -> Array:
        """x [T, K] times the named matrix [N, K], plus its bias if the model has one: [T, N]."""
        tensor = self._tensor(weight)
        if not len(x):  # an expert that no token goes through, whose weights are not read
            return self._result(name, np.empty((0, tensor.shape[0]), np.float32))
        out = self._product(weight, x, tensor)
        bias = weight.removesuffix("weight") + "bias"
        return self._result(name, out + self._vector(bias) if bias in self.model.tensors else out)

    def heads(self, name: str, x: Array, n: int) -> Array:
        """x [T, n*D] seen as [T, n, D]."""
        return x.reshape(x.shape[0], n, x.shape[1] // n)

    def rope(self, name: str, x: Array, rope: RopeSpec) -> Array:
        """x [T, n, D] rotated by its positions."""
        first, n = self._cache.n_past, x.shape[0]
        rope = rope_at(rope, self._cache.rope_context)
        tables = self._rope.get(rope)
        if tables is None or tables[0].shape[0] < first + n:
            room = max(64, 2 * (first + n))
            tables = self._rope[rope] = rope_tables(rope, room)
        cos, sin = (table[first : first + n] for table in tables)
        return self._result(name, apply_rope(x, cos, sin))

    def attend(self, name: str, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Append k and v to the layer's cache; attention of q: [T, H*D]."""
        self._store(self._cache, layer, k, v)
        return self.attend_shared(name, layer, q)

    def attend_shared(self, name: str, layer: int, q: Array) -> Array:
        """Attention of q over the cache that the layer reads: [T, H*D]."""
        mixed = self._cache.attend(layer, q, self._sinks(layer))
        return self._result(name, mixed.reshape(q.shape[0], -1))

    def short_conv(self, name: str, layer: int, b: Array, c: Array, x: Array, weight: str) -> Array:
        """Append b * x to the layer's state; c times its convolution: [T, hidden]."""
        mixed = self._cache.convolve(layer, b * x, self._vector(weight))
        return self._result(name, c * mixed)

    def delta_net(
        self, name: str, layer: int, qkv: Array, z: Array, beta: Array, decay: Array
    ) -> Array:
        """Append qkv, beta and decay to the layer's state; what it gives: [T, values]."""
        weights, spec = self.delta_weights(layer), self.config.blocks[layer].delta
        assert spec is not None
        read = self._cache.recur(layer, np.concatenate([qkv, beta, decay], axis=-1), weights)
        return self._result(name, delta_output(spec, weights, read, z))

    def delta_weights(self, layer: int) -> DeltaWeights:
        """What a gated delta net has beside its matrices."""
        taps, a_log, dt_bias, norm = (
            self._vector(tensor_name(layer, part))
            for part in (DELTA_CONV, A_LOG, DT_BIAS, DELTA_NORM)
        )
        return DeltaWeights(taps, a_log, dt_bias, norm, self.config.norm_eps)

    def output_gate(self, name: str, x: Array, gate: Array) -> Array:
        """x * sigmoid(gate)."""
        return self._result(name, x * sigmoid(gate))

    def gated(self, name: str, gate: Array, up: Array) -> Array:
        """`gated` of the results of two matrices."""
        return self._result(name, gated(self.config.activation, gate, up))

    def route(self, name: str, layer: int, logits: Array) -> Array:
        """`expert_weights` of the layer's experts."""
        experts = self.config.blocks[layer].experts
        assert experts is not None  # or the layer had no router
        bias = f"model.layers.{layer}.{CHOICE_BIAS}"
        added = self._vector(bias) if experts.choice_bias else None
        return self._result(name, self._expert_weights(logits, experts, added))

    def to_expert(self, name: str, x: Array, routing: Array, expert: int) -> Array:
        """The rows of x with a weight for an expert."""
        return self._result(name, x[routing[:, expert] != 0])

    def combine(self, name: str, routing: Array, outputs: Sequence[Array]) -> Array:
        """The sum of the experts' outputs times their weights."""
        out = np.zeros((routing.shape[0], outputs[0].shape[1]), np.float32)
        for expert, values in enumerate(outputs):
            if len(values):
                weights = routing[:, expert]
                rows = weights != 0
                out[rows] += weights[rows, None] * values
        return self._result(name, out)

    def add(self, name: str, a: Array, b: Array) -> Array:
        """The sum of two."""
        return self._result(name, a + b)

    def scaled(self, name: str, x: Array, factor: float) -> Array:
        """x times a number."""
        return self._result(name, x * np.float32(factor))

    def capped(self, name: str, x: Array, cap: float) -> Array:
        """`softcap` of x."""
        return self._result(name, softcap(x, cap))

    def logits(self, name: str, x: Array, weight: str) -> Array:
        """The head on all positions [T, V] or on the last [1, V]."""
        return self.linear(name, x if self._all_logits else x[-1:], weight)

    # ------------------------------------------------------------------------------------------

    def _choose_ropes(self, length: int) -> None:
        """Set the context that the cache's keys are rotated for, at its first pass."""
        cache = self._cache
        if not cache.n_past:
            cache.rope_context = max(self._usual_context, length)
        longer = length > cache.rope_context
        if longer and not same_ropes(self.config, cache.rope_context, length):
            raise UsageError(
                f"the sequence grows to {length} tokens, and the keys in the cache are rotated for "
                f"at most {cache.rope_context}; give Reference the context that the sequence needs"
            )

    def _expert_weights(self, logits: Array, experts: ExpertsSpec, bias: Array | None) -> Array:
        return expert_weights(logits, experts, bias)

    def _result(self, name: str, value: Array) -> Array:
        """What later steps receive as the named result."""
        return value

    def _store(self, cache: KV, layer: int, k: Array, v: Array) -> None:
        if self._kv is not None:
            k, v = self._kv("k", layer, k), self._kv("v", layer, v)
        cache.append(layer, k, v)

    def _tensor(self, name: str) -> Tensor:
        try:
            return self.model.tensors[name]
        except KeyError as err:
            raise FormatError(f"tensor {name} is missing from the model") from err

    def _sinks(self, layer: int) -> Array | None:
        """The sinks of a layer [H], or None where it has none."""
        if not self.config.blocks[layer].sinks:
            return None
        return self._vector(tensor_name(layer, SINKS))

    def _vector(self, name: str) -> Array:
        if name not in self._small:
            self._small[name] = self._tensor(name).numpy()
        return self._small[name]

    def _product_of_stored(self, name: str, x: Array, weight: Tensor) -> Array:
        if name not in self._weights:
            self._weights[name] = weight.numpy()
        return x @ self._weights[name].T
