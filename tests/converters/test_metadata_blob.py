"""What files say of themselves: the same again, and shorter where it can be."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest

from edgeq.converters.metadata_blob import blob_bytes, blob_text, read_blob
from edgeq.core.errors import FormatError

LONG = {"weights": {f"layer{i}/w": {"bits": 4, "shape": [16, 16, 3, 3]} for i in range(40)}}
SHORT = {"weights": {}}


@pytest.mark.parametrize("held", [LONG, SHORT, {"name": "größer\n"}])
def test_a_note_is_read_again(held: dict[str, Any]) -> None:
    assert read_blob(blob_text(held)) == held
    assert read_blob(blob_bytes(held)) == held
    assert read_blob(json.dumps(held, indent=2)) == held


def test_only_a_long_note_is_compressed() -> None:
    plain = len(json.dumps(LONG))
    assert len(blob_bytes(LONG)) < len(blob_text(LONG)) < plain / 5
    assert blob_text(SHORT) == blob_bytes(SHORT).decode() == '{"weights":{}}'


def damaged() -> list[str | bytes]:
    text, raw = blob_text(LONG), blob_bytes(LONG)
    return [text[:-9], text[:7] + "00" + text[9:], text[:20] + '"', "zlib85:", raw[:-5],
            raw[:9] + b"\0\0\0" + raw[12:], b"", "[1]", zlib.compress(b"{"), b"\xff{}"]  # fmt: skip


@pytest.mark.parametrize("given", damaged())
def test_a_damaged_note_is_refused(given: str | bytes) -> None:
    with pytest.raises(FormatError, match="damaged"):
        read_blob(given)
