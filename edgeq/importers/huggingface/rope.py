"""Rotary settings of a ``config.json``.

They come in two spellings: the flat ``rope_theta`` and ``rope_scaling``, and the nested
``rope_parameters`` of Transformers 5. Where both are there, they are resolved as Transformers does:
a value inside the object goes before one beside it, and ``rope_scaling`` before
``rope_parameters``. Every key of these objects is read, harmless, or refused by name.

Source: modeling_rope_utils.py and the configuration classes of Transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.family import Shape
from edgeq.importers.huggingface.values import Values
from edgeq.importers.huggingface.windows import LAYER_KINDS
from edgeq.importers.unread import is_off, refusal, shown
from edgeq.model.block import BlockSpec
from edgeq.model.limits import MAX_SIZE
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from edgeq.model.rotary import longrope_attention_factor, yarn_attention_factor

_PARTIAL = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
_FACTORS = ("short_factor", "long_factor")
_KEYS_OF_KINDS = {
    "default": frozenset(),
    "linear": frozenset(("factor",)),
    "llama3": frozenset(("factor", "low_freq_factor", "high_freq_factor")),
    "dynamic": frozenset(("factor",)),
    "yarn": frozenset((
        "factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
        "truncate",
    )),
    "longrope": frozenset(("factor", "attention_factor", *_FACTORS)),
}  # fmt: skip
_HARMLESS = frozenset(("rope_type", "type", "rope_theta", _PARTIAL, _ORIGINAL, "finetuned"))


def read_rope(
    values: Values,
    shape: Shape,
    *,
    base: float = 10_000.0,
    kinds: Sequence[str] = tuple(_KEYS_OF_KINDS),
    aliases: Mapping[str, str] = {},
    partial: bool = False,
    share: float = 1.0,
    known: Collection[str] = (),
) -> RopeSpec:
    """Read the rotary settings that all layers share.

    Args:
        values: the configuration.
        shape: its sizes.
        base: of the frequencies, where the file states none.
        kinds: the values of ``rope_type`` that are supported for the family.
        aliases: further values of it, and which of ``kinds`` they stand for.
        partial: whether the family's classes read ``partial_rotary_factor``.
        share: that factor, where the file states none; 1 unless ``partial``.
        known: further keys of the object, which the family's file reads.

    Raises:
        FormatError: a value is missing or impossible.
        UnsupportedError: a rotary type or key that edgeq does not compute.
    """
    name, settings = rope_settings(values)
    theta = read_base(values, settings, base)
    if partial:
        share = _rotated_share(values, settings, share)
    else:
        check_whole_heads(values, name, settings)
    dim = int(shape.head_dim * share)
    scaling = read_scaling(values, name, settings, shape, dim, kinds, aliases, known)
    return RopeSpec(theta, dim, scaling)


def rope_settings(values: Values) -> tuple[str, dict[str, Any]]:
    """The rotary settings that all layers share, and the name of the object they are in."""
    flat, nested = read_settings(values, "rope_scaling"), read_settings(values, "rope_parameters")
    return ("rope_scaling", flat) if flat else ("rope_parameters", nested)


def rope_settings_by_kind(values: Values, model: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The rotary settings of layers that see everything, and of those with a window.

    ``rope_scaling`` beside them, as older configurations have it, is for the former alone.

    Args:
        values: the configuration.
        model: what it is, for messages, such as "a Gemma 3".

    Returns:
        (name, full, local): both settings, and the name of the object that says how the former are
        stretched.

    Raises:
        FormatError: one of them is no object.
        UnsupportedError: settings of another kind of layer.
    """
    nested = read_settings(values, "rope_parameters")
    for kind in nested:
        if kind not in LAYER_KINDS:
            raise UnsupportedError(
                f"{values.path}: rope_parameters has the key {kind!r}; {model} model has one "
                f"object each for {' and '.join(LAYER_KINDS)}"
            )
    flat = read_settings(values, "rope_scaling")
    full = (read_settings(values, "full_attention", nested) or {"rope_type": "default"}) | flat
    local = read_settings(values, "sliding_attention", nested)
    return "rope_scaling" if flat else "full_attention", full, local


