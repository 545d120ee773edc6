"""Models in LiteRT: the same integers, the oracle's tokens, and what is refused."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters import Options
from edgeq.converters.tflite import builder as tflite_decoder
from edgeq.converters.tflite.decoder import LiteRTDecoderTarget, settings
from edgeq.converters.tflite.file import ALIGN, TfliteFile
from edgeq.converters.tflite.operators import SubgraphWriter, Value
from edgeq.converters.tflite.read import read
from edgeq.converters.tflite.stored_matrix import OUTER
from edgeq.converters.validate import validate
from edgeq.converters.validate.integers import compare_integers
from edgeq.converters.validate.report import ValidationReport
from edgeq.core.errors import FormatError, MissingDependencyError, UnsupportedError, UsageError
from edgeq.evaluation.text import kl_divergence, log_softmax
from edgeq.formats.schemes import parse_scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor
from edgeq.importers import load, shapes
from edgeq.model import artifact
from edgeq.model.block import BlockSpec
from edgeq.model.config import ModelConfig
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.model.trace import TracedReference
from tests.conftest import need
from tests.families import ATTENTION_FAMILIES, blocks, quantized, random_model, rounded, tiny_config
from tests.paths import DEMO

tflite = LiteRTDecoderTarget()
HELD = (*ATTENTION_FAMILIES, "lfm2")

FLOAT = Options(compute="float", prefill=(4, 8))
INT8 = Options(compute="int8", prefill=(4, 8))


def tiny(family: str, scheme: str = "w4-g32", embed: str = "w8-channel") -> Model:
    return quantized(random_model(tiny_config(family, context=96)), scheme, embed)


def converted(model: Model, folder: Path, options: Options) -> Path:
    tflite.check(model, options)
    out = folder / "model.tflite"
    tflite.write(model, out, options)
    return out


def greedy(model: Model, prompt: Sequence[int], n: int) -> tuple[list[int], NDArray[np.float64]]:
    """The oracle's next tokens, and the logits they were chosen by."""
    reference = Reference(model, keep=True)
    cache = reference.new_cache()
    rows = [reference.forward(prompt, cache)[-1]]
    tokens: list[int] = []
    for _ in range(n):
        tokens.append(int(rows[-1].argmax()))
        rows.append(reference.forward(tokens[-1:], cache)[-1])
    return tokens, np.stack(rows).astype(np.float64)


def spoken(
    path: Path, prompt: Sequence[int], tokens: Sequence[int]
) -> tuple[list[int], NDArray[np.float64]]:
    """LiteRT's choices, and logits, when it is given the prompt and then some tokens."""
    runner = tflite.open_runner(path, threads=1)
    rows = [runner.forward(np.asarray(prompt))[-1]]
    rows += [runner.forward(np.asarray([token]))[-1] for token in tokens]
    runner.close()
    return [int(row.argmax()) for row in rows[:-1]], np.stack(rows).astype(np.float64)


def prompt_of(model: Model, n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, model.config.vocab, n)]


# --- what it computes -------------------------------------------------------------------------


