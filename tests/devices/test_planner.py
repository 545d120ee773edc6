"""Plans: facts from headers, memory to the byte, speed by the roofline, and the commands."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgeq.cli import main
from edgeq.core import memory
from edgeq.core.errors import DoesNotFitError, UsageError
from edgeq.devices.model_header import ModelFacts, facts, facts_of, scheme_facts
from edgeq.devices.planner import (
    PROCESS_BYTES,
    TOKENIZER_BYTES,
    budget_bytes,
    needed_bytes,
    plan,
)
from edgeq.devices.profile import Cluster, DeviceProfile, find
from edgeq.devices.roofline import DECODE_SHARE, Speed, sustained, values_seen
from edgeq.formats.schemes import FloatScheme
from edgeq.importers.shapes import SHAPES
from edgeq.model import artifact
from edgeq.model.kv_bits import KvBits
from edgeq.model.memory_layout import (
    cache_length,
    draft_bytes,
    kv_bytes,
    position_bytes,
    scratch_bytes,
    state_bytes,
)
from edgeq.model.model import Model
from edgeq.profiling import bytes_read_per_token
from edgeq.quant import Recipe
from edgeq.runtime.engine import Engine
from tests.chat_models import chat_copy
from tests.conftest import clear_settings
from tests.families import FAMILIES, SHARING, quantized, random_model, tiny_config, with_blocks
from tests.paths import ROOT

DEMO = ROOT / "edgeq" / "demo_model"
SOURCES = dict.fromkeys(
    ("usable_bytes", "read_gb_s", "int8_gops", "load_watts", "clusters"), "estimate: for a test"
)


def device(usable_mib: float, **over: Any) -> DeviceProfile:
    fields: dict[str, Any] = {
        "clusters": (Cluster("Cortex-A76", 4, 2.4),),
        "read_gb_s": {1: 8.0, 4: 10.0},
        "int8_gops": 600.0,
        "load_watts": 10.0,
    }
    return DeviceProfile(
        "test", "Test", "generic", usable_bytes=int(usable_mib * 2**20), sources=SOURCES,
        **{**fields, **over},
    )  # fmt: skip


def shape_facts(name: str, bits: int | None = None) -> ModelFacts:
    config, held = SHAPES[name], FloatScheme("bfloat16")
    tensors = (*config.linears(), *config.norms())
    known = ModelFacts(name, config, {n: scheme_facts(held, size) for n, size in tensors})
    return known if bits is None else known.at_bits(bits)


# memory


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_bits", [8, 16])
def test_what_is_planned_is_what_the_engine_takes(family: str, kv_bits: Any) -> None:
    config = tiny_config(family, context=1024)
    model = quantized(random_model(config), "w4-g32")
    for context, threads in ((7, 3), (300, 1), (1000, 2)):
        with Engine(model, context=context, threads=threads, kv_bits=kv_bits) as engine:
            made = plan(
                facts_of(model, family), device(500), context=context, kv_bits=kv_bits,
                threads=threads,
            )  # fmt: skip
            assert made.kv_bytes == engine.kv_bytes
            assert made.scratch_bytes == engine.scratch_bytes
            assert made.weights_bytes + made.table_bytes == model.nbytes
            table = sum(model.tensors[name].nbytes for name in config.tables)
            assert made.table_bytes == table
            assert bool(table) == (family in SHARING)


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
def test_each_answer_at_a_time_has_a_cache(kv_bits: Any) -> None:
    model = quantized(random_model(tiny_config("llama")), "w4-g32")
    planned = plan(
        facts_of(model, "m"), device(500), context=40, kv_bits=kv_bits, threads=2, parallel=3
    )
    engines = Engine.batch(model, 3, context=40, threads=2, kv_bits=kv_bits)
    assert planned.kv_bytes == sum(engine.kv_bytes for engine in engines)
    assert planned.scratch_bytes == engines[0].scratch_bytes
    for engine in engines:
        engine.close()
    alone = plan(facts_of(model, "m"), device(500), context=40, kv_bits=kv_bits, threads=2)
    assert planned.kv_bytes == 3 * alone.kv_bytes
    assert planned.decode_tokens_per_s == alone.decode_tokens_per_s
    for wrong in (0, 65):
        with pytest.raises(UsageError, match=f"parallel is {wrong}; use 1 to 64"):
            plan(facts_of(model, "m"), device(500), context=40, parallel=wrong)
    with pytest.raises(DoesNotFitError, match=r"40 tokens for each of 64 answers at a time"):
        plan(facts_of(model, "m"), device(1), context=40, parallel=64).require()


def test_windowed_layers_keep_only_their_window() -> None:
    config = SHAPES["gemma3-1b"]
    whole = with_blocks(config, window=None)
    short, long = kv_bytes(config, 4096), kv_bytes(config, 32768)
    assert long < 0.3 * kv_bytes(whole, 32768)
    # four layers of 26 grow with the context
    assert long - short == 4 * kv_bytes(whole, 32768 - 4096) // config.layers


def test_bytes_of_a_position() -> None:
    config = tiny_config("llama")  # heads of 12: 32 of keys and 16 of values
    # codes, the scales and the zero point, and a sixteenth of a key in float16
    assert position_bytes(config, 8) == config.kv_heads * (32 + 16 + 2 + 1 + 4 + 2 * 32 // 16)
    assert position_bytes(config, 16) == config.kv_heads * 2 * (32 + 16)
    # codes in half the bytes, and one key in 64
    assert position_bytes(config, 4) == config.kv_heads * (16 + 8 + 2 + 1 + 4 + 2 * 32 // 64)
    published = SHAPES["qwen2.5-0.5b"]
    numbers = 2 * published.kv_heads * published.head_dim
    assert 8 * position_bytes(published, 4) / numbers == 4.5625
    assert kv_bytes(config, 1024, 8) == config.layers * 1024 * position_bytes(config, 8)
    windowed = tiny_config("gemma3", context=4096)
    lengths = [cache_length(block, 4096) for block in windowed.blocks]
    assert lengths == [256, 256, 4096]  # 5 positions, a batch and a tile take one chunk
    assert kv_bytes(windowed, 4096) == sum(lengths) * position_bytes(windowed)


def test_the_parts_add_up() -> None:
    known, context = shape_facts("qwen2.5-0.5b", 4), 2048
    made = plan(known, device(1000), context=context)
    assert made.process_bytes == PROCESS_BYTES + TOKENIZER_BYTES * known.config.vocab
    assert made.total_bytes == (
        made.weights_bytes + made.kv_bytes + made.scratch_bytes + made.process_bytes
    )
    assert made.usable_bytes - made.total_bytes == made.headroom_bytes
    assert made.fits
    assert json.loads(json.dumps(made.to_dict()))["total_bytes"] == made.total_bytes


def test_the_largest_context_is_the_largest() -> None:
    known, small = shape_facts("qwen2.5-0.5b", 4), device(700)
    made = plan(known, small, context=64)
    most = made.largest_context
    assert 64 < most < known.config.context
    assert plan(known, small, context=most).fits
    assert not plan(known, small, context=most + 1).fits
    assert plan(known, device(10_000), context=64).largest_context == known.config.context
    assert plan(known, device(200), context=64).largest_context == 0


def test_the_highest_bits_are_the_highest() -> None:
    known = shape_facts("llama-3.2-1b")
    # 2 bits in groups of 16 take as much as 3
    for bits, below in ((8, 6), (6, 5), (5, 4), (4, 3), (3, None)):
        just = plan(known, device(9000), context=512, bits=bits).total_bytes / 2**20
        assert plan(known, device(just), context=512, bits=bits).fits
        assert plan(known, device(just), context=512).highest_bits == bits
        assert plan(known, device(just - 0.01), context=512).highest_bits == below


def test_bits_are_what_quantize_writes(tmp_path: Path) -> None:
    out = tmp_path / "demo.edgeq"
    assert main(["quantize", str(DEMO), "-o", str(out), "--bits", "3", "--no-card"]) == 0
    assert facts(DEMO).at_bits(3).tensors == facts(out).tensors


def test_what_does_not_fit_says_what_would() -> None:
    known, small = shape_facts("llama-3.2-1b"), device(1000)
    made = plan(known, small, context=4096)
    assert not made.fits
    assert made.headroom_bytes < 0
    with pytest.raises(DoesNotFitError, match=r"weights of 3 bits \(edgeq quantize --bits 3") as e:
        made.require()
    assert e.value.plan is made
    with pytest.raises(DoesNotFitError, match=r"would fit: a context of \d+ tokens \(-c \d+\)$"):
        plan(known, device(1200), context=60_000, bits=4).require()
    with pytest.raises(DoesNotFitError, match="use a smaller model"):
        plan(known, device(300), context=64).require()


def test_the_budget_leaves_room_for_the_rest() -> None:
    known, small = shape_facts("llama-3.2-1b"), device(1000)
    room = budget_bytes(known, small, 2048)
    made = plan(known, small, context=2048)
    assert room == made.headroom_bytes + made.weights_bytes
    with pytest.raises(DoesNotFitError):
        budget_bytes(known, device(100), 2048)


def test_impossible_questions() -> None:
    known = shape_facts("tinyllama-1.1b")
    with pytest.raises(UsageError, match="supports 1 to 2048 tokens"):
        plan(known, device(9000), context=4096)
    with pytest.raises(UsageError, match="kv_bits is 6"):
        plan(known, device(9000), context=64, kv_bits=6)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads is 0"):
        plan(known, device(9000), context=64, threads=0)
    with pytest.raises(UsageError, match="usable memory of Test is not known"):
        plan(known, replace(device(9000), usable_bytes=None), context=64)


# speed


def test_decoding_is_bytes_over_bandwidth() -> None:
    known = shape_facts("llama-3.2-1b", 4)
    made = plan(known, device(2000), context=4096)
    assert made.bound == "memory bandwidth"
    read = 10e9 * DECODE_SHARE / known.read_bytes
    assert made.decode_tokens_per_s == pytest.approx(read)
    assert made.joules_per_token == pytest.approx(10.0 / read)
    assert made.decode_full_tokens_per_s is not None
    assert made.decode_full_tokens_per_s < read
    one = plan(known, device(2000), context=4096, threads=1)
    assert one.decode_tokens_per_s == pytest.approx(read * 0.8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_a_token_are_those_bench_counts(family: str) -> None:
    model = quantized(random_model(tiny_config(family)), "w4-g32")
    states = 2 * sum(state_bytes(model.config, i) for i in range(model.config.layers))
    assert facts_of(model, family).read_bytes + states == bytes_read_per_token(model, 0, 8)


def test_a_slow_processor_is_bound_by_its_multiplications() -> None:
    known = shape_facts("llama-3.2-1b", 2)
    made = plan(known, device(2000, int8_gops=10.0), context=512)
    assert made.bound == "int8 throughput"
    fast = plan(known, device(2000), context=512)
    assert made.decode_tokens_per_s is not None
    assert fast.decode_tokens_per_s is not None
    assert made.decode_tokens_per_s < fast.decode_tokens_per_s


def test_prompts_scale_with_the_integer_units() -> None:
    known = shape_facts("qwen2.5-0.5b", 4)
    slow, fast = (
        plan(known, device(2000, int8_gops=gops), context=512).prefill_tokens_per_s
        for gops in (100.0, 200.0)
    )
    assert slow is not None
    assert fast == pytest.approx(2 * slow)


def test_what_is_unknown_is_none() -> None:
    blind = device(2000, read_gb_s=None, int8_gops=None, load_watts=None)
    made = plan(shape_facts("qwen2.5-0.5b", 4), blind, context=64)
    assert made.fits
    assert made.decode_tokens_per_s is made.decode_full_tokens_per_s is None
    assert made.prefill_tokens_per_s is made.joules_per_token is made.bound is None
    assert any("bandwidth is unknown" in text for text in made.assumptions)
    floats = plan(shape_facts("qwen2.5-0.5b"), device(2000), context=64)
    assert floats.prefill_tokens_per_s is None
    assert floats.decode_tokens_per_s is not None


def test_windows_bound_what_attention_sees() -> None:
    config = tiny_config("gemma3")  # windows of 5 on two layers of three
    assert values_seen(config, 3) == 9 * config.head_dim
    assert values_seen(config, 50) == (5 + 5 + 50) * config.head_dim
    known = facts_of(quantized(random_model(config), "w4-g32"), "gemma3")
    rates = sustained(device(100), 4)
    spent = [Speed(known, rates, 8).decode_seconds(n) for n in (0, 50, 100)]
    assert None not in spent
    empty, some, more = (float(s or 0) for s in spent)
    assert empty < some < more


def test_a_measured_peak_is_the_kernels_own() -> None:
    reckoned = sustained(device(100), 4).int8_gops
    said = replace(device(100), sources={**SOURCES, "int8_gops": "measured: here"})
    measured = sustained(said, 4).int8_gops
    assert reckoned is not None
    assert measured is not None
    assert measured > reckoned


def test_assumptions_say_where_numbers_come_from() -> None:
    made = plan(facts(DEMO), find("rpi5"), context=512, bits=4)
    text = "\n".join(made.assumptions)
    for source in find("rpi5").sources:
        if source in ("usable_bytes", "read_gb_s", "int8_gops", "load_watts"):
            assert find("rpi5").sources[source] in text
    assert "w4-g32" in text


# facts


def test_facts_of_every_kind_of_file(tmp_path: Path) -> None:
    model = artifact.load(_packed(tmp_path))
    known = facts(tmp_path / "demo.edgeq")
    assert known == replace(facts_of(model, "demo.edgeq"), name=known.name)
    assert known.name == "demo.edgeq"
    assert known.weights_bytes == model.nbytes
    assert known.scheme == "w4-g32"
    assert known.integer
    floats = facts(DEMO)
    assert floats.scheme == "bf16"
    assert not floats.integer
    assert floats.n_params == known.n_params
    assert floats.decoded == 0


def _packed(folder: Path) -> Path:
    out = folder / "demo.edgeq"
    assert main(["quantize", str(DEMO), "-o", str(out), "--fast", "--no-card"]) == 0
    return out


def test_integers_of_gguf_files_are_kept(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    _write_gguf(gguf, path)
    known = facts(path)
    gate = known.tensors["model.layers.0.mlp.gate_proj.weight"]
    assert (gate.scheme, gate.nbytes, gate.run_bytes) == ("Q8_0", 64 * 34, 64 * 34)
    assert known.tensors["model.layers.0.self_attn.q_proj.weight"].run_bytes == 32 * 34
    assert known.decoded == 0
    assert not any("float32" in text for text in plan(known, device(500), context=64).assumptions)
    with Engine(_loaded(path), context=64, threads=1) as engine:
        assert known.weights_bytes == engine.model.packed().nbytes


def _loaded(path: Path) -> Model:
    from edgeq.importers import describe

    return describe(path)


def _write_gguf(gguf: ModuleType, path: Path) -> None:
    """A small llama with Q8_0 matrices and no tokenizer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-5)
    sizes = {"token_embd": (48, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32),
             "blk.0.ffn_down": (32, 64)}  # fmt: skip
    sizes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, size in sizes.items():
        values = rng.normal(size=size).astype(np.float32)
        if name == "token_embd":
            writer.add_tensor(f"{name}.weight", values)
        else:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sparse_folder(folder: Path, layers: int) -> Path:
    """A Llama 3.1 8B of some layers, whose safetensors file is all header and hole."""
    config = SHAPES["llama-3.1-8b"]
    config = replace(config, blocks=config.blocks[:1] * layers)
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": config.hidden,
                "intermediate_size": config.ffn,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "num_key_value_heads": config.kv_heads,
                "head_dim": config.head_dim,
                "vocab_size": config.vocab,
                "max_position_embeddings": config.context,
                "tie_word_embeddings": config.tied,
            }
        ),
        "utf-8",
    )
    entries, at = {}, 0
    for name, size in (*config.linears(), *config.norms()):
        stop = at + 2 * math.prod(size)
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [at, stop]}
        at = stop
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + at)
    return folder


