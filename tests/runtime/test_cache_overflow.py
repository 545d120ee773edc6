"""Keys and values too large for the cache are named as the reason, never as a damaged file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.tensor import FloatTensor
from edgeq.model.kv_bits import KvBits
from edgeq.model.model import Model
from edgeq.runtime.engine import Engine
from tests.families import random_model, tiny_config

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
BACKENDS = ("numba", "numpy")


def scaled(model: Model, **factors: float) -> Model:
    """Matrices of every layer multiplied by factors, as ``v_proj=1e6``."""
    tensors = dict(model.tensors)
    for name, tensor in model.tensors.items():
        factor = factors.get(name.split(".")[-2])
        if factor is not None:
            tensors[name] = FloatTensor("float32", (tensor.numpy() * factor).astype(np.float32))
    return replace(model, tensors=tensors)


def plain() -> Model:
    return random_model(tiny_config("llama", rope_scaling=None))


def engine(model: Model, kv_bits: KvBits, backend: str) -> Engine:
    return Engine(model, threads=1, kv_bits=kv_bits, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_past_float16(backend: str) -> None:
    """v times 1e6 and o divided by it: the same function, which an 8-bit cache runs."""
    model = scaled(plain(), v_proj=1e6, o_proj=1e-6)
    with engine(model, 8, backend) as right, engine(plain(), 8, backend) as same:
        want = same.forward(TOKENS)
        np.testing.assert_allclose(right.forward(TOKENS), want, atol=2e-2 * np.abs(want).max())
    with (
        engine(model, 16, backend) as overflown,
        pytest.raises(UnsupportedError, match="float16 KV cache overflowed: layer 0 makes values"),
    ):
        overflown.forward(TOKENS)


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_past_float16(backend: str, kv_bits: KvBits) -> None:
    """Both caches hold keys in float16."""
    model = scaled(plain(), k_proj=1e7, q_proj=1e-7)
    with (
        engine(model, kv_bits, backend) as overflown,
        pytest.raises(UnsupportedError, match=r"KV cache overflowed: .* multiply q_proj by it"),
    ):
        overflown.forward(TOKENS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_decoding_notices_too(backend: str) -> None:
    model = scaled(plain(), v_proj=1e6, o_proj=1e-6)
    with (
        engine(model, 16, backend) as overflown,
        pytest.raises(UnsupportedError, match="float16 KV cache overflowed"),
    ):
        overflown.greedy(3, 5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("kv_bits", "part"), [(8, "mlp.down"), (16, "mlp.down"), (16, "self_attn.v")]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_weights_are_no_overflow(
    backend: str, kv_bits: KvBits, part: str, bad: float
) -> None:
    model, name = plain(), f"model.layers.0.{part}_proj.weight"
    values = model.tensors[name].numpy().copy()
    values[0, 0] = bad
    model = replace(model, tensors={**model.tensors, name: FloatTensor("float32", values)})
    with engine(model, kv_bits, backend) as damaged:
        assert not np.isfinite(damaged.forward(TOKENS).max())
        damaged.reset()
        with pytest.raises(FormatError, match="damaged or holds NaN or Inf"):
            damaged.greedy(3, 5)
