"""Tiny models of every family, with random weights and awkward sizes, for all tests."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.formats.schemes import QuantScheme, parse_scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.importers.huggingface.families import FAMILIES as FAMILY_ROWS
from edgeq.model.block import A_LOG, BlockSpec, DeltaSpec, ExpertsSpec
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeScaling, RopeSpec

_BASE: dict[str, Any] = {
    # 44 and 76 are no multiples of 32, nor the rows of 16
    "hidden": 44,
    "ffn": 76,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 12,
    "vocab": 101,
    "context": 64,
    "bos": 1,
    "eos": (2,),
}

_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_base": 500000.0,
        "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
    },
    "mistral": {"window": 6, "tied": False},
    "ministral3": {
        "rope_base": 1e6,
        "rope_scaling": RopeScaling("yarn", 4.0, original_context=16, beta_fast=8.0),
        "rope_temperature": 0.25,
        "tied": False,
    },
    "qwen2": {"rope_base": 1e6},
    "qwen3": {"qk_norm": "head", "heads": 6, "norm_eps": 1e-6},
    "gemma3": {
        "norm_offset": 1.0,
        "norm_eps": 1e-6,
        "activation": "gelu_tanh",
        "rope_base": 1e6,
        "rope_base_local": 10000.0,
        "rope_scaling": RopeScaling("linear", 8.0),
        "window": 5,
        "layers": 3,
        "window_layers": (True, True, False),
        "qk_norm": "head",
        "norm_after": True,
        "embed_scale": math.sqrt(44),
        "attn_scale": 24**-0.5,
        "kv_heads": 1,
    },
    "gemma2": {
        "norm_offset": 1.0,
        "norm_eps": 1e-6,
        "activation": "gelu_tanh",
        "window": 5,
        "layers": 3,
        "window_layers": (True, False, True),
        "norm_after": True,
        "embed_scale": math.sqrt(44),
        # the published 50 and 30 would change nothing in so small a model
        "attn_softcap": 1.5,
        "logit_softcap": 3.0,
    },
    "phi3": {"rope_dim": 8, "head_dim": 11, "kv_heads": 4, "tied": False},
    "smollm3": {"rope_base": 5e6, "layers": 4, "rope_layers": (True, True, True, False)},
    "olmo2": {
        "rope_base": 500000.0,
        "qk_norm": "all",
        "norm_before": False,
        "norm_after": True,
        "norm_eps": 1e-6,
        "tied": False,
    },
    "granite": {
        "embed_scale": 1.5,
        "attn_scale": 0.2,
        "residual_scale": 0.6,
        "logit_scale": 1 / 3,
    },
    "granitemoehybrid": {"embed_scale": 1.5, "residual_scale": 0.6, "logit_scale": 0.25},
    "minicpm": {"embed_scale": 2.0, "residual_scale": 0.99, "logit_scale": 8 / 44},
    "exaone4": {
        "qk_norm": "head",
        "norm_before": False,
        "norm_after": True,
        "window": 5,
        "layers": 4,
        "window_layers": (True, True, True, False),
        "rope_layers": (True, True, True, False),
        "tied": False,
    },
    "olmo3": {
        "rope_base": 500000.0,
        "qk_norm": "all",
        "norm_before": False,
        "norm_after": True,
        "norm_eps": 1e-6,
        "window": 5,
        "layers": 4,
        "window_layers": (True, True, True, False),
        "tied": False,
    },
    "hunyuan_v1_dense": {
        "rope_base": 39810716.0,  # 10000 stretched by 1000, as the float32 of a GGUF file
        "qk_norm": "head",
        "qk_norm_last": True,
    },
    "ernie4_5": {"rope_base": 500000.0},
    "glm4": {"rope_dim": 6, "norm_after": True, "norm_eps": 1.5625e-7, "tied": False},
    "lfm2": {
        "rope_base": 1e6,
        "qk_norm": "head",
        "layers": 3,
        "convolutions": (True, False, True),
    },
    "qwen3_5": {
        "rope_base": 1e7,
        "rope_dim": 4,
        "norm_offset": 1.0,
        "norm_eps": 1e-6,
        "qk_norm": "head",
        "output_gate": True,
        "layers": 3,
        "delta": DeltaSpec(key_heads=2, value_heads=6, key_dim=5, value_dim=9),
        "delta_layers": (True, True, False),
    },
    "qwen3_moe": {
        "rope_base": 1e6,
        "qk_norm": "head",
        "norm_eps": 1e-6,
        "layers": 3,
        "experts": ExpertsSpec(count=6, chosen=2, ffn=20, normalize=True),
        "dense_layers": 1,
        "tied": False,
    },
    "granitemoe": {
        "embed_scale": 1.5,
        "attn_scale": 0.2,
        "residual_scale": 0.6,
        "logit_scale": 1 / 3,
        "experts": ExpertsSpec(count=5, chosen=3, ffn=76, normalize=True),
    },
    "lfm2_moe": {
        "rope_base": 1e6,
        "qk_norm": "head",
        "layers": 3,
        "convolutions": (True, False, True),
        "experts": ExpertsSpec(
            count=7, chosen=3, ffn=36, score="sigmoid", choice_bias=True, normalize=True
        ),
        "dense_layers": 1,
    },
    "gemma4": {
        "norm_eps": 1e-6,
        "activation": "gelu_tanh",
        "head_dim": 12,
        "kv_heads": 1,
        "embed_scale": math.sqrt(44),
        "attn_scale": 0.25,
        "logit_softcap": 3.0,
        "layer_input": 20,
        "blocks": (),  # of `sharing_blocks`
    },
    "gpt_oss": {
        "activation": "clamped_swiglu",
        "rope_base": 150000.0,
        "rope_scaling": RopeScaling(
            "yarn", 4.0, original_context=16, attention_factor=1.138629436111989
        ),
        "window": 5,
        "layers": 3,
        "window_layers": (True, False, True),
        "sinks": True,
        "experts": ExpertsSpec(count=6, chosen=3, ffn=76, normalize=True, biases=True),
        "tied": False,
    },
}

FAMILIES = tuple(_FAMILY)
SHARING = ("gemma4",)
"""Families with inputs of layers, and layers that read the keys and values of others."""

HYBRIDS = ("lfm2", "qwen3_5", "lfm2_moe")
"""Families with layers that have no attention."""
MIXTURES = ("qwen3_moe", "granitemoe", "lfm2_moe", "gpt_oss")
"""Families with layers that have experts."""
ATTENTION_FAMILIES = tuple(
    family for family in FAMILIES if family not in (*HYBRIDS, *MIXTURES, *SHARING)
)
"""Families that every target holds."""
CALIBRATED = tuple(family for family in FAMILIES if family not in SHARING)
"""Families whose layers can be run one after the other on a text, as calibration does."""

_OF_BLOCKS = (
    "layers", "rope_base", "rope_base_local", "rope_dim", "rope_scaling", "rope_temperature",
    "rope_layers", "window", "window_layers", "norm_before", "norm_after", "qk_norm",
    "qk_norm_last", "convolutions", "output_gate", "sinks", "delta", "delta_layers", "experts",
    "dense_layers",
)  # fmt: skip


def blocks(
    head_dim: int,
    *,
    layers: int = 2,
    rope_base: float = 10000.0,
    rope_base_local: float | None = None,
    rope_dim: int | None = None,
    rope_scaling: RopeScaling | None = None,
    rope_temperature: float = 0.0,
    rope_layers: tuple[bool, ...] = (),
    window: int | None = None,
    window_layers: tuple[bool, ...] = (),
    convolutions: tuple[bool, ...] = (),
    delta: DeltaSpec | None = None,
    delta_layers: tuple[bool, ...] = (),
    experts: ExpertsSpec | None = None,
    dense_layers: int = 0,
    **fields: Any,
) -> tuple[BlockSpec, ...]:
    """Layers that differ only in their window and rotary embedding; ``fields`` are `BlockSpec`'s.

    The window applies to ``window_layers``, to all of them if that is empty. ``rope_base_local``
    is the base in those layers, without scaling; a temperature goes by the original context.
    Layers not in ``rope_layers`` have no positions. Layers in ``convolutions`` are short
    convolutions of three taps, and those in ``delta_layers`` gated delta nets of four. All layers
    but the first ``dense_layers`` have the experts.
    """
    length = rope_scaling.original_context if rope_scaling and rope_temperature else 0
    whole = RopeSpec(rope_base, rope_dim or head_dim, rope_scaling, rope_temperature, length)
    local = whole if rope_base_local is None else RopeSpec(rope_base_local, whole.dim)
    windowed = window_layers or (window is not None,) * layers
    rotated = rope_layers or (True,) * layers
    convolves = convolutions or (False,) * layers
    recurs = delta_layers or (False,) * layers
    mixtures = tuple(None if i < dense_layers else experts for i in range(layers))
    return tuple(
        BlockSpec(mixer="gated_delta_net", rope=None, window=4, delta=delta, experts=mixture)
        if recurrent
        else BlockSpec(mixer="short_conv", rope=None, window=3, experts=mixture)
        if convolved
        else BlockSpec(
            rope=(local if is_local else whole) if has_rope else None,
            window=window if is_local else None,
            experts=mixture,
            **fields,
        )
        for is_local, has_rope, convolved, recurrent, mixture in zip(
            windowed, rotated, convolves, recurs, mixtures, strict=True
        )
    )


def sharing_blocks(head_dim: int, ffn: int, window: int = 5) -> tuple[BlockSpec, ...]:
    """Six layers as Gemma 4 has them: those with a window and those without, the latter with larger
    heads of which a part turns; the last three read keys and values of layers 1 and 2."""
    common: dict[str, Any] = {"norm_after": True, "qk_norm": "head", "layer_scale": True}
    wide = head_dim + 8
    local = {**common, "rope": RopeSpec(10000.0, head_dim), "window": window}
    whole = {**common, "rope": RopeSpec(1e6, wide, still=wide // 2 - 3), "head_dim": wide}
    own, shared = {"v_norm": True}, {"ffn": 2 * ffn}
    return (
        BlockSpec(**local, **own),
        BlockSpec(**local, **own),
        BlockSpec(**whole, **own),
        BlockSpec(**local, **shared, kv_from=1),
        BlockSpec(**local, **shared, kv_from=1),
        BlockSpec(**whole, **shared, kv_from=2),
    )


def tiny_config(family: str, **over: Any) -> ModelConfig:
    """A small configuration that uses every feature of the family.

    Args:
        family: of `FAMILIES`.
        over: replaces fields of the configuration, or arguments of `blocks`.
    """
    values = {**_BASE, **_FAMILY[family], **over}
    of_blocks = {key: values.pop(key) for key in _OF_BLOCKS if key in values}
    if family in SHARING and not values["blocks"]:
        window = of_blocks.get("window", 5)
        values["blocks"] = sharing_blocks(values["head_dim"], values["ffn"], window)
    if "blocks" not in values:
        values["blocks"] = blocks(values["head_dim"], **of_blocks)
    return ModelConfig(family=family, **values)


def windows(config: ModelConfig) -> tuple[int | None, ...]:
    """The window of each layer."""
    return tuple(block.window for block in config.blocks)


def with_blocks(config: ModelConfig, **fields: Any) -> ModelConfig:
    """The same configuration with fields of every block replaced."""
    return replace(config, blocks=tuple(replace(block, **fields) for block in config.blocks))


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """Random float32 weights of a size that keeps activations near one; no tokenizer."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, (n, k) in config.linears():
        # of a decided router, so that the expert at the border has a small weight
        decided = 4 if name.endswith("router.weight") else 1
        tensors[name] = _float(decided * rng.normal(size=(n, k)) / math.sqrt(k))
    for name, shape in config.norms():
        tensors[name] = _float(1 - config.norm_offset + 0.2 * rng.normal(size=shape))
    for name, shape in config.layer_scales():
        tensors[name] = _float(0.8 + 0.1 * rng.normal(size=shape))
    for name, shape in config.convolutions():
        tensors[name] = _float(rng.normal(size=shape) / math.sqrt(shape[2]))
    for name, shape in config.delta_vectors():
        # decays of a position between about 0.2 and 0.9
        center = -1.0 if name.endswith(A_LOG) else 1.0 if name.endswith("weight") else 0.0
        tensors[name] = _float(center + 0.5 * rng.normal(size=shape))
    for name, size in config.choice_biases():
        tensors[name] = _float(0.1 * rng.normal(size=size))
    for name, size in config.sinks():
        tensors[name] = _float(rng.normal(size=size))
    for name, size in config.expert_biases():
        tensors[name] = _float(0.1 * rng.normal(size=size))
    family = FAMILY_ROWS[config.family]
    if family.biases == "qkv" or family.defaults.get("attention_bias"):
        for name, shape in config.biases():
            if "o_proj" not in name or family.biases == "attention_bias":
                tensors[name] = _float(0.3 * rng.normal(size=shape))
    return Model(config, tensors)


