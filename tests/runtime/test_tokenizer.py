"""Encoding, decoding and streaming, against the tokenizers library."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.importers.gguf.file import open_gguf
from edgeq.importers.gguf.tokenizer import tokenizer_files
from edgeq.importers.tokenizer.tokenizer_json import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    byte_level_bpe,
    files,
    sentencepiece_bpe,
)
from edgeq.runtime.tokenizer import Tokenizer
from tests.conftest import need, small_checkpoint

SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)),
              "▁", "a", "b", "n", "▁b", "an", "▁ban", "▁▁", "€", "<|end|>", "<tool>"]  # fmt: skip
SPM_KINDS = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 9, CONTROL, USER_DEFINED]


def spm_files(add_prefix: bool = True, add_bos: bool = True) -> dict[str, bytes]:
    vocabulary = Vocabulary(SPM_TOKENS, SPM_KINDS, bos=1, eos=2, unk=0, add_bos=add_bos)
    scores = [-float(i) for i in range(len(SPM_TOKENS))]
    document = sentencepiece_bpe(vocabulary, scores, add_prefix=add_prefix)
    return files(document, vocabulary, ends=(2, 268))


def printable(text: str) -> list[str]:
    """Text in byte-level BPE's alphabet, by the library itself."""
    pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return list("".join(piece for piece, _ in pre.pre_tokenize_str(text)))


def byte_files(pre: str = "gpt-2") -> dict[str, bytes]:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "he", "Ġt", "<|endoftext|>", "<|im end|>", "<think>"]
    kinds = [NORMAL] * 258 + [CONTROL, USER_DEFINED, USER_DEFINED]
    vocabulary = Vocabulary(tokens, kinds, bos=None, eos=258)
    return files(byte_level_bpe(vocabulary, [("h", "e"), ("Ġ", "t")], pre), vocabulary)


@cache
def kinds() -> dict[str, tuple[Tokenizer, tokenizers.Tokenizer]]:
    made = {
        "spm": spm_files(),
        "spm without prefix": spm_files(add_prefix=False),
        "byte level": byte_files(),
        "qwen2": byte_files("qwen2"),
    }
    return {
        name: (Tokenizer(f), tokenizers.Tokenizer.from_str(f["tokenizer.json"].decode()))
        for name, f in made.items()
    }


def special_in(library: tokenizers.Tokenizer, text: str) -> bool:
    """Whether a text holds special tokens, which do not show when they are decoded."""
    added = library.get_added_tokens_decoder().values()
    return any(token.special and token.content in text for token in added)


KINDS = ("spm", "spm without prefix", "byte level", "qwen2")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_stream_gives_the_same_text_as_all_at_once(kind: str, data: st.DataObject) -> None:
    tokenizer, _ = kinds()[kind]
    ids = data.draw(st.lists(st.integers(-2, tokenizer.vocab_size + 3), max_size=24))
    split = data.draw(st.integers(0, len(ids)))
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)
    continued = tokenizer.stream(ids[:split])
    assert [continued.push(token) for token in ids[split:]] == pieces[split:]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_text_comes_back(kind: str, text: str) -> None:
    """Any text survives, and reads as the library reads it."""
    tokenizer, library = kinds()[kind]
    ids = tokenizer.encode(text, add_bos=False)
    assert ids == library.encode(text, add_special_tokens=False).ids
    got = tokenizer.decode(ids)
    assert got == library.decode(ids)
    if kind == "qwen2":  # composes Unicode
        if not special_in(library, text):
            assert tokenizer.encode(got) == ids
    elif "▁" not in text and not special_in(library, text):
        assert got == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_never_shows_half_a_character(kind: str) -> None:
    tokenizer, _ = kinds()[kind]
    stream = tokenizer.stream()
    shown = [stream.push(token) for token in tokenizer.encode("a😀é b", add_bos=False)]
    assert "�" not in "".join(shown)
    assert "".join(shown) == "a😀é b"
    assert stream.flush() == ""
    assert shown[-1] in ("b", " b")
    half = tokenizer.encode("😀", add_bos=False)[:-1]
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in half).strip() == ""
    assert stream.flush() == "�"


def test_broken_bytes_do_not_hold_the_rest_up() -> None:
    tokenizer, _ = kinds()["spm"]
    stream = tokenizer.stream()
    byte = SPM_TOKENS.index
    assert stream.push(byte("<0xF0>")) == ""
    assert stream.push(byte("a")) == "�a"
    assert stream.push(byte("<0xFF>")) == "�"
    assert stream.push(byte("€")) == "€"


def test_sentencepiece_spaces() -> None:
    tokenizer, library = kinds()["spm"]
    ids = tokenizer.encode("ban  ban", add_bos=False)
    assert tokenizer.decode(ids) == library.decode(ids) == "ban  ban"
    again = tokenizer.encode("ban", add_bos=False)
    assert tokenizer.decode(again) == "ban"
    # as the continuation of a prompt the same token is a word after a space
    assert tokenizer.stream(ids).push(again[0]) == " ban"
    assert tokenizer.stream([1]).push(again[0]) == "ban"
    bare, _ = kinds()["spm without prefix"]
    assert bare.decode(bare.encode(" ban", add_bos=False)) == " ban"


