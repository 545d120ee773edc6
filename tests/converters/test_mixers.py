"""Targets whose graphs hold attention alone refuse other mixers before any work, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import edgeq
from edgeq.converters.options import Options
from edgeq.converters.targets import TARGETS
from edgeq.core.errors import UnsupportedError
from edgeq.model import artifact
from edgeq.model.block import BlockSpec, DeltaSpec, ExpertsSpec
from edgeq.model.rope_spec import RopeSpec
from tests.families import quantized, random_model, tiny_config

HOLDING = {"gguf"}
"""Targets that hold short convolutions and gated delta nets."""
OTHERS = [name for name, target in TARGETS.items() if target.decoder and name not in HOLDING]


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("ort", "tflite")])
def test_short_convolutions_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = quantized(random_model(tiny_config("lfm2")), "w4-g32")
    words = r"2 of 3 layers of the model, layer 0 the first, are gated short convolutions"
    with pytest.raises(UnsupportedError, match=words):
        TARGETS[name].decoder_target().check(model, Options())
    artifact.save(model, tmp_path / "model.edgeq")
    out = tmp_path / f"out{TARGETS[name].output}"
    with pytest.raises(UnsupportedError, match=words):
        edgeq.convert(tmp_path / "model.edgeq", name, out)
    assert not out.exists()


@pytest.mark.parametrize("name", OTHERS)
def test_gated_delta_nets_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model = quantized(random_model(tiny_config("qwen3_5")), "w4-g32")
    words = r"2 of 3 layers of the model, layer 0 the first, are gated delta nets"
    artifact.save(model, tmp_path / "model.edgeq")
    out = tmp_path / f"out{TARGETS[name].output}"
    with pytest.raises(UnsupportedError, match=words):
        edgeq.convert(tmp_path / "model.edgeq", name, out)
    assert not out.exists()


@pytest.mark.parametrize("name", OTHERS)
def test_gates_on_the_output_of_attention_are_refused_by_name(name: str) -> None:
    config = tiny_config("qwen3_5")
    model = random_model(tiny_config("qwen3_5", blocks=config.blocks[2:]))
    words = r"1 of 1 layers of the model, layer 0 the first, have attention with an output gate"
    with pytest.raises(UnsupportedError, match=words):
        TARGETS[name].decoder_target().check(model, Options())


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_experts_are_refused_by_name(name: str, family: str) -> None:
    model = quantized(random_model(tiny_config(family)), "w4-g32")
    words = r"of the model, layer [01] the first, are mixtures of [56] experts"
    with pytest.raises(UnsupportedError, match=words):
        TARGETS[name].decoder_target().check(model, Options())


@pytest.mark.parametrize("name", OTHERS)
def test_sinks_and_clamped_feed_forwards_are_refused_by_name(name: str) -> None:
    target = TARGETS[name].decoder_target()
    model = random_model(tiny_config("gpt_oss"))
    words = r"3 of 3 layers of the model, layer 0 the first, have attention with sinks"
    with pytest.raises(UnsupportedError, match=words):
        target.check(model, Options())
    clamped = random_model(tiny_config("qwen3", activation="clamped_swiglu"))
    with pytest.raises(UnsupportedError, match="clamp gate and up"):
        target.check(clamped, Options())


def test_gguf_of_gpt_oss_has_sinks_and_all_biases() -> None:
    gguf = TARGETS["gguf"].decoder_target()
    model = random_model(tiny_config("gpt_oss"))
    gguf.check(model, Options())
    left = {n: t for n, t in model.tensors.items() if not n.endswith("o_proj.bias")}
    with pytest.raises(UnsupportedError, match="no biases on o_proj"):
        gguf.check(replace(model, tensors=left), Options())
    with pytest.raises(UnsupportedError, match="another attention sinks than False"):
        gguf.check(random_model(tiny_config("gpt_oss", sinks=False)), Options())
    with pytest.raises(UnsupportedError, match="another attention sinks than True"):
        gguf.check(random_model(tiny_config("qwen3", sinks=True)), Options())
    plain = ExpertsSpec(count=6, chosen=3, ffn=76, normalize=True)
    with pytest.raises(UnsupportedError, match="without biases of the matrices"):
        gguf.check(random_model(tiny_config("gpt_oss", experts=plain)), Options())


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_gemma_4_are_refused_by_what_they_have(name: str, tmp_path: Path) -> None:
    """First the inputs of layers, then every field that a graph has no room for."""
    config = tiny_config("gemma4")
    model = quantized(random_model(config), "w4-g32")
    artifact.save(model, tmp_path / "model.edgeq")
    out = tmp_path / f"out{TARGETS[name].output}"
    with pytest.raises(UnsupportedError, match=r"has an input of 20 values of its own \(layer_inp"):
        edgeq.convert(tmp_path / "model.edgeq", name, out)
    assert not out.exists()
    first, whole = config.blocks[0], config.blocks[2]
    plain = replace(first, v_norm=False, layer_scale=False)
    for blocks, words in (
        ((plain, replace(plain, kv_from=0)), "1 of 2 layers .* layer 1 the first, read the keys"),
        ((replace(plain, v_norm=True), plain), r"norm the values of attention \(v_norm\)"),
        ((replace(plain, head_dim=14), plain), "a head_dim of their own"),
        ((plain, replace(plain, ffn=80)), r"a width of their own \(ffn\)"),
        ((replace(plain, layer_scale=True), plain), r"by a number \(layer_scale\)"),
        ((replace(plain, rope=RopeSpec(1e4, 12, still=2)),), r"keep still \(rope.still\)"),
    ):
        one = random_model(tiny_config("llama", blocks=blocks))
        with pytest.raises(UnsupportedError, match=words):
            TARGETS[name].decoder_target().check(one, Options())
    assert whole.rope is not None
    assert whole.rope.still


def test_gguf_refuses_what_it_does_not_hold() -> None:
    gguf = TARGETS["gguf"].decoder_target()
    with pytest.raises(UnsupportedError, match=r"writes GGUF files of .*; the model is gemma4"):
        gguf.check(random_model(tiny_config("gemma4")), Options())
    shared = tiny_config("gemma4").blocks
    blocks = tuple(replace(b, norm_after=False, qk_norm=None) for b in shared)
    with pytest.raises(UnsupportedError, match="read the keys and values of another layer"):
        gguf.check(random_model(tiny_config("llama", blocks=blocks)), Options())


def test_gguf_holds_gated_delta_nets_of_one_size_in_regular_places() -> None:
    gguf = TARGETS["gguf"].decoder_target()
    sizes = {"key_heads": 4, "value_heads": 4, "key_dim": 16, "value_dim": 16}
    for right in (sizes, sizes | {"value_heads": 8}):
        gguf.check(random_model(tiny_config("qwen3_5", delta=DeltaSpec(**right))), Options())
    model = random_model(tiny_config("qwen3_5", delta=DeltaSpec(**(sizes | {"key_dim": 8}))))
    with pytest.raises(UnsupportedError, match="qwen35 computes with another gated delta net"):
        gguf.check(model, Options())
    irregular = {"delta": DeltaSpec(**sizes), "delta_layers": (False, True, True)}
    with pytest.raises(UnsupportedError, match="another gated delta net"):
        gguf.check(random_model(tiny_config("qwen3_5", **irregular)), Options())
    plain = tiny_config("qwen3_5", delta_layers=(False, False, False), output_gate=False)
    with pytest.raises(UnsupportedError, match="another output gate than"):
        gguf.check(random_model(plain), Options())


def test_gguf_has_one_number_of_taps() -> None:
    config = tiny_config("lfm2")
    longer = BlockSpec(mixer="short_conv", rope=None, window=4)
    mixed = tiny_config("lfm2", blocks=(*config.blocks[:2], longer))
    gguf = TARGETS["gguf"].decoder_target()
    with pytest.raises(UnsupportedError, match="another number of taps of short convolutions"):
        gguf.check(random_model(mixed), Options())
    attention = tiny_config("lfm2", blocks=(config.blocks[1],) * 2)
    with pytest.raises(UnsupportedError, match="another number of taps of short convolutions"):
        gguf.check(random_model(attention), Options())
