"""Names of architectures in GGUF files, and which of our tensors lie in which of a file's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgeq.importers.gguf.names import gguf_name

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "phi3": "phi3",
}
"""Our family -> llama.cpp's architecture."""


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
