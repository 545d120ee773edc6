"""Bundles for LiteRT-LM, run by LiteRT-LM."""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters import Options
from edgeq.converters.tflite import litertlm as litertlm_module
from edgeq.converters.tflite.litertlm import LiteRTLMDecoderTarget
from edgeq.converters.validate.integers import compare_integers
from edgeq.core.errors import FormatError, MissingDependencyError, UnsupportedError, UsageError
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.runtime.chat_template import render_chat
from edgeq.runtime.tokenizer import Tokenizer
from tests.conftest import need
from tests.families import ATTENTION_FAMILIES, quantized, random_model, tiny_config
from tests.paths import DEMO

litertlm = LiteRTLMDecoderTarget()

FLOAT = Options(compute="float", context=128, prefill=(16,))
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Once upon{% endif %}"
)


def demo() -> Model:
    return quantized(load(DEMO), "w4-g32")


def bundled(model: Model, folder: Path, options: Options = FLOAT) -> Path:
    litertlm.check(model, options)
    out = folder / "model.litertlm"
    litertlm.write(model, out, options)
    return out


def said(model: Model, prompt: list[int], n: int) -> str:
    """The oracle's text after some tokens."""
    reference = Reference(model, keep=True)
    cache = reference.new_cache()
    row, tokens = reference.forward(prompt, cache)[-1], list[int]()
    while len(tokens) < n:
        tokens.append(int(row.argmax()))
        if tokens[-1] in model.config.eos:
            break
        row = reference.forward(tokens[-1:], cache)[-1]
    stream = Tokenizer(model.files).stream(prompt)
    return "".join(stream.push(t) for t in tokens) + stream.flush()


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (bundled(demo(), tmp_path / name) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    other = bundled(quantized(load(DEMO), "w8-channel"), tmp_path)
    ids = {re.findall(rb"[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f-]{21,}", path.read_bytes()[:16384])[0]
           for path in (one, other)}  # fmt: skip
    assert len(ids) == 2


@contextmanager
def engine(path: Path) -> Iterator[Any]:
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    backend = litert_lm.Backend.CPU(thread_count=1)
    with litert_lm.Engine(str(path), backend=backend, cache_dir=":nocache") as made:
        yield made


def greedily() -> Any:
    import litert_lm

    return litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)


@pytest.mark.parametrize("name", ["demo", "stories260K"])
def test_litert_lm_says_what_the_oracle_says_for_64_tokens(name: str, tmp_path: Path) -> None:
    source = DEMO if name == "demo" else need("models/stories260K")
    model = quantized(load(source), "w4-g32")
    prompt = "Once upon a time there was a little girl named Lily and she had a big dog"
    tokens = Tokenizer(model.files).encode(prompt)
    assert len(tokens) > 17  # more than one prefill
    path = bundled(model, tmp_path)
    # LiteRT-LM takes the answer for a text of its own, whose first space SentencePiece drops
    assert litertlm_module.generate(path, prompt, 64).lstrip() == said(model, tokens, 64).lstrip()
    with engine(path) as made:
        assert [made.bos_token_id, *made.tokenize(prompt)] == tokens
        assert made.eos_token_ids == [[t] for t in model.config.eos]
    assert [p.name for p in tmp_path.iterdir()] == ["model.litertlm"]


@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_other_caches_run(kv: str, tmp_path: Path) -> None:
    model = demo()
    path = bundled(model, tmp_path, replace(FLOAT, kv=kv))
    prompt = "Once upon a time"
    want = said(model, Tokenizer(model.files).encode(prompt), 24)
    assert litertlm_module.generate(path, prompt, 24) == want


