"""A model whose weights are quantized already is quantized again only where that is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq import quantize
from edgeq.cli import main
from edgeq.core.errors import UsageError
from edgeq.model.artifact import load as load_artifact
from edgeq.model.model import Model
from edgeq.quant.decoder.calibrate import CalibrationText
from edgeq.quant.decoder.model_card import model_card
from edgeq.quant.decoder.quality_report import HeldOut
from edgeq.quant.decoder.source import quantized_types
from edgeq.sweeping import tasks
from tests.families import quantized, random_model, tiny_config
from tests.real_models import SMOLLM2, real_model

HIDDEN = 64
"""Two blocks of 32 to a row."""


def gguf_file(path: Path, kinds: dict[str, str]) -> Path:
    """A small llama in GGUF.

    Args:
        path: the file to write.
        kinds: part of a tensor's name -> GGUF type; the first that matches, else F32.
    """
    gguf = pytest.importorskip("gguf")
    config = tiny_config("llama", hidden=HIDDEN, ffn=96, head_dim=16, rope_scaling=None)
    rng = np.random.default_rng(3)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate",
             "up": "ffn_up", "down": "ffn_down"}  # fmt: skip
    for name, shape in (*config.linears(), *config.norms()):
        parts = name.split(".")
        if parts[1] == "embed_tokens":
            stored = "token_embd"
        elif parts[1] == "norm":
            stored = "output_norm"
        elif "layernorm" in name:
            stored = f"blk.{parts[2]}.{'attn' if parts[3].startswith('input') else 'ffn'}_norm"
        else:
            stored = f"blk.{parts[2]}.{names[parts[4].removesuffix('_proj')]}"
        stored += ".weight"
        values = (rng.normal(size=shape) / 8).astype(np.float32)
        kind = "F32"
        if len(shape) == 2:
            kind = next((k for part, k in kinds.items() if part in stored), "F32")
        if kind == "F32":
            writer.add_tensor(stored, values)
        elif kind == "F16":
            writer.add_tensor(stored, values.astype(np.float16))
        else:
            number = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(stored, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_a_quantized_gguf_asks_for_requantize(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = gguf_file(tmp_path / "m.gguf", {"": kind})
    out = tmp_path / "m.edgeq"
    assert main(["quantize", str(source), "-o", str(out)]) == 1
    said = capsys.readouterr().err
    # q and k are rearranged on the way in, and count as what they are
    assert f"its weights are already quantized ({kind} x 15)" in " ".join(said.split())
    assert "--requantize" in said
    assert "second rounding error" in " ".join(said.split())
    assert not out.exists()
    assert main(["quantize", str(source), "-o", str(out), "--requantize"]) == 0
    found = load_artifact(out)
    assert found.provenance["requantized"] == {kind: 15}
    assert "quantized already" in model_card(found, "m")


def test_each_type_of_a_mixed_file_is_named(tmp_path: Path) -> None:
    source = gguf_file(tmp_path / "m.gguf", {"token_embd": "Q8_0", "ffn_down": "F16", "": "Q4_1"})
    assert quantized_types(edgeq.load(source)) == {"Q4_1": 12, "Q8_0": 1}
    with pytest.raises(UsageError, match=r"\(Q4_1 x 12, Q8_0 x 1\)"):
        edgeq.quantize(source, tmp_path / "m.edgeq")
    summary = edgeq.quantize(source, tmp_path / "m.edgeq", requantize=True, fast=True)
    assert summary.requantized == {"Q4_1": 12, "Q8_0": 1}


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_float_gguf_needs_no_flag(kind: str, tmp_path: Path) -> None:
    source = gguf_file(tmp_path / "m.gguf", {"": kind})
    assert quantized_types(edgeq.load(source)) == {}
    summary = edgeq.quantize(source, tmp_path / "m.edgeq", fast=True)
    assert summary.requantized == {}
    assert "requantized" not in load_artifact(tmp_path / "m.edgeq").provenance


def test_an_artifact_too_is_quantized_again_only_when_asked_for(tmp_path: Path) -> None:
    model = quantized(random_model(tiny_config("llama")), "w4-g32")
    edgeq.save(model, tmp_path / "a.edgeq")
    with pytest.raises(UsageError, match=r"\(w4-g32 x 14, w8-channel x 1\)"):
        quantize(tmp_path / "a.edgeq", tmp_path / "b.edgeq", "w3-g32")
    summary = quantize(tmp_path / "a.edgeq", tmp_path / "b.edgeq", "w3-g32", requantize=True)
    assert {str(t.scheme) for t in summary.tensors if "proj" in t.name} == {"w3-g32"}


def test_bits_are_chosen_for_a_quantized_source(tmp_path: Path) -> None:
    model = quantized(random_model(tiny_config("llama")), "w4-g32")
    rng = np.random.default_rng(0)
    cut = CalibrationText(tuple(rng.integers(0, 101, 30) for _ in range(3)), "1", 30, None)
    recipe = replace(edgeq.Recipe.from_options("w3-g32-mse"), target={"bpw": 5.0})
    summary = quantize(model, tmp_path / "b.edgeq", recipe, calibration=cut, requantize=True)
    assert summary.bpw <= 5.0
    assert summary.target is not None
    assert set(summary.target) >= {"tried", "kept"}


def test_a_sweep_asks_before_any_work(tmp_path: Path) -> None:
    source = gguf_file(tmp_path / "m.gguf", {"": "Q8_0"})
    with pytest.raises(UsageError, match="Q8_0 x 15"):
        tasks([source], ["w4-g32"], timed=False)
    (again,) = tasks([source], ["w4-g32"], timed=False, requantize=True)
    assert again.requantize


def test_the_command_says_what_quality_is_measured_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Model = quantized(edgeq.load(Path(edgeq.__file__).parent / "demo_model"), "w8-channel")
    source = tmp_path / "demo.edgeq"
    edgeq.save(model, source)
    args = ["quantize", str(source), "-o", str(tmp_path / "b.edgeq"), "--requantize"]
    assert main(args) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "quality against the quantized source (w8-channel x" in said
    assert main([*args, "--force", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["requantized"] == quantized_types(model)


def test_a_graph_has_no_use_for_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["quantize", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "o.onnx"), "--requantize"]
    assert main(args) == 2
    assert "--requantize is for language models" in " ".join(capsys.readouterr().err.split())


def test_the_published_model_names_its_types(tmp_path: Path) -> None:
    source = real_model(SMOLLM2)
    with pytest.raises(UsageError, match=r"Q4_1 x \d+.*--requantize"):
        edgeq.quantize(source, tmp_path / "m.edgeq")


def test_a_card_needs_no_other_text(tmp_path: Path) -> None:
    """Of a quantized source the card is against its rounded values: equal weights give no KL."""
    model = quantized(random_model(tiny_config("llama")), "w8-channel")
    rng = np.random.default_rng(0)
    cut = CalibrationText(tuple(rng.integers(0, 101, 30) for _ in range(3)), "1", 30, None)
    summary = quantize(
        model, tmp_path / "b.edgeq", "w8-channel", card=HeldOut("text", cut), requantize=True
    )
    assert summary.quality.evaluation is not None
    assert summary.quality.evaluation.kl_mean == pytest.approx(0.0, abs=1e-4)
