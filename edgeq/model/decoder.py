"""What a decoder computes, written once over a `Builder`; every backend is a builder.

A `Builder` turns each step into its own operators and returns its own kind of value: an array, a
torch tensor, a value of a graph. The name given to a step is the name of its result, the same for
every builder, so that results of two backends can be compared and the first that differs named:

    embed                            [T, hidden]
    layer_proj                       [T, L*P] of L layers, if layer_input is P; and its multiple
                                     layer_proj_scaled
    layer_proj_norm, layer_embed     [T, L, P] each, their sum layer_sum, and its multiple
                                     layer_inputs
    embed_norm, from_embed           [T, hidden]                   of a multi-token-prediction head
    states, states_norm, from_states [T, hidden]                   likewise
    joined                           [T, hidden]                   likewise
    layers.{i}.attn_norm             [T, hidden]                   if norm_before
    layers.{i}.q, .k, .v             [T, H*D], [T, Hkv*D] twice, biases added
    layers.{i}.q_norm, .k_norm       [T, H, D], [T, Hkv, D]        if qk_norm is "head"
                                     [T, H*D], [T, Hkv*D]          if qk_norm is "all"
    layers.{i}.v_norm                [T, Hkv, D]                   if v_norm
    layers.{i}.q_rope, .k_rope       [T, H, D], [T, Hkv, D]        if the layer has positions
    layers.{i}.g                     [T, H*D]                      if output_gate
    layers.{i}.b, .c, .x             [T, hidden] each, of a short convolution in place of q, k, v
    layers.{i}.qkv, .z               [T, channels], [T, values]: of a gated delta net in place of
    layers.{i}.beta, .decay          [T, value heads] twice        q, k, v; before their functions
    layers.{i}.mix                   [T, H*D]  attention's weighted values, or
                                     [T, hidden]  c * convolution of (b * x), or
                                     [T, values]  what a gated delta net reads of its state
    layers.{i}.gated_mix             [T, H*D]                      if output_gate
    layers.{i}.o                     [T, hidden]
    layers.{i}.attn_post_norm        [T, hidden]                   if norm_after
    layers.{i}.attn_scaled           [T, hidden]                   if residual_scale is not 1
    layers.{i}.attn_out              [T, hidden]  the residual stream after attention
    layers.{i}.mlp_norm              [T, hidden]                   if norm_before
    layers.{i}.gate, .up, .act       [T, ffn]; act is activation(gate) * up
    layers.{i}.down                  [T, hidden]
    layers.{i}.router                [T, E]  of a layer with experts, in place of gate ... down
    layers.{i}.routing               [T, E]  the weight of each expert; 0 for those not chosen
    layers.{i}.expert{e}.in          [t, hidden]  the tokens that chose an expert, likewise its
                                     gate, up, act [t, ffn of an expert] and down [t, hidden]
    layers.{i}.experts               [T, hidden]  the sum of weight * down of the chosen experts
    layers.{i}.mlp_post_norm         [T, hidden]                   if norm_after
    layers.{i}.mlp_scaled            [T, hidden]                   if residual_scale is not 1
    layers.{i}.mlp_out               [T, hidden]  the residual stream after the feed-forward, if the
                                     layer has an input or a scale of its own
    layers.{i}.input                 [T, P]  the layer's own input, if layer_input is P
    layers.{i}.input_gate            [T, P]; and input_act: activation(input_gate) * input
    layers.{i}.input_proj, .input_norm  [T, hidden] each
    layers.{i}.input_out             [T, hidden]  the sum with the stream, if layer_scale
    layers.{i}.out                   [T, hidden]  the residual stream after the layer
    final_norm                       [T, hidden]
    head                             [T, V] or, if the builder keeps only the last, [1, V]; only if
                                     logits are scaled or capped
    head_scaled                      the same shape                if logits are scaled and capped
    logits                           the same shape

A layer without experts is cut in six parts, where calibration and transforms have to look or to
change something: `attention_in`, `attention_mix` and `attention_out`, then `feed_forward_in`,
`feed_forward_act` and `feed_forward_out`. Each part can be run by itself. "Attention" in their
names stands for the mixer, whichever it is. With experts, `routing`, then `expert_in`, `expert_act`
and `expert_out` of each, and `feed_forward_sum` stand in place of the last two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from edgeq.model.block import (
    B_PROJ,
    C_PROJ,
    CONV,
    CONV_OUT,
    DELTA_OUT,
    DOWN_PROJ,
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
    MTP_EMBEDDING,
    MTP_EMBEDDING_NORM,
    MTP_STATE,
    MTP_STATE_NORM,
    O_PROJ,
    Q_NORM,
    Q_PROJ,
    ROUTER,
    UP_PROJ,
    V_PROJ,
    X_PROJ,
    BlockSpec,
    Mixer,
    expert_part,
    tensor_name,
)
from edgeq.model.config import ModelConfig
from edgeq.model.rope_spec import RopeSpec

V = TypeVar("V")

LAYER_STEPS = (
    "attn_norm", "q", "k", "v", "g", "q_norm", "k_norm", "v_norm", "q_rope", "k_rope", "b", "c",
    "x", "qkv", "z", "beta", "decay", "mix", "gated_mix", "o", "attn_post_norm", "attn_scaled",
    "attn_out", "mlp_norm", "gate", "up", "act", "down", "router", "routing", "experts",
    "mlp_post_norm", "mlp_scaled", "mlp_out", "input", "input_gate", "input_act", "input_proj",
    "input_norm", "input_out", "out",
)  # fmt: skip
"""What follows ``layers.{i}.`` in the name of a result, in order.

