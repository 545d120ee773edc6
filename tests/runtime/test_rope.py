"""Rotary scaling in the engine: the same integers as in the reference, past every limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.rope_spec import RopeScaling
from edgeq.runtime.engine import Engine
from tests.families import quantized, random_model, tiny_config
from tests.model.test_rotary import DYNAMIC, LONGROPE

YARN = RopeScaling("yarn", 4.0, original_context=16, beta_fast=8.0, attention_factor=1.14)
KINDS = {"longrope": LONGROPE, "dynamic": DYNAMIC, "yarn": YARN}
TOKENS = np.random.default_rng(5).integers(3, 101, 60)


def model_of(kind: str, bits: int) -> Model:
    scheme = f"w{bits}-g32"
    if kind == "temperature":
        return quantized(random_model(tiny_config("ministral3")), scheme)
    return quantized(random_model(tiny_config("qwen2", rope_scaling=KINDS[kind])), scheme)


def divergence(right: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    p, q = (x.astype(np.float64) - x.max(axis=-1, keepdims=True) for x in (right, got))
    p, q = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [*KINDS, "temperature"])
def test_engine_is_near_the_reference_of_its_context(kind: str, bits: int) -> None:
    model = model_of(kind, bits)
    for context in (16, 64):
        tokens = TOKENS[: context - 4]
        right = Reference(model, context=context).forward(tokens)
        outputs = []
        for threads in (1, 2, 3, 4):
            with Engine(model, context=context, threads=threads) as engine:
                outputs.append(engine.forward(tokens, all_logits=True))
                engine.reset()
                steps = [engine.forward([int(token)]) for token in tokens]
                assert divergence(right, np.stack(steps)) < 5e-3
        assert divergence(right, outputs[0]) < 5e-3
        assert all(np.array_equal(outputs[0], other) for other in outputs)
        with Engine(model, context=context, backend="numpy") as engine:
            assert divergence(right, engine.forward(tokens, all_logits=True)) < 5e-3


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_keys_rotated_for_another_context_are_refused(tmp_path: Path, backend: str) -> None:
    model, path = model_of("longrope", 4), tmp_path / "prompt.state"
    with Engine(model, context=16, backend=backend) as engine:
        engine.forward(TOKENS[:9])
        engine.save_state(path)
        snapshot = engine.snapshot()
        following = engine.forward(TOKENS[9:10])
    with Engine(model, context=12, backend=backend) as engine:  # on the same side
        engine.load_state(path)
        assert np.array_equal(engine.forward(TOKENS[9:10]), following)
        engine.restore(snapshot)
    with Engine(model, context=64, backend=backend) as engine:
        with pytest.raises(UsageError, match=r"context of 16 tokens and the engine's is 64"):
            engine.load_state(path)
        with pytest.raises(UsageError, match=r"the snapshot was made with a context of 16 tok"):
            engine.restore(snapshot)


def test_states_go_between_contexts_where_the_rope_does_not_depend_on_them(tmp_path: Path) -> None:
    model, path = model_of("yarn", 4), tmp_path / "prompt.state"
    with Engine(model, context=16) as engine:
        engine.forward(TOKENS[:9])
        engine.save_state(path)
        following = engine.forward(TOKENS[9:10])
    with Engine(model, context=64) as engine:
        engine.load_state(path)
        assert np.array_equal(engine.forward(TOKENS[9:10]), following)