READ = """
import json, sys
from edgeq.devices.model_header import facts
from edgeq.core.memory import reset_peak_rss, peak_rss_bytes, rss_bytes
reset_peak_rss()
before = rss_bytes()
known = facts(sys.argv[1])
print(json.dumps({"grew": peak_rss_bytes() - before, "params": known.n_params,
                  "nbytes": known.weights_bytes}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_facts_read_no_weights(tmp_path: Path) -> None:
    """A file of 16 GB that is a hole: its headers cost a few megabytes of memory."""
    folder = _sparse_folder(tmp_path / "big", 32)
    assert (folder / "model.safetensors").stat().st_size > 16e9
    found = json.loads(_python(READ, folder))
    assert found["params"] == pytest.approx(8.03e9, rel=1e-3)
    assert found["nbytes"] == 2 * found["params"]
    assert found["grew"] < 8e6


def _python(code: str, *args: object) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip


# commands


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch, "EDGEQ_CACHE")


def said(capsys: pytest.CaptureFixture[str], *args: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_plan_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "plan", DEMO, "--device", "rpi5", "-c", 256, "--bits", 4, "--format", "json")
    made = json.loads(out)
    assert made["fits"] is True
    assert made["context"] == 256
    assert made["scheme"] == "w4-g32"
    want = plan(facts(DEMO), find("rpi5"), context=256, bits=4).to_dict()
    assert made == json.loads(json.dumps(want))
    text = said(capsys, "plan", DEMO, "--device", "rpi5")
    for word in (
        "fits",
        "weights",
        "cache",
        "scratch",
        "process",
        "J per token",
        "memory bandwidth",
        "Assumptions:",
    ):
        assert word in text
    text = said(capsys, "plan", "--shape", "llama-3.1-8b", "--device", "rpi4", "--bits", 4)
    assert "does not fit" in text


def test_the_command_counts_every_answer_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "--shape", "qwen2.5-0.5b", "--bits", "4", "--device", "rpi5", "-c", "2048"]
    assert main([*options, "--format", "json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main([*options, "--parallel", "4", "--format", "json"]) == 0
    four = json.loads(capsys.readouterr().out)
    assert (four["parallel"], four["kv_bytes"]) == (4, 4 * alone["kv_bytes"])
    assert main([*options, "--parallel", "4"]) == 0
    assert "4 answers at a time, 2048 tokens of context, 8 bits each" in capsys.readouterr().out


def test_the_command_for_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(said(capsys, "plan", DEMO, "--bits", 4, "-t", 1, "--format", "json"))
    assert made["threads"] == 1
    assert made["decode_tokens_per_s"] > 0
    assert made["prefill_tokens_per_s"] > 0
    assert made["joules_per_token"] is None  # nothing here says what it draws


def test_wrong_questions_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'rpi5'" in said(capsys, "plan", DEMO, "--device", "rpi55", code=1)
    assert "give either MODEL or --shape" in said(capsys, "plan", "--device", "rpi5", code=2)
    long = said(capsys, "plan", DEMO, "--device", "rpi5", "-c", 9999, code=1)
    assert "1 to 512 tokens" in long


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
@pytest.mark.parametrize("drafted", [False, True])
def test_what_run_compares_with_free_memory_is_the_plan_s_total(
    kv_bits: KvBits, drafted: bool
) -> None:
    known = facts(DEMO)
    engine: dict[str, Any] = {
        "context": 300, "threads": 2, "kv_bits": kv_bits, "draft": known if drafted else None,
    }  # fmt: skip
    assert needed_bytes(known, **engine) == plan(known, device(9000), **engine).total_bytes


@pytest.mark.parametrize("verb", ["run", "chat"])
def test_what_cannot_fit_is_not_run(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of 133 GB, as holes: more than this machine has, or the test says nothing."""
    if (memory.available_bytes() or 0) > 100e9:
        pytest.skip("this machine has more than 100 GB of memory")
    folder = _sparse_folder(tmp_path / "giant", 300)
    args = ("-p", "x") if verb == "run" else ()
    err = said(capsys, verb, folder, *args, code=1)
    assert "needs" in err
    assert "--force" in err


