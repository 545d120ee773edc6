"""tokenizer.model against the sentencepiece library."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from edgeq.converters.validate.hard_strings import hard_strings
from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.tokenizer import hf_tokenizer
from edgeq.importers.tokenizer.sentencepiece_model import tokenizer_files
from edgeq.runtime.tokenizer import Tokenizer

library = pytest.importorskip("sentencepiece")

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
DEFINED = ["<tool>", "##x", "  ", "\u2581\u2581\u2581"]


def trained(folder: Path, **settings: Any) -> Any:
    """A model trained on the hard texts, in a folder; the library's own processor."""
    out = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in hard_strings() if text.strip()]),
        model_writer=out, minloglevel=2, hard_vocab_limit=False, character_coverage=0.98,
        **{"model_type": "bpe", "vocab_size": 600, "byte_fallback": True, **PLAIN, **settings},
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return library.SentencePieceProcessor(model_proto=out.getvalue())


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unknown pieces": {"byte_fallback": False},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "no space first": {"add_dummy_prefix": False},
    "no space first, spaces removed": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "user-defined pieces": {"user_defined_symbols": DEFINED},
    "user-defined, no space first": {"user_defined_symbols": DEFINED, "add_dummy_prefix": False},
    "pieces over words": {"split_by_whitespace": False},
    "single digits": {"split_digits": True, "allow_whitespace_only_pieces": True},
    "normalized": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
}


@pytest.mark.parametrize("what", SETTINGS)
def test_ids_are_the_library_s_own(what: str, tmp_path: Path) -> None:
    theirs = trained(tmp_path, **SETTINGS[what])
    ours = hf_tokenizer(tokenizer_files(tmp_path / "tokenizer.model"))
    texts = [*hard_strings(), "a<tool>b", "<tool>", " <tool> x", "##x  ##x", "a   b    c"]
    # special tokens are written out in prompts, which the library alone does not read
    texts = [t for t in texts if not any(s in t for s in ("<s>", "</s>", "<unk>"))]
    if what == "normalized":  # the tokenizers library composes some sequences otherwise
        texts = [t for t in texts if t.isascii()]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]


@pytest.mark.parametrize("what", ["plain", "no space first", "user-defined pieces"])
@pytest.mark.parametrize("legacy", [True, False, None])
def test_spaces_after_added_tokens(what: str, legacy: bool | None, tmp_path: Path) -> None:
    """``legacy`` says whether a space goes before every text between them, or the first alone."""
    transformers = pytest.importorskip("transformers")
    rows = trained(tmp_path, **SETTINGS[what]).get_piece_size()
    user = {"content": "<|user|>", "special": True, "normalized": False}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    config: dict[str, Any] = {"added_tokens_decoder": {str(rows): {**user, **flags}}}
    if legacy is not None:
        config["legacy"] = legacy
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer(tokenizer_files(tmp_path / "tokenizer.model"))
    texts = [
        *hard_strings(["<|user|>"]),
        "a<|user|>b",
        " a <|user|> b",
        "<|user|>\nHi",
        "</s>x",
        "",
    ]
    assert [ours.encode(text, add_bos=False) for text in texts] == [
        theirs.encode(text, add_special_tokens=False) for text in texts
    ]
    if legacy is False and what == "plain":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": "yes"}))
        with pytest.raises(FormatError, match="legacy is 'yes'; it must be true or false"):
            tokenizer_files(tmp_path / "tokenizer.model")


def test_settings_that_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, treat_whitespace_as_suffix=True)
    with pytest.raises(UnsupportedError, match="treat_whitespace_as_suffix is true"):
        tokenizer_files(tmp_path / "tokenizer.model")
    for kind in ("unigram", "char"):
        trained(tmp_path, model_type=kind)
        with pytest.raises(UnsupportedError, match="edgeq reads BPE"):
            tokenizer_files(tmp_path / "tokenizer.model")


def test_what_goes_before_and_after_a_text(tmp_path: Path) -> None:
    trained(tmp_path)
    path = tmp_path / "tokenizer.model"
    plain = Tokenizer(tokenizer_files(path)).encode("Hello", add_bos=False)
    for config, right in (
        ({}, [1, *plain]),
        ({"add_bos_token": False}, plain),
        ({"add_bos_token": False, "add_eos_token": True}, [*plain, 2]),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer(tokenizer_files(path))
        assert tokenizer.encode("Hello") == right
        assert tokenizer.eos_ids == (2,)  # though the configuration does not name it
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": "yes"}')
    with pytest.raises(FormatError, match="add_bos_token is 'yes'; it must be true or false"):
        tokenizer_files(path)


def test_placeholders_get_their_names(tmp_path: Path) -> None:
    """Pieces that tokenizer_config.json names anew keep their ids."""
    trained(tmp_path, user_defined_symbols=["<unused0>"])
    path = tmp_path / "tokenizer.model"
    listed = {"3": {"content": "<|im_end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": listed, "eos_token": "<|im_end|>"})
    )
    tokenizer = Tokenizer(tokenizer_files(path))
    assert tokenizer.encode("Hello<|im_end|>")[-1] == 3
    assert tokenizer.eos_ids == (3,)
    listed["5000"] = {"content": "<|late|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    with pytest.raises(FormatError, match="leaves gaps after token"):
        tokenizer_files(path)


def test_a_tiktoken_vocabulary_is_named(tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    with pytest.raises(UnsupportedError, match="is a tiktoken vocabulary"):
        tokenizer_files(tmp_path / "tokenizer.model")
