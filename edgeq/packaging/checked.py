"""Reading JSON objects whose fields are exactly those of a class, each of one kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.importers.unread import shown

MOST_CONTEXT = 1 << 24
"""Longer contexts are refused."""


@dataclass(frozen=True)
class FieldKind:
    """A kind of value in JSON.

    Args:
        words: what it is, for messages.
        holds: whether a value is of it.
    """

    words: str
    holds: Callable[[Any], bool]


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0  # true and false are no numbers


TEXT = FieldKind("a text", lambda value: isinstance(value, str))
NAME = FieldKind("a text that is not empty", lambda value: isinstance(value, str) and value != "")
TEXTS = FieldKind("a list of texts", _list_of(str))
OBJECT = FieldKind("an object", lambda value: isinstance(value, dict))
OBJECTS = FieldKind("a list of objects", _list_of(dict))
LIST = FieldKind("a list", lambda value: isinstance(value, list))
COUNT = FieldKind("a positive whole number", _positive)
OPTIONAL_COUNT = FieldKind(
    "a positive whole number or null", lambda value: value is None or _positive(value)
)
CONTEXT = FieldKind(
    f"a whole number of 1 to {MOST_CONTEXT} tokens, or null",
    lambda value: value is None or (_positive(value) and value <= MOST_CONTEXT),
)


def checked_fields(data: Any, what: str, kinds: Mapping[str, FieldKind]) -> dict[str, Any]:
    """The fields of a JSON object; lists become tuples.

    Args:
        data: the object.
        what: what it describes, for messages.
        kinds: each field that it must have, and the field's kind. It may have no other.

    Raises:
        FormatError: a field is missing, unknown or of another kind; the message names it.
    """
    if not isinstance(data, dict) or set(data) != set(kinds):
        raise FormatError(f"{what} must have the fields {', '.join(sorted(kinds))}")
    name = f"{what} {data['id']!r}" if "id" in kinds else what
    for field, kind in kinds.items():
        if not kind.holds(data[field]):
            raise FormatError(
                f"{name} has a field of a wrong type: {field} is {shown(data[field])}; it must be "
                f"{kind.words}"
            )
    return {field: tuple(v) if isinstance(v, list) else v for field, v in data.items()}