With ``qk_norm_last`` the norms of q and k follow their rotation."""
HEAD_STEPS = ("head", "head_scaled", "logits")
"""Names of the results that have a row for each position, or one for the last."""
OUTER_STEPS = (
    "embed", "layer_proj", "layer_proj_scaled", "layer_proj_norm", "layer_embed", "layer_sum",
    "layer_inputs", "final_norm", *HEAD_STEPS,
)  # fmt: skip
"""Names of the results before and after the layers."""


_OUT_PROJ: dict[Mixer, str] = {
    "attention": O_PROJ, "short_conv": CONV_OUT, "gated_delta_net": DELTA_OUT,
}  # fmt: skip


class Builder(Protocol[V]):
    """The operators of one backend; V is its kind of value.

    Methods that a block does not need are not called for it.
    """

    def embed(self, name: str) -> V:
        """Rows of the embedding of this pass's tokens, times ``embed_scale``: [T, hidden]."""

    def states(self, name: str) -> V:
        """The states of another model that a multi-token-prediction head reads: [T, hidden]."""

    def norm(self, name: str, x: V, weight: str) -> V:
        """RMS norm of x along its last axis with the named weight plus ``norm_offset``."""

    def linear(self, name: str, x: V, weight: str) -> V:
        """x [T, K] times the named matrix [N, K], plus its bias if the model has one: [T, N]."""

    def heads(self, name: str, x: V, n: int) -> V:
        """x [T, n*D] seen as [T, n, D]; a view, which needs no result of that name."""

    def rope(self, name: str, x: V, rope: RopeSpec) -> V:
        """x [T, n, D] rotated by its positions, times the factors of `rope_tables`."""

    def attend(self, name: str, layer: int, q: V, k: V, v: V) -> V:
        """Append k and v [T, Hkv, D] to the layer's cache; attention of q [T, H, D]: [T, H*D].

        A position sees what ``config.blocks[layer].window`` says; scores are capped by
        ``attn_softcap``. With ``sinks`` the layer's tensor of that name holds a further score of
        each head, whose share of the attention goes to no position.
        """

    def attend_shared(self, name: str, layer: int, q: V) -> V:
        """Attention of q [T, H, D] over the keys and values of the layer that
        ``config.blocks[layer].kv_from`` names, which has appended those of this pass: [T, H*D]."""

    def plain_norm(self, name: str, x: V) -> V:
        """RMS norm of x along its last axis, without a weight."""

    def layer_embed(self, name: str) -> V:
        """Rows of the table `edgeq.model.config.LAYER_TABLE` of this pass's tokens, times the root
        of ``layer_input``: [T, L, P] of L layers. No other row of the table is read."""

    def layer_input(self, name: str, x: V, layer: int) -> V:
        """The values [T, P] of a layer in x [T, L, P]."""

    def weighted(self, name: str, x: V, weight: str) -> V:
        """x times the named number, a tensor of one value."""

    def short_conv(self, name: str, layer: int, b: V, c: V, x: V, weight: str) -> V:
        """c times a causal convolution of (b * x), each [T, hidden], channel by channel.

        The named weight is [hidden, 1, taps]; its last tap is that of the current position.
        Positions before the first of the sequence are zero. The layer's cache keeps b * x of the
        last ``config.blocks[layer].window`` - 1 positions for the next pass.
        """

    def delta_net(self, name: str, layer: int, qkv: V, z: V, beta: V, decay: V) -> V:
        """The gated delta rule (`edgeq.model.delta_rule`) on a layer's projections: [T, values].

        The layer's cache keeps the state, and qkv of the last ``config.blocks[layer].window`` - 1
        positions.
        """

    def output_gate(self, name: str, x: V, gate: V) -> V:
        """x * sigmoid(gate), both [T, H*D]."""

    def gated(self, name: str, gate: V, up: V) -> V:
        """`edgeq.model.formulas.gated` of both, [T, ffn]: activation(gate) * up, or what
        ``config.activation`` says."""

    def route(self, name: str, layer: int, logits: V) -> V:
        """The weight of each expert for each token, from the router's logits: [T, E].

        As ``config.blocks[layer].experts`` says; 0 for an expert that a token does not go through.
        """

    def to_expert(self, name: str, x: V, routing: V, expert: int) -> V:
        """The rows of x [T, hidden] whose tokens go through an expert: [t, hidden]."""

    def combine(self, name: str, routing: V, outputs: Sequence[V]) -> V:
        """The sum of each expert's outputs [t, hidden] times its weights: [T, hidden].

        An expert's rows are those that `to_expert` gives; the lowest expert is added first.
        """

    def add(self, name: str, a: V, b: V) -> V:
        """The sum of two [T, hidden]."""

    def scaled(self, name: str, x: V, factor: float) -> V:
        """x times a number."""

    def capped(self, name: str, x: V, cap: float) -> V:
        """cap * tanh(x / cap)."""

    def logits(self, name: str, x: V, weight: str) -> V:
        """The head on x [T, hidden], of all positions or only the last: float32 [T | 1, V]."""


