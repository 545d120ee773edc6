"""Rotary positions and sliding windows of a ``config.json``.

Rotary settings come in two spellings: the flat ``rope_theta`` and ``rope_scaling``, and the nested
``rope_parameters`` of Transformers 5. Where both are there, they are resolved as Transformers does:
a value inside the object goes before one beside it, and ``rope_scaling`` before
``rope_parameters``. Every key of these objects is read, harmless, or refused by name.

Source: modeling_rope_utils.py and the configuration classes of Transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.values import Values
from edgeq.importers.unread import is_off, refusal, shown
from edgeq.model.block import RopeScaling

DEFAULT_THETA = 10_000.0
_GEMMA_THETA = 1_000_000.0
_PARTIAL = "partial_rotary_factor"
_ORIGINAL = "original_max_position_embeddings"
_LAYER_KINDS = ("full_attention", "sliding_attention")
_ROPE_KEYS = {
    "default": frozenset(),
    "linear": frozenset(("factor",)),
    "llama3": frozenset(("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)),
}
_ROPE_HARMLESS = frozenset(("rope_type", "type", "rope_theta", _PARTIAL, _ORIGINAL, "finetuned"))


@dataclass(frozen=True)
class Rope:
    """Rotary positions.

    Args:
        theta: base of the frequencies.
        theta_local: base in the sliding-window layers, if it is another.
        scaling: how frequencies are stretched, or None.
        rotated: the fraction of a head's dimensions that rotates.
    """

    theta: float
    theta_local: float | None
    scaling: RopeScaling | None
    rotated: float


def read_rope(values: Values, family: str) -> Rope:
    """Read the rotary settings.

    Raises:
        FormatError: a value is missing or impossible.
        UnsupportedError: a rotary type or key edgeq does not compute.
    """
    if family == "gemma3":
        return _gemma_rope(values)
    flat, nested = _object(values, "rope_scaling"), _object(values, "rope_parameters")
    name, found = ("rope_scaling", flat) if flat else ("rope_parameters", nested)
    beside = values.raw.get("rope_theta", DEFAULT_THETA)
    values.read.add("rope_theta")
    theta = values.check_number("rope_theta", found.get("rope_theta", beside))
    # only these classes of Transformers rotate a part of each head
    rotated = _rotated(values, found) if family == "phi3" else 1.0
    if family != "phi3":
        _check_whole_heads(values, name, found)
    kinds = ("default",) if family == "phi3" else tuple(_ROPE_KEYS)
    scaling = _scaling(values, name, found, kinds)
    return Rope(theta, None, scaling, rotated)


def read_window(
    values: Values, family: str, layers: int, context: int
) -> tuple[int | None, tuple[bool, ...]]:
    """Read the sliding window, and which layers it applies to.

    Args:
        values: the configuration.
        family: edgeq's family.
        layers: how many layers there are.
        context: the longest sequence the model was made for; a window of that length is none.

    Raises:
        FormatError: a value is impossible.
        UnsupportedError: a kind of layer edgeq does not compute, or settings that contradict one
            another or the family.
    """
    has_kinds = "layer_types" in values.raw
    kinds = _layer_kinds(values, layers)
    given = None if values.is_null("sliding_window") else values.get("sliding_window")
    window = None if given is None else values.count("sliding_window")
    switch = values.get("use_sliding_window")
    off = switch is not None and not values.flag("use_sliding_window")
    values.read.add("max_window_layers")
    if family in ("qwen2", "qwen3"):
        window = window if values.flag("use_sliding_window") else None
        where = _late_layers(values, layers) if kinds is None else kinds
    elif family == "gemma3":
        values.read.add("sliding_window_pattern")
        where = _periodic_layers(values, layers) if kinds is None else kinds
    elif family == "mistral" and has_kinds:  # Transformers takes it as a Ministral
        where = (window is not None,) * layers if kinds is None else kinds
    else:  # these classes of Transformers do not read layer_types: every layer is of one kind
        where = (window is not None and family != "llama",) * layers
        if kinds is not None and kinds != where:
            _refuse_window(values, family, "layer_types", values.raw["layer_types"])
    short = window is not None and window < context
    if short and ((family == "llama" and not off) or (family in ("mistral", "phi3") and off)):
        key = "sliding_window" if family == "llama" else "use_sliding_window"
        _refuse_window(values, family, key, values.raw.get(key))
    if family == "llama":
        return None, ()
    if kinds is not None and any(kinds) and window is None:
        raise UnsupportedError(
            f"{values.path}: layer_types names sliding_attention layers and the sliding window is "
            "off (sliding_window null or use_sliding_window false); set one or the other right"
        )
    return (window, where) if window is not None and any(where) else (None, ())


def _refuse_window(values: Values, family: str, key: str, value: Any) -> None:
    window = values.raw.get("sliding_window")
    beside = "" if key == "sliding_window" else f" and sliding_window is {shown(window)}"
    raise UnsupportedError(
        f"{values.path}: {key} is {shown(value)}{beside}, which the {family} models of "
        f"Transformers do not follow; remove {key} if the model was trained without it, or give "
        "the model_type that has it"
    )


def _layer_kinds(values: Values, layers: int) -> tuple[bool, ...] | None:
    """Whether each layer is a sliding one, as ``layer_types`` says; None if it does not."""
    kinds = values.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise FormatError(f"{values.path}: layer_types must name each of {layers} layers")
    for kind in kinds:
        if kind not in _LAYER_KINDS:
            raise UnsupportedError(
                f"{values.path}: layer_types names a layer of kind {shown(kind)}; edgeq computes "
                f"{' and '.join(_LAYER_KINDS)}"
            )
    return tuple(kind == "sliding_attention" for kind in kinds)


def _late_layers(values: Values, layers: int) -> tuple[bool, ...]:
    """Qwen: the window applies from layer ``max_window_layers`` on."""
    full = values.get("max_window_layers")
    full = 28 if full is None else full
    if type(full) is not int or full < 0:
        raise FormatError(
            f"{values.path}: max_window_layers is {shown(full)}; it must be a number of layers"
        )
    return tuple(i >= full for i in range(layers))


def _periodic_layers(values: Values, layers: int) -> tuple[bool, ...]:
    """Gemma 3: every so-many-th layer sees everything."""
    pattern = values.count("sliding_window_pattern")
    return tuple((i + 1) % pattern != 0 for i in range(layers))


def _gemma_rope(values: Values) -> Rope:
    nested = _object(values, "rope_parameters")
    for kind in nested:
        if kind not in _LAYER_KINDS:
            raise UnsupportedError(
                f"{values.path}: rope_parameters has the key {kind!r}; a Gemma 3 model has one "
                f"object each for {' and '.join(_LAYER_KINDS)}"
            )
    plain = {"rope_type": "default"}
    full = _object(values, "full_attention", nested) or plain
    flat = _object(values, "rope_scaling")
    full |= flat
    local = _object(values, "sliding_attention", nested)
    bases = []
    for found, beside, default in (
        (full, "rope_theta", _GEMMA_THETA),
        (local, "rope_local_base_freq", DEFAULT_THETA),
    ):
        values.read.add(beside)
        base = found.get("rope_theta", values.raw.get(beside, default))
        bases.append(values.check_number(beside, base))
        _check_whole_heads(values, "rope_parameters", found)
    # the layers with a window are never stretched
    _scaling(values, "sliding_attention", local, ("default",))
    name = "rope_scaling" if flat else "full_attention"
    scaling = _scaling(values, name, full, ("default", "linear"))
    return Rope(bases[0], bases[1], scaling, 1.0)


def _object(values: Values, key: str, inside: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """An object, empty if it is absent or null."""
    found = values.get(key) if inside is None else inside.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise FormatError(f"{values.path}: {key} is {shown(found)}; it must be an object")
    return dict(found)


def _rotated(values: Values, found: Mapping[str, Any]) -> float:
    beside = values.get(_PARTIAL)
    inside = found.get(_PARTIAL)
    value = beside if inside is None else inside
    rotated = values.check_number(_PARTIAL, 1.0 if value is None else value)
    if rotated > 1:
        raise FormatError(f"{values.path}: {_PARTIAL} is {rotated}; it must be at most 1")
    return rotated


def _check_whole_heads(values: Values, name: str, found: Mapping[str, Any]) -> None:
    value = found.get(_PARTIAL)
    if value is not None and (isinstance(value, bool) or value != 1):
        raise UnsupportedError(
            f"{values.path}: {_PARTIAL} in {name} is {shown(value)}, which edgeq computes for phi3 "
            "alone; it runs other families where it is 1 or absent"
        )


def _scaling(values: Values, name: str, found: Mapping[str, Any], kinds: Any) -> RopeScaling | None:
    """How frequencies are stretched, from one object of rotary settings."""
    kind = found.get("rope_type", found.get("type", "default"))
    if not isinstance(kind, str) or kind not in kinds:
        raise UnsupportedError(
            f"{values.path}: rope_type in {name} is {shown(kind)}, which edgeq does not compute "
            f"for this family; it computes {', '.join(kinds)}"
        )
    needed = _ROPE_KEYS[kind]
    others = {
        f"{name}.{key}": value
        for key, value in found.items()
        if key not in needed and key not in _ROPE_HARMLESS and not is_off(key, value)
    }
    if others:
        raise UnsupportedError(f"{values.path}: {refusal(others)}")
    if kind == "default":
        return None
    factor = values.check_number("rope factor", found.get("factor"))
    if kind == "linear":
        return RopeScaling("linear", factor)
    low = values.check_number("low_freq_factor", found.get("low_freq_factor"))
    high = values.check_number("high_freq_factor", found.get("high_freq_factor"))
    if high <= low:
        raise FormatError(
            f"{values.path}: high_freq_factor {high} must be above low_freq_factor {low}"
        )
    return RopeScaling("llama3", factor, low, high, _original_context(values, found))


def _original_context(values: Values, found: Mapping[str, Any]) -> int:
    """The context before stretching, which files say in either of two places."""
    inside, beside = found.get(_ORIGINAL), values.get(_ORIGINAL)
    if inside is not None and beside is not None and inside != beside:
        raise UnsupportedError(
            f"{values.path}: {_ORIGINAL} is {shown(inside)} inside the rotary settings and "
            f"{shown(beside)} beside them; keep the one the model was trained with"
        )
    original = beside if inside is None else inside
    if original is None:
        original = values.get("max_position_embeddings")
    return int(values.check_number(_ORIGINAL, original))
