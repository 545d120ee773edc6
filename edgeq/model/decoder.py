"""The decoder, written once: what every target's graph is built from.

A `Builder` turns each step into its target's own operators and hands back its own kind of value.
The name given to a step is the name of its result, the same in every target, so that results of
two targets (or of a target and `edgeq.model.reference`) can be laid side by side and the first that
differs named:

    embed                            [T, hidden]
    layers.{i}.attn_norm             [T, hidden]
    layers.{i}.q, .k, .v             [T, H*D], [T, Hkv*D] twice, biases added
    layers.{i}.q_norm, .k_norm       [T, H, D], [T, Hkv, D]        where the family has them
    layers.{i}.q_rope, .k_rope       [T, H, D], [T, Hkv, D]
    layers.{i}.mix                   [T, H*D]  attention's weighted values
    layers.{i}.o                     [T, hidden]
    layers.{i}.attn_post_norm        [T, hidden]                   where the family has it
    layers.{i}.attn_out              [T, hidden]  the residual stream after attention
    layers.{i}.mlp_norm              [T, hidden]
    layers.{i}.gate, .up, .act       [T, ffn]; act is activation(gate) * up
    layers.{i}.down                  [T, hidden]
    layers.{i}.mlp_post_norm         [T, hidden]                   where the family has it
    layers.{i}.out                   [T, hidden]  the residual stream after the layer
    final_norm                       [T, hidden]
    logits                           [T, V] or, if the target keeps only the last, [1, V]
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from edgeq.model.config import ModelConfig

V = TypeVar("V")

LAYER_STEPS = (
    "attn_norm", "q", "k", "v", "q_norm", "k_norm", "q_rope", "k_rope", "mix", "o",
    "attn_post_norm", "attn_out", "mlp_norm", "gate", "up", "act", "down", "mlp_post_norm", "out",
)  # fmt: skip
"""What follows ``layers.{i}.`` in the name of a result, in order."""


class Builder(Protocol[V]):
    """One target's operators; V is its kind of value (a graph's tensor name, a node ...)."""

    def embed(self, name: str) -> V:
        """Rows of the embedding of this pass's tokens, times ``embed_scale``: [T, hidden]."""

    def norm(self, name: str, x: V, weight: str) -> V:
        """RMS norm of x along its last axis with the named weight plus ``norm_offset``."""

    def linear(self, name: str, x: V, weight: str) -> V:
        """x [T, K] times the named matrix [N, K], plus its bias if the model has one: [T, N]."""

    def heads(self, name: str, x: V, n: int) -> V:
        """x [T, n*D] seen as [T, n, D]; a view, which needs no result of that name."""

    def rope(self, name: str, x: V, layer: int) -> V:
        """x [T, n, D] rotated by its positions with the layer's frequencies."""

    def attend(self, name: str, layer: int, q: V, k: V, v: V) -> V:
        """Put k and v [T, Hkv, D] in the layer's cache; attention of q [T, H, D]: [T, H*D]."""

    def gated(self, name: str, gate: V, up: V) -> V:
        """activation(gate) * up, both [T, ffn]."""

    def add(self, name: str, a: V, b: V) -> V:
        """The sum of two [T, hidden]."""

    def logits(self, name: str, x: V, weight: str) -> V:
        """The head on x [T, hidden], of all positions or only the last: float32 [T | 1, V]."""


def decoder(b: Builder[V], config: ModelConfig) -> V:
    """Build the whole decoder; returns its logits."""
    x = b.embed("embed")
    for i in range(config.layers):
        x = _attention(b, config, i, x)
        x = _feed_forward(b, config, i, x)
    x = b.norm("final_norm", x, "model.norm.weight")
    return b.logits("logits", x, config.head_name)


def _attention(b: Builder[V], c: ModelConfig, i: int, x: V) -> V:
    p, at = f"model.layers.{i}.", f"layers.{i}."
    h = b.norm(at + "attn_norm", x, p + "input_layernorm.weight")
    q = b.linear(at + "q", h, p + "self_attn.q_proj.weight")
    k = b.linear(at + "k", h, p + "self_attn.k_proj.weight")
    v = b.linear(at + "v", h, p + "self_attn.v_proj.weight")
    q = b.heads(at + "q_heads", q, c.heads)
    k = b.heads(at + "k_heads", k, c.kv_heads)
    v = b.heads(at + "v_heads", v, c.kv_heads)
    if c.qk_norm:
        q = b.norm(at + "q_norm", q, p + "self_attn.q_norm.weight")
        k = b.norm(at + "k_norm", k, p + "self_attn.k_norm.weight")
    q, k = b.rope(at + "q_rope", q, i), b.rope(at + "k_rope", k, i)
    mix = b.attend(at + "mix", i, q, k, v)
    out = b.linear(at + "o", mix, p + "self_attn.o_proj.weight")
    if c.post_norms:
        out = b.norm(at + "attn_post_norm", out, p + "post_attention_layernorm.weight")
    return b.add(at + "attn_out", x, out)


def _feed_forward(b: Builder[V], c: ModelConfig, i: int, x: V) -> V:
    p, at = f"model.layers.{i}.", f"layers.{i}."
    before = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
    h = b.norm(at + "mlp_norm", x, f"{p}{before}.weight")
    gate = b.linear(at + "gate", h, p + "mlp.gate_proj.weight")
    up = b.linear(at + "up", h, p + "mlp.up_proj.weight")
    out = b.linear(at + "down", b.gated(at + "act", gate, up), p + "mlp.down_proj.weight")
    if c.post_norms:
        out = b.norm(at + "mlp_post_norm", out, p + "post_feedforward_layernorm.weight")
    return b.add(at + "out", x, out)
