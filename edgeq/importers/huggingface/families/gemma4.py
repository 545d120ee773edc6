"""Gemma 4 E2B and E4B, alone or as the decoder of a model that also sees and hears.

Every layer has an input of its own, from a table of all layers and from the token's embedding. The
last layers read the keys and values of the last layer of their kind before them, and may have a
feed-forward of twice the width. Heads of layers that see everything are larger, and only a part of
their pairs turns. Norms after attention and feed-forward as well, norms on each head of q and k,
and of v without a weight; attention scores without a factor, embeddings times sqrt(hidden), and a
number for each layer by which the residual stream is multiplied after it.

Not computed: mixtures of experts (26B-A4B), and keys that serve as values (31B).

Source: configuration_gemma4.py, modeling_gemma4.py and modeling_rope_utils.py of Transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.family import Family, Shape, sizes
from edgeq.importers.huggingface.rope import (
    check_whole_heads,
    read_base,
    read_scaling,
    read_settings,
)
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import LAYER_KINDS, read_windows
from edgeq.importers.unread import shown
from edgeq.model.block import BlockSpec
from edgeq.model.limits import is_count
from edgeq.model.rope_spec import RopeSpec

_PERIOD = 6
"""One layer in so many sees everything, where ``layer_types`` does not say."""
_FULL_HEAD = 512
"""Values of a head of such a layer, where the file does not say."""
_ROPES = {
    "full_attention": {
        "rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}  # fmt: skip
"""Rotary settings where the file has none."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_k_eq_v": (False,),
    "enable_moe_block": (False,),
    # "vision" is about the parts of images, of which a text has none
    "use_bidirectional_attention": ("vision",),
}
_UNUSED = ("num_experts", "top_k_experts", "moe_intermediate_size", "num_global_key_value_heads")
"""Keys of what is switched off by `_ONLY`."""


def blocks(values: Values, shape: Shape) -> list[BlockSpec]:
    """The blocks of all layers; the last ``num_kv_shared_layers`` share keys and values."""
    values.check_only(_ONLY)
    values.read.update(_UNUSED)
    sliding = [(i + 1) % _PERIOD != 0 for i in range(shape.layers)]
    windows = list(read_windows(values, shape, "gemma4", sliding=sliding))
    windows[-1] = None  # as Transformers has it, whatever layer_types says
    heads = _head_dims(values, shape, windows)
    ropes = {
        windowed: _read_rope(values, shape, windowed, heads[windowed])
        for windowed in {window is not None for window in windows}
    }
    shared = _shared_layers(values, shape)
    wide = 2 * values.count("intermediate_size") if values.flag("use_double_wide_mlp") else None
    result: list[BlockSpec] = []
    for i, window in enumerate(windows):
        shares, head_dim = i >= shape.layers - shared, heads[window is not None]
        result.append(
            BlockSpec(
                norm_after=True,
                qk_norm="head",
                v_norm=not shares,
                rope=ropes[window is not None],
                window=window,
                head_dim=None if head_dim == shape.head_dim else head_dim,
                kv_from=_source(values, windows[: shape.layers - shared], i, window)
                if shares
                else None,
                ffn=wide if shares else None,
                layer_scale=True,
            )
        )
    return result


def numbers(values: Values, shape: Shape) -> dict[str, Any]:
    """The soft cap, the inputs of layers, and attention scores without a factor."""
    cap = values.get_or_none("final_logit_softcapping")
    return {
        "attn_scale": 1.0,
        "logit_softcap": None if cap is None else values.number("final_logit_softcapping"),
        "layer_input": _layer_input(values),
    }


def _layer_input(values: Values) -> int:
    key = "hidden_size_per_layer_input"
    width = values.get(key)
    values.read.add("vocab_size_per_layer_input")
    if values.is_null(key) or (is_count(width) and width == 0):
        return 0
    rows, vocab = values.count("vocab_size_per_layer_input"), values.count("vocab_size")
    if rows != vocab:
        raise UnsupportedError(
            f"{values.path}: vocab_size_per_layer_input is {rows} and vocab_size {vocab}; edgeq "
            "runs models whose table of the layers' inputs has a row for each token"
        )
    return values.count(key)


def _shared_layers(values: Values, shape: Shape) -> int:
    """How many layers, the last ones, have no keys and values of their own."""
    shared = values.get("num_kv_shared_layers")
    if not is_count(shared) or shared >= shape.layers:
        raise FormatError(
            f"{values.path}: num_kv_shared_layers is {shown(shared)}; it must be a whole number "
            f"below {shape.layers}, the number of layers"
        )
    return int(shared)


def _source(values: Values, own: Sequence[int | None], layer: int, window: int | None) -> int:
    """The last layer with a window, or without one, among those with keys of their own."""
    for source in reversed(range(len(own))):
        if own[source] == window:
            return source
    kind = LAYER_KINDS[window is not None]
    raise FormatError(
        f"{values.path}: layer {layer} is of kind {kind!r} and shares keys and values, of which "
        f"none of the first {len(own)} layers is; num_kv_shared_layers must leave one of each kind"
    )


