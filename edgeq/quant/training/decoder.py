"""The decoder in torch, many windows at a time and differentiable in its weights.

`TorchDecoder` runs `edgeq.model.decoder` over a builder of torch tensors. Weights come as a mapping
with the model's tensor names, so the same decoder serves the float teacher and the student, whose
weights are computed anew at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from edgeq.core.errors import UnsupportedError
from edgeq.model.block import (
    A_LOG,
    CHOICE_BIAS,
    DELTA_CONV,
    DELTA_NORM,
    DT_BIAS,
    LAYER_TABLE,
    SINKS,
    BlockSpec,
    tensor_name,
)
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import head, head_in, layer, layer_inputs
from edgeq.model.delta_rule import NORM_EPS
from edgeq.model.formulas import SIGMOID_SUM_EPS, SWIGLU_ALPHA, SWIGLU_LIMIT
from edgeq.model.rope_spec import RopeSpec
from edgeq.model.rotary import rope_tables

Weights = Mapping[str, Any]
"""Tensor name -> float32 torch tensor."""


class TorchDecoder:
    """A model's decoder as functions of its weights.

    Args:
        config: of the model.
        length: tokens of the longest window it will see.
    """

    def __init__(self, config: ModelConfig, length: int) -> None:
        import torch

        self.config = config
        self._rope = {
            rope: [torch.from_numpy(table) for table in rope_tables(rope, length)]
            for rope in config.ropes
        }

    def __call__(self, weights: Weights, tokens: Any) -> tuple[Any, list[Any]]:
        """Logits, and the hidden state after each layer.

        Args:
            weights: every tensor of the model.
            tokens: int64 [B, T].

        Returns:
            Logits float32 [B, T, V], and for each layer float32 [B, T, hidden].
        """
        builder = _TorchBuilder(self.config, self._rope, weights, tokens)
        x = builder.embed("embed")
        inputs = layer_inputs(builder, self.config, x) if self.config.layer_input else None
        states = []
        for i in range(self.config.layers):
            x = layer(builder, self.config, i, x, inputs)
            states.append(x)
        return self.head(weights, x), states

    def embed(self, weights: Weights, tokens: Any) -> Any:
        """Embeddings of int64 [B, T], times `embed_scale`: float32 [B, T, hidden]."""
        return _TorchBuilder(self.config, self._rope, weights, tokens).embed("embed")

    def layer(self, weights: Weights, i: int, x: Any) -> Any:
        """The hidden state float32 [B, T, hidden] after layer i, from the one before it."""
        return layer(_TorchBuilder(self.config, self._rope, weights), self.config, i, x)

    def head(self, weights: Weights, x: Any) -> Any:
        """Logits float32 [B, T, V] of the last hidden state [B, T, hidden]."""
        builder = _TorchBuilder(self.config, self._rope, weights)
        return head(builder, self.config, head_in(builder, x))


class _TorchBuilder:
    """An `edgeq.model.decoder.Builder` of torch tensors with a batch axis B before T."""

    def __init__(
        self,
        config: ModelConfig,
        rope: Mapping[RopeSpec, list[Any]],
        weights: Weights,
        tokens: Any = None,
    ) -> None:
        self._config, self._rope, self._weights, self._tokens = config, rope, weights, tokens
        self._shared = {block.kv_from for block in config.blocks} - {None}
        self._past: dict[int, tuple[Any, Any]] = {}  # keys and values that later layers read

    def embed(self, name: str) -> Any:
        from torch.nn.functional import embedding

        rows = embedding(self._tokens, self._weights["model.embed_tokens.weight"])
        return rows * self._config.embed_scale

    def layer_embed(self, name: str) -> Any:
        from torch.nn.functional import embedding

        c = self._config
        rows = embedding(self._tokens, self._weights[LAYER_TABLE]) * c.layer_input**0.5
        return rows.unflatten(-1, (c.layers, c.layer_input)).transpose(1, 2)  # [B, L, T, P]

    def layer_input(self, name: str, x: Any, layer: int) -> Any:
        return x[:, layer]

    def weighted(self, name: str, x: Any, weight: str) -> Any:
        return x * self._weights[weight]

    def norm(self, name: str, x: Any, weight: str) -> Any:
        return self.plain_norm(name, x) * (self._weights[weight] + self._config.norm_offset)

    def plain_norm(self, name: str, x: Any) -> Any:
        return x * (x.square().mean(dim=-1, keepdim=True) + self._config.norm_eps).rsqrt()

    def linear(self, name: str, x: Any, weight: str) -> Any:
        from torch.nn.functional import linear

        bias = self._weights.get(weight.removesuffix("weight") + "bias")
        return linear(x, self._weights[weight], bias)

    def heads(self, name: str, x: Any, n: int) -> Any:
        return x.unflatten(-1, (n, x.shape[-1] // n)).transpose(1, 2)  # [B, n, T, D]

    def rope(self, name: str, x: Any, rope: RopeSpec) -> Any:
        import torch

        cos, sin = (table[: x.shape[2]] for table in self._rope[rope])
        half = cos.shape[1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def attend(self, name: str, layer: int, q: Any, k: Any, v: Any) -> Any:
        if layer in self._shared:
            self._past[layer] = k, v
        return self._attention(layer, q, k, v)

    def attend_shared(self, name: str, layer: int, q: Any) -> Any:
        return self._attention(layer, q, *self._past[self._config.kv_layer(layer)])

    def _attention(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        from torch.nn.functional import scaled_dot_product_attention

        c = self._config
        b, _, t, _ = q.shape
        k, v = (part.repeat_interleave(c.group, dim=1) for part in (k, v))
        mask = self._mask(c.blocks[layer], t)
        if c.attn_softcap is not None or c.blocks[layer].sinks:
            return self._own_attention(layer, q, k, v, mask).transpose(1, 2).reshape(b, t, -1)
        mixed = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=c.attn_scale
        )
        return mixed.transpose(1, 2).reshape(b, t, -1)

    def _own_attention(self, layer: int, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """Attention [B, H, T, D] with capped scores or sinks, which torch's function lacks."""
        import torch

        c, t = self._config, q.shape[2]
        scores = q @ k.transpose(-1, -2) * c.attn_scale
        if c.attn_softcap is not None:
            scores = self.capped("", scores, c.attn_softcap)
        seen = torch.ones(t, t, dtype=torch.bool).tril() if mask is None else mask
        scores = scores.masked_fill(~seen, float("-inf"))
        if not c.blocks[layer].sinks:
            return scores.softmax(dim=-1) @ v
        sinks = self._weights[tensor_name(layer, SINKS)].reshape(1, -1, 1, 1)
        sunk = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
        return sunk.softmax(dim=-1)[..., :-1] @ v

    def _mask(self, block: BlockSpec, t: int) -> Any:
        """What each position of a layer sees, bool [T, T]; None if all before."""
        import torch

        window = t if block.window is None else block.window
        if block.causal and t <= window:
            return None
        ones = torch.ones(t, t, dtype=torch.bool)
        return ones.tril(0 if block.causal else window - 1) & ones.triu(1 - window)

    def short_conv(self, name: str, layer: int, b: Any, c: Any, x: Any, weight: str) -> Any:
        return c * self._convolved(b * x, weight)

    def _convolved(self, x: Any, weight: str) -> Any:
        """The causal convolution of x [B, T, channels]."""
        from torch.nn.functional import conv1d

        kernel = self._weights[weight]
        channels, _, taps = kernel.shape
        inputs = x.transpose(1, 2)  # [B, channels, T]
        mixed = conv1d(inputs, kernel, padding=taps - 1, groups=channels)[..., : x.shape[1]]
        return mixed.transpose(1, 2)

    def states(self, name: str) -> NoReturn:
        raise UnsupportedError(f"no multi-token-prediction head is trained ({name})")

    def delta_net(self, name: str, layer: int, qkv: Any, z: Any, beta: Any, decay: Any) -> Any:
        import torch
        from torch.nn.functional import silu, softplus

        spec = self._config.blocks[layer].delta
        assert spec is not None
        batch, length, _ = qkv.shape
        mixed = silu(self._convolved(qkv, tensor_name(layer, DELTA_CONV)))
        q, k, v = mixed.split((spec.keys, spec.keys, spec.values), dim=-1)
        q, k = (
            (x * (x.square().sum(dim=-1, keepdim=True) + NORM_EPS).rsqrt()).repeat_interleave(
                spec.group, dim=2
            )
            for x in (part.reshape(batch, length, spec.key_heads, -1) for part in (q, k))
        )
        q, v = q * spec.key_dim**-0.5, v.reshape(batch, length, spec.value_heads, -1)
        rate = self._weights[tensor_name(layer, A_LOG)].exp()
        bias = self._weights[tensor_name(layer, DT_BIAS)]
        kept = (-rate * softplus(decay + bias)).exp()[..., None, None]
        strength = beta.sigmoid()[..., None]
        state = torch.zeros(batch, spec.value_heads, spec.key_dim, spec.value_dim)
        read = []
        for t in range(length):
            state = state * kept[:, t]
            recalled = (state * k[:, t, :, :, None]).sum(dim=-2)
            change = (v[:, t] - recalled) * strength[:, t]
            state = state + k[:, t, :, :, None] * change[..., None, :]
            read.append((state * q[:, t, :, :, None]).sum(dim=-2))
        out = torch.stack(read, dim=1)
        out = out * (out.square().mean(dim=-1, keepdim=True) + self._config.norm_eps).rsqrt()
        out = out * self._weights[tensor_name(layer, DELTA_NORM)]
        out = out * silu(z).reshape(out.shape)
        if spec.tiled_out:
            out = out.unflatten(2, (spec.key_heads, spec.group)).transpose(2, 3)
        return out.reshape(z.shape)

    def output_gate(self, name: str, x: Any, gate: Any) -> Any:
        return x * gate.sigmoid()

    def gated(self, name: str, gate: Any, up: Any) -> Any:
        from torch.nn.functional import gelu, silu

        kind = self._config.activation
        if kind == "clamped_swiglu":
            limit, alpha = float(SWIGLU_LIMIT), float(SWIGLU_ALPHA)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return gate * (gate * alpha).sigmoid() * (up + 1)
        return (silu(gate) if kind == "silu" else gelu(gate, approximate="tanh")) * up

    def route(self, name: str, layer: int, logits: Any) -> Any:
        import torch

        experts = self._config.blocks[layer].experts
        assert experts is not None  # or the layer had no router
        scores = logits.sigmoid() if experts.score == "sigmoid" else logits.softmax(dim=-1)
        order = scores.detach()
        if experts.choice_bias:
            order = order + self._weights[f"model.layers.{layer}.{CHOICE_BIAS}"]
        chosen = order.sort(dim=-1, descending=True, stable=True).indices[..., : experts.chosen]
        weights = scores.gather(-1, chosen)
        if experts.normalize:
            least = float(SIGMOID_SUM_EPS) if experts.score == "sigmoid" else 0.0
            weights = weights / (weights.sum(dim=-1, keepdim=True) + least)
        return torch.zeros_like(scores).scatter(-1, chosen, weights * experts.scale)

    def to_expert(self, name: str, x: Any, routing: Any, expert: int) -> Any:
        return x  # all tokens: those that do not go through it have a weight of 0

    def combine(self, name: str, routing: Any, outputs: Sequence[Any]) -> Any:
        return sum(routing[..., e, None] * values for e, values in enumerate(outputs))

    def add(self, name: str, a: Any, b: Any) -> Any:
        return a + b

    def scaled(self, name: str, x: Any, factor: float) -> Any:
        return x * factor

    def capped(self, name: str, x: Any, cap: float) -> Any:
        return (x / cap).tanh() * cap

    def logits(self, name: str, x: Any, weight: str) -> Any:
        return self.linear(name, x, weight)
