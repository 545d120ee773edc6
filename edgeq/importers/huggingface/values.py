"""Checked access to the values of a ``config.json``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.unread import shown
from edgeq.model.limits import MAX_SIZE


class Values:
    """Checked access to a configuration's values, which remembers what has been read.

    Attributes:
        path: the file, for messages.
        raw: its keys; null counts as absent where a method does not say otherwise.
        defaults: values of absent keys.
        read: the keys that have been asked for.
    """

    def __init__(self, path: Path, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.defaults = defaults
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        """The value, or the default of an absent one."""
        self.read.add(key)
        value = self.raw.get(key)
        return self.defaults.get(key) if value is None else value

    def get_or_none(self, key: str) -> Any:
        """The value, None if the file says null, or the default of an absent one."""
        self.read.add(key)
        return self.raw[key] if key in self.raw else self.defaults.get(key)

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null, which differs from a default."""
        return key in self.raw and self.raw[key] is None

    def number(self, key: str) -> float:
        """A positive number."""
        self.read.add(key)
        return self.check_number(key, self.raw.get(key, self.defaults.get(key)))

    def check_number(self, key: str, value: Any) -> float:
        """A value of the key that was read elsewhere, as a positive number."""
        if value is None:
            what = "null" if self.is_null(key) else "missing"
            raise FormatError(f"{self.path}: {key} is {what}; it must be a positive number")
        # compared before any conversion: an integer of 400 digits is no float
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value <= sys.float_info.max
        ):
            raise FormatError(f"{self.path}: {key} is {shown(value)}; it must be a positive number")
        return float(value)

    def count(self, key: str) -> int:
        """A positive whole number."""
        number = self.number(key)
        if not number.is_integer() or number > MAX_SIZE:
            raise FormatError(
                f"{self.path}: {key} is {shown(self.get(key))}; it must be a whole number of at "
                f"most {MAX_SIZE}"
            )
        return int(number)

    def flag(self, key: str) -> bool:
        """A flag; null counts as false, as in Transformers."""
        value = None if self.is_null(key) else self.get(key)
        self.read.add(key)
        if value is not None and not isinstance(value, bool):
            raise FormatError(f"{self.path}: {key} is {shown(value)}; it must be true or false")
        return bool(value)

    def check_only(self, allowed: Mapping[str, Sequence[Any]]) -> None:
        """Refuse keys that would have to be followed at any but a few values; all count as read.

        Args:
            allowed: key -> the values at which edgeq computes what the model does.

        Raises:
            UnsupportedError: a key, or the default of an absent one, has another value.
        """
        for key, values in allowed.items():
            value = self.get(key)
            if value is not None or self.is_null(key):
                absent = self.defaults.get(key) in (None, *values)
                check_only(self.path, key, value, values, absent=absent)


def check_only(
    path: Path, key: str, value: Any, allowed: Sequence[Any], *, absent: bool = True
) -> None:
    """Refuse a value that is not among those that edgeq computes.

    Null is harmless where false is, or where the key is no flag; where only true is, null reads as
    false (Transformers masks nothing where ``is_causal`` is null).

    Args:
        path: the file, for the message.
        key: its name.
        value: its value.
        allowed: the values that edgeq computes.
        absent: whether it computes models without the key too, for the message.

    Raises:
        UnsupportedError: names the key, its value, and what is allowed.
    """
    if value is None and tuple(allowed) != (True,):
        return
    if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
        return
    choices = [*map(repr, allowed), *(["absent"] if absent else [])]
    raise UnsupportedError(
        f"{path}: {key} is {shown(value)}, which edgeq cannot run; it runs models where {key} is "
        + " or ".join(choices)
    )
