"""The files of the families say what Transformers and llama.cpp say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from edgeq.importers.huggingface import families
from edgeq.importers.huggingface.families import FAMILIES, GGUF_FAMILIES, MODEL_TYPES
from tests.families import FAMILIES as TESTED
from tests.families import tiny_config

OF_THEIR_OWN_CODE = {"minicpm"}
"""Families that Transformers does not have: their code lies beside the weights."""
OPTIONAL = {
    # rotary factors
    "rope_freqs", "rope_factors_long", "rope_factors_short", "blk.{bid}.attn_rot_embd",
    # experts
    "blk.{bid}.ffn_gate_inp", "blk.{bid}.ffn_gate_exps", "blk.{bid}.ffn_up_exps",
    "blk.{bid}.ffn_down_exps", "blk.{bid}.ffn_gate_shexp", "blk.{bid}.ffn_up_shexp",
    "blk.{bid}.ffn_down_shexp",
    # layers that guess further tokens
    "blk.{bid}.nextn.eh_proj", "blk.{bid}.nextn.embed_tokens", "blk.{bid}.nextn.enorm",
    "blk.{bid}.nextn.hnorm", "blk.{bid}.nextn.shared_head_head",
    "blk.{bid}.nextn.shared_head_norm",
    # what follows the decoder in models that embed texts
    "dense_2",
}  # fmt: skip
"""Tensors that the models of an architecture need not have."""
SEPARATE = {"blk.{bid}.attn_q", "blk.{bid}.attn_k", "blk.{bid}.attn_v"}
"""Projections that a file may store fused instead."""


def test_each_file_is_a_row_and_named_as_its_family() -> None:
    folder = Path(families.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == FAMILIES.keys() == {family.name for family in FAMILIES.values()}


def test_each_family_has_test_data() -> None:
    assert set(TESTED) == FAMILIES.keys()


def test_no_two_families_share_a_name() -> None:
    assert len(MODEL_TYPES) == sum(len(family.model_types) for family in FAMILIES.values())
    classes = [name for family in FAMILIES.values() for name in family.classes]
    assert len(set(classes)) == len(classes)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - OF_THEIR_OWN_CODE))
def test_defaults_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    family = FAMILIES[name]
    # of a model that also sees, the last type is that of its decoder
    config = transformers.AutoConfig.for_model(family.model_types[-1 if family.text_config else 0])
    config.allow_global_per_layer_attribute_access = True  # where layers differ in a key
    for key, value in family.defaults.items():
        private = "_" + key  # as Transformers keeps what it has no public name for anymore
        theirs = getattr(config, key) if hasattr(config, key) else getattr(config, private)
        if isinstance(value, dict):  # Transformers adds the base of rotary settings
            theirs = {one: theirs[one] for one in value}
        assert theirs == value, key


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - OF_THEIR_OWN_CODE))
def test_classes_are_those_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    assert hasattr(transformers, FAMILIES[name].classes[0])


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_gguf_names_are_those_of_the_gguf_package(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    family = GGUF_FAMILIES[name]
    arch = family.gguf
    assert arch is not None
    number = next(key for key, text in gguf.MODEL_ARCH_NAMES.items() if text == arch.name)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}
    # llama.cpp gives experts to every layer of qwen3moe
    over: dict[str, Any] = {"dense_layers": 0} if arch.name == "qwen3moe" else {}
    config = tiny_config(family.name, tied=arch.tied, **over)
    names = [arch.tensor_name(n) for n, _ in (*config.linears(), *config.floats())]
    stems = [re.sub(r"\.(weight|bias)$", "", n) for n in names]
    written = {re.sub(r"^blk\.\d+\.", "blk.{bid}.", stem) for stem in stems}
    assert written <= known
    fused = "blk.{bid}.attn_qkv" in written
    assert known - written <= OPTIONAL | (SEPARATE if fused else {"blk.{bid}.attn_qkv"})