def test_a_second_turn_near_the_end_of_the_context(tmp_path: Path) -> None:
    """Its prefill of 16 begins past the context less 16, and must not be moved."""
    model = demo()
    path = bundled(model, tmp_path, Options(compute="float", context=64, prefill=(16,)))
    first, second = "Once upon a time there was a", " big dog. One day the dog"
    tokenizer = Tokenizer(model.files)
    tokens = tokenizer.encode(first)
    n = 50 - len(tokens)
    answer = said(model, tokens, n)
    whole = tokens + tokenizer.encode(answer, add_bos=False)
    assert len(whole) == 50
    with (
        engine(path) as made,
        made.create_session(
            apply_prompt_template=False, sampler_config=greedily(), max_output_tokens=n
        ) as session,
    ):
        session.run_prefill([first])
        assert session.run_decode().texts[0] == answer
        session.run_prefill([second])
        got = session.run_decode().texts[0]
    assert len(got) > 10
    prompt = whole + tokenizer.encode(second, add_bos=False)
    assert said(model, prompt, 20).startswith(got)


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_goes_through_the_models_template(where: str, tmp_path: Path) -> None:
    model = demo()
    content = CHAT.encode()
    if where == "tokenizer_config.json":
        config = json.loads(model.files[where])
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHAT}]
        content = json.dumps({**config, "chat_template": named}).encode()
    model = replace(model, files={**model.files, where: content})
    path = bundled(model, tmp_path)
    message = "Lily and the dog"
    with (
        engine(path) as made,
        made.create_conversation(sampler_config=greedily(), max_output_tokens=24) as chat,
    ):
        got = str(chat.send_message(message))
    text = render_chat(model.files, [{"role": "user", "content": message}])
    assert got == said(model, Tokenizer(model.files).encode(text), 24)


@pytest.mark.parametrize("start", ["", "{{ bos_token }}", "<|bos|>"])
def test_a_chat_has_the_tokens_of_the_models_template(start: str, tmp_path: Path) -> None:
    """LiteRT-LM puts its start token before a conversation, whatever the template writes."""
    model = demo()
    config = json.loads(model.files["tokenizer_config.json"])
    template = CHAT.replace("{{ bos_token }}", start)
    files = {"tokenizer_config.json": json.dumps({**config, "chat_template": template}).encode()}
    model = replace(model, files={**model.files, **files})
    path = bundled(model, tmp_path)
    message = "Lily and the dog"
    with (
        engine(path) as made,
        made.create_conversation(sampler_config=greedily(), max_output_tokens=4) as chat,
    ):
        rendered = chat.render_message_to_string(message)
        got = str(chat.send_message(message))
        count = chat.token_count
    text = render_chat(model.files, [{"role": "user", "content": message}])
    tokens = Tokenizer(model.files).encode(text, add_bos=False)
    assert (tokens[0] == model.config.bos) == bool(start)
    assert rendered == ("" if start == "{{ bos_token }}" else start) + text.removeprefix("<|bos|>")
    assert count == len(tokens) + 4
    assert got == said(model, tokens, 4)


def test_without_a_template_a_chat_is_plain_text(tmp_path: Path) -> None:
    model = demo()
    with (
        engine(bundled(model, tmp_path)) as made,
        made.create_conversation(sampler_config=greedily(), max_output_tokens=16) as chat,
    ):
        got = str(chat.send_message("Lily and the dog"))
    assert got == said(model, Tokenizer(model.files).encode("Lily and the dog"), 16)


def test_no_start_token_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    model = demo()
    document = {**json.loads(model.files["tokenizer.json"]), "post_processor": None}
    files = {**model.files, "tokenizer.json": json.dumps(document).encode()}
    model = replace(model, files=files)
    path = bundled(model, tmp_path)
    tokens = Tokenizer(files).encode("Once upon a time")
    assert tokens[0] != model.config.bos
    assert litertlm_module.generate(path, "Once upon a time", 16) == said(model, tokens, 16)


@pytest.mark.parametrize("family", ATTENTION_FAMILIES)
def test_every_family_runs(family: str, tmp_path: Path) -> None:
    """Random weights with the demo's tokenizer."""
    files = load(DEMO).files
    config = tiny_config(family, vocab=2048, bos=0, eos=(1,))
    model = replace(quantized(random_model(config), "w4-g32"), files=files)
    path = bundled(model, tmp_path, Options(compute="float", context=64, prefill=(8,)))
    tokens = Tokenizer(files).encode("One day a dog went to the park with a big red ball")
    prompt = Tokenizer(files).decode(tokens)
    assert litertlm_module.generate(path, prompt, 20) == said(model, tokens, 20)


