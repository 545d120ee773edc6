"""GGUF files: read by the gguf package, run by llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters import Options
from edgeq.converters.gguf.bytes import pack_blocks, unpack_blocks
from edgeq.converters.gguf.decoder import GgufDecoderTarget
from edgeq.converters.gguf.run import LlamaRunner
from edgeq.converters.gguf.tokenizer import tokenizer_keys
from edgeq.converters.validate import validate
from edgeq.converters.validate.bisect import first_divergence, traced_passes
from edgeq.converters.validate.integers import compare_integers
from edgeq.converters.validate.report import ValidationReport
from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.formats.schemes import QuantScheme
from edgeq.formats.spill import Spill
from edgeq.formats.tensor import FloatTensor
from edgeq.importers import load, shapes
from edgeq.importers.gguf.file import open_gguf
from edgeq.importers.gguf.tokenizer import tokenizer_files
from edgeq.model import artifact
from edgeq.model.block import DeltaSpec, ExpertsSpec
from edgeq.model.model import Model
from edgeq.model.rope_spec import RopeScaling
from tests.conftest import SHARED, need
from tests.families import CALIBRATED, MIXTURES, quantized, random_model, tiny_config
from tests.paths import DEMO, ROOT

gguf = GgufDecoderTarget()

package = pytest.importorskip("gguf")
runs = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is absent")

SCHEME = QuantScheme(4)


def config(family: str, **over: Any) -> Any:
    """Rows of 64 are whole blocks, the feed-forward's 76 are not."""
    shape: dict[str, Any] = {"hidden": 64, "head_dim": 16, "context": 128}
    if family in ("gemma2", "gemma3"):
        shape |= {"embed_scale": 8.0}
    if family in ("mistral", "phi3"):
        shape |= {"window": 100}
    if family == "exaone4":  # llama.cpp gives windows to models of 64 layers
        shape |= {"window": None, "window_layers": (), "rope_layers": ()}
    if family == "qwen3_moe":  # llama.cpp gives experts to every layer
        shape |= {"dense_layers": 0}
    if family == "qwen3_5":  # keys and values of one size, as many heads of each
        sizes = DeltaSpec(key_heads=4, value_heads=4, key_dim=16, value_dim=16)
        shape |= {"delta": sizes, "rope_dim": 8}
    return tiny_config(family, **(shape | over))


def tiny(family: str, scheme: str | None = "w4-g32", **over: Any) -> Model:
    model = random_model(config(family, **over))
    return model if scheme is None else quantized(model, scheme)


def made(model: Model, folder: Path, options: Options | None = None) -> Path:
    out = folder / "model.gguf"
    gguf.check(model, options or Options())
    gguf.write(model, out, options or Options())
    return out


def checked(model: Model, folder: Path, **more: Any) -> ValidationReport:
    return validate(made(model, folder), model, "gguf", threads=1, **more)


@runs
@pytest.mark.parametrize("family", CALIBRATED)
def test_llama_cpp_says_the_same_64_tokens(family: str, tmp_path: Path) -> None:
    """Every step of its own graph is ours, but for activations in 8 bits."""
    report = checked(tiny(family), tmp_path, steps=63)
    assert report.passed, report.explain()
    assert report.decoder.precision == "int8"
    assert report.decoder.trace_note is None
    # near a tie of the router, another rounding chooses another expert
    assert report.decoder.kl_mean < (5e-3 if family in MIXTURES else 2e-3)
    assert report.decoder.greedy_compared == 64 * len(report.decoder.prompts)
    assert report.decoder.greedy_equal + report.decoder.near_ties == report.decoder.greedy_compared


@runs
@pytest.mark.parametrize("family", CALIBRATED)
def test_floating_point_is_exact(family: str, tmp_path: Path) -> None:
    report = checked(tiny(family, None), tmp_path)
    assert report.passed, report.explain()
    assert report.decoder.precision == "float32"
    assert report.decoder.logits_max < 5e-4 * report.decoder.logits_range
    assert report.decoder.greedy_equal == report.decoder.greedy_compared