def test_special_and_added_tokens() -> None:
    tokenizer, library = kinds()["byte level"]
    ids = tokenizer.encode("he<|im end|><think> t<|endoftext|>")
    assert ids == library.encode("he<|im end|><think> t<|endoftext|>").ids
    assert ids[-1] == 258
    assert tokenizer.decode(ids) == "he<|im end|><think> t"
    assert tokenizer.decode([-1, 10**9]) == ""
    assert tokenizer.eos_ids == (258,)


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_comes_once(add_bos: bool) -> None:
    tokenizer = Tokenizer(spm_files(add_bos=add_bos))
    assert tokenizer.bos == 1
    assert tokenizer.encode("b").count(1) == add_bos
    assert tokenizer.encode("<s>b").count(1) == 1  # a chat template writes its own
    assert tokenizer.encode("b", add_bos=False).count(1) == 0


def edited(made: dict[str, bytes], name: str, **values: Any) -> dict[str, bytes]:
    document = json.loads(made.get(name, b"{}")) | values
    return made | {name: json.dumps(document).encode()}


def test_bos_follows_the_post_processor_whatever_the_flags_say() -> None:
    """As Transformers 5 does wherever there is a tokenizer.json."""
    made = spm_files()
    made["tokenizer_config.json"] = b'{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}'
    assert Tokenizer(made).add_bos
    assert Tokenizer(made).encode("b")[:2] == [1, 263]
    silent = edited(made, "tokenizer.json", post_processor=None)
    assert not Tokenizer(silent).add_bos
    assert Tokenizer(edited(made, "tokenizer_config.json", add_bos_token=False)).add_bos
    assert not Tokenizer(edited(silent, "tokenizer_config.json", add_bos_token=True)).add_bos


def test_ends() -> None:
    made = spm_files()
    assert Tokenizer(made).eos_ids == (2, 268)
    assert Tokenizer(edited(made, "generation_config.json", eos_token_id=7)).eos_ids == (7, 2)
    del made["generation_config.json"]
    assert Tokenizer(made).eos_ids == (2,)
    del made["tokenizer_config.json"]
    assert Tokenizer(made).eos_ids == ()
    made["special_tokens_map.json"] = b'{"eos_token": {"content": "<|end|>"}, "bos_token": "<s>"}'
    assert Tokenizer(made).eos_ids == (268,)
    assert Tokenizer(made).bos == 1


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    made = edited(
        spm_files(),
        "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    )
    assert len(Tokenizer(made).encode("banbanban")) > 4


def metaspace(scheme: str) -> dict[str, bytes]:
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return edited(spm_files(), "tokenizer.json", normalizer=None, pre_tokenizer=step, decoder=step)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace(scheme: str) -> None:
    made = metaspace(scheme)
    library = tokenizers.Tokenizer.from_str(made["tokenizer.json"].decode())
    tokenizer = Tokenizer(made)
    for text in ("ban an", " ban", "ban"):
        ids = tokenizer.encode(text, add_bos=False)
        assert ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize(
    ("decoder", "error", "words"),
    [
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, UnsupportedError,
         "unknown decoder 'WordPiece' .*ByteLevel"),
        (None, UnsupportedError, "unknown decoder 'None'"),
        ({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}]},
         UnsupportedError, "Replace decoder with the pattern .*plain strings"),
    ],
)  # fmt: skip
def test_decoders_that_are_refused(decoder: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Tokenizer(edited(spm_files(), "tokenizer.json", decoder=decoder))


def test_damaged_tokenizers_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"no tokenizer\.json \(it has no tokenizer file"):
        Tokenizer({})
    with pytest.raises(UnsupportedError, match=r"\(it has vocab\.txt\); put one beside"):
        Tokenizer({"vocab.txt": b""})
    with pytest.raises(FormatError, match=r"tokenizer\.json is not JSON"):
        Tokenizer({"tokenizer.json": b"{"})
    with pytest.raises(FormatError, match="holds a list"):
        Tokenizer({"tokenizer.json": b"[]"})
    with pytest.raises(FormatError, match=r"tokenizer\.json is not readable"):
        Tokenizer({"tokenizer.json": b'{"version": "1.0"}'})
    with pytest.raises(FormatError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer(spm_files() | {"tokenizer_config.json": b"x"})
    with pytest.raises(FormatError, match="eos_token_id is 'x'"):
        Tokenizer(edited(spm_files(), "generation_config.json", eos_token_id="x"))
    with pytest.raises(UsageError, match="not valid Unicode"):
        kinds()["spm"][0].encode("half a pair: \ud83d")


def test_real_vocabulary_streams() -> None:
    file = open_gguf(need("data/tokenizers/ggml-vocab-gpt-2.gguf"))
    tokenizer = Tokenizer(tokenizer_files(file.metadata)[0])
    text = "Naïve café 😀🏳️‍🌈 — 北京 \r\n\tдо свидания"
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "�" not in "".join(pieces)


def test_real_checkpoint_reads_as_the_library_reads_it() -> None:
    folder = small_checkpoint()
    made = {p.name: p.read_bytes() for p in folder.glob("*.json")}
    tokenizer = Tokenizer(made)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Once upon a time, there was a little girl named Lily. é😀"
    assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == library.decode(library.encode(text).ids)
