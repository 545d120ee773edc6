"""No compiled step writes past its buffers, whatever the heads, their size and the context.

Every block of memory that the engine hands to compiled code gets a guard behind it. After prompts
and decoded tokens the guards must be as they were.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.model.block import BlockSpec
from edgeq.model.memory_layout import attention_work, buffers, layout_bytes
from edgeq.model.rope_spec import RopeSpec
from edgeq.runtime import engine_memory
from edgeq.runtime.engine import Engine
from tests.families import blocks, random_model, tiny_config, with_blocks

GUARD = 256
"""Bytes behind every block: more than any vector store."""
PATTERN = 0xA5


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, NDArray[np.uint8]]]:
    """Guards of all blocks that engines allocate: (bytes of the block, the guard)."""
    made: list[tuple[int, NDArray[np.uint8]]] = []

    def zeros(self: engine_memory.EngineMemory, count: int, dtype: Any) -> NDArray[Any]:
        nbytes = count * np.dtype(dtype).itemsize
        raw = np.zeros(nbytes + GUARD + engine_memory.ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % engine_memory.ALIGNMENT
        guard = raw[start + nbytes : start + nbytes + GUARD]
        guard[:] = PATTERN
        made.append((nbytes, guard))
        part: NDArray[Any] = raw[start : start + nbytes].view(dtype)
        self._arrays.append(part)
        return part

    monkeypatch.setattr(engine_memory.EngineMemory, "zeros", zeros)
    return made


SHAPES = [
    (heads, kv_heads, dim)
    for heads, kv_heads in ((1, 1), (2, 1), (3, 3), (4, 2), (6, 2), (8, 1), (9, 3), (32, 1))
    for dim in (2, 12, 16, 32, 64, 80, 128)
    if heads * dim <= 512
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_nothing_is_written_past_a_buffer(
    guards: list[tuple[int, NDArray[np.uint8]]],
    heads: int, kv_heads: int, dim: int, kv_bits: int, threads: int,
) -> None:  # fmt: skip
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "context": 600}
    kinds = (
        BlockSpec(rope=RopeSpec(10000.0, dim)),
        BlockSpec(rope=None, qk_norm="all", norm_before=False, norm_after=True),
    )
    model = random_model(tiny_config("llama", blocks=kinds, **shape))
    for context, window in ((17, None), (257, None), (600, 40)):
        config = with_blocks(model.config, window=window)
        tokens = np.random.default_rng(0).integers(0, config.vocab, context - 3).tolist()
        guards.clear()
        with Engine(
            replace(model, config=config), threads=threads, kv_bits=kv_bits, context=context
        ) as engine:
            engine.forward(tokens)
            engine.greedy(1, 2)
        assert guards
        for nbytes, guard in guards:
            assert (guard == PATTERN).all(), f"written past a block of {nbytes} bytes"


def test_parts_of_the_work_area_do_not_overlap() -> None:
    base = tiny_config("llama")
    for heads, dim in itertools.product((1, 2, 7, 32), (2, 32, 34, 256)):
        config = replace(base, heads=heads, kv_heads=1, head_dim=dim, blocks=blocks(dim))
        end = 0
        for offset, nbytes in attention_work(config).values():
            assert offset == end
            end = offset + nbytes
        assert end <= layout_bytes(attention_work(config)) == buffers(config, 64, 2).work