def decoder(b: Builder[V], config: ModelConfig) -> V:
    """Build the whole decoder; returns its logits."""
    x = joined(b) if config.is_mtp else b.embed("embed")
    inputs = layer_inputs(b, config, x) if config.layer_input else None
    for i in range(config.layers):
        x = layer(b, config, i, x, inputs)
    return head(b, config, head_in(b, x))


def joined(b: Builder[V]) -> V:
    """The input of a multi-token-prediction head's layer: [T, hidden].

    A checkpoint holds the two matrices as one, whose columns are those of the embedding, then
    those of the state.
    """
    embedding = b.norm("embed_norm", b.embed("embed"), MTP_EMBEDDING_NORM)
    from_embedding = b.linear("from_embed", embedding, MTP_EMBEDDING)
    state = b.norm("states_norm", b.states("states"), MTP_STATE_NORM)
    return b.add("joined", from_embedding, b.linear("from_states", state, MTP_STATE))


def layer_inputs(b: Builder[V], config: ModelConfig, x: V) -> V:
    """The inputs that the layers have of their own [T, L, P], from the embeddings [T, hidden].

    The mean of two parts but for a factor of the root of 2: a norm of a projection of the
    embedding, and the token's row in a table for all layers.
    """
    rows = b.linear("layer_proj", x, LAYER_PROJECTION)
    rows = b.scaled("layer_proj_scaled", rows, config.hidden**-0.5)
    rows = b.heads("layer_heads", rows, config.layers)
    rows = b.norm("layer_proj_norm", rows, LAYER_PROJECTION_NORM)
    rows = b.add("layer_sum", rows, b.layer_embed("layer_embed"))
    return b.scaled("layer_inputs", rows, 2**-0.5)


