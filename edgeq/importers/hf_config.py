"""A Hugging Face ``config.json`` as a `ModelConfig`.

Each family is one row of `FAMILIES` (what Transformers assumes where the file is silent) and, if
it needs more than that, one branch below. Both spellings of rotary settings are read: the flat
``rope_theta`` / ``rope_scaling`` and the nested ``rope_parameters`` of Transformers 5.

Source: the configuration classes of Transformers 4.57 and 5.x.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.errors import FormatError, UnsupportedError, unknown
from edgeq.model import Activation, ModelConfig, RopeScaling

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
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
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
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SWITCHES = {  # keys that would change the arithmetic, and the values that leave it alone
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "quantization_config": (),
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
        raise UnsupportedError(f"{path}: {unknown('model family', model_type, _MODEL_TYPES)}")
    if isinstance(raw.get("text_config"), dict):  # a vision-language model: its decoder
        outer, raw, prefix = raw, dict(raw["text_config"]), "language_model."
        for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config"):
            if raw.get(key) is None and outer.get(key) is not None:
                raw[key] = outer[key]
    for key, harmless in _SWITCHES.items():
        value = raw.get(key)
        if value is not None and value not in harmless:
            detail = value.get("quant_method", value) if isinstance(value, dict) else value
            raise UnsupportedError(
                f"{path}: {key} is {detail!r}, which edgeq cannot run; "
                "use an original F32, F16 or BF16 checkpoint without it"
            )
    name = _MODEL_TYPES[model_type]
    family = FAMILIES[name]
    values = _Values(path, raw, family.defaults)
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    model = _model(name, values, generation)
    biases: tuple[str, ...] = ()
    if family.attention_bias == "always":
        biases = ("q_proj", "k_proj", "v_proj")
    elif family.attention_bias == "flag" and values.flag("attention_bias"):
        biases = ("q_proj", "k_proj", "v_proj", "o_proj")
    return HfConfig(model, prefix, biases)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FormatError: it cannot be read, is not JSON, or is no object.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    except (ValueError, RecursionError) as err:
        raise FormatError(f"{path} is not JSON ({err}); fetch it again") from err
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds a {type(data).__name__}, expected an object")
    return data


def _known() -> str:
    return ", ".join(sorted(_MODEL_TYPES))


class _Values:
    """Checked access to a configuration's values; null counts as absent but for token ids."""

    def __init__(self, path: Path, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.defaults = defaults

    def get(self, key: str) -> Any:
        value = self.raw.get(key)
        return self.defaults.get(key) if value is None else value

    def get_or_none(self, key: str) -> Any:
        """A value that null sets to "none" instead of the family's default."""
        return self.raw[key] if key in self.raw else self.defaults.get(key)

    def number(self, key: str) -> float:
        return self.check_number(key, self.get(key))

    def check_number(self, key: str, value: Any) -> float:
        if value is None:
            raise FormatError(f"{self.path}: {key} is missing")
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value <= 0
        ):
            raise FormatError(f"{self.path}: {key} is {value!r}; it must be a positive number")
        return float(value)

    def count(self, key: str) -> int:
        value = self.get(key)
        if self.check_number(key, value) != int(value):
            raise FormatError(f"{self.path}: {key} is {value!r}; it must be a whole number")
        return int(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise FormatError(f"{self.path}: {key} is {value!r}; it must be true or false")
        return bool(value)


def _model(family: str, values: _Values, generation: Mapping[str, Any]) -> ModelConfig:
    layers = values.count("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise FormatError(f"{values.path}: num_hidden_layers is {layers}; at most {MAX_LAYERS}")
    hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
    kv_heads = values.count("num_key_value_heads") if values.get("num_key_value_heads") else heads
    head_dim = values.count("head_dim") if values.get("head_dim") else hidden // heads
    gemma = family == "gemma3"
    theta, scaling, partial = _rope(values, "full_attention", values.get("rope_theta") or 10000.0)
    local = None
    if gemma:
        local, local_scaling, _ = _rope(
            values, "sliding_attention", values.number("rope_local_base_freq")
        )
        if local_scaling is not None:
            raise UnsupportedError(
                f"{values.path}: rope scaling {local_scaling.kind!r} on sliding_attention layers; "
                "Gemma 3 stretches its full_attention layers only"
            )
    window, window_layers = _window(family, values, layers)
    return ModelConfig(
        family=family,
        hidden=hidden,
        ffn=values.count("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=values.count("vocab_size"),
        context=values.count("max_position_embeddings"),
        norm_eps=values.number("rms_norm_eps"),
        norm_offset=1.0 if gemma else 0.0,
        activation=_activation(values, "hidden_activation" if gemma else "hidden_act"),
        rope_theta=theta,
        rope_theta_local=local,
        rope_dim=int(head_dim * partial),
        rope_scaling=scaling,
        window=window,
        window_layers=window_layers,
        qk_norm=FAMILIES[family].qk_norm,
        post_norms=gemma,
        embed_scale=hidden**0.5 if gemma else 1.0,
        attn_scale=(values.number("query_pre_attn_scalar") if gemma else head_dim) ** -0.5,
        tied=values.flag("tie_word_embeddings"),
        bos=_one_token(values),
        eos=_tokens(values, generation),
    )


def _activation(values: _Values, key: str) -> Activation:
    name = str(values.get(key))
    if name not in _ACTIVATIONS:
        raise UnsupportedError(f"{values.path}: {unknown('activation', name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _rope(
    values: _Values, layer_type: str, theta: float
) -> tuple[float, RopeScaling | None, float]:
    """Base, stretching and rotated fraction of the layers of one type."""
    nested = values.get("rope_parameters")
    flat = values.get("rope_scaling") if layer_type == "full_attention" else None
    found = flat if nested is None else nested
    if isinstance(found, dict) and isinstance(found.get(layer_type), dict):
        found = found[layer_type]
    if found is None or (isinstance(found, dict) and "sliding_attention" in found):
        found = {}
    if not isinstance(found, dict):
        raise FormatError(f"{values.path}: rope parameters are {found!r}; expected an object")
    theta = values.check_number("rope_theta", found.get("rope_theta", theta))
    partial = values.check_number(
        "partial_rotary_factor",
        found.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0,
    )
    kind = found.get("rope_type", found.get("type", "default"))
    if kind in ("default", None):
        return theta, None, partial
    if kind not in ("llama3", "linear"):
        raise UnsupportedError(
            f"{values.path}: {unknown('rope type', str(kind), ('default', 'linear', 'llama3'))}"
        )
    factor = values.check_number("rope factor", found.get("factor"))
    if kind == "linear":
        return theta, RopeScaling("linear", factor), partial
    low = values.check_number("low_freq_factor", found.get("low_freq_factor"))
    high = values.check_number("high_freq_factor", found.get("high_freq_factor"))
    if high <= low:
        raise FormatError(
            f"{values.path}: high_freq_factor {high} must be above low_freq_factor {low}"
        )
    original = found.get("original_max_position_embeddings", values.get("max_position_embeddings"))
    original = int(values.check_number("original_max_position_embeddings", original))
    return theta, RopeScaling("llama3", factor, low, high, original), partial


def _window(family: str, values: _Values, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window, and which layers it applies to."""
    # an explicit null switches Mistral's window off, whatever the default says
    if "sliding_window" in values.raw and values.raw["sliding_window"] is None:
        return None, ()
    if family == "llama" or values.get("sliding_window") is None:
        return None, ()
    if family in ("qwen2", "qwen3") and not values.flag("use_sliding_window"):
        return None, ()
    window = values.count("sliding_window")
    kinds = values.get("layer_types")
    if family in ("mistral", "phi3"):
        return window, (True,) * layers
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise FormatError(f"{values.path}: layer_types must name each of {layers} layers")
        for kind in kinds:
            if kind not in known:
                raise UnsupportedError(f"{values.path}: {unknown('layer type', str(kind), known)}")
        where = tuple(kind == "sliding_attention" for kind in kinds)
    elif family == "gemma3":
        pattern = values.count("sliding_window_pattern")
        where = tuple((i + 1) % pattern != 0 for i in range(layers))
    else:
        full = values.get("max_window_layers")
        full = 28 if full is None else full
        if type(full) is not int:
            raise FormatError(f"{values.path}: max_window_layers is {full!r}; expected a number")
        where = tuple(i >= full for i in range(layers))
    return (window, where) if any(where) else (None, ())


def _one_token(values: _Values) -> int | None:
    bos = values.get_or_none("bos_token_id")
    if bos is not None and (type(bos) is not int or bos < 0):
        raise FormatError(f"{values.path}: bos_token_id is {bos!r}; expected a token id")
    return bos


def _tokens(values: _Values, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens; generation_config.json knows the chat model's, and goes first."""
    eos = generation.get("eos_token_id")
    eos = values.get_or_none("eos_token_id") if eos is None else eos
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(t) is not int or t < 0 for t in found):
        raise FormatError(f"{values.path}: eos_token_id is {eos!r}; expected token ids")
    return tuple(dict.fromkeys(found))
