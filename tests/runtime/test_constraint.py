"""Grammars: what is generated follows them, from any tokenizer, and what cannot be is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

import edgeq
from edgeq.core.errors import MissingDependencyError, UsageError
from edgeq.importers import load
from tests.conftest import DEMO, small_checkpoint
from tests.real_models import SMOLLM2, real_model

pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("which", ["demo", "small", "smollm2"])
def test_json_of_a_schema(which: str) -> None:
    path = {"demo": lambda: DEMO, "small": small_checkpoint,
            "smollm2": lambda: real_model(SMOLLM2)}[which]()  # fmt: skip
    model = load(path)
    tokenizer = edgeq.Tokenizer(model)
    ends = {*tokenizer.eos_ids, *model.config.eos}
    vocabulary = edgeq.GrammarVocabulary(tokenizer, model.config.vocab, ends)
    grammar = vocabulary.json_schema(SCHEMA)
    with edgeq.Engine(model, threads=1, context=256) as engine:
        for seed in range(3):
            engine.reset()
            params = edgeq.SamplingParams(temperature=1.5, seed=seed)
            chunks = list(edgeq.generate(engine, tokenizer, "Once", params,
                                         constraint=grammar.start()))  # fmt: skip
            value = json.loads("".join(chunk.text for chunk in chunks))
            assert set(value) == {"a", "b"}
            assert type(value["a"]) is int
            assert value["b"] in ("x", "yz")
            assert chunks[-1].finish_reason == "stop"


def test_a_mask_allows_what_may_come() -> None:
    model = load(DEMO)
    tokenizer = edgeq.Tokenizer(model)
    vocabulary = edgeq.GrammarVocabulary(tokenizer, model.config.vocab, tokenizer.eos_ids)
    constraint = vocabulary.lark('start: "ab" | "ac"').start()
    mask = constraint.allowed()
    assert mask.shape == (model.config.vocab,)
    texts = {tokenizer.token_bytes(int(i)) for i in np.flatnonzero(mask)}
    assert texts <= {b"a", b"ab", b"ac"}
    assert b"a" in texts
    with pytest.raises(UsageError, match="cannot be followed after token"):
        constraint.accept(tokenizer.encode("z", add_bos=False)[0])
    other = vocabulary.lark('start: "a"').start()
    other.accept(tokenizer.encode("a", add_bos=False)[0])
    assert np.flatnonzero(other.allowed()).tolist() == sorted(tokenizer.eos_ids)


def test_what_cannot_be_followed() -> None:
    model = load(DEMO)
    tokenizer = edgeq.Tokenizer(model)
    vocabulary = edgeq.GrammarVocabulary(tokenizer, model.config.vocab, tokenizer.eos_ids)
    for schema in ("[]", "{", {"type": "nothing"}, {"not": {}}, {"$ref": "http://x.example/y"}):
        with pytest.raises(UsageError, match="the JSON schema"):
            vocabulary.json_schema(schema)
    with pytest.raises(UsageError, match="the grammar cannot be used"):
        vocabulary.lark("start: nothing")
    with pytest.raises(UsageError, match="no token that ends a text"):
        edgeq.GrammarVocabulary(tokenizer, model.config.vocab, ())


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = load(DEMO)
    tokenizer = edgeq.Tokenizer(model)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependencyError, match=r"edgeq\[structured\]"):
        edgeq.GrammarVocabulary(tokenizer, model.config.vocab, tokenizer.eos_ids)
