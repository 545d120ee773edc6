"""Rotary settings of a ``config.json``.

They come in two spellings: the flat ``rope_theta`` and ``rope_scaling``, and the nested
``rope_parameters`` of Transformers 5. Where both are there, they are resolved as Transformers does:
a value inside the object goes before one beside it, and ``rope_scaling`` before
``rope_parameters``. Every key of these objects is read, harmless, or refused by name.

Source: modeling_rope_utils.py and the configuration classes of Transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.family import Shape
from edgeq.importers.huggingface.values import Values
from edgeq.importers.unread import is_off, refusal, shown
from edgeq.model.block import RopeScaling, RopeSpec

_PARTIAL = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
_KEYS_OF_KINDS = {
    "default": frozenset(),
    "linear": frozenset(("factor",)),
    "llama3": frozenset(("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)),
}
_HARMLESS = frozenset(("rope_type", "type", "rope_theta", _PARTIAL, _ORIGINAL, "finetuned"))


def read_rope(
    values: Values,
    shape: Shape,
    *,
    base: float = 10_000.0,
    kinds: Sequence[str] = tuple(_KEYS_OF_KINDS),
    partial: bool = False,
) -> RopeSpec:
    """Read the rotary settings that all layers share.

    Args:
        values: the configuration.
        shape: its sizes.
        base: of the frequencies, where the file states none.
        kinds: the values of ``rope_type`` that are supported for the family.
        partial: whether the family's classes read ``partial_rotary_factor``.

    Raises:
        FormatError: a value is missing or impossible.
        UnsupportedError: a rotary type or key that edgeq does not compute.
    """
    flat, nested = read_settings(values, "rope_scaling"), read_settings(values, "rope_parameters")
    name, settings = ("rope_scaling", flat) if flat else ("rope_parameters", nested)
    beside = values.raw.get("rope_theta", base)
    values.read.add("rope_theta")
    theta = values.check_number("rope_theta", settings.get("rope_theta", beside))
    share = 1.0
    if partial:
        share = _rotated_share(values, settings)
    else:
        check_whole_heads(values, name, settings)
    scaling = read_scaling(values, name, settings, kinds)
    return RopeSpec(theta, int(shape.head_dim * share), scaling)


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
    values: Values, name: str, settings: Mapping[str, Any], kinds: Sequence[str]
) -> RopeScaling | None:
    """How frequencies are stretched, from one object of rotary settings.

    Args:
        values: the configuration.
        name: of the object, for messages.
        settings: its keys.
        kinds: supported values of ``rope_type``.

    Raises:
        FormatError: a value is missing or impossible.
        UnsupportedError: another kind, or a key that edgeq does not compute.
    """
    kind = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in kinds:
        raise UnsupportedError(
            f"{values.path}: rope_type in {name} is {shown(kind)}, which edgeq does not compute "
            f"for this family; it computes {', '.join(kinds)}"
        )
    needed = _KEYS_OF_KINDS[kind]
    others = {
        f"{name}.{key}": value
        for key, value in settings.items()
        if key not in needed and key not in _HARMLESS and not is_off(key, value)
    }
    if others:
        raise UnsupportedError(f"{values.path}: {refusal(others)}")
    if kind == "default":
        return None
    factor = values.check_number("rope factor", settings.get("factor"))
    if kind == "linear":
        return RopeScaling("linear", factor)
    low = values.check_number("low_freq_factor", settings.get("low_freq_factor"))
    high = values.check_number("high_freq_factor", settings.get("high_freq_factor"))
    if high <= low:
        raise FormatError(
            f"{values.path}: high_freq_factor {high} must be above low_freq_factor {low}"
        )
    return RopeScaling("llama3", factor, low, high, _original_context(values, settings))


def _rotated_share(values: Values, settings: Mapping[str, Any]) -> float:
    beside = values.get(_PARTIAL)
    inside = settings.get(_PARTIAL)
    value = beside if inside is None else inside
    share = values.check_number(_PARTIAL, 1.0 if value is None else value)
    if share > 1:
        raise FormatError(f"{values.path}: {_PARTIAL} is {share}; it must be at most 1")
    return share


def _original_context(values: Values, settings: Mapping[str, Any]) -> int:
    """The context before stretching, which files state in either of two places."""
    inside, beside = settings.get(_ORIGINAL), values.get(_ORIGINAL)
    if inside is not None and beside is not None and inside != beside:
        raise UnsupportedError(
            f"{values.path}: {_ORIGINAL} is {shown(inside)} inside the rotary settings and "
            f"{shown(beside)} beside them; keep the one the model was trained with"
        )
    original = beside if inside is None else inside
    if original is None:
        original = values.get("max_position_embeddings")
    return int(values.check_number(_ORIGINAL, original))
