"""Hyperparameters of a decoder, and the names and shapes of the tensors that follow from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal, get_args

from edgeq.core.errors import FormatError
from edgeq.model.block import (
    A_LOG,
    B_PROJ,
    C_PROJ,
    CHOICE_BIAS,
    CONV,
    CONV_OUT,
    DELTA_CONV,
    DELTA_NORM,
    DELTA_OUT,
    DOWN_PROJ,
    DT_BIAS,
    G_PROJ,
    GATE_PROJ,
    IN_A,
    IN_B,
    IN_QKV,
    IN_Z,
    INPUT_GATE,
    INPUT_NORM,
    INPUT_PROJ,
    K_NORM,
    K_PROJ,
    LAYER_PROJECTION,
    LAYER_PROJECTION_NORM,
    LAYER_SCALE,
    LAYER_TABLE,
    MTP_EMBEDDING,
    MTP_EMBEDDING_NORM,
    MTP_STATE,
    MTP_STATE_NORM,
    O_PROJ,
    Q_NORM,
    Q_PROJ,
    ROUTER,
    SINKS,
    UP_PROJ,
    V_PROJ,
    X_PROJ,
    BlockSpec,
    ExpertsSpec,
    expert_part,
    of_any_expert,
    tensor_name,
)
from edgeq.model.config_json import config_from_json, config_to_json
from edgeq.model.limits import MAX_LAYERS, MAX_SIZE, is_count, is_finite
from edgeq.model.rope_spec import RopeSpec

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]

_SIZES = ("hidden", "ffn", "heads", "kv_heads", "head_dim", "vocab", "context")
_POSITIVE = ("norm_eps", "embed_scale", "attn_scale", "residual_scale", "logit_scale")
_CAPS = ("attn_softcap", "logit_softcap")


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters of a decoder.

    Attributes:
        family: its name, as "llama" or "qwen3".
        hidden, ffn, heads, kv_heads, head_dim, vocab: the shape; experts have a width of their own
            in place of ffn.
        context: the longest sequence the model was made for, in tokens.
        blocks: what each layer is, first layer first.
        norm_eps: epsilon of the RMS norms.
        norm_offset: added to every norm weight (1.0 for Gemma).
        activation: of the gated feed-forward: "silu" or "gelu_tanh" of the gate, times up; or
            "clamped_swiglu", which clamps both and adds one to up (gpt-oss).
        embed_scale: factor on the embeddings (sqrt(hidden) for Gemma).
        attn_scale: factor on the attention scores; 0 stands for the usual head_dim ** -0.5.
        residual_scale: factor on what attention and the feed-forward add to the residual stream.
        logit_scale: factor on the logits.
        attn_softcap: c of ``c * tanh(x / c)``, which the scaled attention scores go through, or
            None.
        logit_softcap: the same of the scaled logits.
        layer_input: values of the input of its own that each layer has for every token, from an
            embedding of all layers together and from the token's embedding; 0 for none (Gemma 4).
        tied: the head is the embedding matrix.
        bos, eos: token ids; eos may be several.
        mtp: the layer of a multi-token-prediction head, which guesses tokens ahead and takes no
            part in an answer, or None; see `edgeq.model.mtp`.
        is_mtp: whether this is such a head, whose input has the states of another model beside its
            tokens.
    """

    family: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    blocks: tuple[BlockSpec, ...]
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    activation: Activation = "silu"
    embed_scale: float = 1.0
    attn_scale: float = 0.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    layer_input: int = 0
    tied: bool = True
    bos: int | None = None
    eos: tuple[int, ...] = ()
    mtp: BlockSpec | None = None
    is_mtp: bool = False

    def __post_init__(self) -> None:
        self._check_values()
        if self.heads % self.kv_heads:
            raise FormatError(
                f"model config: {self.heads} heads cannot share {self.kv_heads} key/value heads; "
                "heads must be a multiple of kv_heads"
            )
        if not self.attn_scale:
            object.__setattr__(self, "attn_scale", self.head_dim**-0.5)
        for layer, block in enumerate(self.blocks):
            self._check_rope(block.rope, self.head_dim_of(layer))
            self._check_source(layer, block)

    def _check_rope(self, rope: RopeSpec | None, head_dim: int) -> None:
        if rope is not None and rope.dim > head_dim:
            raise FormatError(
                f"model config: rope dim is {rope.dim}; it must be at most head_dim {head_dim}"
            )
        if rope is not None and rope.temperature and rope.dim != head_dim:
            raise FormatError(
                f"model config: rope dim is {rope.dim}; with a temperature it must be "
                f"head_dim {head_dim}"
            )

    def _check_source(self, layer: int, block: BlockSpec) -> None:
        """Check that a layer may read the keys and values of the layer that it names."""
        if block.kv_from is None:
            return
        source = self.blocks[block.kv_from] if block.kv_from < layer else None
        if source is None or source.mixer != "attention" or source.kv_from is not None:
            raise FormatError(
                f"model config: layer {layer} reads the keys and values of layer {block.kv_from}; "
                "that must be a layer before it with keys and values of its own"
            )
        for name in ("head_dim", "window", "causal"):
            ours, theirs = getattr(block, name), getattr(source, name)
            if ours != theirs:
                raise FormatError(
                    f"model config: {name} of layer {layer} is {ours!r}, and of layer "
                    f"{block.kv_from}, whose keys and values it reads, {theirs!r}; both must be "
                    "the same"
                )

    def _check_values(self) -> None:
        """Check each value by itself: its type, that it is finite, and its range."""
        if not isinstance(self.family, str):
            raise FormatError(f"model config: family is {self.family!r}; it must be a name")
        for name in _SIZES:
            value = getattr(self, name)
            if not is_count(value) or value < 1:
                raise FormatError(
                    f"model config: {name} is {value!r}; it must be a positive whole number of at "
                    f"most {MAX_SIZE}"
                )
        blocks: object = self.blocks
        if not isinstance(blocks, tuple) or not all(isinstance(b, BlockSpec) for b in blocks):
            raise FormatError("model config: blocks must be a tuple of BlockSpecs")
        if not 1 <= len(blocks) <= MAX_LAYERS:
            raise FormatError(
                f"model config: blocks describes {len(blocks)} layers; "
                f"there must be at least 1 and at most {MAX_LAYERS}"
            )
        if len({block.experts for block in blocks} - {None}) > 1:
            raise FormatError("model config: all layers with experts must have the same kind")
        for name in _POSITIVE:
            value = getattr(self, name)
            zero = name == "attn_scale"  # which stands for the usual one
            if not is_finite(value) or value < 0 or (value == 0 and not zero):
                raise FormatError(f"model config: {name} is {value!r}; it must be above 0")
        for name in _CAPS:
            value = getattr(self, name)
            if value is not None and (not is_finite(value) or value <= 0):
                raise FormatError(
                    f"model config: {name} is {value!r}; it must be above 0, or absent"
                )
        if not is_count(self.layer_input):
            raise FormatError(
                f"model config: layer_input is {self.layer_input!r}; it must be a whole number of "
                f"at most {MAX_SIZE}, or 0"
            )
        if not is_finite(self.norm_offset):
            raise FormatError(
                f"model config: norm_offset is {self.norm_offset!r}; it must be a number"
            )
        if not isinstance(self.tied, bool):
            raise FormatError(f"model config: tied is {self.tied!r}; it must be true or false")
        if self.activation not in get_args(Activation):
            raise FormatError(
                f"model config: activation is {self.activation!r}; it must be one of "
                f"{', '.join(get_args(Activation))}"
            )
        if not isinstance(self.is_mtp, bool):
            raise FormatError(f"model config: is_mtp is {self.is_mtp!r}; it must be true or false")
        if self.mtp is not None and (
            not isinstance(self.mtp, BlockSpec) or self.mtp.mixer != "attention" or self.is_mtp
        ):
            raise FormatError(
                f"model config: mtp is {self.mtp!r}; it must be a BlockSpec with attention, or "
                "absent"
            )
        for token in (*self.eos, *(() if self.bos is None else (self.bos,))):
            if not is_count(token):
                raise FormatError(f"model config: {token!r} is no token id")

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.blocks)

    @property
    def causal(self) -> bool:
        """Whether no position sees what comes after it, so that the model can generate text."""
        return all(block.causal for block in self.blocks)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def experts(self) -> ExpertsSpec | None:
        """The experts of the layers that have any; None if there is no such layer."""
        return next((block.experts for block in self.blocks if block.experts), None)

    @property
    def mix_width(self) -> int:
        """Most values of a position that the mixer of a layer gives to its output projection."""
        widths = {"attention": self.heads * self.widest_head, "short_conv": self.hidden}
        return max(
            block.delta.values if block.delta else widths[block.mixer] for block in self.blocks
        )

    def head_dim_of(self, layer: int) -> int:
        """Values of a head of a layer."""
        return self.blocks[layer].head_dim or self.head_dim

    def ffn_of(self, layer: int) -> int:
        """The width of a layer's feed-forward."""
        return self.blocks[layer].ffn or self.ffn

    def kv_layer(self, layer: int) -> int:
        """The layer whose cache a layer's attention reads: itself, but for shared ones."""
        source = self.blocks[layer].kv_from
        return layer if source is None else source

    @property
    def widest_head(self) -> int:
        """Most values of a head of any layer."""
        return max(self.head_dim_of(layer) for layer in range(self.layers))

    @property
    def widest_ffn(self) -> int:
        """The width of the widest feed-forward."""
        return max(self.ffn_of(layer) for layer in range(self.layers))

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotary embeddings of queries and keys, in order of their first use."""
        both = ((rope, rope.for_keys) for rope in self.block_ropes)
        return tuple(dict.fromkeys(rope for pair in both for rope in pair))

    @property
    def block_ropes(self) -> tuple[RopeSpec, ...]:
        """The distinct rotary embeddings that blocks name, in order of their first use: those of
        queries, which a temperature may tell from those of keys."""
        return tuple(dict.fromkeys(block.rope for block in self.blocks if block.rope))

    @property
    def rope_names(self) -> dict[RopeSpec, str]:
        """A name for each of `ropes`: "global", or "local" if only windowed layers have it.

        A model with one rotary embedding has a "global" one; further ones of a kind are numbered.
        """
        ropes, names = self.ropes, dict[RopeSpec, str]()
        whole = {
            rope
            for block in self.blocks
            if block.rope and block.window is None
            for rope in (block.rope, block.rope.for_keys)
        }
        for rope in ropes:
            kind = "global" if rope in whole or len(ropes) == 1 else "local"
            taken = sum(name.startswith(kind) for name in names.values())
            names[rope] = f"{kind}{taken + 1}" if taken else kind
        return names

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Names and shapes [N, K] of every matrix the decoder multiplies by, embedding included."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        if self.layer_input:
            yield LAYER_TABLE, (self.vocab, self.layers * self.layer_input)
            yield LAYER_PROJECTION, (self.layers * self.layer_input, self.hidden)
        if self.is_mtp:
            yield MTP_EMBEDDING, (self.hidden, self.hidden)
            yield MTP_STATE, (self.hidden, self.hidden)
        for i, block in enumerate(self.blocks):
            q, kv = (heads * self.head_dim_of(i) for heads in (self.heads, self.kv_heads))
            if block.mixer == "short_conv":
                for part in (B_PROJ, C_PROJ, X_PROJ, CONV_OUT):
                    yield tensor_name(i, part), (self.hidden, self.hidden)
            elif block.delta is not None:
                yield tensor_name(i, IN_QKV), (block.delta.channels, self.hidden)
                yield tensor_name(i, IN_Z), (block.delta.values, self.hidden)
                yield tensor_name(i, IN_B), (block.delta.value_heads, self.hidden)
                yield tensor_name(i, IN_A), (block.delta.value_heads, self.hidden)
                yield tensor_name(i, DELTA_OUT), (self.hidden, block.delta.values)
            else:
                yield tensor_name(i, Q_PROJ), (q, self.hidden)
                if block.kv_from is None:
                    yield tensor_name(i, K_PROJ), (kv, self.hidden)
                    yield tensor_name(i, V_PROJ), (kv, self.hidden)
                if block.output_gate:
                    yield tensor_name(i, G_PROJ), (q, self.hidden)
                yield tensor_name(i, O_PROJ), (self.hidden, q)
            yield from self._feed_forward(i)
            if self.layer_input:
                yield tensor_name(i, INPUT_GATE), (self.layer_input, self.hidden)
                yield tensor_name(i, INPUT_PROJ), (self.hidden, self.layer_input)
        if not self.tied:
            yield "lm_head.weight", (self.vocab, self.hidden)

    def _feed_forward(self, i: int) -> Iterator[tuple[str, tuple[int, int]]]:
        experts, ffn = self.blocks[i].experts, self.ffn_of(i)
        parts = [(GATE_PROJ, UP_PROJ, DOWN_PROJ)]
        if experts is not None:
            yield tensor_name(i, ROUTER), (experts.count, self.hidden)
            ffn = experts.ffn
            gate, up, down = parts[0]
            parts = [
                (expert_part(e, gate), expert_part(e, up), expert_part(e, down))
                for e in range(experts.count)
            ]
        for gate, up, down in parts:
            yield tensor_name(i, gate), (ffn, self.hidden)
            yield tensor_name(i, up), (ffn, self.hidden)
            yield tensor_name(i, down), (self.hidden, ffn)

    def norms(self) -> Iterator[tuple[str, tuple[int]]]:
        """Names and shapes of every norm weight, but for those inside gated delta nets."""
        if self.layer_input:
            yield LAYER_PROJECTION_NORM, (self.layer_input,)
        if self.is_mtp:
            yield MTP_EMBEDDING_NORM, (self.hidden,)
            yield MTP_STATE_NORM, (self.hidden,)
        for i, block in enumerate(self.blocks):
            q, k = (heads * self.head_dim_of(i) for heads in (self.heads, self.kv_heads))
            if block.qk_norm == "head":
                q = k = self.head_dim_of(i)
            own_keys = block.qk_norm and block.kv_from is None
            parts = (
                (block.attention_norm, self.hidden),
                (Q_NORM if block.qk_norm else None, q),
                (K_NORM if own_keys else None, k),
                (block.attention_post_norm, self.hidden),
                (block.feed_forward_norm, self.hidden),
                (block.feed_forward_post_norm, self.hidden),
                (INPUT_NORM if self.layer_input else None, self.hidden),
            )
            for part, size in parts:
                if part:
                    yield tensor_name(i, part), (size,)
        yield "model.norm.weight", (self.hidden,)

    def layer_scales(self) -> Iterator[tuple[str, tuple[int]]]:
        """Names and shapes of the numbers that the residual stream is multiplied by."""
        for i, block in enumerate(self.blocks):
            if block.layer_scale:
                yield tensor_name(i, LAYER_SCALE), (1,)

    def convolutions(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """Names and shapes [channels, 1, taps] of the weights of short convolutions."""
        for i, block in enumerate(self.blocks):
            if block.mixer != "attention":
                assert block.window is not None  # checked by the block
                part = DELTA_CONV if block.delta else CONV
                channels = block.delta.channels if block.delta else self.hidden
                yield tensor_name(i, part), (channels, 1, block.window)

    def delta_vectors(self) -> Iterator[tuple[str, tuple[int]]]:
        """Names and shapes of the vectors of gated delta nets."""
        for i, block in enumerate(self.blocks):
            if block.delta is not None:
                yield tensor_name(i, A_LOG), (block.delta.value_heads,)
                yield tensor_name(i, DT_BIAS), (block.delta.value_heads,)
                yield tensor_name(i, DELTA_NORM), (block.delta.value_dim,)

    def choice_biases(self) -> Iterator[tuple[str, tuple[int]]]:
        """Names and shapes of what is added to the scores of experts to choose among them."""
        for i, block in enumerate(self.blocks):
            if block.experts is not None and block.experts.choice_bias:
                yield f"model.layers.{i}.{CHOICE_BIAS}", (block.experts.count,)

    def sinks(self) -> Iterator[tuple[str, tuple[int]]]:
        """Names and shapes of the sinks of attention."""
        for i, block in enumerate(self.blocks):
            if block.sinks:
                yield tensor_name(i, SINKS), (self.heads,)

    def expert_biases(self) -> Iterator[tuple[str, tuple[int]]]:
        """Names and shapes of the biases of routers and experts, in layers where these have any."""
        for i, block in enumerate(self.blocks):
            if block.experts is not None and block.experts.biases:
                for name, (n, _) in self._feed_forward(i):
                    yield name.removesuffix("weight") + "bias", (n,)

    def floats(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all weights that no matrix is made of and that stay floating point:
        norms, convolutions, the vectors of gated delta nets, the sinks of attention, the scales of
        layers, the biases by which experts are chosen, and those that routers and experts add."""
        yield from self.norms()
        yield from self.layer_scales()
        yield from self.convolutions()
        yield from self.delta_vectors()
        yield from self.choice_biases()
        yield from self.sinks()
        yield from self.expert_biases()

    def biases(self) -> Iterator[tuple[str, tuple[int]]]:
        """Names and shapes of the biases that attention may have (they are optional tensors)."""
        for name, (n, _) in self.linears():
            if "self_attn" in name:
                yield name.removesuffix("weight") + "bias", (n,)

    def tokens_share(self, name: str) -> Fraction:
        """The share of tokens that go through a matrix: all, but of an expert's; and the share of
        a table's rows that a token reads.

        Example:
            >>> from edgeq.importers.shapes import shape
            >>> shape("qwen3-30b-a3b").tokens_share("model.layers.0.mlp.experts.3.up_proj.weight")
            Fraction(1, 16)
        """
        if name in self.tables:
            return Fraction(1, self.vocab)
        if self.experts is None or not of_any_expert(name)[1]:
            return Fraction(1)
        return Fraction(self.experts.chosen, self.experts.count)

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the matrices of which only the rows of the tokens at hand are ever read, so that
        they stay in their file. (The embedding is often the head too.)"""
        return (LAYER_TABLE,) if self.layer_input else ()

    @property
    def head_name(self) -> str:
        """The tensor that turns the last hidden state into logits."""
        return "model.embed_tokens.weight" if self.tied else "lm_head.weight"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, the inverse of `from_dict`."""
        return config_to_json(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Rebuild from `to_dict`, or from the keys that artifacts had before blocks.

        Raises:
            FormatError: keys are unknown or missing, or a value is out of range.
        """
        try:
            return cls(**config_from_json(data, {field.name for field in fields(cls)}))
        except TypeError as err:
            raise FormatError(f"model config is not readable: {err}") from err
