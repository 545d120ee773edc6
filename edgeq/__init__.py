"""Quantize a language model once, run it packed in INT4, and ship the same integers everywhere.

    import edgeq

    edgeq.quantize("path/to/model", "model.edgeq")           # INT4 in groups of 32
    model = edgeq.load("model.edgeq")                        # or a checkpoint, or a GGUF file
    tokenizer = edgeq.Tokenizer(model)
    with edgeq.Engine(model) as engine:
        # a text is continued; a list of messages is answered by the model's chat template
        for chunk in edgeq.generate(engine, tokenizer, "Once upon a time", max_tokens=100):
            print(chunk.text, end="", flush=True)

Names are loaded when they are first asked for: ``import edgeq`` alone imports neither numpy
nor numba nor any converter.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgeq._version import __version__

if TYPE_CHECKING:
    from edgeq.core.errors import (
        DeviceError,
        DoesNotFitError,
        EdgeqError,
        FormatError,
        MissingDependencyError,
        SchemeError,
        UnsupportedError,
        UsageError,
    )
    from edgeq.formats.schemes import PRESETS, QuantScheme, parse_scheme
    from edgeq.formats.tensor import FloatTensor, QuantTensor
    from edgeq.importers import load
    from edgeq.model.artifact import save
    from edgeq.model.config import ModelConfig
    from edgeq.model.model import Model
    from edgeq.model.reference import Reference
    from edgeq.quant import Recipe, Rule, quantize
    from edgeq.runtime.chat_template import render_chat
    from edgeq.runtime.engine import Engine
    from edgeq.runtime.generate import Chunk, generate
    from edgeq.runtime.sampling import SamplingParams
    from edgeq.runtime.tokenizer import Tokenizer

__all__ = [
    "PRESETS",
    "Chunk",
    "DeviceError",
    "DoesNotFitError",
    "EdgeqError",
    "Engine",
    "FloatTensor",
    "FormatError",
    "MissingDependencyError",
    "Model",
    "ModelConfig",
    "QuantScheme",
    "QuantTensor",
    "Recipe",
    "Reference",
    "Rule",
    "SamplingParams",
    "SchemeError",
    "Tokenizer",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "generate",
    "load",
    "parse_scheme",
    "quantize",
    "render_chat",
    "save",
]

_HOMES = {
    "edgeq.model.artifact": ("save",),
    "edgeq.core.errors": (
        "DeviceError",
        "DoesNotFitError",
        "EdgeqError",
        "FormatError",
        "MissingDependencyError",
        "SchemeError",
        "UnsupportedError",
        "UsageError",
    ),
    "edgeq.importers": ("load",),
    "edgeq.model": ("Model", "ModelConfig"),
    "edgeq.quant": ("Recipe", "Rule", "quantize"),
    "edgeq.model.reference": ("Reference",),
    "edgeq.runtime.chat_template": ("render_chat",),
    "edgeq.runtime.engine": ("Engine",),
    "edgeq.runtime.generate": ("Chunk", "generate"),
    "edgeq.runtime.sampling": ("SamplingParams",),
    "edgeq.runtime.tokenizer": ("Tokenizer",),
    "edgeq.formats.schemes": ("PRESETS", "QuantScheme", "parse_scheme"),
    "edgeq.formats.tensor": ("FloatTensor", "QuantTensor"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgeq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
