"""A Hugging Face ``config.json`` as a `ModelConfig`.

Each family is one row of `FAMILIES` (what Transformers assumes where the file is silent) and, if
it needs more than that, one branch below. Every key is read here or in `hf_attention`, known to
leave the arithmetic alone (`hf_keys`), or refused by its name.

Source: the configuration classes of Transformers 4.57 and 5.x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.attention import read_rope, read_window
from edgeq.importers.huggingface.keys import check_classes, check_unread
from edgeq.importers.huggingface.values import Values, read_json
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec, RopeSpec
from edgeq.model.config import Activation, ModelConfig

MAX_LAYERS = 4096
"""More layers than this is a damaged number, not a model."""


@dataclass(frozen=True)
class Family:
    """What a family's configuration means where it says nothing.

    Args:
        defaults: values of absent keys.
        attention_bias: biases on q, k and v: "never", "always", or "flag" (and on o as well)
            if ``attention_bias`` says so.
        qk_norm: RMS norms on each head of q and k.
    """

    defaults: Mapping[str, Any]
    attention_bias: str = "never"
    qk_norm: bool = False


_COMMON = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        {**_COMMON, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        attention_bias="flag",
    ),
    "mistral": Family(
        {
            **_COMMON,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    ),
    "qwen2": Family(
        {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        attention_bias="always",
    ),
    "qwen3": Family(
        {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        attention_bias="flag",
        qk_norm=True,
    ),
    "gemma3": Family(
        {
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        attention_bias="flag",
        qk_norm=True,
    ),
    "phi3": Family(
        {
            **_COMMON,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 32000,
        }
    ),
}
_MODEL_TYPES = {
    "llama": "llama",
    "smollm": "llama",
    "mistral": "mistral",
    "ministral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class HfConfig:
    """A read ``config.json``.

    Args:
        model: the hyperparameters.
        prefix: what the tensors' names carry before Hugging Face's usual names.
        biases: name ends of the bias tensors that must be there, as "q_proj".
    """

    model: ModelConfig
    prefix: str
    biases: tuple[str, ...]


def read_config(folder: Path) -> HfConfig:
    """Read ``config.json`` and ``generation_config.json`` of a checkpoint folder.

    Raises:
        FormatError: a file is damaged, or a value is missing or impossible.
        UnsupportedError: a family, rotary type or option edgeq does not know.
    """
    path = folder / "config.json"
    raw = read_json(path)
    prefix = ""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise FormatError(f"{path} names no model_type; it must be one of {_known()}")
    if model_type not in _MODEL_TYPES:
        # no guess at what was meant: a similar name is another architecture
        raise UnsupportedError(
            f"{path}: model_type is {model_type!r}, a family edgeq does not run; it runs {_known()}"
        )
    name = _MODEL_TYPES[model_type]
    check_classes(path, raw, name, model_type)
    if name == "gemma3" and isinstance(raw.get("text_config"), dict):
        # a vision-language model: its decoder
        outer, raw, prefix = raw, dict(raw["text_config"]), "language_model."
        inherited = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config")
        check_unread(path, outer, {"text_config", "architectures", "auto_map", *inherited}, name)
        for key in inherited:
            if raw.get(key) is None and outer.get(key) is not None:
                raw[key] = outer[key]
        if _MODEL_TYPES.get(raw.get("model_type", model_type)) != name:
            raise UnsupportedError(
                f"{path}: text_config is a model of type {raw['model_type']!r}; in a {model_type} "
                "model edgeq runs a decoder of type gemma3_text"
            )
        check_classes(path, raw, name, model_type)
    family = FAMILIES[name]
    values = Values(path, raw, family.defaults)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    model = _model(name, values, generation)
    biases: tuple[str, ...] = ()
    if family.attention_bias == "always":
        values.read |= {"attention_bias", "qkv_bias"}
        biases = ("q_proj", "k_proj", "v_proj")
    elif family.attention_bias == "flag" and values.flag("attention_bias"):
        biases = ("q_proj", "k_proj", "v_proj", "o_proj")
    check_unread(path, raw, {"architectures", "auto_map", *values.read}, name)
    return HfConfig(model, prefix, biases)


def _known() -> str:
    return ", ".join(sorted(_MODEL_TYPES))


def _model(family: str, values: Values, generation: Mapping[str, Any]) -> ModelConfig:
    layers = values.count("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise FormatError(f"{values.path}: num_hidden_layers is {layers}; at most {MAX_LAYERS}")
    hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
    # an explicit null is as many as there are query heads, whatever the family's default
    shared = values.get("num_key_value_heads") is None or values.is_null("num_key_value_heads")
    kv_heads = heads if shared else values.count("num_key_value_heads")
    own = values.get("head_dim") is not None and not values.is_null("head_dim")
    head_dim = values.count("head_dim") if own else hidden // heads
    gemma = family == "gemma3"
    rope = read_rope(values, family)
    context = values.count("max_position_embeddings")
    window, window_layers = read_window(values, family, layers, context)
    dim = int(head_dim * rope.rotated)
    whole = RopeSpec(rope.theta, dim, rope.scaling)
    local = whole if rope.theta_local is None else RopeSpec(rope.theta_local, dim)
    blocks = tuple(
        BlockSpec(
            norm_after=gemma,
            qk_norm="head" if FAMILIES[family].qk_norm else None,
            rope=local if windowed else whole,
            window=window if windowed else None,
        )
        for windowed in window_layers or (False,) * layers
    )
    return ModelConfig(
        family=family,
        hidden=hidden,
        ffn=values.count("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=values.count("vocab_size"),
        context=context,
        blocks=blocks,
        norm_eps=values.number("rms_norm_eps"),
        norm_offset=1.0 if gemma else 0.0,
        activation=_activation(values, "hidden_activation" if gemma else "hidden_act"),
        embed_scale=hidden**0.5 if gemma else 1.0,
        attn_scale=(values.number("query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
        tied=values.flag("tie_word_embeddings"),
        bos=_one_token(values),
        eos=_tokens(values, generation),
    )


def _activation(values: Values, key: str) -> Activation:
    name = None if values.is_null(key) else values.get(key)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{values.path}: {key} is {shown(name)}, an activation edgeq does not compute; it "
            f"computes {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _one_token(values: Values) -> int | None:
    bos = values.get_or_none("bos_token_id")
    if bos is not None and (type(bos) is not int or bos < 0):
        raise FormatError(f"{values.path}: bos_token_id is {bos!r}; expected a token id")
    return bos


def _tokens(values: Values, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens; generation_config.json knows the chat model's, and goes first."""
    eos = generation.get("eos_token_id")
    eos = values.get_or_none("eos_token_id") if eos is None else eos
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(t) is not int or t < 0 for t in found):
        raise FormatError(f"{values.path}: eos_token_id is {eos!r}; expected token ids")
    return tuple(dict.fromkeys(found))