@runs
@pytest.mark.parametrize("name", ["demo", "stories260K"])
def test_real_models(name: str, tmp_path: Path) -> None:
    source = DEMO if name == "demo" else need("models/stories260K")
    model = quantized(load(source), "w4-g32")
    report = checked(model, tmp_path, steps=63)
    assert report.passed, report.explain()
    assert report.decoder.kl_mean < 2e-3
    assert len(report.integers) == 36
    assert all(report.integers.values())
    text = "Once upon a time, there was a <s> 3-legged\n dog: it's naïve!  Two spaces."
    import tokenizers

    theirs = LlamaRunner(tmp_path / "model.gguf", 1)
    ours = tokenizers.Tokenizer.from_str(model.files["tokenizer.json"].decode())
    assert theirs.tokenize(text) == ours.encode(text).ids
    theirs.close()


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("w4-g32", "Q4_0"), ("w4-g64", "Q4_0"), ("w4-channel", "Q4_0"), ("w4-tensor", "Q4_0"),
        ("w3-g32", "Q4_0"), ("w2-g64-asym", "Q4_0"), ("w3-g32-asym", "Q4_0"),
        ("w4-g32-asym", "Q4_1"), ("w4-g64-asym", "Q5_0"), ("w4-g32-palette", "Q8_0"),
        ("w8-g32", "Q8_0"), ("w8-g128", "Q8_0"), ("w8-channel", "Q8_0"), ("w8-tensor", "Q8_0"),
    ],
)  # fmt: skip
def test_integers_come_back(scheme: str, kind: str, tmp_path: Path) -> None:
    """Of every scheme, and the gguf package's own values of the blocks are the weights'."""
    model = tiny("qwen2", scheme, hidden=128, head_dim=32)
    if kind == "Q4_1":
        model = with_even_zero_points(model)
    out = made(model, tmp_path)
    equal, faults = compare_integers(model, lambda: gguf.read_weights(out))
    assert not faults
    assert len(equal) == len(list(model.config.linears()))
    reader = {t.name: t for t in package.GGUFReader(out).tensors}
    down = reader["blk.1.ffn_down.weight"]
    assert down.tensor_type.name == kind
    values = package.quants.dequantize(down.data, down.tensor_type)
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(values[:, :76], model.tensors[name].numpy())
    assert not values[:, 76:].any()


def with_even_zero_points(model: Model) -> Model:
    """Zero points of few bits, so that float16 holds scale * zero_point."""
    tensors = dict(model.tensors)
    for name, tensor in tensors.items():
        zeros = getattr(tensor, "zero_points", None)
        if zeros is not None:
            tensors[name] = replace(tensor, zero_points=np.full_like(zeros, 8))
    return replace(model, tensors=tensors)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_lie_one_after_the_other(family: str, tmp_path: Path) -> None:
    """In one tensor of three dimensions, as the gguf package reads it; their integers come back."""
    model = tiny(family)
    out = made(model, tmp_path)
    equal, faults = compare_integers(model, lambda: gguf.read_weights(out))
    assert not faults
    quant = [n for n, _ in model.config.linears() if not n.endswith("router.weight")]
    assert len(equal) == len(quant)
    experts, layer = model.config.experts, model.config.layers - 1
    assert experts is not None
    reader = {t.name: t for t in package.GGUFReader(out).tensors}
    padded = -(-experts.ffn // 32) * 32
    for part, stored, n, k in (
        ("gate_proj", "ffn_gate_exps", padded, 64), ("up_proj", "ffn_up_exps", padded, 64),
        ("down_proj", "ffn_down_exps", 64, padded),
    ):  # fmt: skip
        tensor = reader[f"blk.{layer}.{stored}.weight"]
        assert tuple(tensor.shape) == (k, n, experts.count)
        values = package.quants.dequantize(tensor.data, tensor.tensor_type)
        for e in range(experts.count):
            want = model.tensors[f"model.layers.{layer}.mlp.experts.{e}.{part}.weight"].numpy()
            got = values.reshape(experts.count, n, k)[e]
            np.testing.assert_array_equal(got[: want.shape[0], : want.shape[1]], want)
            assert not got[want.shape[0] :].any()
            assert not got[:, want.shape[1] :].any()
    router = reader[f"blk.{layer}.ffn_gate_inp.weight"]
    assert router.tensor_type.name == "F32"


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_blocks_are_the_gguf_package_s(kind: Any) -> None:
    rng = np.random.default_rng(0)
    low, high = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}[kind]
    codes = rng.integers(low, high + 1, (7, 96)).astype(np.int16)
    scales = (rng.integers(1, 200, (7, 3)) / 64).astype(np.float32)
    zeros = rng.integers(0, 8, (7, 3)).astype(np.int16) if kind == "Q4_1" else None
    raw = pack_blocks(kind, codes, scales, zeros)
    values = package.quants.dequantize(raw, package.GGMLQuantizationType[kind])
    each = np.repeat(scales, 32, axis=1)
    offset = 0 if zeros is None else np.repeat(zeros, 32, axis=1)
    np.testing.assert_array_equal(values, (codes - offset) * each)
    got = unpack_blocks(kind, raw)
    np.testing.assert_array_equal(got[0], codes)
    np.testing.assert_array_equal(got[1], scales)
    if zeros is not None:
        np.testing.assert_array_equal(got[2], zeros)


