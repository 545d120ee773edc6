"""Recipes with a name of their own, as data: what ``edgeq quantize --list`` shows.

Each is what a recipe file holds (`edgeq.quant.recipe.Recipe.from_file`): embedding and head get 8
bits where nothing else is said. Bits, what data a recipe needs and which extra are read off it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GPTQ = {"method": "gptq", "options": {"crossed": True}}
"""GPTQ that makes up for the errors made upstream as well."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # rounding without data
    "w8-channel": {"default": "w8-channel"},
    "w8-g32": {"default": "w8-g32"},
    "w4-g32": {"default": "w4-g32"},
    "w4-g128": {"default": "w4-g128"},
    "w3-g32": {"default": "w3-g32"},
    "w2-g16": {"default": "w2-g16-asym"},
    "w4-g32-mse": {"default": "w4-g32", "method": "mse"},
    "w3-g32-mse": {"default": "w3-g32", "method": "mse"},
    "palette4": {"default": "w4-g32-palette", "method": "mse"},
    "palette3": {"default": "w3-g32-palette", "method": "mse"},
    "palette2": {"default": "w2-g16-palette", "method": "mse"},
    # integer activations
    "w8a8-dynamic": {"default": "w8-channel", "activations": {"mode": "dynamic"}},
    "w8a8-static": {
        "default": "w8-channel",
        "activations": {"mode": "static", "observer": "mse"},
    },
    "w8a8-smooth": {
        "default": "w8-channel",
        "transforms": ["smoothquant"],
        "activations": {"mode": "static", "observer": "mse"},
    },
    # rounding by what the model does with a text
    "w4-g32-imatrix": {"default": "w4-g32", "method": "imatrix"},
    "w4-g32-gptq": {"default": "w4-g32", **_GPTQ},
    "w4-g128-gptq": {"default": "w4-g128", **_GPTQ},
    "w3-g32-gptq": {"default": "w3-g32", **_GPTQ},
    "w2-g16-gptq": {"default": "w2-g16-asym", **_GPTQ},
    "w4-awq-gptq": {"default": "w4-g32", **_GPTQ, "transforms": ["awq"]},
    "w3-awq-gptq": {"default": "w3-g32", **_GPTQ, "transforms": ["awq"]},
    "palette4-gptq": {"default": "w4-g32-palette", **_GPTQ},
    "palette3-gptq": {"default": "w3-g32-palette", **_GPTQ},
    # bits where they matter
    "mixed-4.5bpw": {"default": "w4-g32", **_GPTQ, "target": {"bpw": 4.5}},
    "mixed-3.5bpw": {"default": "w3-g32", **_GPTQ, "target": {"bpw": 3.5}},
    "mixed-palette-4.5bpw": {"default": "w4-g32-palette", **_GPTQ, "target": {"bpw": 4.5}},
    "mixed-palette-3.5bpw": {"default": "w3-g32-palette", **_GPTQ, "target": {"bpw": 3.5}},
    # training
    "w4-g32-distill": {"default": "w4-g32", **_GPTQ, "training": {"method": "distill"}},
    "w3-g32-distill": {"default": "w3-g32", **_GPTQ, "training": {"method": "distill"}},
    "w2-g16-distill": {
        "default": "w2-g16-asym",
        **_GPTQ,
        "training": {"method": "distill"},
    },
}
