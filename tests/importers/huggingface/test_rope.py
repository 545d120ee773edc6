"""Every kind of rotary scaling, wherever a config.json keeps it, against Transformers' logits.

Sequences are shorter and longer than the original context. Transformers chooses frequencies that
depend on the length by the sequence it is given, and edgeq by the context: both are the same here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.importers import load
from edgeq.model.reference import Reference
from tests.importers.huggingface.test_settings import (
    SIZES,
    assert_refused,
    checkpoint,
    settings,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTHS = (20, 61)
SHORT, LONG = [1.0, 1.1, 1.3, 2.0], [1.0, 2.5, 7.0, 11.0]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
LONGROPE = {"short_factor": SHORT, "long_factor": LONG}
INSIDE = {"original_max_position_embeddings": 32}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn, its context inside": ("llama", {"rope_scaling": {**YARN, **INSIDE}}),
    "yarn, its context beside": (
        "llama", {"rope_scaling": YARN, "original_max_position_embeddings": 16},
    ),
    "yarn, in the old spelling": (
        "qwen2",
        {"rope_scaling": {"type": "yarn", "factor": 4.0, **INSIDE}, "rope_parameters": None},
    ),
    "yarn, limits not rounded": (
        "qwen3",
        {"rope_parameters": {
            **YARN, **INSIDE, "beta_fast": 8, "beta_slow": 0.5, "truncate": False,
        }},
    ),
    "yarn, two mscales": (
        "qwen3", {"rope_parameters": {**YARN, **INSIDE, "mscale": 1.0, "mscale_all_dim": 0.5}},
    ),
    "yarn, one mscale": ("qwen3", {"rope_parameters": {**YARN, **INSIDE, "mscale": 0.7}}),
    "yarn, its own attention factor": (
        "qwen3", {"rope_parameters": {**YARN, **INSIDE, "attention_factor": 1.7}},
    ),
    "yarn, factor of the contexts": (
        "qwen3", {"rope_parameters": {**YARN, **INSIDE, "factor": None}},
    ),
    "yarn, without rotation in some layers": ("smollm3", {"rope_parameters": {**YARN, **INSIDE}}),
    "yarn, one object for each kind of layer": (
        "gemma3_text",
        {"rope_parameters": {
            "full_attention": {**YARN, **INSIDE},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }},
    ),
    "dynamic": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 24},
    ),
    "dynamic, in the old spelling": (
        "qwen2",
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 24},
    ),
    "longrope": (
        "llama",
        {"rope_scaling": {
            "rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 24,
        }},
    ),
    "longrope, factor and attention factor": (
        "llama",
        {"rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, **LONGROPE, "factor": 3.0,
            "original_max_position_embeddings": 24, "attention_factor": 1.4,
        }},
    ),
    "longrope, as Phi-3.5": (
        "phi3",
        {"rope_scaling": {"type": "longrope", **LONGROPE}, "rope_parameters": None,
         "original_max_position_embeddings": 24},
    ),
    "longrope, as Phi-4-mini": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": SHORT[:3], "long_factor": LONG[:3]},
         "rope_parameters": None, "original_max_position_embeddings": 24,
         "partial_rotary_factor": 0.75},
    ),
    "temperature, as Ministral 3": (
        "ministral3",
        {"rope_parameters": {
            **YARN, "type": "yarn", "original_max_position_embeddings": 8, "mscale": 1.0,
            "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3, "max_position_embeddings": 128,
        }},
    ),
}  # fmt: skip


def theirs(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        logits: NDArray[np.float32] = model.eval()(torch.tensor(tokens[None])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("case", CASES)
def test_every_kind_gives_their_logits_at_once_in_chunks_and_step_by_step(
    tmp_path: Path, case: str
) -> None:
    name, over = CASES[case]
    folder = checkpoint(tmp_path, name)
    plain = Reference(load(folder))
    with settings(folder, over):
        model = load(folder)
        for n in LENGTHS:
            tokens = np.random.default_rng(n).integers(3, 64, n)
            want = theirs(folder, tokens)
            near = 1e-4 * np.abs(want).max()
            reference = Reference(model, context=n)
            assert np.abs(reference.forward(tokens) - want).max() < near
            for step in (1, 7):
                cache = reference.new_cache()
                parts = [reference.forward(tokens[a : a + step], cache) for a in range(0, n, step)]
                assert np.abs(np.concatenate(parts) - want).max() < near
        # the setting matters
        assert np.abs(plain.forward(tokens) - want).max() > 10 * near


def test_without_a_context_the_first_pass_chooses(tmp_path: Path) -> None:
    name, over = CASES["longrope, as Phi-3.5"]
    folder = checkpoint(tmp_path, name)
    with settings(folder, over):
        model = load(folder)
        for n in LENGTHS:
            tokens = np.random.default_rng(n).integers(3, 64, n)
            want = theirs(folder, tokens)
            got = Reference(model).forward(tokens)
            assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_qwen_with_yarn_and_dynamic_reach_further_than_their_position_embeddings(
    tmp_path: Path,
) -> None:
    folder = checkpoint(tmp_path, "qwen2", max_position_embeddings=32)
    assert load(folder).config.context == 32
    with settings(folder, {"rope_scaling": {"type": "yarn", "factor": 4.0, **INSIDE}}):
        assert load(folder).config.context == 128
    with settings(folder, {"rope_scaling": {"type": "yarn", "factor": 4.0}}):
        assert load(folder).config.context == 32
    with settings(folder, {"rope_scaling": {"type": "dynamic", "factor": 2.5}}):
        assert load(folder).config.context == 80


def test_a_factor_past_all_bounds_makes_no_longer_context_than_there_may_be(
    tmp_path: Path,
) -> None:
    folder = checkpoint(tmp_path, "llama")
    with settings(folder, {"rope_scaling": {"rope_type": "dynamic", "factor": 1e308}}):
        assert load(folder).config.context == 1 << 31


def test_su_is_longrope(tmp_path: Path) -> None:
    """As in the first files of Phi-3-mini-128k; Transformers reads them no more."""
    folder = checkpoint(tmp_path, "phi3")
    over = {"original_max_position_embeddings": 24, "rope_parameters": None}
    with settings(folder, {**over, "rope_scaling": {"type": "su", **LONGROPE}}):
        old = load(folder).config
    with settings(folder, {**over, "rope_scaling": {"type": "longrope", **LONGROPE}}):
        assert load(folder).config == old


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_type": "ntk", "factor": 2.0}, "rope_type in rope_scaling is 'ntk'.*dynamic"),
    ("llama", {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, r"alpha is 1000\.0"),
    ("llama", {"rope_type": "dynamic"}, "rope factor is"),
    ("llama", {**YARN, "extrapolation_factor": 2.0}, r"extrapolation_factor is 2\.0"),
    ("llama", {**YARN, "factor": -4.0}, r"rope factor is -4\.0"),
    ("llama", {**YARN, "truncate": "no"}, "truncate is 'no'"),
    ("llama", {**YARN, "attention_factor": 0}, "attention_factor is 0"),
    ("llama", {"rope_type": "longrope", "short_factor": SHORT}, "long_factor is None.* 4 rotated"),
    (
        "llama",
        {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG[:3]},
        "long_factor is .* 4 rotated",
    ),
    (
        "llama",
        {"rope_type": "longrope", "short_factor": [*SHORT[:3], 0], "long_factor": LONG},
        "short_factor is 0",
    ),
    (
        "llama",
        {"rope_type": "longrope", **LONGROPE, "original_max_position_embeddings": 1},
        "original_max_position_embeddings is 1; it must be at least 2",
    ),
    ("llama", {"rope_type": "longrope", "mscale": 3.0, **LONGROPE}, r"mscale is 3\.0"),
    ("phi3", {"rope_type": "linear", "factor": 4.0}, "'linear'.*longrope, su, yarn"),
    ("ministral3", {**YARN, **INSIDE}, "llama_4_scaling_beta in rope_scaling is None"),
    ("ministral3", {"rope_type": "default", "llama_4_scaling_beta": 0.1}, "'default'"),
]


@pytest.mark.parametrize("name", ["llama", "phi3", "ministral3"])
def test_what_is_no_known_setting_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path, name)
    for family, scaling, words in REFUSED:
        if family == name:
            with settings(folder, {"rope_scaling": scaling}):
                assert_refused(folder, words)


def test_the_decoder_of_a_ministral_3_that_sees(tmp_path: Path) -> None:
    text = {
        **SIZES, "model_type": "ministral3", "tie_word_embeddings": True,
        "rope_parameters": CASES["temperature, as Ministral 3"][1]["rope_parameters"],
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "image_size": 28,
        "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=7, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    model = transformers.Mistral3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(10, 64, 40)
    with torch.no_grad():
        want = model(input_ids=torch.tensor(tokens[None])).logits[0].numpy()
    got = load(tmp_path)
    assert got.config.family == "ministral3"
    assert got.config.tied
    near = 1e-4 * np.abs(want).max()
    assert np.abs(Reference(got).forward(tokens) - want).max() < near