def layer(b: Builder[V], config: ModelConfig, i: int, x: V, inputs: V | None = None) -> V:
    """The residual stream [T, hidden] after layer i, from the one before it.

    Args:
        b: the builder.
        config: of the model.
        i: which layer.
        x: the stream before it.
        inputs: the result of `layer_inputs`, of a model that has them.
    """
    at, scaled = f"layers.{i}.", config.blocks[i].layer_scale
    mix = attention_mix(b, config, i, attention_in(b, config, i, x))
    x = b.add(at + "attn_out", x, attention_out(b, config, i, mix))
    h = feed_forward_in(b, config, i, x)
    last = inputs is None and not scaled
    x = b.add(at + ("out" if last else "mlp_out"), x, feed_forward(b, config, i, h))
    if inputs is not None:
        own = _own_input(b, i, x, b.layer_input(at + "input", inputs, i))
        x = b.add(at + ("input_out" if scaled else "out"), x, own)
    return b.weighted(at + "out", x, tensor_name(i, LAYER_SCALE)) if scaled else x


def _own_input(b: Builder[V], i: int, x: V, own: V) -> V:
    """What a layer's own input [T, P] adds to the residual stream x [T, hidden]."""
    at = f"layers.{i}."
    gate = b.linear(at + "input_gate", x, tensor_name(i, INPUT_GATE))
    act = b.gated(at + "input_act", gate, own)
    out = b.linear(at + "input_proj", act, tensor_name(i, INPUT_PROJ))
    return b.norm(at + "input_norm", out, tensor_name(i, INPUT_NORM))


def attention_in(b: Builder[V], config: ModelConfig, i: int, x: V) -> V:
    """What the mixer's inputs are projected from: x or its norm, [T, hidden]."""
    return _normed(b, f"layers.{i}.attn_norm", i, x, config.blocks[i].attention_norm)


