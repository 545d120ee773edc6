"""A model's configuration as JSON, as artifacts hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from edgeq.core.errors import FormatError, check_type
from edgeq.model.block_json import (
    FLAT_KEYS,
    block_from_json,
    block_to_json,
    blocks_from_flat,
    blocks_from_json,
    blocks_to_json,
)

_LATER = (
    "residual_scale", "logit_scale", "attn_softcap", "logit_softcap", "layer_input", "mtp",
    "is_mtp",
)  # fmt: skip
"""Fields that are written to artifacts only where they differ from what older versions compute."""


def config_to_json(config: Any) -> dict[str, Any]:
    """A JSON-ready dictionary of a `ModelConfig`, the inverse of `config_from_json`."""
    values = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name != "blocks" and not (f.name in _LATER and getattr(config, f.name) == f.default)
    }
    if config.mtp is not None:
        values["mtp"] = block_to_json(config.mtp)
    return {**values, **blocks_to_json(config.blocks)}


def config_from_json(data: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The fields of a `ModelConfig`, from `config_to_json` or the keys that artifacts had before
    blocks.

    Args:
        data: the dictionary.
        names: of the fields.

    Raises:
        FormatError: keys are unknown, or a value is out of range.
        TypeError: what is a block is no mapping.
    """
    check_type("data", data, Mapping)
    block_keys = {"blocks", "layer_blocks"} if "blocks" in data else set(FLAT_KEYS)
    if extra := set(data) - ((names - {"blocks"}) | block_keys):
        raise FormatError(f"model config has unknown keys: {', '.join(sorted(extra))}")
    values = {key: value for key, value in data.items() if key not in block_keys}
    eos = values.get("eos", ())
    if not isinstance(eos, list | tuple):
        raise FormatError(f"model config: eos is {eos!r}; expected a list")
    values["eos"] = tuple(eos)
    read = blocks_from_json if "blocks" in data else blocks_from_flat
    if values.get("mtp") is not None:
        values["mtp"] = block_from_json(values["mtp"])
    return {"blocks": read(data), **values}