def _head_dims(values: Values, shape: Shape, windows: Sequence[int | None]) -> dict[bool, int]:
    """Values of a head of layers that see everything (False), and of those with a window (True).

    Published files say ``global_head_dim``; Transformers 5.24 writes ``per_layer_config``, which
    goes before it.
    """
    told = values.get("per_layer_config")
    full = values.get("global_head_dim")
    if told is None:
        given = _FULL_HEAD if full is None else values.count("global_head_dim")
        return {False: given, True: shape.head_dim}
    if not isinstance(told, dict):
        raise FormatError(
            f"{values.path}: per_layer_config is {shown(told)}; it must be an object with an "
            "object for each layer that differs"
        )
    dims: dict[bool, set[int]] = {False: set(), True: set()}
    known = {str(i) for i in range(shape.layers)}
    for number, own in told.items():
        if number not in known or not isinstance(own, dict) or set(own) - {"head_dim"}:
            raise UnsupportedError(
                f"{values.path}: per_layer_config of layer {number} is {shown(own)}; edgeq "
                f"computes layers 0 to {shape.layers - 1} with a head_dim of their own, and with "
                "nothing else"
            )
    for i, window in enumerate(windows):
        value = told.get(str(i), {}).get("head_dim", shape.head_dim)
        number = values.check_number(f"head_dim of layer {i} in per_layer_config", value)
        if not number.is_integer():
            raise FormatError(
                f"{values.path}: head_dim of layer {i} in per_layer_config is {shown(value)}; it "
                "must be a whole number"
            )
        dims[window is not None].add(int(number))
    for windowed, found in dims.items():
        if len(found) > 1:
            raise UnsupportedError(
                f"{values.path}: layers of kind {LAYER_KINDS[windowed]!r} have heads of "
                f"{' and '.join(map(str, sorted(found)))} values; all of a kind must have the same"
            )
    return {windowed: found.pop() for windowed, found in dims.items() if found}


def _read_rope(values: Values, shape: Shape, windowed: bool, head_dim: int) -> RopeSpec:
    """The rotary embedding of one kind of layer."""
    kind = LAYER_KINDS[windowed]
    if values.get("rope_scaling") is not None:
        raise UnsupportedError(
            f"{values.path}: rope_scaling is {shown(values.get('rope_scaling'))}, which the gemma4 "
            "models of Transformers do not follow; remove it, or say in rope_parameters how each "
            "kind of layer rotates"
        )
    nested = read_settings(values, "rope_parameters") or _ROPES
    for name in nested:
        if name not in LAYER_KINDS:
            raise UnsupportedError(
                f"{values.path}: rope_parameters has the key {name!r}; a Gemma 4 model has one "
                f"object each for {' and '.join(LAYER_KINDS)}"
            )
    settings = read_settings(values, kind, nested)
    if not settings:
        raise FormatError(
            f"{values.path}: rope_parameters has no settings of {kind}, and there is such a layer"
        )
    base = read_base(values, settings, _ROPES[kind]["rope_theta"])  # type: ignore[arg-type]
    scaling, still = None, 0
    if settings.get("rope_type") == "proportional":
        share = _turning(values, settings)
        still = head_dim // 2 - int(share * head_dim // 2)
        settings["factor"] = settings.get("factor", 1.0)
        scaling = read_scaling(
            values, kind, settings, shape, head_dim, ("linear",), {"proportional": "linear"}
        )
        if scaling is not None and scaling.factor == 1:
            scaling = None
    else:
        check_whole_heads(values, kind, settings)
        read_scaling(
            values, kind, settings, shape, head_dim, ("default",), {"proportional": "linear"}
        )
    return RopeSpec(base, head_dim, scaling, still=still)


def _turning(values: Values, settings: Mapping[str, Any]) -> float:
    """The share of the pairs that turn."""
    share = values.check_number("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    if share > 1:
        raise FormatError(f"{values.path}: partial_rotary_factor is {share}; it must be at most 1")
    return share


def _published(
    hidden: int, ffn: int, layers: int, kv_heads: int, period: int, shared: int, wide: bool
) -> dict[str, Any]:
    """A published model of the size for devices."""
    kinds = [LAYER_KINDS[(i + 1) % period != 0] for i in range(layers)]
    return sizes(
        hidden, ffn, layers, 8, kv_heads, 262144, 131072, head_dim=256, layer_types=kinds,
        sliding_window=512, num_kv_shared_layers=shared, use_double_wide_mlp=wide,
        final_logit_softcapping=30.0, eos_token_id=[1, 106],
    )  # fmt: skip


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_text"),
    classes=(
        "Gemma4ForCausalLM",
        "Gemma4TextModel",
        "Gemma4ForConditionalGeneration",
        "Gemma4Model",
    ),
    blocks=blocks,
    defaults={
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    biases="attention_bias",
    activation_key="hidden_activation",
    scaled_embeddings=True,
    numbers=numbers,
    left_out={
        "vision_tower.": "vision part",
        "embed_vision.": "vision part",
        "audio_tower.": "audio part",
        "embed_audio.": "audio part",
    },
    text_config="text_config",
    prefix="language_model.",
    hub_tag="gemma4",
    shapes={
        "gemma4-e2b": _published(1536, 6144, 35, 1, 5, 20, True),
        "gemma4-e4b": _published(2560, 10240, 42, 2, 6, 18, False),
    },
)
