"""Blocks: where files are cut, and what a change leaves alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from edgeq.packaging import blocks
from edgeq.packaging.blocks import LEAST, MOST, WHOLE, digest_and_blocks


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def noise(n: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(n)


def digests(path: Path) -> set[str]:
    return {block.sha256 for block in digest_and_blocks(path)[1]}


@pytest.mark.parametrize("size", [0, 1, WHOLE - 1, WHOLE, WHOLE + 1, 3_000_000])
def test_blocks_are_the_file_in_order(size: int, tmp_path: Path) -> None:
    data = noise(size)
    digest, cut = digest_and_blocks(written(tmp_path / "a", data))
    assert digest == hashlib.sha256(data).hexdigest()
    assert all(LEAST <= block.nbytes <= MOST for block in cut[:-1])
    assert len(cut) <= 1 or size > WHOLE
    start = 0
    for block in cut:
        piece = data[start : start + block.nbytes]
        assert block.sha256 == hashlib.sha256(piece).hexdigest()
        start += block.nbytes
    assert start == size


def test_places_are_those_of_the_hash_computed_byte_by_byte(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "_PIECE", 5_000)  # many pieces, so that their borders matter
    data = np.frombuffer(noise(400_000), np.uint8)
    mask = ((1 << 17) - 1) << 15
    hashed, places = 0, []
    for at, byte in enumerate(data.tolist(), 1):
        hashed = ((hashed << 1) + int(blocks._GEARS[byte])) & 0xFFFFFFFF
        if not hashed & mask:
            places.append(at)
    assert places
    assert list(blocks._candidates(data)) == places


def test_a_change_leaves_other_blocks_alike(tmp_path: Path) -> None:
    data = noise(6_000_000)
    before = digests(written(tmp_path / "a", data))
    changed = bytearray(data)
    changed[2_000_000] ^= 1
    changed[4_000_000:4_000_000] = b"something put in"
    after = digests(written(tmp_path / "b", bytes(changed)))
    assert 1 <= len(after - before) <= 6
    assert len(after & before) > 20


def test_equal_bytes_are_cut_too(tmp_path: Path) -> None:
    _, cut = digest_and_blocks(written(tmp_path / "a", bytes(2_000_000)))
    assert {block.nbytes for block in cut[:-1]} <= {MOST}
    assert len({block.sha256 for block in cut[:-1]}) == 1
