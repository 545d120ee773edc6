"""Rotary scaling in every target: the frequencies of the file's context, and the factors with them.

The models change their frequencies past 256 tokens: llama.cpp rounds its context up to that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeq.converters.convert import convert
from edgeq.converters.gguf.decoder import GgufDecoderTarget
from edgeq.converters.options import Options
from edgeq.converters.validate import validate
from edgeq.core.errors import UnsupportedError
from edgeq.importers import load
from edgeq.importers.gguf.file import open_gguf
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.rope_spec import RopeScaling
from edgeq.model.trace import TracedReference
from tests.families import quantized, random_model, tiny_config

LONGROPE = RopeScaling(
    "longrope", 2.0, original_context=256, attention_factor=1.25,
    short_factors=(1.0, 1.3, 2.0, 4.5), long_factors=(1.0, 2.0, 7.0, 30.0),
)  # fmt: skip
DYNAMIC = RopeScaling("dynamic", 2.0, original_context=256)
YARN = RopeScaling("yarn", 2.0, original_context=256, attention_factor=1.3, beta_fast=16.0)
TOKENS = np.random.default_rng(2).integers(3, 101, 40)
SUFFIX = {"ort": "", "tflite": ".tflite", "coreml": ".mlpackage", "gguf": ".gguf"}
PACKAGE = {"ort": "onnxruntime", "tflite": "ai_edge_litert", "coreml": "coremltools",
           "gguf": "llama_cpp"}  # fmt: skip


def tiny(kind: str, scheme: str | None = None) -> Model:
    shape = {"hidden": 64, "head_dim": 16, "context": 512}
    if kind == "longrope":
        config = tiny_config("phi3", rope_scaling=LONGROPE, **shape)
    elif kind == "temperature":
        scaling = RopeScaling("yarn", 2.0, original_context=8)
        config = tiny_config("ministral3", rope_scaling=scaling, **shape)
    else:
        scaling = {"dynamic": DYNAMIC, "yarn": YARN}[kind]
        config = tiny_config("qwen2", rope_scaling=scaling, **shape)
    model = random_model(config)
    return quantized(model, scheme) if scheme else model


def written(model: Model, target: str, folder: Path, context: int) -> Path:
    out = folder / f"model{SUFFIX[target]}"
    convert(model, target, out, options=Options(context), validate=False)
    return out


@pytest.mark.parametrize(
    ("kind", "context", "target"),
    [
        (kind, context, target)
        for kind, context in (
            ("longrope", 256), ("longrope", 512), ("dynamic", 256), ("dynamic", 512),
            ("yarn", 512), ("temperature", 512),
        )
        for target in SUFFIX
        if (target, kind, context) != ("gguf", "dynamic", 512)  # refused, see below
    ],
)  # fmt: skip
def test_every_target_says_what_the_reference_says(
    target: str, kind: str, context: int, tmp_path: Path
) -> None:
    pytest.importorskip(PACKAGE[target])
    model = tiny(kind, "w4-g32")
    report = validate(written(model, target, tmp_path, context), model, target, threads=1)
    assert report.passed, report.explain()
    assert report.decoder.trace_note is None
    assert report.decoder.kl_mean < 5e-3


def test_both_contexts_differ() -> None:
    for kind in ("longrope", "dynamic"):
        model = tiny(kind)
        short, long = (Reference(model, context=n).forward(TOKENS) for n in (256, 512))
        assert np.abs(short - long).max() > 0.02 * np.abs(long).max()


def test_dynamic_is_refused_where_llama_cpp_would_not_stretch() -> None:
    target, model = GgufDecoderTarget(), tiny("dynamic")
    with pytest.raises(UnsupportedError, match="dynamic rotary scaling; give a context of at most"):
        target.check(model, Options(512))
    target.check(model, Options(256))


def test_yarn_whose_limits_are_not_rounded_is_refused_by_gguf() -> None:
    scaling = RopeScaling("yarn", 2.0, truncate=False)
    model = random_model(tiny_config("qwen2", rope_scaling=scaling))
    with pytest.raises(UnsupportedError, match="set truncate to true in rope_scaling"):
        GgufDecoderTarget().check(model, Options())


@pytest.mark.parametrize("kind", ["longrope", "yarn", "temperature"])
def test_gguf_and_back(kind: str, tmp_path: Path) -> None:
    model = tiny(kind)
    path = written(model, "gguf", tmp_path, 512)
    for context in (256, 512):
        want = Reference(model, context=context).forward(TOKENS)
        got = Reference(load(path), context=context).forward(TOKENS)
        assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_keys_are_those_that_llama_cpps_converters_write(tmp_path: Path) -> None:
    keys = open_gguf(written(tiny("temperature"), "gguf", tmp_path, 512)).metadata
    assert keys["mistral3.rope.scaling.type"] == "yarn"
    assert keys["mistral3.rope.scaling.factor"] == 2.0
    assert keys["mistral3.rope.scaling.original_context_length"] == 8
    assert keys["mistral3.rope.scaling.yarn_log_multiplier"] == pytest.approx(1.0)
    assert keys["mistral3.attention.temperature_scale"] == 0.25
    (tmp_path / "phi").mkdir()
    file = open_gguf(written(tiny("longrope"), "gguf", tmp_path / "phi", 512))
    assert file.metadata["phi3.rope.scaling.attn_factor"] == 1.25
    assert file.metadata["phi3.rope.scaling.original_context_length"] == 256
    assert {"rope_factors_long.weight", "rope_factors_short.weight"} <= set(file.tensors)


def test_ranges_of_an_int8_cache_hold_a_factor_on_what_is_rotated_once(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from edgeq.converters.ort.cache import MARGIN, calibrate

    model = tiny("longrope")
    path = written(model, "ort", tmp_path, 512) / "model.onnx"
    ranges = calibrate(path, model.config, tokens=TOKENS)
    keys = TracedReference(model, context=512).trace(TOKENS)["layers.0.k_rope"]
    first, second = keys[..., :4], keys[..., 4:8]
    radius = np.sqrt(first**2 + second**2).max(axis=0)  # no turn changes it: [Hkv, 4]
    span = ranges["past_key_values.0.key"].scale[:, :4] * 2 * 127 / MARGIN
    assert (span <= 2.001 * radius).all()
    assert (span[:, 0] > 1.9 * radius[:, 0]).all()  # the fastest pair turns all the way round