@pytest.mark.parametrize("family", HELD)
def test_float_says_what_the_oracle_says_for_64_tokens(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    prompt = prompt_of(model, 20)  # 8 + 8 + 3 in a graph of 4, then the last
    want, want_logits = greedy(model, prompt, 64)
    got, logits = spoken(converted(model, tmp_path, FLOAT), prompt, want)
    assert got == want
    assert np.abs(logits - want_logits).max() < 1e-4


@pytest.mark.parametrize("family", HELD)
def test_rounded_activations_stay_near(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    prompt = prompt_of(model, 20)
    tokens, want = greedy(model, prompt, 20)
    _, logits = spoken(converted(model, tmp_path, INT8), prompt, tokens)
    assert 0 < kl_divergence(log_softmax(want), log_softmax(logits)).mean() < 0.01


@pytest.mark.parametrize("taps", [1, 2, 7])
@pytest.mark.parametrize("compute", ["float", "int8"])
def test_short_convolutions_see_past_what_fills_up_a_prompt(
    taps: int, compute: Literal["float", "int8"], tmp_path: Path
) -> None:
    """Prompts of 4 and 8 tokens are filled up, and the next token does not see the filling."""
    config = tiny_config("lfm2", context=96)
    convolution = BlockSpec(mixer="short_conv", rope=None, window=taps)
    layers = (convolution, config.blocks[1], convolution)
    model = quantized(random_model(replace(config, blocks=layers)), "w8-channel")
    options = Options(compute=compute, prefill=(4, 8))
    report = validate(converted(model, tmp_path, options), model, "tflite", threads=1)
    assert report.passed, report.explain()
    runner = tflite.open_runner(tmp_path / "model.tflite", threads=1)
    prompt = prompt_of(model, 30)
    want = Reference(model).forward(prompt)
    close = 1e-4 if compute == "float" else 0.5
    for _ in range(2):
        done = 0
        for length in (6, 1, 2, 11, 1, 9):
            done += length
            row = runner.forward(np.asarray(prompt[done - length : done]))[-1]
            assert np.abs(row - want[done - 1]).max() < close
        runner.reset()
    runner.close()


def trained(name: str) -> tuple[Model, list[int]]:
    model = load(DEMO if name == "demo" else need("models/stories260K"))
    tokens = {
        "demo": [0, 411, 435, 260, 384, 383, 279, 260, 377, 424, 510, 428],
        "stories260K": [1, 403, 407, 261, 378, 383, 286, 261, 376, 298, 315, 421, 395, 317],
    }
    return model, tokens[name]


@pytest.mark.parametrize("name", ["demo", "stories260K"])
@pytest.mark.parametrize("scheme", ["w4-g32", "w4-channel", "w8-channel"])
def test_trained_models(name: str, scheme: str, tmp_path: Path) -> None:
    model, prompt = trained(name)
    model = quantized(model, scheme)
    want, logits = greedy(model, prompt, 64)
    for compute in ("float", "int8"):
        folder = tmp_path / compute
        folder.mkdir()
        options = Options(compute=compute, context=128, prefill=(16,))
        got, theirs = spoken(converted(model, folder, options), prompt, want)
        if compute == "float":
            assert got == want
        assert kl_divergence(log_softmax(logits), log_softmax(theirs)).mean() < 0.01


@pytest.mark.parametrize(("kv", "allowed"), [("float16", 1e-4), ("int8", 1e-2)])
def test_cache_types(kv: str, allowed: float, tmp_path: Path) -> None:
    model, prompt = trained("demo")
    model = quantized(model, "w4-g32")
    options = Options(compute="float", kv=kv, context=128, prefill=(16,))
    path = converted(model, tmp_path, options)
    tokens, want = greedy(model, prompt, 32)
    runner = tflite.open_runner(path, threads=1)
    assert runner.precision == kv
    rows = [runner.forward(np.asarray(t))[-1] for t in [prompt, *([t] for t in tokens)]]
    kl = kl_divergence(log_softmax(want), log_softmax(np.stack(rows).astype(np.float64)))
    assert 0 < kl.mean() < allowed
    assert {str(a.dtype) for a in runner._cache.values()} == {kv} | (
        {"float32"} if kv == "int8" else set()
    )


@pytest.mark.parametrize("scheme", ["w4-g16", "w8-g32", "w4-g32-palette", "w2-g16", "w3-g64"])
def test_float_holds_what_the_kernels_cannot(scheme: str, tmp_path: Path) -> None:
    model = tiny("llama", scheme, embed=scheme)
    prompt = prompt_of(model, 9)
    tokens, want = greedy(model, prompt, 4)
    path = converted(model, tmp_path, FLOAT)
    got, logits = spoken(path, prompt, tokens)
    assert got == tokens
    assert np.abs(logits - want).max() < 1e-4
    assert not compare_integers(model, lambda: tflite.read_weights(path))[1]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_floating_point_model(dtype: str, tmp_path: Path) -> None:
    model = random_model(tiny_config("qwen3"))
    kinds = {"float16": np.float16, "float32": np.float32, "bfloat16": np.float32}
    tensors = {}
    for name, tensor in model.tensors.items():
        values = tensor.numpy().astype(kinds[dtype])
        if dtype == "bfloat16":
            raw = (values.view(np.uint32) >> 16).astype(np.uint16)
            tensors[name] = FloatTensor("bfloat16", raw)
        else:
            tensors[name] = FloatTensor(dtype, values)
    model = replace(model, tensors=tensors)
    prompt = prompt_of(model, 9)
    want, _ = greedy(model, prompt, 16)
    path = converted(model, tmp_path, FLOAT)
    assert spoken(path, prompt, want)[0] == want
    assert list(tflite.read_weights(path)) == []


def test_a_prompt_that_fills_the_context(tmp_path: Path) -> None:
    """The last piece's filling would reach past the end of a cache of just the context."""
    model = tiny("mistral")
    prompt = prompt_of(model, 30)
    path = converted(model, tmp_path, Options(compute="float", context=30, prefill=(8, 16)))
    runner = tflite.open_runner(path, threads=1)
    runner.forward(np.asarray(prompt[:25]))
    got = runner.forward(np.asarray(prompt[25:]))
    assert np.abs(got - Reference(model).forward(prompt)[-1]).max() < 1e-4
    with pytest.raises(UsageError, match=r"31 tokens.*converted for 30.*longer context"):
        runner.forward(np.asarray([1]))
    runner.reset()
    again = runner.forward(np.asarray(prompt))
    assert np.abs(again - got).max() < 1e-4
    with pytest.raises(UsageError, match="no tokens"):
        runner.forward(np.asarray([], np.int64))


# --- what is in the file ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    ["w4-g32", "w4-g64", "w4-g128", "w4-g256", "w4-channel", "w4-tensor", "w8-channel",
     "w8-tensor", "w3-g32", "w2-g32-sym", "w3-channel", "w4-channel-asym", "w2-g32-asym"],
)  # fmt: skip
def test_stored_integers_are_the_artifacts(scheme: str, tmp_path: Path) -> None:
    model = tiny("phi3", scheme, embed=scheme)
    path = converted(model, tmp_path, INT8)
    equal, faults = compare_integers(model, lambda: tflite.read_weights(path))
    assert not faults
    assert all(equal.values())
    assert len(equal) == sum(isinstance(t, QuantTensor) for t in model.tensors.values())
    prompt = prompt_of(model, 6)
    want = Reference(model).forward(prompt)[-1]
    got = spoken(path, prompt, [])[1][0]
    assert np.linalg.norm(got - want) < 0.15 * np.linalg.norm(want)