def read_base(
    values: Values, settings: Mapping[str, Any], default: float, key: str = "rope_theta"
) -> float:
    """The base of the frequencies, among the rotary settings or else beside them.

    Args:
        values: the configuration.
        settings: rotary settings, in which the base is always ``rope_theta``.
        default: the base where neither states one.
        key: the name of the base beside the settings.

    Raises:
        FormatError: it is no positive number.
    """
    values.read.add(key)
    return values.check_number(key, settings.get("rope_theta", values.raw.get(key, default)))


def read_settings(
    values: Values, key: str, inside: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """An object of the configuration or of another object; empty if it is absent or null.

    Raises:
        FormatError: it is no object.
    """
    value = values.get(key) if inside is None else inside.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError(f"{values.path}: {key} is {shown(value)}; it must be an object")
    return dict(value)


def check_whole_heads(values: Values, name: str, settings: Mapping[str, Any]) -> None:
    """Refuse partial rotary settings for families that do not read them.

    Raises:
        UnsupportedError: the part is not all of the head.
    """
    value = settings.get(_PARTIAL)
    if value is not None and (isinstance(value, bool) or value != 1):
        raise UnsupportedError(
            f"{values.path}: {_PARTIAL} in {name} is {shown(value)}, which edgeq computes for phi3 "
            "alone; it runs other families where it is 1 or absent"
        )


def read_scaling(
    values: Values,
    name: str,
    settings: Mapping[str, Any],
    shape: Shape,
    dim: int,
    kinds: Sequence[str],
    aliases: Mapping[str, str] = {},
    known: Collection[str] = (),
    inside_only: bool = False,
) -> RopeScaling | None:
    """How frequencies are stretched, from one object of rotary settings.

    Args:
        values: the configuration.
        name: of the object, for messages.
        settings: its keys.
        shape: the model's sizes.
        dim: how many dimensions of a head rotate.
        kinds: supported values of ``rope_type``.
        aliases: further values of it, and which of ``kinds`` they stand for.
        known: further keys of the object, which the family's file reads.
        inside_only: whether the original context is read inside the object alone, as Transformers
            does where each kind of layer has an object of its own.

    Raises:
        FormatError: a value is missing or impossible.
        UnsupportedError: another kind, or a key that edgeq does not compute.
    """
    kind = settings.get("rope_type", settings.get("type", "default"))
    if isinstance(kind, str):
        kind = aliases.get(kind, kind)
    if not isinstance(kind, str) or kind not in kinds:
        raise UnsupportedError(
            f"{values.path}: rope_type in {name} is {shown(kind)}, which edgeq does not compute "
            f"for this family; it computes {', '.join((*kinds, *aliases))}"
        )
    needed = _KEYS_OF_KINDS[kind]
    others = {
        f"{name}.{key}": value
        for key, value in settings.items()
        if key not in needed and key not in _HARMLESS and key not in known
        and not is_off(key, value)
    }  # fmt: skip
    if others:
        raise UnsupportedError(f"{values.path}: {refusal(others)}")
    if kind == "default":
        return None
    if kind == "longrope":
        original = _original_context(values, settings, inside_only)
        return _longrope(values, settings, shape, dim, original)
    if kind == "yarn":
        return _yarn(values, settings, shape, _original_context(values, settings, inside_only))
    factor = values.check_number("rope factor", settings.get("factor"))
    if kind == "linear":
        return RopeScaling("linear", factor)
    if kind == "dynamic":
        return RopeScaling("dynamic", factor, original_context=shape.context)
    low = values.check_number("low_freq_factor", settings.get("low_freq_factor"))
    high = values.check_number("high_freq_factor", settings.get("high_freq_factor"))
    if high <= low:
        raise FormatError(
            f"{values.path}: high_freq_factor {high} must be above low_freq_factor {low}"
        )
    return RopeScaling(
        "llama3", factor, low, high, _original_context(values, settings, inside_only)
    )


def _yarn(values: Values, settings: Mapping[str, Any], shape: Shape, original: int) -> RopeScaling:
    factor = _ratio(values, settings, shape, original)
    told = settings.get("attention_factor")
    if told is None:
        numerator, denominator = settings.get("mscale"), settings.get("mscale_all_dim")
        if numerator and denominator:
            told = yarn_attention_factor(
                factor,
                values.check_number("mscale", numerator),
                values.check_number("mscale_all_dim", denominator),
            )
        else:
            told = yarn_attention_factor(factor)
    truncate = settings.get("truncate", True)
    if not isinstance(truncate, bool):
        raise FormatError(f"{values.path}: truncate is {shown(truncate)}; it must be true or false")
    fast, slow = settings.get("beta_fast") or 32, settings.get("beta_slow") or 1
    return RopeScaling(
        "yarn",
        factor,
        original_context=original,
        attention_factor=values.check_number("attention_factor", told),
        beta_fast=values.check_number("beta_fast", fast),
        beta_slow=values.check_number("beta_slow", slow),
        truncate=truncate,
    )


def _longrope(
    values: Values, settings: Mapping[str, Any], shape: Shape, dim: int, original: int
) -> RopeScaling:
    factor = _ratio(values, settings, shape, original)
    if original < 2:
        raise FormatError(f"{values.path}: {_ORIGINAL} is {original}; it must be at least 2")
    told = settings.get("attention_factor")
    if told is None:
        told = longrope_attention_factor(factor, original)
    lists = []
    for key in _FACTORS:
        factors = settings.get(key)
        if not isinstance(factors, list) or len(factors) != dim // 2:
            raise FormatError(
                f"{values.path}: {key} is {shown(factors)}; it must list a number for each of "
                f"{dim // 2} rotated pairs"
            )
        lists.append(tuple(values.check_number(key, one) for one in factors))
    return RopeScaling(
        "longrope",
        factor,
        original_context=original,
        attention_factor=values.check_number("attention_factor", told),
        short_factors=lists[0],
        long_factors=lists[1],
    )


def _ratio(values: Values, settings: Mapping[str, Any], shape: Shape, original: int) -> float:
    """The factor, which is that between the two contexts where none is given."""
    factor = settings.get("factor")
    return values.check_number(
        "rope factor", shape.context / original if factor is None else factor
    )


def stretched_context(values: Values, context: int, blocks: Sequence[BlockSpec]) -> int:
    """The longest sequence that a model was made for, stretching included.

    ``max_position_embeddings`` already says so, but for two kinds: dynamic stretches from there
    on, and instructions for yarn (Qwen's) leave it as it is and state the original context.
    """
    reached = [context]
    inside = rope_settings(values)[1].get(_ORIGINAL)
    told = inside is not None or values.raw.get(_ORIGINAL) is not None
    for block in blocks:
        scaling = block.rope.scaling if block.rope else None
        if scaling and (scaling.kind == "dynamic" or (scaling.kind == "yarn" and told)):
            reached.append(int(min(scaling.original_context * scaling.factor, MAX_SIZE)))
    return max(reached)


def _rotated_share(values: Values, settings: Mapping[str, Any], usual: float) -> float:
    beside = values.get(_PARTIAL)
    inside = settings.get(_PARTIAL)
    value = beside if inside is None else inside
    share = values.check_number(_PARTIAL, usual if value is None else value)
    if share > 1:
        raise FormatError(f"{values.path}: {_PARTIAL} is {share}; it must be at most 1")
    return share


def _original_context(values: Values, settings: Mapping[str, Any], inside_only: bool) -> int:
    """The context before stretching, which files state in either of two places."""
    inside, beside = settings.get(_ORIGINAL), values.get(_ORIGINAL)
    if inside is not None and beside is not None and inside != beside:
        raise UnsupportedError(
            f"{values.path}: {_ORIGINAL} is {shown(inside)} inside the rotary settings and "
            f"{shown(beside)} beside them; keep the one the model was trained with"
        )
    context = values.get("max_position_embeddings")
    if inside is None and inside_only and beside not in (None, context):
        raise UnsupportedError(
            f"{values.path}: {_ORIGINAL} is {shown(beside)} beside the rotary settings, where "
            "Transformers does not read it for this family; put it inside them"
        )
    told = beside if inside is None else inside
    return int(values.check_number(_ORIGINAL, context if told is None else told))
