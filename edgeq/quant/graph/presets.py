"""Recipes for graphs with a name of their own, as data: what ``edgeq quantize --list`` shows.

Each is a line of description and what a recipe file holds
(`edgeq.quant.graph.recipe.GraphRecipe.from_file`).

Where the preset's weights have 4 bits, ``outer`` keeps 8 for what is few and hurts most: the
first and the last layer of a classifier, and depthwise convolutions. With scales for blocks what
stays float takes half the bytes, which is a good part of a small encoder's. There, a table of words
is half of all weights: its rows get a scale for 64 numbers, which loses next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STATIC = {"activations": "static", "bias_correction": True}
_W4 = {"outer": "w8-channel"}
_BLOCKS = {"activations": "float", **_W4, "tables": "w4-g64-mse", "rest": "fp16"}

PRESETS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "w8a8-static": (
        "8-bit weights and activations, ranges found on samples",
        {"weights": "w8-channel-gptq", **_STATIC},
    ),
    "w8a8-tensor": (
        "the same with one scale for each weight, for targets that need it",
        {"weights": "w8-tensor", **_STATIC, "equalise": True},
    ),
    "w8a8-mixed": (
        "w8a8-static with the layers that lose most kept float",
        {"weights": "w8-channel-gptq", **_STATIC, "mixed": 0.5, "mixed_keep": "fp16"},
    ),
    "w8-dynamic": (
        "8-bit weights, activations rounded by the range of the moment",
        {"weights": "w8-channel", "activations": "dynamic"},
    ),
    "w8-channel": (
        "8-bit weights only",
        {"weights": "w8-channel", "activations": "float"},
    ),
    "w4-channel": (
        "4-bit weights only, a scale for each output channel",
        {"weights": "w4-channel", "activations": "float", **_W4},
    ),
    "w4-g32": (
        "4-bit weights only, a scale for 32 of a matrix' weights",
        {"weights": "w4-g32", **_BLOCKS},
    ),
    "w4-g32-gptq": (
        "w4-g32 rounded by what the layers are fed (GPTQ)",
        {"weights": "w4-g32-gptq", **_BLOCKS},
    ),
    "w4-channel-gptq": (
        "w4-channel rounded by what the layers are fed (GPTQ)",
        {"weights": "w4-channel-gptq", "activations": "float", **_W4},
    ),
    "w4a8-static": (
        "4-bit weights and 8-bit activations, ranges found on samples",
        {"weights": "w4-channel", **_STATIC, **_W4},
    ),
    "w4a8-gptq": (
        "w4a8-static rounded by what the layers are fed (GPTQ)",
        {"weights": "w4-channel-gptq", **_STATIC, **_W4},
    ),
    "w4a8-mixed": (
        "w4a8-gptq with 8 bits for the layers that lose most",
        {
            "weights": "w4-channel-gptq",
            **_STATIC,
            **_W4,
            "mixed": 0.5,
            "mixed_keep": "w8-channel",
        },
    ),
    "palette4": (
        "weights from a table of 16 values for each matrix, with a scale for each channel",
        {"weights": "w4-channel-palette", "activations": "float", **_W4},
    ),
    "fp16": (
        "float constants in half the bytes, nothing rounded to integers",
        {"weights": "fp16", "activations": "float", "rest": "fp16"},
    ),
}
"""Name -> a line for people, and the recipe."""

DEFAULT_PRESET = "w8a8-static"
