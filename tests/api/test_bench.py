"""`edgeq.bench` says what it measured in llama-bench's words."""

from __future__ import annotations

import pytest

import edgeq
from edgeq.model.kv_bits import KvBits
from tests.families import quantized, random_model, tiny_config


@pytest.mark.parametrize(("bits", "name"), [(4, "q4_0"), (8, "q8_0"), (16, "f16")])
def test_the_cache_s_type_has_llama_bench_s_name(bits: KvBits, name: str) -> None:
    model = quantized(random_model(tiny_config("llama")), "w4-g32")
    (row,) = edgeq.bench(model, n_prompt=[4], n_gen=[], threads=[1], repetitions=1, kv_bits=bits)
    assert (row["type_k"], row["type_v"]) == (name, name)