def test_force_runs_it_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that says it has 64 MiB: the demo model is refused, and runs when forced."""
    from edgeq.api import devices

    small = replace(devices.this_profile(measured=False), usable_bytes=64 << 20)
    monkeypatch.setattr(devices, "this_profile", lambda **_: small)
    monkeypatch.setattr(devices, "available_bytes", lambda: 64 << 20)
    args = ("run", DEMO, "-p", "Once", "-n", 2, "-t", 1)
    assert "has 64 MiB usable" in said(capsys, *args, code=1)
    assert said(capsys, *args, "--force").startswith("Once")


@pytest.mark.parametrize("verb", ["run", "chat"])
def test_a_draft_model_is_counted_too(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that holds the demo model, and not the same model as its own draft beside it."""
    from edgeq.api import devices

    model = chat_copy(tmp_path / "talker")
    known = facts(model)
    alone = plan(known, device(9000), context=512, threads=1)
    beside = known.weights_bytes + draft_bytes(known.config, 1)
    room = alone.total_bytes + beside - 1
    small = replace(devices.this_profile(measured=False), usable_bytes=room)
    monkeypatch.setattr(devices, "this_profile", lambda **_: small)
    monkeypatch.setattr(devices, "available_bytes", lambda: room)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    args = (verb, model, *(("-p", "Once", "-n", 2) if verb == "run" else ()), "-t", 1, "-c", 512)
    said(capsys, *args)
    err = said(capsys, *args, "--draft", model, code=1)
    assert f"draft model {beside / 2**20:.0f} MiB" in err
    assert "these would fit: no draft model" in err
    said(capsys, *args, "--draft", model, "--force")


