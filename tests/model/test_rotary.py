"""Rotary embeddings that depend on the length, and the factors on what is rotated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeq.core.errors import FormatError, UsageError
from edgeq.model.config import ModelConfig
from edgeq.model.reference import Reference
from edgeq.model.rope_spec import RopeScaling, RopeSpec
from edgeq.model.rotary import (
    config_at,
    default_context,
    rope_at,
    rope_frequencies,
    rope_tables,
    same_ropes,
)
from tests.families import random_model, tiny_config

LONGROPE = RopeScaling(
    "longrope", 4.0, original_context=16, attention_factor=1.2,
    short_factors=(1.0, 1.1, 1.2, 1.3, 1.5, 2.0), long_factors=(1.0, 2.0, 3.0, 5.0, 8.0, 9.0),
)  # fmt: skip
DYNAMIC = RopeScaling("dynamic", 2.0, original_context=32)
TOKENS = np.arange(3, 43)


def config(scaling: RopeScaling) -> ModelConfig:
    return tiny_config("qwen2", rope_scaling=scaling)


def test_longrope_changes_its_factors_past_the_original_context() -> None:
    rope = RopeSpec(10000.0, 12, LONGROPE)
    plain = rope_frequencies(RopeSpec(10000.0, 12))
    np.testing.assert_allclose(rope_frequencies(rope, 16), plain / LONGROPE.short_factors)
    np.testing.assert_allclose(rope_frequencies(rope, 17), plain / LONGROPE.long_factors)
    fixed = rope_at(rope, 17)
    assert rope_at(fixed, 5) == fixed
    assert same_ropes(config(LONGROPE), 3, 16)
    assert not same_ropes(config(LONGROPE), 16, 17)


def test_dynamic_raises_its_base_past_the_original_context() -> None:
    rope = RopeSpec(10000.0, 12, DYNAMIC)
    assert rope_at(rope, 32) == RopeSpec(10000.0, 12)
    base = 10000.0 * (2.0 * 48 / 32 - 1) ** (12 / 10)
    assert rope_at(rope, 48).base == pytest.approx(base, rel=1e-12)
    assert not same_ropes(config(DYNAMIC), 47, 48)


@pytest.mark.parametrize("scaling", [LONGROPE, DYNAMIC])
def test_nothing_is_stretched_where_no_context_is_asked_for(scaling: RopeScaling) -> None:
    assert default_context(config(scaling)) == scaling.original_context
    assert default_context(tiny_config("llama")) == 64


@pytest.mark.parametrize("scaling", [LONGROPE, DYNAMIC])
def test_the_reference_goes_by_its_context(scaling: RopeScaling) -> None:
    model = random_model(config(scaling))
    there = replace(model, config=config_at(model.config, 64))
    wanted = Reference(there).forward(TOKENS)
    assert np.array_equal(Reference(model, context=64).forward(TOKENS), wanted)
    assert not np.allclose(Reference(model, context=8).forward(TOKENS), wanted, atol=1e-3)


def test_a_cache_is_not_read_with_other_frequencies() -> None:
    reference = Reference(random_model(config(LONGROPE)))
    cache = reference.new_cache()
    reference.forward(TOKENS[:10], cache)
    reference.forward(TOKENS[10:16], cache)
    with pytest.raises(UsageError, match=r"grows to 17 tokens.*at most 16; give Reference the con"):
        reference.forward(TOKENS[16:17], cache)
    cache.truncate(0)
    reference.forward(TOKENS, cache)  # chosen anew for an empty cache
    reference.forward(TOKENS[:1], cache)


def test_factors_multiply_what_is_rotated_and_temperatures_the_queries_alone() -> None:
    scaling = RopeScaling("yarn", 4.0, original_context=8, attention_factor=1.25)
    rope = RopeSpec(10000.0, 12, scaling, temperature=0.3, temperature_length=8)
    cos, sin = rope_tables(rope, 30)
    amplitude = np.sqrt(cos[:, 0] ** 2 + sin[:, 0] ** 2)
    wanted = 1.25 * (1 + 0.3 * np.log(1 + np.arange(30) // 8))
    np.testing.assert_allclose(amplitude, wanted, rtol=1e-6)
    cos, sin = rope_tables(rope.for_keys, 30)
    np.testing.assert_allclose(np.sqrt(cos**2 + sin**2), 1.25, rtol=1e-6)


def test_an_artifact_holds_them_and_older_ones_are_unchanged() -> None:
    made = config(LONGROPE)
    blocks = tuple(
        replace(block, rope=replace(block.rope, temperature=0.1, temperature_length=16))
        for block in made.blocks
        if block.rope
    )
    made = replace(made, blocks=blocks)
    assert ModelConfig.from_dict(made.to_dict()) == made
    assert made.to_dict()["blocks"][0]["rope"]["temperature"] == 0.1
    old = tiny_config("llama").to_dict()["blocks"][0]["rope"]
    assert set(old) == {"base", "dim", "scaling"}
    assert set(old["scaling"]) == {
        "kind", "factor", "low_freq_factor", "high_freq_factor", "original_context",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RopeScaling("ntk", 2.0), "kind 'ntk'.*'yarn', 'longrope', 'dynamic'"),
        (lambda: replace(LONGROPE, long_factors=()), r"long_factors is \(\).*longrope"),
        (lambda: replace(DYNAMIC, short_factors=(1.0,)), "short_factors is .* empty for other"),
        (lambda: replace(LONGROPE, short_factors=(0.0,)), "short_factors is"),
        (lambda: RopeScaling("yarn", 2.0, truncate=1), "truncate is 1"),
        (lambda: RopeScaling("yarn", 2.0, beta_fast=0.0), r"beta_fast is 0\.0"),
        (lambda: RopeSpec(1e4, 8, LONGROPE), "short_factors holds 6 numbers; 4 pairs"),
        (lambda: RopeSpec(1e4, 2, DYNAMIC), "rope dim of at least 4"),
        (lambda: RopeSpec(1.0, 8, RopeScaling("yarn", 2.0)), "base other than 1"),
        (lambda: RopeSpec(1e4, 8, temperature=-1.0), r"temperature is -1\.0"),
        (lambda: RopeSpec(1e4, 8, temperature=1.0), "temperature_length is 0"),
        (lambda: RopeSpec(1e4, 8, temperature_length=4), "temperature_length is 4"),
        (
            lambda: tiny_config("ministral3", rope_dim=8),
            "rope dim is 8; with a temperature it must be head_dim 12",
        ),
    ],
)
def test_impossible_values_are_refused(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(FormatError, match=words):
        make()
