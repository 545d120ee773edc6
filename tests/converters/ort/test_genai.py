"""Folders of ours in the real onnxruntime-genai."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq import quantize
from edgeq.converters import Options
from edgeq.converters.ort import genai as genai_module
from edgeq.converters.ort.decoder import OrtDecoderTarget
from edgeq.converters.ort.genai import GenaiDecoderTarget
from edgeq.core.errors import FormatError, MissingDependencyError, UnsupportedError, UsageError
from edgeq.importers import load
from edgeq.importers.huggingface.families import FAMILIES as KNOWN
from edgeq.model.artifact import load as load_artifact
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant import Recipe
from tests.conftest import need
from tests.families import ATTENTION_FAMILIES, quantized, random_model, tiny_config
from tests.greedy import NEAR, assert_reference_choices
from tests.paths import DEMO

genai = GenaiDecoderTarget()

ort = OrtDecoderTarget()

pytest.importorskip("onnx")
og = pytest.importorskip("onnxruntime_genai")

TEXTS = [
    "Once upon a time, there was a little girl.",
    "Hello  world!\n\n  Tabs\tand émoji 😀 中文 über",
    " leading space",
    "123 + 45 = 168; don't can't WE'LL",
]
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@cache
def files() -> dict[str, bytes]:
    return dict(load(DEMO).files)


def tiny(family: str = "llama", **over: Any) -> Model:
    config = tiny_config(family, context=128, **over)
    held = dict(files())
    if not config.eos:  # the tokenizer's files name no end token either
        settings = json.loads(held["tokenizer_config.json"]) | {"eos_token": None}
        held |= {
            "tokenizer_config.json": json.dumps(settings).encode(),
            "generation_config.json": b"{}",
        }
    return replace(quantized(random_model(config), "w4-g32"), files=held)


def made(model: Model, out: Path, **options: Any) -> Path:
    chosen = Options(**{"compute": "float", **options})
    genai.check(model, chosen)
    genai.write(model, out, chosen)
    return out


def generate(folder: Path, prompt: Sequence[int], n: int) -> list[int]:
    """Greedy tokens, by nothing but onnxruntime-genai."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + n, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompt, np.int32))
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def oracle(model: Model, prompt: Sequence[int], n: int) -> list[int]:
    reference = Reference(model, keep=True)
    past = reference.new_cache()
    tokens: list[int] = []
    logits = reference.forward(prompt, past, all_logits=False)
    while len(tokens) < n:
        tokens.append(int(logits.argmax()))
        if tokens[-1] in model.config.eos:
            break
        logits = reference.forward(tokens[-1:], past, all_logits=False)
    return tokens


@pytest.mark.parametrize("kv", ["float32", "float16"])
@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_it_generates_the_references_tokens(family: str, kv: str, tmp_path: Path) -> None:
    model = tiny(family, eos=())
    if KNOWN[family].genai is None:
        with pytest.raises(UnsupportedError, match=f"no model type for {family}; it runs llama"):
            made(model, tmp_path / "out", kv=kv)
        return
    out = made(model, tmp_path / "out", kv=kv)
    prompt = [1, 5, 9, 77, 30]
    got = generate(out, prompt, 64)
    assert len(got) == 64
    assert_reference_choices(model, prompt, got, NEAR[kv])


@pytest.mark.parametrize("name", ["stories260K", "demo"])
@pytest.mark.parametrize("kv", ["float32", "int8"])
def test_it_generates_from_real_weights(name: str, kv: str, tmp_path: Path) -> None:
    source = DEMO if name == "demo" else need(f"models/{name}")
    quantize(source, tmp_path / "m.edgeq", Recipe.from_options("w4-g32"), method="rtn", threads=1)
    model = load_artifact(tmp_path / "m.edgeq")
    out = made(model, tmp_path / "out", kv=kv)
    prompt = [model.config.bos or 0, 403, 407, 261]
    got = generate(out, prompt, 64)
    if kv == "float32":
        assert len(got) == 64
        assert_reference_choices(model, prompt, got)
    else:
        assert_reference_choices(model, prompt, got[:5], NEAR[kv])
    assert {s.name for s in genai.read_weights(out)} == {s.name for s in ort.read_weights(out)}


def test_it_stops_at_any_end_token(tmp_path: Path) -> None:
    model = tiny(eos=())
    tokens = oracle(model, [1, 5, 9], 40)
    ends = (tokens[12], 100)
    model = replace(model, config=replace(model.config, eos=ends))
    got = generate(made(model, tmp_path / "out"), [1, 5, 9], 40)
    assert got == tokens[: tokens.index(ends[0]) + 1]