def test_a_changed_integer_is_seen(tmp_path: Path) -> None:
    model = tiny("llama")
    path = converted(model, tmp_path, INT8)
    name = "model.layers.1.mlp.down_proj.weight"
    header = read(path)
    graph = header.model.subgraphs[-1]
    buffer = next(t.buffer for t in graph.tensors if t.name.decode() == f"decode/{name}")
    entry = header.model.buffers[buffer]
    raw = bytearray(path.read_bytes())
    raw[entry.offset + entry.size // 2] ^= 0x10
    path.write_bytes(raw)
    equal, faults = compare_integers(model, lambda: tflite.read_weights(path))
    assert [f.name for f in faults] == [name]
    assert sum(not ok for ok in equal.values()) == 1


def test_signatures_are_litert_lms(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    model = tiny("qwen2")
    path = converted(model, tmp_path, Options(context=32, prefill=(8, 4)))
    c = model.config
    interpreter = Interpreter(model_path=str(path))
    found = interpreter.get_signature_list()
    caches = {f"kv_cache_{kind}_{i}" for kind in "kv" for i in range(c.layers)}
    for name, length in (("prefill_4", 4), ("prefill_8", 8), ("decode", 1)):
        assert set(found[name]["inputs"]) == caches | {"tokens", "input_pos"}
        assert set(found[name]["outputs"]) == caches | ({"logits"} if length == 1 else set())
        run = interpreter.get_signature_runner(name)
        details = run.get_input_details()
        assert list(details["tokens"]["shape"]) == [1, length]
        assert list(details["input_pos"]["shape"]) == [length]
        shape = list(details["kv_cache_k_0"]["shape"])
        assert shape == [1, c.kv_heads, 32 + 8, c.head_dim]
    assert list(run.get_output_details()["logits"]["shape"]) == [1, 1, c.vocab]
    assert len(found) == 3


def larger() -> Model:
    config = ModelConfig(
        "llama", hidden=512, ffn=2048, heads=8, kv_heads=4, head_dim=64, vocab=16384,
        context=512, blocks=blocks(64), bos=1, eos=(2,),
    )  # fmt: skip
    return shapes.random_model(
        config,
        lambda name, shape: parse_scheme("w8-channel" if "embed" in name else "w4-g32"),
    )


def test_size_is_the_artifacts(tmp_path: Path) -> None:
    model = larger()
    artifact.save(model, tmp_path / "model.edgeq")
    seen: list[tuple[str, int, int]] = []
    out = tmp_path / "model.tflite"
    tflite.write(model, out, Options(), lambda *state: seen.append(state))
    size = out.stat().st_size
    assert size <= 1.03 * (tmp_path / "model.edgeq").stat().st_size
    done = [state[1] for state in seen]
    assert done == sorted(done)
    assert size - ALIGN < done[-1] <= seen[-1][2] == size
    assert {"model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight.scales"} <= {
        state[0] for state in seen
    }


def test_weights_lie_behind_the_flatbuffer_and_are_shared(tmp_path: Path) -> None:
    header = read(converted(tiny("gemma3"), tmp_path, INT8))
    late = [b for b in header.model.buffers if b.offset]
    assert all(b.offset % ALIGN == 0 for b in late)
    ends = [0, *(b.offset + b.size for b in late)]
    assert all(b.offset >= end for b, end in zip(late, ends, strict=False))
    places = [
        {t.name.split(b"/")[1]: t.buffer for t in graph.tensors if t.name.endswith(b".weight")}
        for graph in header.model.subgraphs
    ]
    assert len(places) == 3
    for name in places[0]:
        assert places[0][name] == places[1][name] == places[2][name]
    assert b"model.layers.2.mlp.down_proj.weight" in places[2]
    assert b"model.layers.2.mlp.down_proj.weight" not in places[0]  # no later layer sees it


def test_memory_is_bounded(tmp_path: Path) -> None:
    """What `write` takes is what it says, and does not grow with the weights."""
    from edgeq.core.memory import peak_rss_bytes, reset_peak_rss, rss_bytes

    artifact.save(larger(), tmp_path / "model.edgeq")
    model = artifact.load(tmp_path / "model.edgeq")
    tflite.check(model, Options())
    if not reset_peak_rss():
        pytest.skip("this system does not count a process's peak anew")
    before = rss_bytes()
    tflite.write(model, tmp_path / "model.tflite", Options())
    peak = peak_rss_bytes()
    assert before is not None
    assert peak is not None
    mapped = max(t.nbytes for t in model.tensors.values())
    assert peak - before - mapped < tflite.memory(model, Options())


@pytest.mark.heavy
def test_a_file_past_two_gigabytes(tmp_path: Path) -> None:
    config = ModelConfig(
        "llama", hidden=4096, ffn=4096, heads=32, kv_heads=8, head_dim=128,
        vocab=540_000, context=32, blocks=blocks(128, layers=1), bos=1, eos=(2,),
    )  # fmt: skip
    model = shapes.random_model(
        config,
        lambda name, shape: parse_scheme("w8-channel" if "embed" in name else "w4-g32"),
    )
    path = converted(model, tmp_path, Options(prefill=(4,)))
    assert path.stat().st_size > 2**31
    prompt = [539_999, 270_000, 1, 535_000, 2]
    want = Reference(model).forward(prompt, all_logits=False)
    got = spoken(path, prompt, [])[1][0]
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


# --- results by name --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_named_results_are_the_oracles(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    path = converted(model, tmp_path, FLOAT)
    past, tokens = prompt_of(model, 5), prompt_of(model, 11, seed=1)
    builder = TracedReference(model, keep=True)
    builder.trace(past)
    ours = builder.trace(tokens)
    theirs = tflite.trace(path, tokens, past)
    assert set(theirs) == set(ours)
    last = model.config.layers - 1
    for name, right in ours.items():
        got = theirs[name]
        rows = 11 if f"layers.{last}." not in name and name not in ("final_norm", "logits") else 1
        if name in (
            f"layers.{last}.{step}" for step in ("attn_norm", "k", "v", "k_norm", "k_rope")
        ):
            rows = 11
        assert got.shape == (rows, *right.shape[1:]), name
        assert np.abs(got - right[-rows:]).max() < 1e-4, name
    alone = tflite.trace(path, tokens[:1])
    assert np.abs(alone["logits"] - TracedReference(model).trace(tokens[:1])["logits"]).max() < 1e-4


def test_one_signature_at_a_time(tmp_path: Path) -> None:
    """What validation opens says the same as any other runner, prompt after prompt."""
    model = tiny("llama")
    path = converted(model, tmp_path, Options(prefill=(4,)))
    usual, frugal = tflite.open_runner(path, threads=1), tflite.open_frugal(path, threads=1)
    for seed in range(2):
        usual.reset()
        frugal.reset()
        for tokens in (prompt_of(model, 9, seed=seed), [5], prompt_of(model, 6, seed=2), [7], [8]):
            ids = np.asarray(tokens)
            np.testing.assert_array_equal(usual.forward(ids), frugal.forward(ids))
    usual.close()
    frugal.close()


# --- refusals ---------------------------------------------------------------------------------


def test_schemes_without_a_kernel_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"self_attn.q_proj.* as w4-g32-asym; .*w4-g32,"):
        tflite.check(tiny("llama", "w4-g32-asym"), INT8)
    for scheme in ("w8-g32", "w4-g16", "w4-g32-palette"):
        with pytest.raises(UnsupportedError, match=f"as {scheme}; .*compute in float"):
            tflite.check(tiny("llama", scheme), INT8)
    with pytest.raises(UnsupportedError, match="as w8-g32-asym") as refusal:
        tflite.check(tiny("llama", "w8-g32-asym"), FLOAT)
    assert "compute in float" not in str(refusal.value)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_a_head_without_a_kernel_is_computed_in_float(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    outer = {name for name in OUTER if name in dict(model.config.linears())}
    tensors = {name: rounded(model.tensors[name].numpy(), "w6-g32") for name in outer}
    model = replace(model, tensors={**model.tensors, **tensors})
    remarks = " ".join(tflite.remarks(model, INT8))
    assert all(f"{name} is computed in float" in remarks for name in outer)
    assert "computed in float" not in " ".join(tflite.remarks(model, FLOAT))
    path = converted(model, tmp_path, INT8)
    got = tflite.trace(path, prompt_of(model, 9))
    # from the target's own last hidden state, so that nothing but the head's arithmetic differs
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    want = got["final_norm"][-1:] @ head.numpy().T
    assert np.abs(got["logits"] - want).max() < 1e-4


def mirrored(model: Model, name: str, scheme: str) -> Model:
    """The model with every second scale of a matrix negative."""
    values = rounded(model.tensors[name].numpy(), scheme)
    scales = values.scales.copy()
    scales.reshape(-1)[::2] *= -1
    return replace(model, tensors={**model.tensors, name: replace(values, scales=scales)})


def test_scales_that_are_not_positive_are_refused_in_integers() -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(UnsupportedError, match=f"{name} has scales that are not positive"):
        tflite.check(mirrored(tiny("llama"), name, "w4-g32"), INT8)
    embedding = "model.embed_tokens.weight"
    with pytest.raises(UnsupportedError, match=f"{embedding} has scales that are not positive"):
        tflite.check(mirrored(tiny("llama"), embedding, "w4-g32"), FLOAT)


@pytest.mark.parametrize("scheme", ["w4-g32", "w5-g16", "w4-channel", "w8-channel"])
@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.down_proj"])
def test_negative_scales_are_multiplied_in_float(name: str, scheme: str, tmp_path: Path) -> None:
    model = mirrored(tiny("llama"), f"model.layers.0.{name}.weight", scheme)
    prompt = prompt_of(model, 9)
    tokens, want = greedy(model, prompt, 4)
    path = converted(model, tmp_path, FLOAT)
    got, logits = spoken(path, prompt, tokens)
    assert got == tokens
    assert np.abs(logits - want).max() < 1e-4
    assert not compare_integers(model, lambda: tflite.read_weights(path))[1]


def test_an_embedding_in_groups_of_8_bits_may_have_negative_scales(tmp_path: Path) -> None:
    model = mirrored(tiny("llama"), "model.embed_tokens.weight", "w5-g16")
    prompt = prompt_of(model, 9)
    tokens, want = greedy(model, prompt, 4)
    got, logits = spoken(converted(model, tmp_path, FLOAT), prompt, tokens)
    assert got == tokens
    assert np.abs(logits - want).max() < 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(context=97), "context is 97; this model supports 2 to 96"),
        (Options(context=1), "context is 1"),
        (Options(prefill=(0, 4)), "prefill lengths are 0, 4"),
        (Options(context=16, prefill=(16,)), "they can be 1 to 15"),
        (Options(extra={"speed": 11}), "no option speed"),
    ],
)
def test_options_out_of_range_are_refused(options: Options, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tflite.check(tiny("llama"), options)


def test_short_contexts_get_a_prefill_of_their_own() -> None:
    config = tiny_config("llama", context=8)
    assert settings(config, Options()).prefill == (7,)
    assert settings(tiny_config("llama"), Options()).prefill == (16,)
    assert settings(shapes.shape("llama-3.2-1b"), Options()).context == 1280


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.tflite"
    for content, words in (
        (b"", "is empty"),
        (b"x" * 64, "TFL3"),
        (b"\xff" * 4 + b"TFL3", "damaged"),
    ):
        bad.write_bytes(content)
        with pytest.raises(FormatError, match=words):
            tflite.open_runner(bad)
    with pytest.raises(FormatError, match="cannot be read"):
        tflite.open_runner(tmp_path / "absent.tflite")
    file = TfliteFile()
    graph = SubgraphWriter(file, "double")
    x = graph.input("x", (2,), "float32")
    graph.finish({"x": x}, {"y": graph.add(x, x)})
    file.save(tmp_path / "other.tflite")
    with pytest.raises(FormatError, match="not made by edgeq"):
        list(tflite.read_weights(tmp_path / "other.tflite"))


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = converted(tiny("llama"), tmp_path, INT8)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"format_version": 1', b'"format_version": 9'))
    with pytest.raises(FormatError, match="format version 9; this edgeq reads 1"):
        tflite.open_runner(path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = converted(tiny("llama"), tmp_path, INT8)
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(FormatError, match="cut short"):
        list(tflite.read_weights(path))
    with pytest.raises(FormatError, match="cut short"):
        tflite.open_runner(path)


def test_without_litert(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    for call in (
        lambda: tflite.check(tiny("llama"), INT8),
        lambda: tflite.open_runner(tmp_path / "model.tflite"),
        lambda: list(tflite.read_weights(tmp_path / "model.tflite")),
        tflite.versions,
    ):
        with pytest.raises(MissingDependencyError, match=r"edgeq\[tflite\]"):
            call()


def test_versions_name_the_libraries() -> None:
    assert set(tflite.versions()) == {"ai-edge-litert", "flatbuffers"}
    assert all(math.isfinite(float(v.split(".")[0])) for v in tflite.versions().values())


# --- planted faults ---------------------------------------------------------------------------


def faulty(model: Model, folder: Path) -> ValidationReport:
    path = folder / "model.tflite"
    tflite.write(model, path, FLOAT)
    report = validate(path, model, "tflite", steps=2, threads=1)
    assert not report.passed
    return report


@pytest.mark.parametrize("fault", ["nibbles", "scales"])
def test_wrong_integers_are_named(fault: str, tmp_path: Path) -> None:
    """The bytes of one matrix of a correct file are replaced."""
    name = "model.layers.1.self_attn.o_proj.weight"
    model = quantized(random_model(tiny_config("llama", hidden=64, head_dim=16)), "w4-g32")
    correct, damaged = tmp_path / "correct.tflite", tmp_path / "model.tflite"
    tflite.write(model, correct, FLOAT)
    [weight] = [one for one in tflite.read_weights(correct) if one.name == name]
    before: NDArray[np.generic]
    after: NDArray[np.generic]
    if fault == "nibbles":
        codes = weight.levels.astype(np.int8).view(np.uint8)
        packed = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
        before, after, words = (
            packed,
            (packed << 4) | (packed >> 4),
            "nibbles of each byte are exch",
        )
    else:
        before = weight.scales.astype(np.float16)
        after, words = np.roll(before, 1, axis=1), "shifted by one group"
    content = correct.read_bytes()
    assert content.count(before.tobytes()) == 1
    damaged.write_bytes(content.replace(before.tobytes(), after.tobytes()))
    report = validate(damaged, model, "tflite", steps=2, threads=1)
    assert not report.passed
    matrix, bytes_of_it = report.decoder.tensor_faults
    assert matrix.name == name
    assert words in matrix.what
    assert name in bytes_of_it.name  # every constant of the file is compared too


def test_a_wrong_rotary_base_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # validate converts the source again to compare the steps, so the converter must be wrong itself
    right = tflite_decoder.rope_tables
    monkeypatch.setattr(
        tflite_decoder,
        "rope_tables",
        lambda rope, n, context: right(replace(rope, base=9e3), n, context),
    )
    divergence = faulty(tiny("qwen3"), tmp_path).decoder.divergence
    assert divergence is not None
    assert divergence.step == "layers.0.q_rope"


def test_a_layer_whose_cache_is_lost_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as above: validate converts the source again, so the converter must be wrong itself
    whole = tflite_decoder._LiteRTBuilder._updated

    def lost(self: tflite_decoder._LiteRTBuilder, name: str, new: Value) -> Value:
        out = whole(self, name, new)
        if name == "kv_cache_v_1":
            self._outputs[name] = self._g.mul(self._inputs[name], self._g.constant(0.0))
        return out

    monkeypatch.setattr(tflite_decoder._LiteRTBuilder, "_updated", lost)
    divergence = faulty(tiny("llama"), tmp_path).decoder.divergence
    assert divergence is not None
    assert divergence.step == "layers.1.mix"
