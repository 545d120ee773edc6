"""The fields of request bodies: checks and JSON schemas, both derived from one description.

A field without a description is refused by name, unless it is known to have no effect on this
server (`HARMLESS`). What a client asks for is done or refused, and never silently ignored.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeq.serving.failures import ApiError, wrong

HARMLESS = frozenset(
    ("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
     "store", "user", "verbosity")
)  # fmt: skip
"""Fields of the OpenAI API about its accounts and storage, which have no effect on answers here."""

_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "object": (dict,),
    "array": (list,),
}
_MAX_DEPTH = 200
"""Most levels of nested arrays and objects in a body, which Python can still process."""


@dataclass(frozen=True)
class Field:
    """A field of a request body. A null value is the same as leaving the field out.

    Args:
        name: name of the field.
        kinds: JSON types that the value may have.
        about: a sentence that describes the field.
        low, high: range of a number; None for no limit.
        required: whether the field must be present.
        schema: further keys of the JSON schema, such as the items of an array.
        only: the only allowed values, if the server does not offer what other values ask for.
    """

    name: str
    kinds: tuple[str, ...]
    about: str
    low: float | None = None
    high: float | None = None
    required: bool = False
    schema: Mapping[str, Any] | None = None
    only: tuple[Any, ...] | None = None

    def json_schema(self) -> dict[str, Any]:
        """The JSON schema of the field."""
        made: dict[str, Any] = {"description": self.about, **(self.schema or {})}
        if self.only is not None:
            made["enum"] = [*self.only] if self.required else [*self.only, None]
            return made
        if "anyOf" not in made and "oneOf" not in made:
            made["type"] = [*self.kinds] if self.required else [*self.kinds, "null"]
        if self.low is not None:
            made["minimum"] = self.low
        if self.high is not None:
            made["maximum"] = self.high
        return made

    def check(self, value: Any) -> Any:
        """Check a value of the field and return it.

        Raises:
            ApiError: the value has another type, is out of range, or is not offered.
        """
        for kind in self.kinds:
            if isinstance(value, _TYPES[kind]) and (kind == "boolean" or type(value) is not bool):
                break
        else:
            raise wrong(
                self.name, f"{self.name} is {shown(value)}; use {_either(self.kinds)}",
                "invalid_type",
            )  # fmt: skip
        if isinstance(value, int | float) and not isinstance(value, bool):
            low = -math.inf if self.low is None else self.low
            high = math.inf if self.high is None else self.high
            if not low <= value <= high:
                raise wrong(self.name, f"{self.name} is {shown(value)}; use {_span(low, high)}")
        if self.only is not None and value not in self.only:
            allowed = ", ".join(json.dumps(one) for one in self.only)
            raise wrong(
                self.name, f"{self.name} is {shown(value)}; this server offers only {allowed}",
                "unsupported_value",
            )  # fmt: skip
        return value


def shown(value: Any) -> str:
    """A value as JSON for a message, truncated to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _either(kinds: Sequence[str]) -> str:
    article = {"integer": "an", "object": "an", "array": "an"}
    names = [f"{article.get(kind, 'a')} {kind}" for kind in kinds]
    return ", ".join(names[:-1]) + (" or " if names[1:] else "") + names[-1]


def _span(low: float, high: float) -> str:
    return f"{low} or more" if math.isinf(high) else f"{low} to {high}"


def read_json(raw: bytes) -> dict[str, Any]:
    """Parse a request body.

    Raises:
        ApiError: the body is not a JSON object, is nested too deeply, holds NaN or infinity, or has
            a text that is not valid Unicode.
    """

    try:
        body = strict_json(raw)
        deep = _depth(body)
    except (ValueError, RecursionError) as err:  # bad UTF-8, bad JSON, too many digits
        why = "it is nested too deeply" if isinstance(err, RecursionError) else str(err)
        raise ApiError(400, "invalid_json", f"the body is not JSON: {why}") from err
    if deep > _MAX_DEPTH:
        raise ApiError(400, "invalid_json", f"the body is nested deeper than {_MAX_DEPTH} levels")
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as err:
        raise ApiError(
            400,
            "invalid_json",
            "a text of the body is not valid Unicode: it holds half of a surrogate pair, "
            f"\\u{ord(err.object[err.start]):04x}; leave it out",
        ) from err
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", f"the body is {shown(body)}; send a JSON object")
    return body


def strict_json(text: str | bytes) -> Any:
    """Parse JSON, without the names NaN and Infinity that Python's own parser accepts.

    Raises:
        ValueError: the text is not JSON.
        RecursionError: it is nested too deeply.
    """

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    return json.loads(text, parse_constant=refuse)


def _depth(value: Any) -> int:
    deepest, rest = 0, [(value, 1)]
    while rest:
        one, level = rest.pop()
        deepest = max(deepest, level)
        inner = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        rest += [(each, level + 1) for each in inner]
        if isinstance(one, float) and not math.isfinite(one):
            raise ValueError("a number is too large")
    return deepest


def read(body: Mapping[str, Any], fields: Iterable[Field]) -> dict[str, Any]:
    """Check the fields of a request body.

    Returns:
        the value of every field; None for fields that are left out.

    Raises:
        ApiError: a field is unknown, missing, or has a value that is not allowed.
    """
    known = {field.name: field for field in fields}
    for name in body:
        if name not in known and name not in HARMLESS:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            hint = f"; did you mean {near[0]!r}?" if near else "; leave it out"
            raise wrong(
                name[:60],
                f"this server does not know the field {name[:60]!r}{hint}",
                "unknown_parameter",
            )
    values = {}
    for name, field in known.items():
        value = body.get(name)
        if value is not None:
            value = field.check(value)
        elif field.required:
            raise wrong(name, f"the field {name!r} is missing", "missing_required_parameter")
        values[name] = value
    return values


def object_schema(fields: Iterable[Field]) -> dict[str, Any]:
    """The JSON schema of a request body."""
    listed = list(fields)
    return {
        "type": "object",
        "properties": {field.name: field.json_schema() for field in listed},
        "required": [field.name for field in listed if field.required],
        "additionalProperties": False,  # see `read`
    }
