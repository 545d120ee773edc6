"""Sliding windows of a ``config.json``: which layers have one, and how long it is.

Four keys speak of them: ``sliding_window``, ``use_sliding_window``, ``layer_types`` and
``max_window_layers``. Which of them a model follows depends on its classes in Transformers. A key
that they do not follow is refused where it says otherwise than what they compute.

Source: the configuration and modeling classes of Transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.family import Shape
from edgeq.importers.huggingface.values import Values
from edgeq.importers.unread import shown

LAYER_KINDS = ("full_attention", "sliding_attention")
"""The values in ``layer_types`` that edgeq computes."""


def read_windows(
    values: Values,
    shape: Shape,
    family: str,
    *,
    sliding: Sequence[bool],
    layer_types: bool = True,
    switch: Literal["followed", "refused", "ignored"] = "ignored",
) -> tuple[int | None, ...]:
    """The window of each layer, or None for one that sees all positions.

    Args:
        values: the configuration.
        shape: its sizes.
        family: the name of the family, for messages.
        sliding: whether each layer has the window where ``layer_types`` does not say.
        layer_types: whether the family's classes follow ``layer_types``.
        switch: what they do with ``use_sliding_window``: follow it, run with the window
            whatever it says (so that false is refused), or never look at it.

    Raises:
        FormatError: a value is impossible.
        UnsupportedError: a kind of layer that edgeq does not compute, or settings that contradict
            one another or the family.
    """
    kinds = _layer_kinds(values, shape.layers)
    window = _window(values)
    off = _is_off(values)
    if switch == "followed" and not values.flag("use_sliding_window"):
        window = None
    if layer_types and kinds is not None:
        where = kinds
    else:
        where = tuple(layer and window is not None for layer in sliding)
        if kinds is not None and kinds != where:
            _refuse(values, family, "layer_types", values.raw["layer_types"])
    if switch == "refused" and off and _is_short(window, shape):
        _refuse(values, family, "use_sliding_window", values.raw.get("use_sliding_window"))
    if kinds is not None and any(kinds) and window is None:
        raise UnsupportedError(
            f"{values.path}: layer_types names sliding_attention layers and the sliding window is "
            "off (sliding_window null or use_sliding_window false); set one or the other right"
        )
    return tuple(window if layer else None for layer in where)


def refuse_windows(
    values: Values, shape: Shape, family: str, *, known: Sequence[str] = LAYER_KINDS
) -> tuple[str, ...] | None:
    """Refuse windows shorter than the context, for a family whose classes have none.

    Args:
        values: the configuration.
        shape: its sizes.
        family: the name of the family, for messages.
        known: the values in ``layer_types`` that edgeq computes for the family.

    Returns:
        The kind of each layer, or None if ``layer_types`` is absent.

    Raises:
        FormatError: a value is impossible.
        UnsupportedError: the settings ask for a window.
    """
    kinds = layer_kinds(values, shape.layers, known)
    window = _window(values)
    off = _is_off(values)
    if kinds is not None and "sliding_attention" in kinds:
        _refuse(values, family, "layer_types", values.raw["layer_types"])
    if _is_short(window, shape) and not off:
        _refuse(values, family, "sliding_window", values.raw.get("sliding_window"))
    return kinds


def layers_from(values: Values, shape: Shape, key: str, default: int) -> tuple[bool, ...]:
    """True for the layers from the one that a key names on.

    Raises:
        FormatError: the value is no number of layers.
    """
    first = values.get(key)
    first = default if first is None else first
    if type(first) is not int or first < 0:
        raise FormatError(f"{values.path}: {key} is {shown(first)}; it must be a number of layers")
    return tuple(i >= first for i in range(shape.layers))


def _window(values: Values) -> int | None:
    values.read.add("max_window_layers")
    value = None if values.is_null("sliding_window") else values.get("sliding_window")
    return None if value is None else values.count("sliding_window")


def _is_off(values: Values) -> bool:
    switch = values.get("use_sliding_window")
    return switch is not None and not values.flag("use_sliding_window")


def _is_short(window: int | None, shape: Shape) -> bool:
    """Whether a window leaves anything out of the context."""
    return window is not None and window < shape.context


def _layer_kinds(values: Values, layers: int) -> tuple[bool, ...] | None:
    """Whether each layer is a sliding one by ``layer_types``; None if the key is absent."""
    kinds = layer_kinds(values, layers, LAYER_KINDS)
    return None if kinds is None else tuple(kind == "sliding_attention" for kind in kinds)


def layer_kinds(
    values: Values, layers: int, known: Sequence[str], key: str = "layer_types"
) -> tuple[str, ...] | None:
    """The kind of each layer by ``layer_types`` or another key; None if the key is absent.

    Raises:
        FormatError: it does not name each layer.
        UnsupportedError: a kind that is not known.
    """
    kinds = values.get(key)
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise FormatError(f"{values.path}: {key} must name each of {layers} layers")
    for kind in kinds:
        if kind not in known:
            raise UnsupportedError(
                f"{values.path}: {key} names a layer of kind {shown(kind)}; edgeq computes "
                f"{' and '.join(known)}"
            )
    return tuple(kinds)


def _refuse(values: Values, family: str, key: str, value: Any) -> None:
    window = values.raw.get("sliding_window")
    beside = "" if key == "sliding_window" else f" and sliding_window is {shown(window)}"
    raise UnsupportedError(
        f"{values.path}: {key} is {shown(value)}{beside}, which the {family} models of "
        f"Transformers do not follow; remove {key} if the model was trained without it, or give "
        "the model_type that has it"
    )
