"""Hyperparameters of a decoder, and the names and shapes of the tensors that follow from them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

from edgeq.core.errors import FormatError, check_type

Activation = Literal["silu", "gelu_tanh"]


_MAX_SIZE = 1 << 31
"""No size of a model is larger."""
_SIZES = ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab", "context")
_POSITIVE = ("norm_eps", "rope_theta", "rope_theta_local", "embed_scale", "attn_scale")


def _is_count(value: Any) -> bool:
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    return whole and 0 <= int(value) <= _MAX_SIZE


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    number: Any = value  # compared rather than converted: an integer of 400 digits is no float
    return bool(-sys.float_info.max <= number <= sys.float_info.max)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's or linear stretching of rotary frequencies.

    Args:
        kind: "llama3" or "linear".
        factor: how many times the context is stretched.
        low_freq_factor, high_freq_factor, original_context: Llama 3.1's further numbers.
    """

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("llama3", "linear"):
            raise FormatError(
                f"rope scaling is of kind {self.kind!r}; it must be 'llama3' or 'linear'"
            )
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_context"):
            value = getattr(self, name)
            if not _is_finite(value) or value <= 0:
                raise FormatError(f"rope scaling: {name} is {value!r}; it must be above 0")


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of a Llama-family decoder.

    Attributes:
        family: "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3".
        hidden, ffn, layers, heads, kv_heads, head_dim, vocab: the shape.
        context: the longest sequence the model was made for, in tokens.
        norm_eps: epsilon of the RMS norms.
        norm_offset: added to every norm weight (1.0 for Gemma).
        activation: of the gated feed-forward.
        rope_theta: base of the rotary frequencies (of the global layers, if there are two kinds).
        rope_theta_local: base for sliding-window layers (Gemma 3), or None.
        rope_dim: how many of the head's dimensions rotate (head_dim but for partial rotary).
        rope_scaling: frequency stretching of the global layers, or None.
        window: sliding-window length in tokens, or None for full attention.
        window_layers: for each layer, whether the window applies to it.
        qk_norm: RMS norm on each head of q and k (Qwen 3, Gemma 3).
        post_norms: norms after attention and feed-forward too (Gemma 3).
        embed_scale: factor on the embeddings (sqrt(hidden) for Gemma).
        attn_scale: factor on the attention scores, usually head_dim ** -0.5.
        tied: the head is the embedding matrix.
        bos, eos: token ids; eos may be several.
    """

    family: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    activation: Activation = "silu"
    rope_theta: float = 10000.0
    rope_theta_local: float | None = None
    rope_dim: int = 0
    rope_scaling: RopeScaling | None = None
    window: int | None = None
    window_layers: tuple[bool, ...] = ()
    qk_norm: bool = False
    post_norms: bool = False
    embed_scale: float = 1.0
    attn_scale: float = 0.0
    tied: bool = True
    bos: int | None = None
    eos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._check_values()
        if self.heads % self.kv_heads:
            raise FormatError(
                f"model config: {self.heads} heads cannot share {self.kv_heads} key/value heads; "
                "heads must be a multiple of kv_heads"
            )
        set_ = object.__setattr__
        if not self.rope_dim:
            set_(self, "rope_dim", self.head_dim)
        if not self.attn_scale:
            set_(self, "attn_scale", self.head_dim**-0.5)
        if not self.window_layers:
            set_(self, "window_layers", (self.window is not None,) * self.layers)
        if self.rope_dim % 2 or self.rope_dim > self.head_dim:
            raise FormatError(
                f"model config: rope_dim is {self.rope_dim}; "
                f"must be even and at most head_dim {self.head_dim}"
            )
        if not isinstance(self.family, str):
            raise FormatError(f"model config: family is {self.family!r}; it must be a name")
        if not all(isinstance(windowed, bool) for windowed in self.window_layers):
            raise FormatError("model config: window_layers holds values other than true and false")
        if len(self.window_layers) != self.layers:
            raise FormatError(
                f"model config: window_layers names {len(self.window_layers)} "
                f"of {self.layers} layers"
            )

    def _check_values(self) -> None:
        """Check each value by itself: its type, that it is finite, and its range."""
        for name in _SIZES:
            value = getattr(self, name)
            if not _is_count(value) or value < 1:
                raise FormatError(
                    f"model config: {name} is {value!r}; it must be a positive whole number of at "
                    f"most {_MAX_SIZE}"
                )
        if self.window is not None and (not _is_count(self.window) or self.window < 1):
            raise FormatError(
                f"model config: window is {self.window!r}; it must be a positive number of tokens "
                "or absent"
            )
        if not _is_count(self.rope_dim):
            raise FormatError(f"model config: rope_dim is {self.rope_dim!r}; it must be a number")
        for name in _POSITIVE:
            value = getattr(self, name)
            if name == "rope_theta_local" and value is None:
                continue
            zero = name == "attn_scale"  # which stands for the usual one
            if not _is_finite(value) or value < 0 or (value == 0 and not zero):
                raise FormatError(f"model config: {name} is {value!r}; it must be above 0")
        if not _is_finite(self.norm_offset):
            raise FormatError(
                f"model config: norm_offset is {self.norm_offset!r}; it must be a number"
            )
        for name in ("qk_norm", "post_norms", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise FormatError(
                    f"model config: {name} is {getattr(self, name)!r}; it must be true or false"
                )
        if self.activation not in get_args(Activation):
            raise FormatError(
                f"model config: activation is {self.activation!r}; it must be one of "
                f"{', '.join(get_args(Activation))}"
            )
        for token in (*self.eos, *(() if self.bos is None else (self.bos,))):
            if not _is_count(token):
                raise FormatError(f"model config: {token!r} is no token id")

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    def kv_bytes(self, tokens: int, kv_bits: int = 8) -> int:
        """Bytes of a KV cache for ``tokens`` positions, all layers at full length.

        16 bits: float16 keys and values. 8 bits: codes; per position and head a float16 scale
        and a zero point for the key and a float32 scale for the value; and for every 16
        positions one key in float16.
        """
        values = 2 * self.head_dim * kv_bits // 8
        rest = 2 + 1 + 4 + 2 * self.head_dim / 16 if kv_bits == 8 else 0
        return int(self.layers * self.kv_heads * tokens * (values + rest))

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names and shapes [N, K] of every matrix the decoder multiplies by, embedding included."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for i in range(self.layers):
            p = f"model.layers.{i}."
            yield p + "self_attn.q_proj.weight", (q, self.hidden)
            yield p + "self_attn.k_proj.weight", (kv, self.hidden)
            yield p + "self_attn.v_proj.weight", (kv, self.hidden)
            yield p + "self_attn.o_proj.weight", (self.hidden, q)
            yield p + "mlp.gate_proj.weight", (self.ffn, self.hidden)
            yield p + "mlp.up_proj.weight", (self.ffn, self.hidden)
            yield p + "mlp.down_proj.weight", (self.hidden, self.ffn)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    def norms(self) -> Iterator[tuple[str, tuple[int]]]:
        """Names and shapes of every norm weight."""
        for i in range(self.layers):
            p = f"model.layers.{i}."
            yield p + "input_layernorm.weight", (self.hidden,)
            if self.qk_norm:
                yield p + "self_attn.q_norm.weight", (self.head_dim,)
                yield p + "self_attn.k_norm.weight", (self.head_dim,)
            yield p + "post_attention_layernorm.weight", (self.hidden,)
            if self.post_norms:
                yield p + "pre_feedforward_layernorm.weight", (self.hidden,)
                yield p + "post_feedforward_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)

    def biases(self) -> Iterator[tuple[str, tuple[int]]]:
        """Names and shapes of the biases a family may have (they are optional tensors)."""
        for name, (n, _) in self.linears():
            if "self_attn" in name:
                yield name.removesuffix("weight") + "bias", (n,)

    @property
    def head_name(self) -> str:
        """The tensor that turns the last hidden state into logits."""
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Rebuild from `to_dict`; unknown or missing keys raise FormatError."""
        check_type("data", data, Mapping)
        known = {f.name for f in fields(cls)}
        if extra := set(data) - known:
            raise FormatError(f"model config has unknown keys: {', '.join(sorted(extra))}")
        values = dict(data)
        try:
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            for name in ("window_layers", "eos"):
                if not isinstance(values.get(name, ()), list | tuple):
                    raise FormatError(f"model config: {name} is {values[name]!r}; expected a list")
                values[name] = tuple(values.get(name, ()))
            return cls(**values)
        except TypeError as err:
            raise FormatError(f"model config is not readable: {err}") from err