@pytest.mark.parametrize(("family", "room"), [("gemma3", 512), ("llama", 512), ("llama", 8)])
def test_the_runner_is_the_reference(
    family: str, room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short the cache is that it begins with."""
    monkeypatch.setattr(genai_module, "ROOM", room)
    model = tiny(family)
    runner = genai.open_runner(made(model, tmp_path / "out", context=60), threads=1)
    tokens = np.random.default_rng(0).integers(0, 101, 60)
    want = Reference(model, keep=True).forward(tokens)
    for _ in range(2):
        runner.reset()
        for part in ((0, 20), (20, 21), (21, 22), (22, 40), (40, 60)):
            got = runner.forward(tokens[slice(*part)])
            assert got.shape == (1, 101)
            np.testing.assert_allclose(got[0], want[part[1] - 1], atol=2e-5)
    with pytest.raises(UsageError, match="more than the 60 tokens"):
        runner.forward([1])
    with pytest.raises(UsageError, match="outside the vocabulary"):
        runner.forward([101])
    assert runner.runtime == f"onnxruntime-genai {og.__version__}"
    assert runner.precision == "float32"
    runner.close()


def test_trace_is_of_the_folders_graph(tmp_path: Path) -> None:
    model = tiny()
    got = genai.trace(made(model, tmp_path / "out"), [4, 5], [1, 2, 3])
    want = Reference(model).forward([1, 2, 3, 4, 5])
    assert got["logits"].shape == (1, 101)
    np.testing.assert_allclose(got["logits"][-1], want[-1], atol=2e-5)


@pytest.mark.parametrize("name", ["stories260K", "demo"])
def test_its_tokenizer_is_the_models(name: str, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = load(DEMO if name == "demo" else need(f"models/{name}"))
    out = made(model, tmp_path / "out")
    ours = tokenizers.Tokenizer.from_str(model.files["tokenizer.json"].decode())
    theirs = og.Tokenizer(og.Model(str(out)))
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert theirs.encode(text).tolist() == ids
        # it adds no BOS of itself, and takes off SentencePiece's first space after one only
        told = ours.encode(text).ids
        assert theirs.decode(np.array(told, np.int32)) == ours.decode(told)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_goes_along(where: str, tmp_path: Path) -> None:
    held = files()
    if where == "chat_template.jinja":
        held = held | {where: TEMPLATE.encode()}
    else:
        settings = json.loads(held[where]) | {"chat_template": TEMPLATE}
        held = held | {where: json.dumps(settings).encode()}
    out = made(replace(tiny(), files=held), tmp_path / "out")
    tokenizer = og.Tokenizer(og.Model(str(out)))
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "[user] Hi\n[assistant] "


def test_the_settings_of_the_search(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "other": 1}
    held = files() | {"generation_config.json": json.dumps(generation).encode()}
    model = replace(tiny("qwen2"), files=held)
    out = made(model, tmp_path / "out", context=100)
    written = json.loads((out / "genai_config.json").read_text())
    assert written["search"] == {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_length": 100,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
    }
    assert written["model"]["type"] == "qwen2"
    assert written["model"]["decoder"]["head_size"] == 16  # 12, padded
    assert (written["model"]["eos_token_id"], written["model"]["pad_token_id"]) == ([2, 1], 2)
    assert json.loads((out / "special_tokens_map.json").read_text())["eos_token"] == "<|eos|>"
    assert len(generate(out, [1, 5, 9], 20)) <= 20


@pytest.mark.parametrize(
    ("named", "kind", "decoder", "found"),
    [
        ("LlamaTokenizerFast", "BPE", None, "LlamaTokenizer"),
        ("GemmaTokenizer", "BPE", None, "GemmaTokenizer"),
        ("SmolTokenizer", "BPE", {"type": "ByteLevel"}, "GPT2Tokenizer"),
        ("", "BPE", {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}, "LlamaTokenizer"),
        ("T5TokenizerFast", "Unigram", None, "T5Tokenizer"),
    ],
)
def test_the_class_is_one_it_knows(named: str, kind: str, decoder: Any, found: str) -> None:
    document = {"model": {"type": kind}, "decoder": decoder}
    assert genai_module.tokenizer_class(named, document) == found


def test_an_unknown_class_would_fail(tmp_path: Path) -> None:
    out = made(tiny(), tmp_path / "out")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    (out / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "SmolTokenizer"})
    )
    with pytest.raises(RuntimeError, match="SmolTokenizer"):
        og.Tokenizer(og.Model(str(out)))


# --- what is refused --------------------------------------------------------------------------


def test_what_it_cannot_run_is_refused() -> None:
    model = tiny()
    with pytest.raises(UnsupportedError, match=r"no model type for falcon; it runs llama"):
        genai.check(replace(model, config=replace(model.config, family="falcon")), Options())
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json"):
        genai.check(replace(model, files={}), Options())
    word = json.dumps({"model": {"type": "WordPiece"}}).encode()
    with pytest.raises(UnsupportedError, match="a WordPiece model"):
        genai.check(replace(model, files={"tokenizer.json": word}), Options())
    with pytest.raises(FormatError, match=r"tokenizer_config\.json is not JSON"):
        genai.check(replace(model, files=files() | {"tokenizer_config.json": b"{"}), Options())
    with pytest.raises(UsageError, match="any length"):
        genai.check(model, Options(prefill=(1,)))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edgeq\[genai\]'"):
        genai.check(tiny(), Options())


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        genai.open_runner(tmp_path)
    out = made(tiny(), tmp_path / "out")
    settings = json.loads((out / "genai_config.json").read_text())
    settings["model"]["edgeq"] = 1
    (out / "genai_config.json").write_text(json.dumps(settings))
    with pytest.raises(FormatError, match="onnxruntime-genai cannot load"):
        genai.open_runner(out)