def test_phi3_s_fused_tensors_take_the_wider_type(tmp_path: Path) -> None:
    model = tiny("phi3")
    wide = quantized(random_model(model.config), "w8-g32")
    name = "model.layers.0.self_attn.v_proj.weight"
    mixed = replace(model, tensors=dict(model.tensors) | {name: wide.tensors[name]})
    out = made(mixed, tmp_path)
    kinds = {t.name: t.tensor_type.name for t in package.GGUFReader(out).tensors}
    assert kinds["blk.0.attn_qkv.weight"] == "Q8_0"
    assert kinds["blk.1.attn_qkv.weight"] == "Q4_0"
    assert not compare_integers(mixed, lambda: gguf.read_weights(out))[1]


def test_what_the_file_says(tmp_path: Path) -> None:
    model = tiny("llama", rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16))
    file = open_gguf(made(model, tmp_path, Options(context=48)))
    keys = file.metadata
    assert keys["llama.context_length"] == 48
    assert keys["llama.feed_forward_length"] == 96
    assert keys["edgeq.feed_forward"] == 76
    assert keys["tokenizer.ggml.model"] == "none"
    assert "output.weight" not in file.tensors
    assert file.tensors["rope_freqs.weight"].shape == (8,)
    size = (tmp_path / "model.gguf").stat().st_size
    last = max(file.tensors.values(), key=lambda entry: entry.start)
    assert last.start < size


def test_our_own_importer_reads_it(tmp_path: Path) -> None:
    """A third reader, which moves the rows of q and k back."""
    model = tiny("llama", "w4-g32", rope_scaling=None)
    again = load(made(model, tmp_path))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj"):
        full = f"model.layers.1.{name}.weight"
        np.testing.assert_array_equal(again.tensors[full].numpy(), model.tensors[full].numpy())


@runs
def test_a_window_llama_cpp_has_not_limits_the_context(tmp_path: Path) -> None:
    model = tiny("mistral", window=40)
    runner = LlamaRunner(made(model, tmp_path), 1)
    assert runner.context == 40
    with pytest.raises(UsageError, match="context is 40 tokens"):
        runner.forward(np.zeros(41, np.int64))
    runner.close()
    with pytest.raises(UnsupportedError, match="no sliding window for mistral: beyond 40 tokens"):
        gguf.check(model, Options(context=41))