def test_the_decoder_within(tmp_path: Path) -> None:
    model = demo()
    path = bundled(model, tmp_path)
    assert not compare_integers(model, lambda: litertlm.read_weights(path))[1]
    tokens = np.asarray(Tokenizer(model.files).encode("Once upon a time there was"))
    want = Reference(model).forward(tokens)
    runner = litertlm.open_runner(path, threads=1)
    assert re.fullmatch(r"LiteRT-LM [\d.]+, ai-edge-litert [\d.]+", runner.runtime)
    got = runner.forward(tokens)
    folder = Path(runner._folder.name)
    assert folder.exists()
    runner.close()
    assert not folder.exists()
    assert np.abs(got - want[-1]).max() < 1e-3
    traced = litertlm.trace(path, tokens[3:], tokens[:3])
    assert np.abs(traced["logits"] - want[-1]).max() < 1e-3


def test_models_that_litert_lm_cannot_run_are_refused(tmp_path: Path) -> None:
    model = demo()
    files = {k: v for k, v in model.files.items() if k != "tokenizer.json"}
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json.*convert to tflite"):
        litertlm.check(replace(model, files=files), FLOAT)
    silent = {"tokenizer_config.json": b"{}", "generation_config.json": b"{}"}
    endless = replace(model, config=replace(model.config, eos=()), files={**model.files, **silent})
    with pytest.raises(UnsupportedError, match="no end-of-text token"):
        litertlm.check(endless, FLOAT)
    with pytest.raises(UnsupportedError, match="w4-g32-asym"):
        litertlm.check(quantized(load(DEMO), "w4-g32-asym"), replace(FLOAT, compute="int8"))
    with pytest.raises(UsageError, match="context is 1000"):
        litertlm.check(model, replace(FLOAT, context=1000))
    broken = {**model.files, "tokenizer_config.json": b"{"}
    with pytest.raises(FormatError, match=r"tokenizer_config\.json is not JSON"):
        litertlm.check(replace(model, files=broken), FLOAT)


def test_files_that_are_no_bundles(tmp_path: Path) -> None:
    path = tmp_path / "bad.litertlm"
    with pytest.raises(FormatError, match="cannot be read"):
        litertlm.open_runner(path)
    for content in (b"", b"x" * 100, b"LITERTLM" + b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"not a \.litertlm bundle"):
            litertlm.open_runner(path)


def test_a_bundle_that_litert_lm_cannot_run_does_not_open(tmp_path: Path) -> None:
    """LiteRT runs its decoder; LiteRT-LM cannot read its tokenizer, whose bytes are replaced."""
    model = demo()
    content = bundled(model, tmp_path).read_bytes()
    tokenizer = zlib.compress(model.files["tokenizer.json"])
    assert content.count(tokenizer) == 1
    damaged = tmp_path / "damaged.litertlm"
    unusable = zlib.compress(b'{"version": "1.0"}').ljust(len(tokenizer), b"\0")
    damaged.write_bytes(content.replace(tokenizer, unusable))
    with pytest.raises(FormatError, match="LiteRT-LM cannot run"):
        litertlm.open_runner(damaged)


def test_without_the_builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = bundled(demo(), tmp_path)
    monkeypatch.setitem(sys.modules, "litert_lm_builder", None)
    for call in (
        lambda: litertlm.check(demo(), FLOAT),
        lambda: litertlm.open_runner(path),
        lambda: list(litertlm.read_weights(path)),
        litertlm.versions,
    ):
        with pytest.raises(MissingDependencyError, match=r"edgeq\[litertlm\]"):
            call()


def test_without_litert_lm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = bundled(demo(), tmp_path)
    monkeypatch.setattr(litertlm_module, "is_installed", lambda name: name != "litert-lm-api")
    assert "litert-lm-api" not in litertlm.versions()
    runner = litertlm.open_runner(path, threads=1)
    assert re.fullmatch(r"ai-edge-litert [\d.]+", runner.runtime)
    runner.close()
    with pytest.raises(MissingDependencyError, match=r"to run \.litertlm bundles"):
        litertlm_module.generate(path, "Once")


def test_versions_name_the_libraries() -> None:
    assert {"ai-edge-litert", "litert-lm-builder", "litert-lm-api"} <= set(litertlm.versions())