def attention_mix(b: Builder[V], config: ModelConfig, i: int, h: V) -> V:
    """What the mixer makes of the result of `attention_in`: [T, H*D], or [T, hidden]."""
    block, at = config.blocks[i], f"layers.{i}."
    if block.mixer == "short_conv":
        gate_in = b.linear(at + "b", h, tensor_name(i, B_PROJ))
        gate_out = b.linear(at + "c", h, tensor_name(i, C_PROJ))
        x = b.linear(at + "x", h, tensor_name(i, X_PROJ))
        return b.short_conv(at + "mix", i, gate_in, gate_out, x, tensor_name(i, CONV))
    if block.mixer == "gated_delta_net":
        qkv = b.linear(at + "qkv", h, tensor_name(i, IN_QKV))
        z = b.linear(at + "z", h, tensor_name(i, IN_Z))
        beta = b.linear(at + "beta", h, tensor_name(i, IN_B))
        decay = b.linear(at + "decay", h, tensor_name(i, IN_A))
        return b.delta_net(at + "mix", i, qkv, z, beta, decay)
    if block.kv_from is not None:
        return _shared_mix(b, config, i, h)
    q = b.linear(at + "q", h, tensor_name(i, Q_PROJ))
    k = b.linear(at + "k", h, tensor_name(i, K_PROJ))
    v = b.linear(at + "v", h, tensor_name(i, V_PROJ))
    gate = b.linear(at + "g", h, tensor_name(i, G_PROJ)) if block.output_gate else None
    if block.qk_norm == "all":
        q = b.norm(at + "q_norm", q, tensor_name(i, Q_NORM))
        k = b.norm(at + "k_norm", k, tensor_name(i, K_NORM))
    q = b.heads(at + "q_heads", q, config.heads)
    k = b.heads(at + "k_heads", k, config.kv_heads)
    v = b.heads(at + "v_heads", v, config.kv_heads)
    if block.qk_norm == "head" and not block.qk_norm_last:
        q = b.norm(at + "q_norm", q, tensor_name(i, Q_NORM))
        k = b.norm(at + "k_norm", k, tensor_name(i, K_NORM))
    if block.v_norm:
        v = b.plain_norm(at + "v_norm", v)
    if block.rope is not None:
        q = b.rope(at + "q_rope", q, block.rope)
        k = b.rope(at + "k_rope", k, block.rope.for_keys)
    if block.qk_norm_last:
        q = b.norm(at + "q_norm", q, tensor_name(i, Q_NORM))
        k = b.norm(at + "k_norm", k, tensor_name(i, K_NORM))
    mix = b.attend(at + "mix", i, q, k, v)
    return mix if gate is None else b.output_gate(at + "gated_mix", mix, gate)


def _shared_mix(b: Builder[V], config: ModelConfig, i: int, h: V) -> V:
    """`attention_mix` of a layer that reads the keys and values of another."""
    block, at = config.blocks[i], f"layers.{i}."
    q = b.linear(at + "q", h, tensor_name(i, Q_PROJ))
    gate = b.linear(at + "g", h, tensor_name(i, G_PROJ)) if block.output_gate else None
    q = b.heads(at + "q_heads", q, config.heads)
    if block.qk_norm and not block.qk_norm_last:
        q = b.norm(at + "q_norm", q, tensor_name(i, Q_NORM))
    if block.rope is not None:
        q = b.rope(at + "q_rope", q, block.rope)
    if block.qk_norm_last:
        q = b.norm(at + "q_norm", q, tensor_name(i, Q_NORM))
    mix = b.attend_shared(at + "mix", i, q)
    return mix if gate is None else b.output_gate(at + "gated_mix", mix, gate)


def attention_out(b: Builder[V], config: ModelConfig, i: int, mix: V) -> V:
    """What the mixer adds to the residual stream [T, hidden], from `attention_mix`'s result."""
    part = _OUT_PROJ[config.blocks[i].mixer]
    out = b.linear(f"layers.{i}.o", mix, tensor_name(i, part))
    out = _normed(b, f"layers.{i}.attn_post_norm", i, out, config.blocks[i].attention_post_norm)
    return _branch(b, config, f"layers.{i}.attn_scaled", out)


def feed_forward_in(b: Builder[V], config: ModelConfig, i: int, x: V) -> V:
    """What gate and up are projected from: x or its norm, [T, hidden]."""
    return _normed(b, f"layers.{i}.mlp_norm", i, x, config.blocks[i].feed_forward_norm)


def feed_forward_act(b: Builder[V], config: ModelConfig, i: int, h: V) -> V:
    """activation(gate) * up [T, ffn], from the result of `feed_forward_in`."""
    gate = b.linear(f"layers.{i}.gate", h, tensor_name(i, GATE_PROJ))
    up = b.linear(f"layers.{i}.up", h, tensor_name(i, UP_PROJ))
    return b.gated(f"layers.{i}.act", gate, up)


def feed_forward_out(b: Builder[V], config: ModelConfig, i: int, act: V) -> V:
    """What the feed-forward adds to the residual stream, from `feed_forward_act`'s result."""
    return fed(b, config, i, b.linear(f"layers.{i}.down", act, tensor_name(i, DOWN_PROJ)))


