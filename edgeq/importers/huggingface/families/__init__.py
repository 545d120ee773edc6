"""The families of decoders, a file for each; see docs/extending.md for how to add one."""

from __future__ import annotations

from importlib import import_module

from edgeq.importers.huggingface.family import Family

_FILES = (
    "llama",
    "mistral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma3",
    "gemma2",
    "phi3",
    "smollm3",
    "olmo2",
    "granite",
    "granitemoehybrid",
    "minicpm",
    "exaone4",
    "olmo3",
    "hunyuan_v1_dense",
    "ernie4_5",
    "glm4",
    "lfm2",
    "qwen3_5",
    "qwen3_moe",
    "granitemoe",
    "lfm2_moe",
    "gemma4",
    "gpt_oss",
)
"""A row for each family: the name of its file. Of two families with one GGUF architecture, files
of that architecture are read as the first."""

FAMILIES: dict[str, Family] = {name: import_module(f"{__name__}.{name}").FAMILY for name in _FILES}
"""Families by name."""

MODEL_TYPES: dict[str, Family] = {
    model_type: family for family in FAMILIES.values() for model_type in family.model_types
}
"""Families by the ``model_type`` of a config.json."""

GGUF_FAMILIES: dict[str, Family] = {}
"""Families by the ``general.architecture`` of a GGUF file."""
for _family in FAMILIES.values():
    if _family.gguf is not None:
        GGUF_FAMILIES.setdefault(_family.gguf.name, _family)
