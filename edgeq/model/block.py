"""What one layer of a decoder is, as data, and the names of the tensors it has.

A layer is a mixer of positions (attention, a short convolution or a gated delta net) followed by a
gated feed-forward, or by a mixture of several, the experts; each adds its output to the residual
stream. `BlockSpec` says which norms stand before and after them, which positions the mixer sees and
how it encodes them. A norm of attention is the norm of the mixer, whichever it is. Names of tensors
are Hugging Face's, ``model.layers.{i}.{part}.weight``:

    norm before   norm after   attention in, out           feed-forward in, out
    yes           no           input, -                    post_attention, -
    yes           yes          input, post_attention       pre_feedforward, post_feedforward
    no            yes          -, post_attention           -, post_feedforward

each followed by ``_layernorm``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.model.limits import MAX_EXPERTS, MAX_SIZE, is_count, is_finite
from edgeq.model.rope_spec import RopeSpec

Mixer = Literal["attention", "short_conv", "gated_delta_net"]
OTHER_MIXERS: dict[Mixer, str] = {
    "short_conv": "gated short convolutions", "gated_delta_net": "gated delta nets",
}  # fmt: skip
"""What layers are called that have no attention."""
QKNorm = Literal["head", "all"]
Score = Literal["softmax", "sigmoid"]


Q_PROJ, K_PROJ, V_PROJ = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"
O_PROJ, G_PROJ = "self_attn.o_proj", "self_attn.g_proj"
GATE_PROJ, UP_PROJ, DOWN_PROJ = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
ROUTER, CHOICE_BIAS = "mlp.router", "mlp.experts.bias"
Q_NORM, K_NORM = "self_attn.q_norm", "self_attn.k_norm"
B_PROJ, C_PROJ, X_PROJ = "conv.b_proj", "conv.c_proj", "conv.x_proj"
CONV, CONV_OUT = "conv.conv", "conv.out_proj"
IN_QKV, IN_Z = "linear_attn.in_proj_qkv", "linear_attn.in_proj_z"
IN_B, IN_A = "linear_attn.in_proj_b", "linear_attn.in_proj_a"
DELTA_CONV, DELTA_NORM = "linear_attn.conv1d", "linear_attn.norm"
DELTA_OUT, A_LOG, DT_BIAS = "linear_attn.out_proj", "linear_attn.A_log", "linear_attn.dt_bias"
INPUT_GATE, INPUT_PROJ = "per_layer_input_gate", "per_layer_projection"
INPUT_NORM, LAYER_SCALE = "post_per_layer_input_norm", "layer_scalar"
LAYER_TABLE = "model.embed_tokens_per_layer.weight"
LAYER_PROJECTION = "model.per_layer_model_projection.weight"
LAYER_PROJECTION_NORM = "model.per_layer_projection_norm.weight"
"""What the inputs that each layer has of its own are made of."""
SINKS = "self_attn.sinks"


_FLAGS = (
    "norm_before", "norm_after", "qk_norm_last", "output_gate", "sinks", "causal", "v_norm",
    "layer_scale",
)  # fmt: skip


MTP_EMBEDDING, MTP_STATE = "model.fc_embedding.weight", "model.fc_hidden.weight"
MTP_EMBEDDING_NORM = "model.pre_fc_norm_embedding.weight"
MTP_STATE_NORM = "model.pre_fc_norm_hidden.weight"
"""Tensors of a multi-token-prediction head before its layer; see `edgeq.model.mtp`."""


def tensor_name(layer: int, part: str) -> str:
    """Name of a layer's weight.

    Example:
        >>> tensor_name(3, Q_PROJ)
        'model.layers.3.self_attn.q_proj.weight'
        >>> tensor_name(3, A_LOG)
        'model.layers.3.linear_attn.A_log'
    """
    name = f"model.layers.{layer}.{part}"
    return name if part in (A_LOG, DT_BIAS, LAYER_SCALE, SINKS) else f"{name}.weight"


def expert_part(expert: int, part: str) -> str:
    """The part of a layer that is a matrix of an expert.

    Example:
        >>> from edgeq.model.block import DOWN_PROJ, expert_part
        >>> expert_part(7, DOWN_PROJ)
        'mlp.experts.7.down_proj'
    """
    block, _, name = part.partition(".")
    return f"{block}.experts.{expert}.{name}"


def of_any_expert(part: str) -> tuple[str, str]:
    """A part of a layer with "*" in place of the number of its expert, and that number.

    Example:
        >>> from edgeq.model.block import of_any_expert
        >>> of_any_expert("mlp.experts.7.down_proj"), of_any_expert("mlp.down_proj")
        (('mlp.experts.*.down_proj', '7'), ('mlp.down_proj', ''))
    """
    before, experts, after = part.partition(".experts.")
    number, _, name = after.partition(".")
    if not experts or not number.isdigit():
        return part, ""
    return f"{before}.experts.*.{name}", number


@dataclass(frozen=True, kw_only=True)
class DeltaSpec:
    """Sizes of a gated delta net, whose state is a matrix [key_dim, value_dim] of each value head.

    Args:
        key_heads: heads of queries and keys; each serves ``value_heads / key_heads`` value heads
            that follow one another.
        value_heads: heads of values and of the state.
        key_dim, value_dim: values of a head of queries and keys, and of values.
        tiled_out: the mixer's output lists the first value head of every key head, then the second
            of every one, and so on; as the columns of its output projection lie in GGUF files.

    Raises:
        FormatError: a value of the wrong type or out of range.

    Example:
        >>> edgeq.DeltaSpec(key_heads=16, value_heads=32, key_dim=128, value_dim=128).channels
        8192
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    tiled_out: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.tiled_out, bool):
            raise FormatError(
                f"model config: tiled_out of a gated delta net is {self.tiled_out!r}; it must be "
                "true or false"
            )
        for name in ("key_heads", "value_heads", "key_dim", "value_dim"):
            value = getattr(self, name)
            if not is_count(value) or value < 1:
                raise FormatError(
                    f"model config: {name} of a gated delta net is {value!r}; it must be a "
                    "positive whole number"
                )
        if self.value_heads % self.key_heads:
            raise FormatError(
                f"model config: {self.value_heads} value heads of a gated delta net cannot share "
                f"{self.key_heads} key heads; value_heads must be a multiple of key_heads"
            )

    @property
    def group(self) -> int:
        """Value heads per key head."""
        return self.value_heads // self.key_heads

    @property
    def keys(self) -> int:
        """Values of all key heads together."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Values of all value heads together: the width of the mixer's output."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Queries, keys and values together: the channels of the convolution."""
        return 2 * self.keys + self.values


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """A feed-forward that is a mixture of experts: each token goes through a few of them.

    A router, a matrix of a row for each expert, scores the experts for each token. The token goes
    through those with the highest scores, the lowest number first among equals, and the outputs are
    added up, each times its expert's weight.

    Args:
        count: how many experts there are.
        chosen: how many each token goes through.
        ffn: the width of an expert.
        score: "softmax" over all experts, or "sigmoid" of each expert's logit.
        choice_bias: a number for each expert is added to its score to choose experts, and to
            nothing else.
        normalize: the weights of the chosen experts are divided by their sum.
        scale: factor on the weights.
        biases: the router and every matrix of an expert add a bias.

    Raises:
        FormatError: a value of the wrong type or out of range.

    Example:
        >>> experts = edgeq.ExpertsSpec(count=128, chosen=8, ffn=768, normalize=True)
        >>> edgeq.BlockSpec(rope=None, experts=experts).experts.score
        'softmax'
    """

    count: int
    chosen: int
    ffn: int
    score: Score = "softmax"
    choice_bias: bool = False
    normalize: bool = False
    scale: float = 1.0
    biases: bool = False

    def __post_init__(self) -> None:
        for name, most in (("count", MAX_EXPERTS), ("chosen", self.count), ("ffn", MAX_SIZE)):
            value = getattr(self, name)
            if not is_count(value) or not 1 <= value <= most:
                raise FormatError(
                    f"model config: {name} of the experts is {value!r}; it must be a whole number "
                    f"from 1 to {most}"
                )
        if self.score not in get_args(Score):
            raise FormatError(
                f"model config: the score of experts is {self.score!r}; it must be one of "
                f"{', '.join(map(repr, get_args(Score)))}"
            )
        for name in ("choice_bias", "normalize", "biases"):
            if not isinstance(getattr(self, name), bool):
                raise FormatError(
                    f"model config: {name} of the experts is {getattr(self, name)!r}; it must be "
                    "true or false"
                )
        if not is_finite(self.scale) or self.scale <= 0:
            raise FormatError(
                f"model config: scale of the experts is {self.scale!r}; it must be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """One layer of a decoder.

    Args:
        mixer: what mixes positions: "attention"; "short_conv", a gated convolution over the
            last few positions (LFM2); or "gated_delta_net", a short convolution of queries, keys
            and values whose state is a matrix of each head (Qwen 3.5). Only attention has a rope,
            a qk_norm, an output_gate or sinks.
        norm_before: RMS norms of the inputs of attention and of the feed-forward.
        norm_after: RMS norms of their outputs, before they are added to the residual stream.
        qk_norm: RMS norm of queries and keys: "head" over the D values of
            each head (Qwen 3, Gemma 3), "all" over the values of all heads together (OLMo 2), or
            None.
        qk_norm_last: queries and keys are normed after they are rotated (Hunyuan).
        rope: rotary position embedding, or None for a layer without positions.
        window: how many positions the mixer sees, the current one included, or None for all. A
            short convolution has one: the number of its taps. That of a gated delta net is the
            number of taps of its convolution.
        output_gate: the output of attention is multiplied by the sigmoid of a projection of its
            input (Qwen 3.5).
        sinks: each head has a number that goes through the softmax of its scores as the score of
            one more position, whose value is zero (gpt-oss).
        delta: sizes of a gated delta net; None for other mixers.
        experts: the experts of the feed-forward, or None where it is a single one.
        causal: a position sees none that comes after it. Where it is false, attention sees those
            after it too, as far as those before it: ``window`` - 1 on each side, or all.
        head_dim: values of a head of the layer, or None for that of `ModelConfig` (Gemma 4).
        ffn: the width of the layer's feed-forward, or None for that of `ModelConfig` (Gemma 4).
        v_norm: RMS norm of the values of each head, without a weight (Gemma 4).
        kv_from: the layer whose keys and values attention reads in place of its own, or None. Such
            a layer has no projections of keys and values and no cache (Gemma 4).
        layer_scale: the residual stream is multiplied by a number of the layer, which is a tensor,
            after the layer (Gemma 4).

    Raises:
        FormatError: a value of the wrong type or out of range.
        UnsupportedError: an unknown mixer, or no norm at all.

    Example:
        >>> block = edgeq.BlockSpec(rope=edgeq.RopeSpec(10000.0, 64), qk_norm="head")
        >>> block.norm_before, block.norm_after, block.window
        (True, False, None)
    """

    mixer: Mixer = "attention"
    norm_before: bool = True
    norm_after: bool = False
    qk_norm: QKNorm | None = None
    qk_norm_last: bool = False
    rope: RopeSpec | None
    window: int | None = None
    output_gate: bool = False
    sinks: bool = False
    delta: DeltaSpec | None = None
    experts: ExpertsSpec | None = None
    causal: bool = True
    head_dim: int | None = None
    ffn: int | None = None
    v_norm: bool = False
    kv_from: int | None = None
    layer_scale: bool = False

    def __post_init__(self) -> None:
        if self.mixer not in get_args(Mixer):
            raise UnsupportedError(
                f"model config: mixer {self.mixer!r} is not supported; "
                f"supported: {', '.join(get_args(Mixer))}"
            )
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise FormatError(
                    f"model config: {name} is {getattr(self, name)!r}; it must be true or false"
                )
        if not (self.norm_before or self.norm_after):
            raise UnsupportedError(
                "model config: a layer without any norm is not supported; "
                "norm_before or norm_after must be true"
            )
        if self.qk_norm is not None and self.qk_norm not in get_args(QKNorm):
            raise FormatError(
                f"model config: qk_norm is {self.qk_norm!r}; it must be 'head', 'all' or absent"
            )
        if self.qk_norm_last and self.qk_norm != "head":
            raise FormatError(
                f"model config: qk_norm_last is true and qk_norm is {self.qk_norm!r}; only a norm "
                "of each head may follow the rotation"
            )
        if self.rope is not None and not isinstance(self.rope, RopeSpec):
            raise FormatError(f"model config: rope is {self.rope!r}; it must be a RopeSpec or None")
        if self.window is not None and (not is_count(self.window) or self.window < 1):
            raise FormatError(
                f"model config: window is {self.window!r}; it must be a positive number of tokens "
                "or absent"
            )
        if self.experts is not None and not isinstance(self.experts, ExpertsSpec):
            raise FormatError(
                f"model config: experts is {self.experts!r}; it must be an ExpertsSpec or None"
            )
        self._check_own_sizes()
        if self.mixer != "attention":
            self._check_without_attention()
        if (self.mixer == "gated_delta_net") != isinstance(self.delta, DeltaSpec):
            raise FormatError(
                f"model config: delta is {self.delta!r} and mixer {self.mixer!r}; it must be a "
                "DeltaSpec for a gated delta net, and absent for other mixers"
            )

    def _check_own_sizes(self) -> None:
        """Check what a layer has in place of the model's sizes, and whose keys it reads."""
        for name in ("head_dim", "ffn"):
            value = getattr(self, name)
            if value is not None and (not is_count(value) or value < 1):
                raise FormatError(
                    f"model config: {name} of a layer is {value!r}; it must be a positive whole "
                    f"number of at most {MAX_SIZE}, or absent"
                )
        if self.ffn is not None and self.experts is not None:
            raise FormatError(
                f"model config: ffn of a layer with experts is {self.ffn!r}; the experts have a "
                "width of their own, so it must be absent"
            )
        if self.kv_from is not None and not is_count(self.kv_from):
            raise FormatError(
                f"model config: kv_from is {self.kv_from!r}; it must be the number of a layer, or "
                "absent"
            )
        if self.kv_from is not None and (self.v_norm or self.qk_norm == "all"):
            raise FormatError(
                "model config: a layer that reads the keys and values of another norms neither; "
                "v_norm must be absent, and qk_norm 'head' or absent"
            )

    def _check_without_attention(self) -> None:
        kind = "short convolution" if self.mixer == "short_conv" else "gated delta net"
        if self.window is None:
            raise FormatError(
                f"model config: window is absent; a {kind} needs it, as the number of positions "
                f"that {'it' if self.mixer == 'short_conv' else 'its convolution'} sees"
            )
        for name in ("rope", "qk_norm", "output_gate", "sinks", "head_dim", "v_norm", "kv_from"):
            if getattr(self, name) is not None and getattr(self, name) is not False:
                raise FormatError(
                    f"model config: {name} is {getattr(self, name)!r}; a {kind} has "
                    "none, so it must be absent"
                )
        if not self.causal:
            raise FormatError(
                "model config: causal is false; a short convolution sees no position after its own"
            )

    @property
    def attention_norm(self) -> str | None:
        """The part whose weight norms the input of attention."""
        return "input_layernorm" if self.norm_before else None

    @property
    def attention_post_norm(self) -> str | None:
        """The part whose weight norms the output of attention."""
        return "post_attention_layernorm" if self.norm_after else None

    @property
    def feed_forward_norm(self) -> str | None:
        """The part whose weight norms the input of the feed-forward."""
        if not self.norm_before:
            return None
        return "pre_feedforward_layernorm" if self.norm_after else "post_attention_layernorm"

    @property
    def feed_forward_post_norm(self) -> str | None:
        """The part whose weight norms the output of the feed-forward."""
        return "post_feedforward_layernorm" if self.norm_after else None

    def first_seen(self, position: int) -> int:
        """The first position that the mixer at ``position`` sees.

        Example:
            >>> BlockSpec(rope=None, window=4).first_seen(9)
            6
        """
        return 0 if self.window is None else max(0, position - self.window + 1)

    def end_seen(self, position: int, length: int) -> int:
        """One more than the last of ``length`` positions that the mixer at ``position`` sees.

        Example:
            >>> BlockSpec(rope=None, window=4, causal=False).end_seen(9, 100)
            13
        """
        if self.causal:
            return position + 1
        return length if self.window is None else min(length, position + self.window)

    def positions_seen(self, length: int) -> int:
        """How many of ``length`` positions the last of them sees, itself included."""
        return length if self.window is None else min(length, self.window)
