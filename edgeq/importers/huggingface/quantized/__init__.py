"""Quantized weights of Hugging Face folders: each library's layout, its integers kept as they are.

A layout is a module with a function that reads its settings, and a row of `QUANT_METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers import unread
from edgeq.importers.huggingface.quantized.auto_round import read_auto_round
from edgeq.importers.huggingface.quantized.awq import read_awq
from edgeq.importers.huggingface.quantized.compressed_tensors import read_compressed_tensors
from edgeq.importers.huggingface.quantized.gptq import read_gptq
from edgeq.importers.huggingface.quantized.layout import Layout, ReadLayout, Settings
from edgeq.importers.huggingface.quantized.mlx import read_mlx
from edgeq.importers.huggingface.quantized.mxfp4 import read_mxfp4

QUANT_METHODS: Mapping[str, ReadLayout] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "auto-round": read_auto_round,
    "intel/auto-round": read_auto_round,
    "mxfp4": read_mxfp4,
}
"""``quant_method`` of a quantization_config -> its reader."""
KEYS = ("quantization_config", "quantization", "compression_config")
"""Keys of a config.json that describe quantized weights; MLX's is ``quantization``."""


def read_quantization(path: Path, raw: Mapping[str, Any]) -> Layout | None:
    """The layout of a checkpoint's quantized weights, or None for a float one.

    Args:
        path: config.json, for messages.
        raw: its keys.

    Raises:
        FormatError: settings are damaged.
        UnsupportedError: a method edgeq does not keep, or a setting that may change the arithmetic.
    """
    settings = {key: raw[key] for key in KEYS if raw.get(key)}
    if not settings:
        return None
    for key, value in settings.items():
        if not isinstance(value, dict):
            raise FormatError(f"{path}: {key} is {unread.shown(value)}; it must be an object")
    key, value = next(iter(settings.items()))
    if any(other != value for other in settings.values()):
        raise UnsupportedError(
            f"{path}: {' and '.join(settings)} differ; keep the one that is true"
        )
    if "quant_method" not in value and {"bits", "group_size"} <= set(value):
        return read_mlx(Settings(f"{path}: {key}", value))
    method = value.get("quant_method")
    if not isinstance(method, str) or method not in QUANT_METHODS:
        raise UnsupportedError(
            f"{path}: {key} has the quant_method {unread.shown(method)}, which edgeq cannot run; "
            f"it keeps the integers of {', '.join(QUANT_METHODS)} and of MLX; use one of these, or "
            "an original F32, F16 or BF16 checkpoint"
        )
    rest = {name: setting for name, setting in value.items() if name != "quant_method"}
    if method == "gptq" and rest.get("packing_format"):
        return QUANT_METHODS["auto-round"](Settings(f"{path}: {key}", rest))
    return QUANT_METHODS[method](Settings(f"{path}: {key}", rest))