@pytest.mark.parametrize(
    ("family", "scheme", "over", "words"),
    [
        ("llama", "w4-g16", {}, r"cannot hold model\.embed|cannot hold model\.layers\.0"),
        ("llama", "w8-g32-asym", {}, "cannot hold model.layers.0.self_attn.q_proj.weight"),
        ("llama", "w4-g32", {"hidden": 44, "head_dim": 12}, "whole blocks of 32 weights, but"),
        ("llama", "w4-g32", {"attn_scale": 0.3}, "computes with another attn_scale than 0.3"),
        ("llama", "w4-g32", {"activation": "gelu_tanh"}, "another activation than gelu_tanh"),
        ("qwen2", "w4-g32", {"rope_scaling": RopeScaling("llama3", 8.0)}, "another rope scaling"),
        ("gemma3", "w4-g32", {"window_layers": (True, False, False)}, "another window than 5"),
        ("gemma3", "w4-g32", {"embed_scale": 3.0}, "another embed_scale"),
        ("phi3", "w4-g32", {"hidden": 96}, "another head_dim"),
        ("qwen3_moe", "w4-g32", {"dense_layers": 1}, "mixture of experts than 2 of 6 .*2 of 3 lay"),
        (
            "qwen3_moe",
            "w4-g32",
            {"experts": ExpertsSpec(count=4, chosen=2, ffn=32)},
            r"mixture of experts than 2 of 4 \(softmax, not divided by their sum",
        ),
        ("qwen3_moe", "w4-g32", {"experts": None}, "another mixture of experts than none"),
        ("lfm2_moe", "w4-g32", {"tied": False}, "another tied than False"),
    ],
)
def test_refusals_name_the_tensor_or_feature(
    family: str, scheme: str, over: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedError, match=words):
        gguf.check(tiny(family, scheme, **over), Options())


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "smollm3", "olmo2", "llama"])
def test_biases_that_llama_cpp_has_not_are_named(family: str) -> None:
    """An architecture of llama.cpp has the biases that it has, whatever a file holds."""
    model = tiny(family, "w4-g32")
    ends = ("q_proj", "k_proj", "v_proj", "o_proj")
    biases = {
        name: FloatTensor("float32", np.ones(shape, np.float32))
        for name, shape in model.config.biases()
        if name.split(".")[-2] in ends
    }
    assert len(biases) == len(ends) * model.config.layers
    biased = replace(model, tensors={**model.tensors, **biases})
    if family in ("smollm3", "llama"):
        gguf.check(biased, Options())
        return
    words = rf"has biases on k_proj, o_proj, q_proj, v_proj, and llama\.cpp's {family} has none"
    with pytest.raises(UnsupportedError, match=words):
        gguf.check(biased, Options())


@pytest.mark.parametrize(
    "options",
    [Options(context=129), Options(kv="int8"), Options(prefill=(16,)), Options(compute="float"),
     Options(extra={"target_os": "ios18"})],
)  # fmt: skip
def test_options_that_have_no_place_in_a_file(options: Options) -> None:
    with pytest.raises(UsageError):
        gguf.check(tiny("llama"), options)


@runs
def test_gemma_s_own_attention_scale(tmp_path: Path) -> None:
    """It goes into the norm of q, and the trace takes it out again."""
    model = tiny("gemma3", None, attn_scale=24**-0.5)
    out = made(model, tmp_path)
    prompt = list(range(20))
    with Spill() as spill:
        passes = traced_passes(lambda tokens, past: gguf.trace(out, tokens, past), prompt, spill)
    assert first_divergence(model, passes, "float32") is None


@runs
def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    out = made(tiny("llama"), tmp_path)
    out.write_bytes(out.read_bytes()[:3000])
    with pytest.raises(FormatError):
        list(gguf.read_weights(out))
    with pytest.raises(FormatError):
        gguf.open_runner(out, threads=1)


@runs
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-spm", "gpt-2"])
def test_tokenizers_survive_the_way_there_and_back(name: str, tmp_path: Path) -> None:
    """llama.cpp's own vocabularies and test vectors, through tokenizer.json."""
    source = need(f"data/tokenizers/ggml-vocab-{name}.gguf")
    files, vocabulary = tokenizer_files(open_gguf(source).metadata)
    assert vocabulary is not None
    n = len(vocabulary.tokens)
    model = replace(tiny("llama", vocab=n), files=files)
    runner = LlamaRunner(made(model, tmp_path), 1)
    folder = SHARED / "data" / "tokenizers"
    texts = (
        (folder / f"ggml-vocab-{name}.gguf.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    )
    lines = (folder / f"ggml-vocab-{name}.gguf.out").read_text("utf-8").splitlines()
    bos = [vocabulary.bos] if vocabulary.add_bos else []
    wrong = [
        text
        for text, line in zip(texts, lines, strict=False)
        if runner.tokenize(text) != bos + [int(word) for word in line.split()]
    ]
    runner.close()
    assert not wrong


def test_a_tokenizer_s_keys() -> None:
    model = load(DEMO)
    keys = tokenizer_keys(model)
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert len(keys["tokenizer.ggml.tokens"]) == model.config.vocab
    assert keys["tokenizer.ggml.bos_token_id"] == 0
    assert keys["tokenizer.ggml.add_bos_token"] is True
    settings = json.loads(model.files["tokenizer_config.json"]) | {
        "chat_template": [{"name": "default", "template": "A"}, {"name": "tools", "template": "B"}]
    }
    files = dict(model.files) | {"tokenizer_config.json": json.dumps(settings).encode()}
    keys = tokenizer_keys(replace(model, files=files))
    assert keys["tokenizer.chat_template"] == "A"
    assert keys["tokenizer.chat_template.tools"] == "B"
    keys = tokenizer_keys(replace(model, files=files | {"chat_template.jinja": b"C"}))
    assert keys["tokenizer.chat_template"] == "C"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"type": "Unigram"}}, "is a Unigram model"),
        ({"decoder": {"type": "WordPiece"}}, "decodes by WordPiece"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"cuts texts by \['Whitespace \{\}'\]"),
    ],
)
def test_tokenizers_llama_cpp_has_not(change: dict[str, Any], words: str) -> None:
    model = load(DEMO)
    document = json.loads(model.files["tokenizer.json"]) | change
    files = dict(model.files) | {"tokenizer.json": json.dumps(document).encode()}
    with pytest.raises(UnsupportedError, match=words):
        gguf.check(replace(quantized(model, "w4-g32"), files=files), Options())


