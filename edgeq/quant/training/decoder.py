"""The decoder in torch, many windows at a time and differentiable in its weights.

It is `edgeq.model.reference.Reference` once more, for training only; a test holds the two together.
Weights come as a mapping with the model's tensor names, so the same decoder serves the float
teacher and the student, whose weights are made anew at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeq.model.config import ModelConfig
from edgeq.model.reference import rope_tables

Weights = Mapping[str, Any]
"""Tensor name -> float32 torch tensor."""


class Decoder:
    """A model's decoder as functions of its weights.

    Args:
        config: of the model.
        length: tokens of the longest window it will see.
    """

    def __init__(self, config: ModelConfig, length: int) -> None:
        import torch

        self.config = config
        self._rope = {
            local: [torch.from_numpy(t) for t in rope_tables(config, local, length)]
            for local in {*config.window_layers}
        }

    def __call__(self, weights: Weights, tokens: Any) -> tuple[Any, list[Any]]:
        """Logits, and the hidden state after each layer.

        Args:
            weights: every tensor of the model.
            tokens: int64 [B, T].

        Returns:
            Logits float32 [B, T, V], and for each layer float32 [B, T, hidden].
        """
        x = self.embed(weights, tokens)
        states = []
        for layer in range(self.config.layers):
            x = self.layer(weights, layer, x)
            states.append(x)
        return self.head(weights, x), states

    def embed(self, weights: Weights, tokens: Any) -> Any:
        """Embeddings of int64 [B, T], times `embed_scale`: float32 [B, T, hidden]."""
        from torch.nn.functional import embedding

        return embedding(tokens, weights["model.embed_tokens.weight"]) * self.config.embed_scale

    def head(self, weights: Weights, x: Any) -> Any:
        """Logits float32 [B, T, V] of the last hidden state [B, T, hidden]."""
        return self._project(
            weights, self.config.head_name, self._norm(weights, "model.norm.weight", x)
        )

    def layer(self, weights: Weights, layer: int, x: Any) -> Any:
        """The hidden state float32 [B, T, hidden] after a layer, from the one before it."""
        x = x + self._attention(weights, layer, x)
        return x + self._feed_forward(weights, layer, x)

    def _attention(self, weights: Weights, layer: int, x: Any) -> Any:
        from torch.nn.functional import scaled_dot_product_attention

        c = self.config
        b, t, _ = x.shape
        p = f"model.layers.{layer}."
        h = self._norm(weights, p + "input_layernorm.weight", x)
        q, k, v = (
            self._project(weights, f"{p}self_attn.{part}_proj.weight", h)
            .reshape(b, t, -1, c.head_dim)
            .transpose(1, 2)
            for part in "qkv"
        )
        if c.qk_norm:
            q = self._norm(weights, p + "self_attn.q_norm.weight", q)
            k = self._norm(weights, p + "self_attn.k_norm.weight", k)
        q, k = self._rotate(layer, q), self._rotate(layer, k)
        k, v = (part.repeat_interleave(c.group, dim=1) for part in (k, v))
        mask = self._mask(layer, t)
        mixed = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=c.attn_scale
        )
        mixed = mixed.transpose(1, 2).reshape(b, t, -1)
        out = self._project(weights, p + "self_attn.o_proj.weight", mixed)
        if not c.post_norms:
            return out
        return self._norm(weights, p + "post_attention_layernorm.weight", out)

    def _feed_forward(self, weights: Weights, layer: int, x: Any) -> Any:
        from torch.nn.functional import gelu, silu

        c = self.config
        p = f"model.layers.{layer}."
        before = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        h = self._norm(weights, f"{p}{before}.weight", x)
        gate = self._project(weights, p + "mlp.gate_proj.weight", h)
        gate = silu(gate) if c.activation == "silu" else gelu(gate, approximate="tanh")
        inner = gate * self._project(weights, p + "mlp.up_proj.weight", h)
        out = self._project(weights, p + "mlp.down_proj.weight", inner)
        if not c.post_norms:
            return out
        return self._norm(weights, p + "post_feedforward_layernorm.weight", out)

    def _norm(self, weights: Weights, name: str, x: Any) -> Any:
        c = self.config
        root = (x.square().mean(dim=-1, keepdim=True) + c.norm_eps).rsqrt()
        return x * root * (weights[name] + c.norm_offset)

    def _project(self, weights: Weights, name: str, x: Any) -> Any:
        from torch.nn.functional import linear

        return linear(x, weights[name], weights.get(name.removesuffix("weight") + "bias"))

    def _rotate(self, layer: int, x: Any) -> Any:
        """Rotary positions on float32 [B, heads, T, D], in the half-split order."""
        import torch

        t = x.shape[2]
        cos, sin = (table[:t] for table in self._rope[self.config.window_layers[layer]])
        half = cos.shape[1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = (first * cos - second * sin, second * cos + first * sin, rest)
        return torch.cat(turned, dim=-1)

    def _mask(self, layer: int, t: int) -> Any:
        """What each position of a sliding-window layer sees, bool [T, T]; None if all before."""
        import torch

        c = self.config
        if c.window is None or not c.window_layers[layer] or t <= c.window:
            return None
        ones = torch.ones(t, t, dtype=torch.bool)
        return ones.tril() & ones.triu(1 - c.window)
