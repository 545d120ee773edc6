"""GGUF to GGUF: the integers of a file come out as they went in, or are refused by name."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from edgeq.converters.convert import convert
from edgeq.core.errors import UnsupportedError
from edgeq.importers.gguf.file import GgufFile, open_gguf
from tests.importers.gguf.test_kept import written


def contents(file: GgufFile) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every quantized tensor."""
    found = {}
    for name, entry in file.tensors.items():
        stop = entry.start + entry.row_bytes * math.prod(entry.shape[:-1])
        if entry.type not in ("F32", "F16"):
            found[name] = entry.type, file.mapping.bytes(entry.start, stop)
    return found


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_bytes_come_out_as_they_went_in(tmp_path: Path, kind: str) -> None:
    written(tmp_path / "in.gguf", "llama", [kind])
    convert(tmp_path / "in.gguf", "gguf", tmp_path / "out.gguf", validate=False)
    before, after = (contents(open_gguf(tmp_path / f"{end}.gguf")) for end in ("in", "out"))
    assert {kind for kind, _ in before.values()} == {kind}
    assert before == after


def test_what_a_target_cannot_hold_is_named(tmp_path: Path) -> None:
    written(tmp_path / "in.gguf", "llama", ["Q4_1"])
    with pytest.raises(UnsupportedError, match=r"cannot hold model\..* as w4-g32-min"):
        convert(tmp_path / "in.gguf", "ort", tmp_path / "out", validate=False)
    assert not (tmp_path / "out").exists()
