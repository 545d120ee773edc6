"""Recipes with a name of their own, as data: what ``edgeq quantize --list`` shows.

Each name stands here once, with a column for decoders and one for graphs. Each column is what a
recipe file holds (`edgeq.quant.recipe.Recipe.from_file`); a column that is None means that the
preset is not for such a source. Where a name has both, the two do the same as far as the sources
allow:

    w8-channel      both      8-bit weights, a scale for each row or output channel, to nearest
    w4-g32          both      4-bit weights in groups of 32, to nearest. What hurts most keeps 8
                              bits: embedding and head of a decoder, first, last and depthwise
                              layers of a graph, whose convolutions get a scale for each channel
    w4-g32-gptq     both      the same, rounded by GPTQ
    palette4        both      weights from a table of 16 values for each matrix; scales for groups
                              of 32 in a decoder, for each channel in a graph, which every target
                              of graphs can hold
    w8a8-static     both      8-bit weights, inputs of matrices in 8 bits with ranges from
                              calibration; a graph's weights are rounded by GPTQ on the samples it
                              needs anyway, and its biases corrected

    2.25bpw ... 8.5bpw  decoders  the best recipe known here at each size, see `LADDER`: palettes up
                              to 3.75 bits, plain integers from 4.25 on; the head, some of whose
                              inputs are large, and the keys and values of attention, which have few
                              weights, get more bits

A decoder's embedding and head get 8 bits where nothing else is said. Where a graph's weights have
4 bits, ``outer`` keeps 8 for the few that hurt most. With scales for blocks, what stays float
takes half the bytes, which is a good part of a small encoder's. There, a table of words is half of
all weights: its rows get a scale for 64 numbers, which loses next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from edgeq.quant.rules import KINDS, OUTER

SourceKind = Literal["decoder", "graph"]
"""What a recipe is for: a language model, or a graph of operators."""


@dataclass(frozen=True)
class Preset:
    """The recipes that a name means.

    Args:
        decoder: the recipe for decoders, as a recipe file holds it; None if it is not for them.
        graph: the recipe for graphs; None if it is not for them.
        about: what the recipe for graphs does, in a line.
    """

    decoder: Mapping[str, Any] | None = None
    graph: Mapping[str, Any] | None = None
    about: str = ""


_GPTQ = {"method": "gptq", "options": {"use_quantized_inputs": True}}
"""GPTQ that also compensates the error of inputs which earlier rounding changed."""
_RUNG_OPTIONS = {
    "use_quantized_inputs": True,
    "relative_errors": True,
    "calibrated_head": True,
    "damping": 0.05,
    "sweeps": 1,
    "signed_scales": True,
}
"""GPTQ with errors counted in parts of the residual stream, and a head rounded likewise. The
text may be of another kind than what the model is used for, so that five times the usual damping is
better; and one sweep is as good as two. Scales may be negative, which LiteRT's integers cannot
have."""
_LIKE_RUNGS = {"method": "gptq", "options": _RUNG_OPTIONS}
_DISTILL = {"training": {"method": "distill"}}
_MSE_RANGES = {"mode": "static", "observer": "mse"}
_STATIC = {"activations": "static", "bias_correction": True}
_OUTER = {"outer": "w8-channel"}
_BLOCKS = {"activations": "float", **_OUTER, "tables": "w4-g64-mse", "rest": "fp16"}


def _rung(matrices: str, outer: str, sensitive: str | None = None, **kinds: str) -> Preset:
    """A decoder's matrices in one scheme, embedding and head in another, some kinds in a third.

    Args:
        matrices: the scheme of all matrices that nothing else is said of.
        outer: that of embedding and head.
        sensitive: that of ``down_proj`` in the layers where rounding it costs the most.
        kinds: kind of matrix -> its scheme.
    """
    kind_rules = [[KINDS[kind], scheme] for kind, scheme in kinds.items()]
    options = {**_RUNG_OPTIONS, **({"sensitive_layers": sensitive} if sensitive else {})}
    rules = [*kind_rules, [OUTER, outer]]
    return Preset({"default": matrices, "method": "gptq", "options": options, "rules": rules})


LADDER: Mapping[str, Preset] = {
    "2.25bpw": _rung(
        "w2-g64-palette",
        "w3-g32-palette",
        "w3-g64-palette",
        k="w4-g32-palette",
        v="w4-g32-palette",
    ),
    "2.75bpw": _rung(
        "w2-g64-palette",
        "w4-g32-palette",
        "w4-g32-palette",
        k="w4-g32-palette",
        v="w4-g32-palette",
        o="w3-g64-palette",
        down="w3-g64-palette",
    ),
    "3.25bpw": _rung(
        "w3-g64-palette",
        "w4-g32-palette",
        "w4-g32-palette",
        k="w4-g32-palette",
        v="w4-g32-palette",
    ),
    "3.75bpw": _rung(
        "w3-g32-palette",
        "w4-g32-palette",
        "w5-g32",
        k="w5-g32",
        v="w5-g32",
        down="w4-g64-palette",
    ),
    "4.25bpw": _rung("w4-g64", "w5-g32", "w5-g32", k="w5-g32", v="w5-g32"),
    "4.75bpw": _rung("w4-g32", "w5-g32", "w6-g32", k="w5-g64", v="w5-g32", down="w5-g32"),
    "5.5bpw": _rung("w5-g32", "w6-g32", v="w6-g32"),
    "6.5bpw": _rung("w6-g32", "w8-channel", v="w8-g32"),
    "8.5bpw": _rung("w8-g32", "w8-g32"),
}
"""Language models by size: name -> the best recipe known here of so many bits per weight of a large
model, scales, embedding and head counted. A small model, of which the embedding is a large part,
takes more: half a bit at a fifth of the weights, 1.4 bits at almost two thirds."""
PRESETS: Mapping[str, Preset] = {
    # language models by size
    **LADDER,
    # rounding without data
    "w8-channel": Preset(
        {"default": "w8-channel"},
        {"weights": "w8-channel", "activations": "float"},
        "8-bit weights only",
    ),
    "w8-g32": Preset({"default": "w8-g32"}),
    "w4-channel": Preset(
        None,
        {"weights": "w4-channel", "activations": "float", **_OUTER},
        "4-bit weights only, a scale for each output channel",
    ),
    "w4-g32": Preset(
        {"default": "w4-g32"},
        {"weights": "w4-g32", **_BLOCKS},
        "4-bit weights only, a scale for 32 of a matrix' weights",
    ),
    "w4-g128": Preset({"default": "w4-g128"}),
    "w3-g32": Preset({"default": "w3-g32"}),
    "w2-g16": Preset({"default": "w2-g16-asym"}),
    "w4-g32-mse": Preset({"default": "w4-g32", "method": "mse"}),
    "w3-g32-mse": Preset({"default": "w3-g32", "method": "mse"}),
    "palette4": Preset(
        {"default": "w4-g32-palette", "method": "mse"},
        {"weights": "w4-channel-palette", "activations": "float", **_OUTER},
        "weights from a table of 16 values for each matrix, with a scale for each channel",
    ),
    "palette3": Preset({"default": "w3-g32-palette", "method": "mse"}),
    "palette2": Preset({"default": "w2-g16-palette", "method": "mse"}),
    "fp16": Preset(
        None,
        {"weights": "fp16", "activations": "float", "rest": "fp16"},
        "float constants in half the bytes, nothing rounded to integers",
    ),
    # integer activations
    "w8-dynamic": Preset(
        None,
        {"weights": "w8-channel", "activations": "dynamic"},
        "8-bit weights, activations rounded by the range of the moment",
    ),
    "w8a8-dynamic": Preset({"default": "w8-channel", "activations": {"mode": "dynamic"}}),
    "w8a8-static": Preset(
        {"default": "w8-channel", "activations": _MSE_RANGES},
        {"weights": "w8-channel-gptq", **_STATIC},
        "8-bit weights and activations, ranges found on samples",
    ),
    "w8a8-tensor": Preset(
        None,
        {"weights": "w8-tensor", **_STATIC, "equalise": True},
        "the same with one scale for each weight, for targets that need it",
    ),
    "w8a8-mixed": Preset(
        None,
        {"weights": "w8-channel-gptq", **_STATIC, "mixed": 0.5, "mixed_keep": "fp16"},
        "w8a8-static with the layers that lose most kept float",
    ),
    "w8a8-smooth": Preset(
        {"default": "w8-channel", "transforms": ["smoothquant"], "activations": _MSE_RANGES},
    ),
    "w4a8-static": Preset(
        None,
        {"weights": "w4-channel", **_STATIC, **_OUTER},
        "4-bit weights and 8-bit activations, ranges found on samples",
    ),
    "w4a8-gptq": Preset(
        None,
        {"weights": "w4-channel-gptq", **_STATIC, **_OUTER},
        "w4a8-static rounded by what the layers are fed (GPTQ)",
    ),
    "w4a8-mixed": Preset(
        None,
        {
            "weights": "w4-channel-gptq",
            **_STATIC,
            **_OUTER,
            "mixed": 0.5,
            "mixed_keep": "w8-channel",
        },
        "w4a8-gptq with 8 bits for the layers that lose most",
    ),
    # rounding by what the model does with a text or with samples
    "w4-g32-imatrix": Preset({"default": "w4-g32", "method": "imatrix"}),
    "w4-channel-gptq": Preset(
        None,
        {"weights": "w4-channel-gptq", "activations": "float", **_OUTER},
        "w4-channel rounded by what the layers are fed (GPTQ)",
    ),
    "w4-g32-gptq": Preset(
        {"default": "w4-g32", **_GPTQ},
        {"weights": "w4-g32-gptq", **_BLOCKS},
        "w4-g32 rounded by what the layers are fed (GPTQ)",
    ),
    "w4-g128-gptq": Preset({"default": "w4-g128", **_GPTQ}),
    "w3-g32-gptq": Preset({"default": "w3-g32", **_GPTQ}),
    "w2-g16-gptq": Preset({"default": "w2-g16-asym", **_GPTQ}),
    "w4-awq-gptq": Preset({"default": "w4-g32", **_GPTQ, "transforms": ["awq"]}),
    "w3-awq-gptq": Preset({"default": "w3-g32", **_GPTQ, "transforms": ["awq"]}),
    "palette4-gptq": Preset({"default": "w4-g32-palette", **_GPTQ}),
    "palette3-gptq": Preset({"default": "w3-g32-palette", **_GPTQ}),
    # bits where they matter
    "mixed-4.5bpw": Preset({"default": "w4-g32", **_LIKE_RUNGS, "target": {"bpw": 4.5}}),
    "mixed-3.5bpw": Preset({"default": "w3-g32", **_LIKE_RUNGS, "target": {"bpw": 3.5}}),
    "mixed-palette-4.5bpw": Preset(
        {"default": "w4-g32-palette", **_LIKE_RUNGS, "target": {"bpw": 4.5}},
    ),
    "mixed-palette-3.5bpw": Preset(
        {"default": "w3-g32-palette", **_LIKE_RUNGS, "target": {"bpw": 3.5}},
    ),
    # training
    "w4-g32-distill": Preset({"default": "w4-g32", **_GPTQ, **_DISTILL}),
    "w3-g32-distill": Preset({"default": "w3-g32", **_GPTQ, **_DISTILL}),
    "w2-g16-distill": Preset({"default": "w2-g16-asym", **_GPTQ, **_DISTILL}),
}
"""Name -> what it stands for."""

DEFAULTS: Mapping[SourceKind, str] = {"decoder": "4.75bpw", "graph": "w8a8-static"}
"""The preset that is taken where none is named."""
FAST = "w4-g32"
"""The preset for language models that is taken where a fast one is asked for."""


def presets_for(source: SourceKind) -> dict[str, Mapping[str, Any]]:
    """The presets that are for a kind of source: name -> recipe, as a recipe file holds it.

    Args:
        source: "decoder" or "graph".
    """
    columns = {name: getattr(preset, source) for name, preset in PRESETS.items()}
    return {name: column for name, column in columns.items() if column is not None}
