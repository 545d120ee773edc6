"""manifest.json: one text for one content, and every edit of it is seen."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from edgeq.core.errors import FormatError
from edgeq.packaging.manifest import Manifest, check_path, read_manifest


@pytest.fixture(scope="module")
def raw(rpi_made: Path) -> bytes:
    return (rpi_made / "manifest.json").read_bytes()


def resealed(data: dict[str, Any]) -> bytes:
    """A manifest with the digest of what it says."""
    rest = {key: value for key, value in data.items() if key != "digest"}

    def text(one: dict[str, Any]) -> bytes:
        return (json.dumps(one, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    return text(rest | {"digest": hashlib.sha256(text(rest)).hexdigest()})


def test_what_is_read_gives_the_same_text(raw: bytes) -> None:
    made = Manifest.from_bytes(raw)
    assert made.to_bytes() == raw
    assert made.digest == json.loads(raw)["digest"]
    assert resealed(json.loads(raw)) == raw


def test_any_byte_that_is_changed_is_seen(raw: bytes) -> None:
    rng = random.Random(0)
    for _ in range(200):
        changed = bytearray(raw)
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        with pytest.raises(FormatError):
            Manifest.from_bytes(bytes(changed))


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("manifest",), 3, "version 3"),
        (("manifest",), True, "not the manifest"),
        (("name",), 7, "name is 7; it must be a text"),
        (("more",), 7, "manifest.json must have the fields"),
        (("variants",), [], "no variants"),
        (("variants", 0, "entry"), "../x", "not a path within"),
        (("variants", 0, "files"), ["missing.bin"], "names the file missing.bin, which is not in"),
        (
            ("variants", 0, "context"),
            "many",
            "context is .many.; it must be a whole number",
        ),
        (("tiers",), [], "the variant edgeq has no tier"),
        (("tiers", 0, "more"), 7, "a tier must have the fields"),
        (("tiers", 0, "context"), "many", "field of a wrong type"),
        (("tiers", 0, "context"), True, "field of a wrong type"),
        (("tiers", 0, "threads"), 0, "threads is 0; it must be a positive whole number or null"),
        (("tiers", 0, "devices"), [7], "field of a wrong type"),
        (("tiers", 0, "needed_bytes"), None, "field of a wrong type"),
        (("tiers", 0, "needed_bytes"), 7, "which the memory of its variant does not state"),
        (("tiers", 0, "context"), 64, "which the memory of its variant does not state"),
        (("tiers", 0, "variant"), "other", "'other', which is not one of edgeq"),
        (("tiers", 0, "entry"), "model/x", "names the file model/x, and its variant has"),
        (("variants", 0, "memory"), [{}], "memory of a variant cannot be read"),
        (("files", "README.md", "sha256"), "abc", "no valid SHA-256 or size"),
        (("files", "README.md", "bytes"), -1, "no valid SHA-256 or size"),
        (("files", "README.md", "blocks"), ["a 1"], "do not add up|is not a block"),
        (("files", "/etc/passwd"), {"sha256": "0" * 64, "bytes": 0}, "not a path within"),
    ],
)
def test_impossible_content_is_named_even_with_its_digest(
    raw: bytes, where: tuple[Any, ...], value: Any, words: str
) -> None:
    data = json.loads(raw)
    inner = data
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(FormatError, match=words):
        Manifest.from_bytes(resealed(data))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(FormatError):
        read_manifest(tmp_path)


@pytest.mark.parametrize("path", ["", ".", "..", "a/../b", "/a", "a//b", "a\\b", "a\nb", 7, "a/"])
def test_paths_stay_within_the_package(path: Any) -> None:
    with pytest.raises(FormatError, match="not a path within"):
        check_path(path)


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("variants", 0, "entry"), "model/none", "is or lies in its entry"),
        (("variants", 0, "context"), 10**15, "must be a whole number of 1 to 16777216 tokens"),
        (("variants", 0, "context"), -5, "must be a whole number of 1 to 16777216 tokens"),
        (("files", "README.md", "bytes"), 10**30, "in one block"),
        (("files", "README.md", "blocks"), ["0" * 64 + " " + "9" * 5000] * 2, "is not a block"),
        (("files", "README.md", "blocks"), ["0" * 64 + " 1000000000000"] * 2, "is not a block"),
    ],
)
def test_huge_numbers_are_refused_before_they_are_used(
    raw: bytes, where: tuple[Any, ...], value: Any, words: str
) -> None:
    test_impossible_content_is_named_even_with_its_digest(raw, where, value, words)


def test_half_a_surrogate_pair_is_refused(raw: bytes) -> None:
    data = json.loads(raw)
    data["model"]["name"] = "\ud800"
    with pytest.raises(FormatError, match="holds text that JSON cannot represent"):
        Manifest.from_bytes(json.dumps(data).encode())