def routing(b: Builder[V], config: ModelConfig, i: int, h: V) -> V:
    """The weights of the experts [T, E], from the result of `feed_forward_in`."""
    logits = b.linear(f"layers.{i}.router", h, tensor_name(i, ROUTER))
    return b.route(f"layers.{i}.routing", i, logits)


def expert_in(b: Builder[V], i: int, expert: int, h: V, weights: V) -> V:
    """What an expert's gate and up are projected from, by the results of `routing`."""
    return b.to_expert(f"layers.{i}.expert{expert}.in", h, weights, expert)


def expert_act(b: Builder[V], i: int, expert: int, x: V) -> V:
    """activation(gate) * up of an expert, from the result of `expert_in`."""
    at = f"layers.{i}.expert{expert}."
    gate = b.linear(at + "gate", x, tensor_name(i, expert_part(expert, GATE_PROJ)))
    up = b.linear(at + "up", x, tensor_name(i, expert_part(expert, UP_PROJ)))
    return b.gated(at + "act", gate, up)


def expert_out(b: Builder[V], i: int, expert: int, act: V) -> V:
    """An expert's output, from the result of `expert_act`."""
    weight = tensor_name(i, expert_part(expert, DOWN_PROJ))
    return b.linear(f"layers.{i}.expert{expert}.down", act, weight)


def feed_forward_sum(
    b: Builder[V], config: ModelConfig, i: int, weights: V, outputs: Sequence[V]
) -> V:
    """What the experts add to the residual stream, from the results of `expert_out`."""
    return fed(b, config, i, b.combine(f"layers.{i}.experts", weights, outputs))


def feed_forward(b: Builder[V], config: ModelConfig, i: int, h: V) -> V:
    """What the feed-forward adds to the residual stream, from the result of `feed_forward_in`."""
    experts = config.blocks[i].experts
    if experts is None:
        return feed_forward_out(b, config, i, feed_forward_act(b, config, i, h))
    weights = routing(b, config, i, h)
    outputs = []
    for e in range(experts.count):
        act = expert_act(b, i, e, expert_in(b, i, e, h, weights))
        outputs.append(expert_out(b, i, e, act))
    return feed_forward_sum(b, config, i, weights, outputs)


def fed(b: Builder[V], config: ModelConfig, i: int, out: V) -> V:
    """The output of the feed-forward as it is added to the residual stream."""
    out = _normed(b, f"layers.{i}.mlp_post_norm", i, out, config.blocks[i].feed_forward_post_norm)
    return _branch(b, config, f"layers.{i}.mlp_scaled", out)


def head_in(b: Builder[V], x: V) -> V:
    """What the head is multiplied by: the last norm of x, [T, hidden]."""
    return b.norm("final_norm", x, "model.norm.weight")


def head(b: Builder[V], config: ModelConfig, x: V) -> V:
    """Logits, from the result of `head_in`."""
    scale, cap = config.logit_scale, config.logit_softcap
    if scale == 1 and cap is None:
        return b.logits("logits", x, config.head_name)
    x = b.logits("head", x, config.head_name)
    if scale != 1:
        x = b.scaled("logits" if cap is None else "head_scaled", x, scale)
    return x if cap is None else b.capped("logits", x, cap)


def key_step(block: BlockSpec) -> str:
    """What follows ``layers.{i}.`` in the name of the keys that a layer's cache stores."""
    if block.rope is not None and not block.qk_norm_last:
        return "k_rope"
    return "k_norm" if block.qk_norm else "k"


def _branch(b: Builder[V], config: ModelConfig, name: str, x: V) -> V:
    """A branch as it is added to the residual stream."""
    return x if config.residual_scale == 1 else b.scaled(name, x, config.residual_scale)


def _normed(b: Builder[V], name: str, i: int, x: V, part: str | None) -> V:
    return x if part is None else b.norm(name, x, tensor_name(i, part))
