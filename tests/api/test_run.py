"""`edgeq.run` with the KV cache of a prompt in a file, as ``edgeq run --prompt-cache``."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgeq
from tests.conftest import small_checkpoint

STORY = "Once upon a time, there was a little girl named Lily."


def text(cache: Path | None = None, *, whole: bool = False) -> str:
    chunks = edgeq.run(
        small_checkpoint(), STORY, edgeq.SamplingParams(temperature=0), max_tokens=12, threads=1,
        prompt_cache=cache, prompt_cache_all=whole,
    )  # fmt: skip
    return "".join(chunk.text for chunk in chunks)


def test_a_prompt_is_kept_in_a_file(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    plain = text()
    assert text(cache) == plain
    saved = cache.read_bytes()
    assert text(cache) == plain
    assert cache.read_bytes() == saved
    assert text(cache, whole=True) == plain
    assert cache.stat().st_size > len(saved)
    cache.write_bytes(saved[:-9])
    with pytest.raises(edgeq.FormatError, match="delete it to start again"):
        text(cache)


def test_the_whole_text_needs_a_file() -> None:
    with pytest.raises(edgeq.UsageError, match="needs prompt_cache"):
        text(whole=True)