def quantized(
    model: Model, scheme: QuantScheme | str, embed: QuantScheme | str = "w8-channel"
) -> Model:
    """The same model with every matrix rounded to nearest; embedding and head to ``embed``.

    Routers of experts stay floating point, as they do with every recipe that does not name them.
    """
    tensors = dict(model.tensors)
    for name, _ in model.config.linears():
        if name.endswith("router.weight"):
            continue
        chosen = embed if "embed_tokens." in name or "lm_head" in name else scheme
        tensors[name] = rounded(model.tensors[name].numpy(), chosen)
    return replace(model, tensors=tensors)


def dequantized(model: Model) -> Model:
    """The same values held as float32."""
    return replace(model, tensors={k: _float(t.numpy()) for k, t in model.tensors.items()})


def rounded(weights: NDArray[np.float32], scheme: QuantScheme | str) -> QuantTensor:
    """Round weights [N, K] to nearest, plainly: a quantizer for tests that need any codes.

    It is no oracle for `edgeq.quant` and shares nothing with it.
    """
    if isinstance(scheme, str):
        parsed = parse_scheme(scheme)
        assert parsed is not None
        scheme = parsed
    n, k = weights.shape
    groups, width = scheme.n_groups(k), scheme.group_size or k
    padded = np.zeros((n, max(groups * width, k)))
    padded[:, :k] = weights
    w = padded.reshape(n, groups, -1)
    palette = zeros = None
    if scheme.codebook:
        palette = np.linspace(-127, 120, scheme.n_codes).astype(np.int8)
        scales = np.abs(w).max(axis=2) / 127
    elif scheme.symmetric:
        scales = np.abs(w).max(axis=2) / (scheme.mid - 0.5)
    else:
        low, high = np.minimum(w.min(axis=2), 0), np.maximum(w.max(axis=2), 0)
        scales = (high - low) / (scheme.n_codes - 1)
    if scheme.granularity == "tensor":
        scales = np.full_like(scales, scales.max())
    scales = np.maximum(scales, 1e-4).astype(np.float16)
    steps = w / scales.astype(np.float64)[:, :, None]
    if palette is not None:
        codes = np.abs(steps[..., None] - palette.astype(np.float64)).argmin(axis=-1)
    elif scheme.symmetric:
        codes = np.clip(np.rint(steps) + scheme.mid, 0, scheme.n_codes - 1)
    else:
        zeros = np.clip(np.rint(-w.min(axis=2) / scales), 0, scheme.n_codes - 1).astype(np.uint8)
        codes = np.clip(np.rint(steps) + zeros[:, :, None], 0, scheme.n_codes - 1)
    codes = codes.reshape(n, -1)[:, :k].astype(np.uint8)
    return QuantTensor.from_codes(scheme, codes, scales, zeros, palette)


def _float(values: NDArray[np.floating]) -> FloatTensor:
    return FloatTensor("float32", np.ascontiguousarray(values, np.float32))


def scheme_of(text: str) -> QuantScheme:
    """The quantization scheme of a text form."""
    scheme = parse_scheme(text)
    assert isinstance(scheme, QuantScheme)
    return scheme
