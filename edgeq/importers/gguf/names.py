"""Names of tensors in GGUF files."""

from __future__ import annotations

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
}
_GEMMA = _LAYER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_PHI = _LAYER | {
    "self_attn.q_proj": "attn_qkv",
    "self_attn.k_proj": "attn_qkv",
    "self_attn.v_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_up",
}


def gguf_name(name: str, family: str) -> str:
    """GGUF's name of one of our tensors; several of ours may lie in one."""
    stem, _, end = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{end}"
    _, _, layer, rest = stem.split(".", 3)
    table = {"gemma3": _GEMMA, "phi3": _PHI}.get(family, _LAYER)
    return f"blk.{layer}.{table[rest]}.{end}"
