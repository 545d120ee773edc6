"""Hidden states and embeddings: compiled, by NumPy, and by the reference; pooling as files say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError, UsageError
from edgeq.importers.sentence_modules import (
    MODULES,
    POOLING,
    SentenceModules,
    pooling_of_gguf,
    sentence_modules,
)
from edgeq.model.formulas import dense
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.runtime.embedding import Embedding, embedded, embedding
from edgeq.runtime.engine import Engine
from tests.families import FAMILIES, quantized, random_model, tiny_config
from tests.paths import DEMO

TOKENS = np.random.default_rng(3).integers(3, 100, 150).tolist()


def reference(model: Model, tokens: list[int]) -> Any:
    """The input of the head, by the reference of the model itself."""
    seen: list[Any] = []

    def watch(name: str, x: Any, weight: Any) -> Any:
        seen[:] = [x]
        return dense(name, x, weight)

    Reference(model, linear=watch).forward(tokens)
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_the_reference_s(family: str) -> None:
    model = random_model(tiny_config(family, context=256))
    want = reference(model, TOKENS)
    with Engine(model, threads=2, kv_bits=16) as engine:
        got = engine.hidden(TOKENS)
        assert got.shape == (150, model.config.hidden)
        assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
        assert engine.tokens == TOKENS
        logits = engine.forward([5])
        engine.reset()
        assert np.array_equal(engine.forward([*TOKENS, 5]), logits)


@pytest.mark.parametrize("kv_bits", [4, 8, 16])
def test_compiled_states_are_numpy_s_whatever_the_threads(kv_bits: Any) -> None:
    model = quantized(random_model(tiny_config("llama", context=256)), "w4-g32")
    with Engine(model, kv_bits=kv_bits, backend="numpy") as engine:
        want = engine.hidden(TOKENS)
    states = []
    for threads in (1, 3):
        with Engine(model, threads=threads, kv_bits=kv_bits) as engine:
            states.append(engine.hidden(TOKENS))
            engine.reset()
            parts = [engine.hidden(TOKENS[:1]), engine.hidden(TOKENS[1:140])]
            parts += [engine.hidden([token]) for token in TOKENS[140:]]
            assert np.array_equal(np.concatenate(parts), states[0])
    assert np.array_equal(*states)
    assert np.abs(states[0] - want).max() < 0.02 * np.abs(want).max()


def test_the_head_reads_hidden_states() -> None:
    model = random_model(tiny_config("llama", tied=False, context=256))
    with Engine(model, threads=1) as engine:
        states = engine.hidden(TOKENS)
        engine.reset()
        logits = engine.forward(TOKENS, all_logits=True)
    head = model.tensors["lm_head.weight"].numpy()
    assert np.abs(states @ head.T - logits).max() < 1e-3 * np.abs(logits).max()


def how(pooling: str, **over: Any) -> Embedding:
    return embedding(SentenceModules(), tiny_config("llama").hidden, pooling=pooling, **over)


def test_pooling() -> None:
    model = random_model(tiny_config("llama", context=256))
    with Engine(model, threads=1) as engine:
        engine.forward([9, 9])
        kinds = ("last", "mean", "cls")
        found = [embedded(engine, TOKENS[:20], how(kind)) for kind in kinds]
        engine.reset()
        states = engine.hidden(TOKENS[:20]).astype(np.float64)
        for got, want in zip(found, (states[-1], states.mean(axis=0), states[0]), strict=True):
            assert np.allclose(got, want / np.linalg.norm(want), atol=1e-6)
            assert abs(np.linalg.norm(got) - 1) < 1e-6
        short = embedded(engine, TOKENS[:20], how("mean", dimensions=5))
        assert np.allclose(short, found[1][:5] / np.linalg.norm(found[1][:5]), atol=1e-6)
        passed: list[int] = []
        parts = embedded(engine, TOKENS, how("mean"), 0, lambda: passed.append(engine.n_past))
        assert np.array_equal(parts, embedded(engine, TOKENS, how("mean")))
        assert passed == [128, 150]
        with pytest.raises(UsageError, match="there are no tokens"):
            embedded(engine, [], how("last"))
        with pytest.raises(UsageError, match="the context has 0 tokens and 257 more"):
            embedded(engine, [5] * 257, how("last"))
    with pytest.raises(UsageError, match="max"):
        how("max")
    with pytest.raises(UsageError, match="give one of them"):
        how("last", prompt="a", prompt_name="b")
    with pytest.raises(UsageError, match="the model's files have no prompts"):
        how("last", prompt_name="query")
    for wrong in (0, -1, 45):
        with pytest.raises(UsageError, match="vectors of this model have 1 to 44"):
            how("last", dimensions=wrong)


def pooling_of(files: dict[str, bytes]) -> str | None:
    return sentence_modules(files).pooling


def files(**pooling: Any) -> dict[str, bytes]:
    return {POOLING: json.dumps(pooling).encode()}


def test_what_files_say() -> None:
    assert pooling_of({}) is None
    assert pooling_of(files(word_embedding_dimension=8)) == "mean"  # as Sentence Transformers
    assert pooling_of(files(pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)) == "mean"
    assert pooling_of(files(pooling_mode_lasttoken=True)) == "last"
    assert pooling_of(files(pooling_mode_cls_token=True)) == "cls"
    for mode, want in (("mean", "mean"), ("lasttoken", "last"), (["cls"], "cls")):
        assert pooling_of(files(pooling_mode=mode)) == want
    for kind, want in ((1, "mean"), (2, "cls"), (3, "last"), (0, None), (None, None)):
        assert pooling_of(pooling_of_gguf(kind)) == want
    for wrong in (files(pooling_mode_max_tokens=True),
                  files(pooling_mode_mean_tokens=True, pooling_mode_max_tokens=True)):  # fmt: skip
        with pytest.raises(UnsupportedError, match=r"embeddings are pooled by .*max"):
            pooling_of(wrong)
    modules = [
        {"type": f"sentence_transformers.models.{name}", "path": path}
        for name, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_N"))
    ]
    assert sentence_modules({MODULES: json.dumps(modules).encode()}).normalized
    for damaged in (b"{", b"7", b"[{}]", b"[7]"):
        with pytest.raises(FormatError, match="is not a list of modules"):
            pooling_of({MODULES: damaged})


def test_the_file_of_pooling_goes_into_the_artifact(tmp_path: Any) -> None:
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder)
    (folder / "1_Pooling").mkdir()
    (folder / POOLING).write_bytes(files(pooling_mode_mean_tokens=True)[POOLING])
    edgeq.quantize(folder, tmp_path / "m.edgeq", fast=True, threads=1)
    assert pooling_of(edgeq.load(tmp_path / "m.edgeq").files) == "mean"
    text = "Once upon a time"
    model = edgeq.load(tmp_path / "m.edgeq")
    mean = edgeq.embed(model, text, threads=1)
    assert np.array_equal(mean, edgeq.embed(model, [text], pooling="mean", threads=1)[0])
    assert not np.allclose(mean, edgeq.embed(model, text, pooling="last", threads=1))


def test_like_texts_have_like_vectors() -> None:
    texts = ["The dog ran in the park.", "The dog played in the park.", "She ate a cake."]
    steps = []
    vectors = edgeq.embed(DEMO, texts, pooling="mean", threads=1,
                          progress=lambda *step: steps.append(step))  # fmt: skip
    assert vectors.shape == (3, edgeq.load(DEMO).config.hidden)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
    assert [done for _, done, _ in steps] == [1, 2, 3]
    with pytest.raises(EdgeqError, match="the context"):
        edgeq.embed(DEMO, "a " * 300, context=20)
