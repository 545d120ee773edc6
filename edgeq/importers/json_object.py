"""JSON objects of a model's files: of a file in a folder, or of bytes that have been read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError
from edgeq.core.files import STAND_IN_BYTES, stand_in


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FormatError: it cannot be read, is not JSON, or is no object.
    """
    try:
        data = path.read_bytes()
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    return _parsed(data, str(path), "; fetch it again")


def read_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object in one of a model's files; an empty one where there is no such file.

    Raises:
        FormatError: it is not JSON, or no object.
    """
    return _parsed(files.get(name, b"{}"), name, "")


def _parsed(data: bytes, name: str, advice: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as err:
        if words := stand_in(data[:STAND_IN_BYTES]):
            raise FormatError(f"{name} {words}") from err
        raise FormatError(f"{name} is not JSON ({err}){advice}") from err
    if not isinstance(value, dict):
        raise FormatError(f"{name} holds a {type(value).__name__}, expected an object")
    return value
