"""Gated delta nets that list value heads as GGUF files do: the same model with other columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeq.formats.tensor import FloatTensor
from edgeq.model.block import DELTA_OUT, tensor_name
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant.decoder.sampling import sample_texts
from edgeq.runtime.engine import Engine
from tests.families import random_model, tiny_config

TOKENS = np.random.default_rng(2).integers(3, 100, 30).tolist()


@pytest.fixture(scope="module")
def pair() -> tuple[Model, Model]:
    """A model, and the same one with the columns of its output projections in the other order."""
    model = random_model(tiny_config("qwen3_5"))
    blocks, tensors = [], dict(model.tensors)
    for i, block in enumerate(model.config.blocks):
        if block.delta is None:
            blocks.append(block)
            continue
        d, name = block.delta, tensor_name(i, DELTA_OUT)
        grid = tensors[name].numpy().reshape(-1, d.key_heads, d.group, d.value_dim)
        moved = np.ascontiguousarray(grid.swapaxes(1, 2)).reshape(-1, d.values)
        tensors[name] = FloatTensor("float32", moved)
        blocks.append(replace(block, delta=replace(d, tiled_out=True)))
    return model, Model(replace(model.config, blocks=tuple(blocks)), tensors)


def test_the_reference_and_the_engine_compute_the_same(pair: tuple[Model, Model]) -> None:
    model, tiled = pair
    want = Reference(model).forward(TOKENS)
    np.testing.assert_allclose(Reference(tiled).forward(TOKENS), want, atol=1e-4)
    with Engine(model, threads=2) as engine, Engine(tiled, threads=2) as other:
        np.testing.assert_allclose(
            other.forward(TOKENS, all_logits=True), engine.forward(TOKENS, all_logits=True),
            atol=1e-4,
        )  # fmt: skip


def test_texts_are_sampled_and_weights_trained_alike(pair: tuple[Model, Model]) -> None:
    model, tiled = pair
    beginnings = [[1, 5, 7], [9]]
    np.testing.assert_array_equal(
        sample_texts(tiled, beginnings, 12, seed=1), sample_texts(model, beginnings, 12, seed=1)
    )
    torch = pytest.importorskip("torch")
    from edgeq.quant.training.decoder import TorchDecoder
    from edgeq.quant.training.student import float_weights

    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        one, other = (TorchDecoder(m.config, 30)(float_weights(m), tokens)[0] for m in pair)
    np.testing.assert_allclose(other.numpy(), one.numpy(), atol=1e-4)


def test_the_order_is_described_and_read_back(pair: tuple[Model, Model]) -> None:
    model, tiled = pair
    assert ModelConfig.from_dict(tiled.config.to_dict()) == tiled.config
    (delta,) = {block.delta for block in tiled.config.blocks if block.delta}
    assert delta.tiled_out
    blocks = model.config.to_dict()["blocks"]  # which older versions read
    assert all("tiled_out" not in (block.get("delta") or {}) for block in blocks)
