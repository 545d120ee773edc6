"""What llama.cpp computes for an architecture, and the names of tensors in its files.

Most of it no key of a GGUF file says: the name of the architecture stands for it.

Source: llama.cpp's llama-arch.cpp (names), llama-model.cpp (rotary kinds, what is assumed where a
key is absent) and src/models (what is computed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgeq.model.block import QKNorm, Score, of_any_expert
from edgeq.model.config import Activation

_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts": "exp_probs_b",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}


NORMS_AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Names of the norms after attention and feed-forward, in architectures that have them."""
NORMS_AROUND = {**NORMS_AFTER, "pre_feedforward_layernorm": "ffn_norm"}
"""The same where there are norms before as well."""
MULTIPLIERS = {
    "embed_scale": "embedding_scale",
    "residual_scale": "residual_scale",
    "logit_scale": "logit_scale",
    "attn_scale": "attention.scale",
}
"""Fields of `ModelConfig` -> the keys that say them; logits are divided by theirs."""
SOFTCAPS = {
    "attn_softcap": ("attn_logit_softcapping", 50.0),
    "logit_softcap": ("final_logit_softcapping", 30.0),
}
"""Fields of `ModelConfig` -> the keys that say them, and what is assumed where they are absent."""


def _head_dim(layers: int, hidden: int, heads: int, head_dim: int) -> float:
    return head_dim


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture of llama.cpp.

    Args:
        name: the value of ``general.architecture``.
        tensors: part of a layer, or a tensor outside them -> its name in the file, where that is
            not the usual one. Parts with one name lie in one tensor, one below the other.
        interleaved: rows of q and k lie in the order that rotates neighbors (2j, 2j+1).
        partial_rope: a part of each head may rotate.
        heads_span_hidden: the sizes of all heads together must be hidden.
        untied: the file holds the output head even where it equals the embeddings.
        tied: the file has no head but the embeddings.
        biases: attention projections that may have biases.
        biases_required: a file must have all of them.
        activation: of the feed-forward.
        norm_before, norm_after, qk_norm, qk_norm_last: see `edgeq.model.block.BlockSpec`.
        rope_layers: whether a layer, by its index and how many there are, has rotary positions.
        rope_factors: a tensor ``rope_freqs.weight`` stretches the frequencies.
        long_factors: two tensors may hold longrope's factors.
        yarn_log: ``rope.scaling.yarn_log_multiplier`` is read, yarn's ``mscale_all_dim``.
        temperature: queries may have a temperature that depends on the position.
        rope_alpha: a key may say by what the base is stretched.
        default_rope_base: base of the frequencies where the file states none; None if it must.
        local_rope_base: the same for layers with a window, where these have a base of their own.
        multipliers: which of the numbers in `MULTIPLIERS` keys of a file say.
        multipliers_required: a file must say them: of this architecture llama.cpp's versions
            differ in what they assume.
        softcaps: attention scores and logits are capped, by what keys of a file say.
        local_unscaled: the frequencies of layers with a window are never stretched.
        windows: which layers have a sliding window: "none" in llama.cpp, whatever a file says;
            "all"; those of a "period" that the file states; or "optional": those of a period, if
            the file states a window.
        windowed_depths: the numbers of layers of the models that have windows; others have none.
            All models have them if it is empty.
        default_window: the window where the file does not say.
        window_period: of how many layers one sees all positions, where the file does not say.
        expert_score: how the router's logits become scores, where layers have experts; weights are
            divided by their sum. None for an architecture without experts.
        expert_ffn: a key of its own says the width of an expert.
        expert_biases: the router and the matrices of experts have biases.
        leading_dense: a key says how many layers, from the first, have no experts.
        short_conv: layers without key/value heads are gated short convolutions.
        delta_net: layers are gated delta nets but every n-th, as a key says; the file may hold
            further layers, which guess tokens ahead.
        sinks: attention has sinks.
        output_gate: attention has an output gate, whose rows lie in q's tensor, head by head.
        scaled_embeddings: embeddings are multiplied by sqrt(hidden).
        query_dim: of layers, hidden, heads and head_dim, the number whose -0.5th power scales
            attention scores.
    """

    name: str
    tensors: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    partial_rope: bool = False
    heads_span_hidden: bool = False
    untied: bool = False
    tied: bool = False
    biases: tuple[str, ...] = ()
    biases_required: bool = False
    activation: Activation = "silu"
    norm_before: bool = True
    norm_after: bool = False
    qk_norm: QKNorm | None = None
    qk_norm_last: bool = False
    rope_layers: Callable[[int, int], bool] = lambda layer, layers: True
    rope_factors: bool = False
    long_factors: bool = False
    yarn_log: bool = False
    temperature: bool = False
    rope_alpha: bool = False
    default_rope_base: float | None = 10_000.0
    local_rope_base: float | None = None
    multipliers: tuple[str, ...] = ()
    multipliers_required: bool = False
    softcaps: bool = False
    local_unscaled: bool = False
    windows: Literal["none", "all", "period", "optional"] = "none"
    windowed_depths: tuple[int, ...] = ()
    default_window: int = 0
    window_period: int = 1
    expert_score: Score | None = None
    expert_ffn: bool = False
    expert_biases: bool = False
    leading_dense: bool = False
    short_conv: bool = False
    delta_net: bool = False
    sinks: bool = False
    output_gate: bool = False
    scaled_embeddings: bool = False
    query_dim: Callable[[int, int, int, int], float] = _head_dim

    def tensor_name(self, name: str) -> str:
        """The file's name for one of edgeq's tensors; it may hold several of them.

        Example:
            >>> Architecture(name="llama").tensor_name("model.layers.3.mlp.up_proj.weight")
            'blk.3.ffn_up.weight'
        """
        return _stored(name, {**_LAYER, **self.tensors})

    def windows_of(self, layers: int) -> Literal["none", "all", "period", "optional"]:
        """`windows` of a model of so many layers."""
        has = not self.windowed_depths or layers in self.windowed_depths
        return self.windows if has else "none"

    def is_interleaved(self, name: str) -> bool:
        """Whether the file stores the rows of a tensor of edgeq in interleaved rotary order."""
        return self.interleaved and name.split(".")[-2] in ("q_proj", "k_proj")


def may_be_separate(name: str) -> bool:
    """Whether some file stores a tensor of a layer alone; see `separate_name`."""
    return name.rpartition(".")[0].split(".", 3)[-1] in _LAYER


def separate_name(name: str) -> str:
    """The name of a tensor in a file that stores it alone, whatever the architecture.

    Some files of architectures that fuse matrices store some of them apart.
    """
    return _stored(name, _LAYER)


def _stored(name: str, parts: Mapping[str, str]) -> str:
    stem, _, end = name.rpartition(".")
    if stem in _OUTER:
        return f"{parts.get(stem, _OUTER[stem])}.{end}"
    _, _, layer, part = stem.split(".", 3)
    if f"{part}.{end}" in parts:  # the name has no usual ending
        return f"blk.{layer}.{parts[f'{part}.{end}']}"
    return f"blk.{layer}.{parts[of_any_expert(part)[0]]}.{end}"