def test_bench_prints_the_plan_s_error(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("bench", DEMO, "-p", 16, "-n", 8, "-r", 1, "-t", 1, "--against-plan", "--format")
    prompt, decode = json.loads(said(capsys, *args, "json"))
    assert prompt["plan_ts"] is None  # floating-point prompts are not planned
    assert decode["plan_ts"] > 0
    error = 100 * (decode["plan_ts"] / decode["avg_ts"] - 1)
    assert decode["plan_ts_error_percent"] == pytest.approx(error)
    # a process of the tests holds far more than one that only runs a model
    assert decode["plan_rss_bytes"] < decode["peak_rss_bytes"]
    assert decode["plan_rss_error_percent"] < 0
    assert "plan RSS" in said(capsys, *args, "md")


PEAK = """
import sys
from edgeq.cli import main
sys.exit(main(["bench", "--shape", "stories42m", "-p", "0", "-n", "16", "-d", "0,500", "-r", "1",
               "-t", "1", "--against-plan", "--format", "json"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_the_peak_of_memory_is_as_planned() -> None:
    for row in json.loads(_python(PEAK)):
        assert abs(row["plan_rss_error_percent"]) < 15


def test_quantize_for_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.edgeq"
    common = ("quantize", DEMO, "-o", out, "--no-card", "--target-device")
    said(capsys, *common, "rpi5", "--fast")
    assert facts(out).scheme == "w4-g32"
    # beside the process less than two megabytes are left, and the default takes that much
    toml = tmp_path / "tiny.toml"
    toml.write_text(
        '[tiny]\ntitle = "Tiny"\nkind = "generic"\nusable_bytes = "109.8 MiB"\n'
        'sources.usable_bytes = "estimate: for a test"\n',
        "utf-8",
    )
    text = tmp_path / "t.txt"
    text.write_text((DEMO / "heldout.txt").read_text("utf-8")[:2000], "utf-8")
    calib = ("--calib", text, "--calib-windows", 2, "--calib-context", 64)
    words = (*common, toml, "--force", "--method", "mse", *calib)
    assert main([str(word) for word in words]) == 0
    assert "would not fit" in capsys.readouterr().err
    assert facts(out).weights_bytes < 2 << 20


# published speeds


def _published() -> list[dict[str, Any]]:
    folder = ROOT / "benchmarks" / "plan"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("plan_run", folder / "run.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        rows: list[dict[str, Any]] = module.published()
        return rows
    finally:
        sys.path.remove(str(folder))


def test_plans_are_near_published_speeds() -> None:
    rows = [row for row in _published() if not row["behind"]]
    assert sum(abs(row["error_percent"]) <= 25 for row in rows) >= 8
    for row in rows:
        assert row["source"]
        assert row["planned_gb"] == pytest.approx(row["file_gb"], rel=0.015)


def test_the_page_is_of_these_rows() -> None:
    kept = json.loads((ROOT / "docs" / "plan.json").read_text("utf-8"))["published"]
    key = ("device", "model", "quant", "tokens_per_s", "source")
    assert [[row[k] for k in key] for row in kept] == [
        [row[k] for k in key] for row in _published()
    ]


def test_a_recipe_decides_the_bytes() -> None:
    known = shape_facts("qwen2.5-0.5b")
    small = known.quantized(Recipe.from_options("w4-g128"))
    assert small.weights_bytes < known.at_bits(4).weights_bytes
    assert scratch_bytes(known.config, 64, 4) > scratch_bytes(known.config, 64, 1)