@pytest.mark.slow
def test_writing_holds_a_piece_at_a_time(tmp_path: Path) -> None:
    """A model of 42 M weights, in a process of its own, within what is promised."""
    model = shapes.random_model(shapes.shape("stories42m"), lambda name, shape: SCHEME)
    artifact.save(model, tmp_path / "m.edgeq")
    code = (
        "import sys; from edgeq.core.memory import peak_rss_bytes, rss_bytes\n"
        "from edgeq.converters.convert import convert\n"
        "from edgeq.converters import Options, TARGETS\n"
        "from edgeq.importers import load\n"
        "gguf = TARGETS['gguf'].decoder_target()\n"
        "before = rss_bytes()\n"
        "convert(sys.argv[1], 'gguf', sys.argv[2], validate=False)\n"
        "print(peak_rss_bytes() - before, gguf.memory(load(sys.argv[1]), Options()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "m.edgeq", tmp_path / "m.gguf"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    taken, promised = map(int, done.stdout.split())
    assert taken < promised
    assert promised < 3 * (tmp_path / "m.gguf").stat().st_size


SHARED_HEADS = DeltaSpec(key_heads=2, value_heads=6, key_dim=32, value_dim=32)
"""Value heads that share key heads, which llama.cpp has in another order."""


@runs
@pytest.mark.parametrize("scheme", [None, "w4-g32", "w4-g32-asym", "w8-g64", "w4-channel"])
def test_value_heads_that_share_key_heads(scheme: str | None, tmp_path: Path) -> None:
    """llama.cpp computes the same, step by step, from a file in its own order of heads."""
    model = tiny("qwen3_5", scheme, delta=SHARED_HEADS)
    report = checked(model, tmp_path)
    assert report.passed, report.explain()
    assert report.decoder.trace_note is None
    if scheme is None:
        assert report.decoder.logits_max < 5e-4 * report.decoder.logits_range
    else:
        assert report.decoder.kl_mean < 2e-3
    # and a file that was read is written with the same bytes in every tensor
    got = load(tmp_path / "model.gguf")
    again = tmp_path / "again"
    again.mkdir()
    second = checked(replace(got, files=model.files).packed(), again)
    assert second.passed, second.explain()
    one, other = open_gguf(tmp_path / "model.gguf"), open_gguf(again / "model.gguf")
    for name, entry in one.tensors.items():
        assert other.tensors[name].type == entry.type
        rows = (int(np.prod(entry.shape[:-1])), entry.row_bytes)
        first, repeated = (
            file.mapping.array(np.uint8, rows, file.tensors[name].start) for file in (one, other)
        )
        if "ssm_a" not in name or "alpha" in name:  # a logarithm and an exponential, rounded
            np.testing.assert_array_equal(first, repeated, err_msg=name)


def test_blocks_larger_than_the_heads_that_are_moved_are_refused(tmp_path: Path) -> None:
    config_ = config("qwen3_5", hidden=256, delta=replace(SHARED_HEADS, value_heads=8))
    model = quantized(random_model(config_), "w2-g256")
    with pytest.raises(UnsupportedError, match=r"out_proj\.weight in another order, and a block"):
        gguf.check(model, Options())
