"""A Hugging Face ``config.json`` as a `ModelConfig`.

What differs from family to family stands in its file in `families`. Every key is read here or
there, known to leave the arithmetic alone (see `keys`), or refused by its name.

Source: the configuration classes of Transformers 4.57 and 5.x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.families import MODEL_TYPES
from edgeq.importers.huggingface.family import Family, Shape
from edgeq.importers.huggingface.keys import check_classes, check_unread
from edgeq.importers.huggingface.quantized import KEYS, read_quantization
from edgeq.importers.huggingface.quantized.layout import Layout
from edgeq.importers.huggingface.rope import stretched_context
from edgeq.importers.huggingface.values import Values
from edgeq.importers.json_object import read_json
from edgeq.importers.unread import shown
from edgeq.model.config import Activation, ModelConfig

MAX_LAYERS = 4096
"""More layers than this is a damaged number, not a model."""


@dataclass(frozen=True)
class HfConfig:
    """A configuration that has been read.

    Args:
        model: the hyperparameters.
        family: what is known of its family.
        prefix: what the tensors' names carry before Hugging Face's usual names.
        biases: name ends of the bias tensors that must be there, as "q_proj".
        layout: how quantized weights are stored, or None where there are none.
    """

    model: ModelConfig
    family: Family
    prefix: str
    biases: tuple[str, ...]
    layout: Layout | None = None


def read_config(folder: Path) -> HfConfig:
    """Read ``config.json`` and ``generation_config.json`` of a checkpoint folder.

    Raises:
        FormatError: a file is damaged, or a value is missing or impossible.
        UnsupportedError: a family, rotary type or option edgeq does not know.
    """
    path = folder / "config.json"
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise FormatError(f"{path} names no model_type; it must be one of {_known()}")
    if model_type not in MODEL_TYPES:
        # no guess at what was meant: a similar name is another architecture
        raise UnsupportedError(
            f"{path}: model_type is {model_type!r}, a family edgeq does not run; it runs {_known()}"
        )
    family = MODEL_TYPES[model_type]
    check_classes(path, raw, family, model_type)
    prefix = ""
    if family.text_config is not None and isinstance(raw.get(family.text_config), dict):
        raw, prefix = _text_config(path, raw, family, family.text_config), family.prefix
    values = Values(path, raw, family.defaults)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    model = model_config(family, values, generation)
    biases = _biases(family, values)
    layout = read_quantization(path, raw)
    read = {"architectures", "auto_map", *KEYS, *values.read}
    check_unread(path, raw, read, model.attn_scale)
    return HfConfig(model, family, prefix, biases, layout)


def _known() -> str:
    return ", ".join(sorted(MODEL_TYPES))


def _text_config(path: Path, outer: Mapping[str, Any], family: Family, key: str) -> dict[str, Any]:
    """The configuration of the decoder of a vision-language model."""
    inner = dict(outer[key])
    inherited = ("tie_word_embeddings", "bos_token_id", "eos_token_id", *KEYS)
    check_unread(path, outer, {key, "architectures", "auto_map", *inherited})
    for name in inherited:
        if inner.get(name) is None and outer.get(name) is not None:
            inner[name] = outer[name]
    model_type = outer["model_type"]
    if MODEL_TYPES.get(inner.get("model_type", model_type)) != family:
        raise UnsupportedError(
            f"{path}: {key} is a model of type {inner['model_type']!r}; in a {model_type} "
            f"model edgeq runs a decoder of type {family.model_types[-1]}"
        )
    check_classes(path, inner, family, model_type)
    return inner


def _biases(family: Family, values: Values) -> tuple[str, ...]:
    if family.biases == "qkv":
        values.read |= {"attention_bias", "qkv_bias"}
        return ("q_proj", "k_proj", "v_proj")
    if family.biases == "qkv_if_attention_bias" and values.flag("attention_bias"):
        return ("q_proj", "k_proj", "v_proj")
    if family.biases == "attention_bias" and values.flag("attention_bias"):
        return ("q_proj", "k_proj", "v_proj", "o_proj")
    return ()


def model_config(
    family: Family, values: Values, generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Hyperparameters from the keys of a ``config.json``.

    Args:
        family: of the model.
        values: the keys, with the family's defaults.
        generation: of a ``generation_config.json``, whose end tokens go first.

    Raises:
        FormatError: a value is missing or impossible.
        UnsupportedError: a rotary type or option edgeq does not know.
    """
    layers = values.count("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise FormatError(f"{values.path}: num_hidden_layers is {layers}; at most {MAX_LAYERS}")
    hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
    # an explicit null is as many as there are query heads, whatever the family's default
    shared = values.get("num_key_value_heads") is None or values.is_null("num_key_value_heads")
    kv_heads = heads if shared else values.count("num_key_value_heads")
    own = values.get("head_dim") is not None and not values.is_null("head_dim")
    head_dim = values.count("head_dim") if own else hidden // heads
    context = values.count("max_position_embeddings")
    shape = Shape(layers, hidden, heads, head_dim, context)
    blocks = family.blocks(values, shape)
    context = stretched_context(values, context, blocks)
    query_dim = values.number(family.query_scale_key) if family.query_scale_key else head_dim
    numbers = {
        "embed_scale": hidden**0.5 if family.scaled_embeddings else 1.0,
        "attn_scale": query_dim**-0.5,
        **family.numbers(values, shape),
    }
    return ModelConfig(
        family=family.name,
        hidden=hidden,
        ffn=family.ffn(values),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=values.count("vocab_size"),
        context=context,
        blocks=tuple(blocks),
        norm_eps=values.number(family.norm_eps_key),
        norm_offset=family.norm_offset,
        activation=_activation(values, family),
        **numbers,
        tied=values.flag(_tied_key(family, values)),
        bos=_one_token(values),
        eos=_tokens(values, generation or {}),
    )


def _tied_key(family: Family, values: Values) -> str:
    """The key that says whether the head is the embedding; the others of the family are read."""
    values.read |= set(family.tied_keys)
    return next((key for key in family.tied_keys if key in values.raw), family.tied_keys[-1])


def _activation(values: Values, family: Family) -> Activation:
    key = family.activation_key
    if key is None:
        return "silu"
    name = None if values.is_null(key) else values.get(key)
    if not isinstance(name, str) or name not in family.activations:
        raise UnsupportedError(
            f"{values.path}: {key} is {shown(name)}, an activation edgeq does not compute; it "
            f"computes {', '.join(family.activations)}"
        )
    return family.activations[name]


def _one_token(values: Values) -> int | None:
    bos = values.get_or_none("bos_token_id")
    if bos is not None and (type(bos) is not int or bos < 0):
        raise FormatError(f"{values.path}: bos_token_id is {bos!r}; expected a token id")
    return bos


def _tokens(values: Values, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens; generation_config.json knows the chat model's, and goes first."""
    eos = generation.get("eos_token_id")
    eos = values.get_or_none("eos_token_id") if eos is None else eos
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(t) is not int or t < 0 for t in ids):
        raise FormatError(f"{values.path}: eos_token_id is {eos!r}; expected token ids")
    return tuple(dict.fromkeys(ids))
