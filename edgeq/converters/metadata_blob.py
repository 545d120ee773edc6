"""edgeq's own metadata in a converted file: JSON, compressed if that is shorter.

The metadata names every packed constant and every scale and zero point. Uncompressed, it would be
a twentieth of a small network's file.
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


def blob_bytes(metadata: Mapping[str, Any]) -> bytes:
    """Metadata as bytes: JSON, or JSON compressed by zlib."""
    plain = _json(metadata)
    return min(plain, zlib.compress(plain, 9), key=len)


def blob_text(metadata: Mapping[str, Any]) -> str:
    """Metadata as text: JSON, or a mark and compressed JSON in base 85."""
    plain = _json(metadata)
    packed = _TEXT_MARK + base64.b85encode(zlib.compress(plain, 9)).decode()
    return min(plain.decode(), packed, key=len)


def read_blob(blob: str | bytes) -> dict[str, Any]:
    """Read metadata that `blob_bytes` or `blob_text` wrote.

    Args:
        blob: what `blob_text` or `blob_bytes` made.

    Raises:
        FormatError: it is none.
    """
    raw = blob.encode() if isinstance(blob, str) else blob
    try:
        if raw.startswith(_TEXT_MARK.encode()):
            raw = base64.b85decode(raw[len(_TEXT_MARK) :])
        metadata = json.loads(zlib.decompress(raw) if raw.startswith(_MARK) else raw)
    except (ValueError, zlib.error) as err:
        raise FormatError(f"the metadata of the file is damaged: {err}") from err
    if not isinstance(metadata, dict):
        raise FormatError("the metadata of the file is damaged: it is not a JSON object")
    return metadata


def _json(metadata: Mapping[str, Any]) -> bytes:
    return json.dumps(metadata, separators=(",", ":")).encode()
