"""What a file says of itself beside what a runtime reads: JSON, compressed where that is shorter.

Such a note names every packed constant and every grid. As plain JSON it would be a twentieth of
a small network's file.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

from edgeq.core.errors import FormatError

_MARK = b"\x78"
"""First byte of zlib's form; JSON begins with another."""
_TEXT_MARK = "zlib85:"


def blob_bytes(held: Mapping[str, Any]) -> bytes:
    """A note for a place that takes bytes: JSON, or that compressed by zlib."""
    plain = _json(held)
    return min(plain, zlib.compress(plain, 9), key=len)


def blob_text(held: Mapping[str, Any]) -> str:
    """A note for a place that takes text: JSON, or a mark and that compressed, in base 85."""
    plain = _json(held)
    packed = _TEXT_MARK + base64.b85encode(zlib.compress(plain, 9)).decode()
    return min(plain.decode(), packed, key=len)


def read_blob(given: str | bytes) -> dict[str, Any]:
    """What a note says.

    Args:
        given: what `blob_text` or `blob_bytes` made.

    Raises:
        FormatError: it is none.
    """
    raw = given.encode() if isinstance(given, str) else given
    try:
        if raw.startswith(_TEXT_MARK.encode()):
            raw = base64.b85decode(raw[len(_TEXT_MARK) :])
        held = json.loads(zlib.decompress(raw) if raw.startswith(_MARK) else raw)
    except (ValueError, zlib.error) as err:
        raise FormatError(f"the metadata of the file is damaged: {err}") from err
    if not isinstance(held, dict):
        raise FormatError("the metadata of the file is damaged: it is not a JSON object")
    return held


def _json(held: Mapping[str, Any]) -> bytes:
    return json.dumps(held, separators=(",", ":")).encode()
