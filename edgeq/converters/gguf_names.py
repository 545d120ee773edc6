"""Names of architectures and tensors in GGUF files, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "phi3": "phi3",
}
"""Our family -> llama.cpp's architecture."""

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


@dataclass(frozen=True)
class Shape:
    """What a file says of its model, as far as its matrices are concerned.

    Args:
        arch: llama.cpp's architecture.
        layers, heads, kv_heads, head_dim: numbers of them.
        ffn: the feed-forward's true length.
        padded: its length in the file.
        tied: whether the head is the embedding.
        query_scale: what q's norm is multiplied by, in place of the scores.
    """

    arch: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    padded: int
    tied: bool
    query_scale: float = 1.0

    def parts(self, name: str) -> Iterator[tuple[str, int, int]]:
        """Our matrices in one of the file's: (name, first row, rows without padding)."""
        for our, first, rows in self._matrices():
            if gguf_name(our, self.arch) == name:
                yield our, first, rows

    def interleaved(self, our: str) -> int:
        """How many heads of one of our tensors have their rows interleaved, or 0."""
        if self.arch != "llama":
            return 0
        if our.endswith("q_proj.weight"):
            return self.heads
        return self.kv_heads if our.endswith("k_proj.weight") else 0

    def _matrices(self) -> Iterator[tuple[str, int, int]]:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        phi = self.arch == "phi3"
        yield "model.embed_tokens.weight", 0, -1
        for i in range(self.layers):
            p = f"model.layers.{i}."
            yield p + "self_attn.q_proj.weight", 0, q
            yield p + "self_attn.k_proj.weight", q if phi else 0, kv
            yield p + "self_attn.v_proj.weight", q + kv if phi else 0, kv
            yield p + "self_attn.o_proj.weight", 0, -1
            yield p + "mlp.gate_proj.weight", 0, self.ffn
            yield p + "mlp.up_proj.weight", self.padded if phi else 0, self.ffn
            yield p + "mlp.down_proj.weight", 0, -1
        if not self.tied:
            yield "lm_head.weight", 0, -1
