"""Texts become the same ids in the converted model's tokenizer, or the conversion is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeq.converters import Options
from edgeq.converters.convert import convert
from edgeq.converters.gguf.decoder import GgufDecoderTarget
from edgeq.converters.gguf.tokenizer import ReadBack, tokenizer_keys
from edgeq.converters.ort import genai as genai_module
from edgeq.converters.ort.genai import GenaiDecoderTarget
from edgeq.converters.validate import validate
from edgeq.converters.validate.hard_strings import COUNT, hard_strings
from edgeq.converters.validate.tokenizer import added_texts, compare_texts, model_ends
from edgeq.core.errors import UnsupportedError
from edgeq.importers import load
from edgeq.importers.gguf.tokenizer import tokenizer_files
from edgeq.importers.huggingface.tokenizer import HfTokenizer, hf_tokenizer
from edgeq.importers.tokenizer.tokenizer_json import PRE_TOKENIZERS
from edgeq.model.model import Model
from edgeq.runtime.tokenizer import Tokenizer
from tests import tokenizer_zoo as zoo
from tests.conftest import DEMO, need
from tests.real_models import SMOLLM2, real_model

genai = GenaiDecoderTarget()

gguf = GgufDecoderTarget()

LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
SPACES = ("lstrip", "rstrip", "single_word")


def test_the_hard_texts() -> None:
    """Always the same two hundred, with the tokenizer's own special tokens among them."""
    texts = hard_strings(["<s>", "</s>", "<tool>"])
    assert len(texts) == len(set(texts)) == COUNT == 200
    assert texts == hard_strings(["<s>", "</s>", "<tool>"])
    assert sum("<tool>" in text for text in texts) >= 5
    assert len(set(hard_strings())) == COUNT
    assert len(set(hard_strings([f"<{i}>" for i in range(40)]))) == COUNT
    joined = "".join(texts)
    for part in (
        "\r\n",
        "\t",
        "\u00a0",
        "\ufeff",
        "\u200d",
        "e\u0301",
        "\u0661",
        "\u0e2a",
        "\u4e2d",
    ):
        assert part in joined
    assert "" in texts


def ids(source: HfTokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [[*source.prefix, *source.encode(text), *source.suffix] for text in texts]


@pytest.mark.parametrize("pre", [name for name, how in PRE_TOKENIZERS.items() if how.exact])
def test_byte_level_tokenizers_survive(pre: str, tmp_path: Path) -> None:
    """Of every way to cut texts that llama.cpp has a name for; in llama.cpp where it is there."""
    composes = "NFC" if PRE_TOKENIZERS[pre].nfc else ""
    model = zoo.model_of(zoo.byte_level(pre, composes))
    keys = tokenizer_keys(model)
    named = PRE_TOKENIZERS[keys["tokenizer.ggml.pre"]]
    assert named.splits == PRE_TOKENIZERS[pre].splits
    assert named.nfc == PRE_TOKENIZERS[pre].nfc
    assert named.whole_words == PRE_TOKENIZERS[pre].whole_words
    if LLAMA_CPP:
        out = tmp_path / "m.gguf"
        gguf.write(model, out, Options())
        source = hf_tokenizer(model.files)
        target = gguf.tokenizer(out, source)
        assert target is not None
        assert target.by.startswith("llama.cpp by llama-cpp-python")
        found = compare_texts(source, target)
        assert found.complaint is None
        assert found.compared == found.equal + sum(found.excused.values()) == COUNT
        assert bool(found.excused) == bool(composes)


def test_sentencepiece_tokenizers_survive() -> None:
    model = zoo.model_of(zoo.sentencepiece())
    source = hf_tokenizer(model.files)
    texts = hard_strings(added_texts(source))
    assert ReadBack(tokenizer_keys(model)).encode(texts) == ids(source, texts)


REFUSED: dict[str, tuple[str, str]] = {
    "lowercase": (zoo.byte_level(normalizer="Lowercase"), "normalizes texts by Lowercase, which"),
    "nfkc": (zoo.byte_level(normalizer="NFKC"), "normalizes texts by NFKC"),
    "nfc": (zoo.byte_level(normalizer="NFC"), "composes Unicode"),
    "not composing": (
        zoo.edited(zoo.byte_level("qwen2", "NFC"), normalizer={"type": "NFD"}), "by NFD",
    ),
    "marks with their letters": (zoo.byte_level("gpt-4o"), "parts combining marks"),
    "strip": (zoo.byte_level(normalizer="Strip"), "by Strip"),
    "accents": (zoo.byte_level(normalizer="StripAccents"), "by StripAccents"),
    "nmt": (zoo.byte_level(normalizer="Nmt"), "by Nmt"),
    "prefix space": (zoo.byte_level(prefix_space=True), "add_prefix_space"),
    "spaces cut away": (
        zoo.edited(zoo.byte_level(), pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Removed",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": True}]}),
        "which llama.cpp has no name for",
    ),
    "metaspace first": (zoo.sentencepiece("first"), r"trained with: the text .* token ids \["),
    "metaspace always": (zoo.sentencepiece("always"), r"trained with: the text .* token ids \["),
    "replace": (
        zoo.edited(zoo.sentencepiece(), normalizer={"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]}),
        "normalizes texts by Replace {'String': '``'}",
    ),
    "suffix": (
        zoo.edited(zoo.byte_level(), model={
            **json.loads(zoo.byte_level())["model"], "end_of_word_suffix": "</w>"}),
        "sets end_of_word_suffix",
    ),
    **{flag: (zoo.flagged(zoo.byte_level(), "<|im_end|>", **{flag: True}), flag)
       for flag in SPACES},
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_has_no_key_for(what: str) -> None:
    document, words = REFUSED[what]
    with pytest.raises(UnsupportedError, match=words):
        tokenizer_keys(zoo.model_of(document))


def test_a_tokenizer_without_bytes_is_refused() -> None:
    """llama.cpp would stop the program at the first character without a piece."""
    document = json.loads(zoo.sentencepiece())
    document["model"]["byte_fallback"] = False
    with pytest.raises(UnsupportedError, match="no bytes to fall back to"):
        tokenizer_keys(zoo.model_of(json.dumps(document)))


def phi3() -> str:
    """Special tokens as Microsoft published them: most take the whitespace after them along."""
    document = json.loads(zoo.sentencepiece())
    rows = len(document["model"]["vocab"])
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for text in ("<|endoftext|>", "<|assistant|>", "<|end|>"):
        rows += 1
        document["added_tokens"].append({"id": rows, "content": text, "special": True, **plain})
    for token in document["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    return json.dumps(document)


def test_phi3_keeps_what_its_tokens_take_along() -> None:
    model = zoo.model_of(phi3(), family="phi3")
    keys = tokenizer_keys(model)
    assert keys["general.name"] == "phi3"
    renamed = replace(model, provenance={"source": "mini"})
    assert tokenizer_keys(renamed)["general.name"] == "Phi-3 mini"
    back = Tokenizer(tokenizer_files(keys)[0])
    text = "<|user|>\n\n Hi<|end|> \n<|assistant|>\n"
    assert back.encode(text) == Tokenizer(model.files).encode(text)
    assert len(back.encode(text)) == 1 + 3 + len(back.encode("Hi", add_bos=False))


def test_a_name_like_phi3_takes_nothing_along() -> None:
    """llama.cpp goes by the name: it would strip, and not load a file without Phi-3's tokens."""
    model = replace(zoo.model_of(zoo.byte_level()), provenance={"source": "my-phi-3-copy"})
    assert tokenizer_keys(model)["general.name"] == "my-Phi 3-copy"


def test_every_end_token_reaches_the_file() -> None:
    model = zoo.model_of(zoo.byte_level(), eos=(7, 9, 11))
    model = replace(model, files={**model.files, "generation_config.json": b'{"eos_token_id": 8}'})
    assert model_ends(model) == (7, 9, 11, 8, 1)
    keys = tokenizer_keys(model)
    back = Tokenizer(tokenizer_files(keys)[0])
    assert {7, 8, 9, 11, 1} <= set(back.eos_ids)
    assert 3 in back.eos_ids  # <|im_end|>, which llama.cpp knows by its text
    many = replace(model, config=replace(model.config, eos=tuple(range(20, 30))))
    with pytest.raises(UnsupportedError, match="12 end tokens, and a GGUF file names at most 6"):
        tokenizer_keys(many)


def test_bos_and_eos_are_those_of_the_post_processor() -> None:
    """Flags beside it say nothing, and what is no BOS and EOS is refused."""
    silent = zoo.edited(zoo.byte_level(), post_processor=None)
    model = zoo.model_of(silent, {**zoo.CONFIG, "add_bos_token": True})
    assert tokenizer_keys(model)["tokenizer.ggml.add_bos_token"] is False
    special = {"id": "<s>", "ids": [0], "tokens": ["<s>"]}
    one, text = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    both = {"type": "TemplateProcessing", "single": [one, text, one], "pair": [one, text],
            "special_tokens": {"<s>": special}}  # fmt: skip
    keys = tokenizer_keys(zoo.model_of(zoo.edited(zoo.byte_level(), post_processor=both)))
    assert keys["tokenizer.ggml.add_bos_token"] is keys["tokenizer.ggml.add_eos_token"] is True
    twice = both | {"single": [one, one, text]}
    with pytest.raises(UnsupportedError, match=r"tokens \[0, 0\] before a text"):
        tokenizer_keys(zoo.model_of(zoo.edited(zoo.byte_level(), post_processor=twice)))


def test_templates_beside_templates_reach_the_file() -> None:
    model = zoo.model_of(zoo.byte_level())
    files = {
        **model.files,
        "chat_template.jinja": b"A",
        "additional_chat_templates/tools.jinja": b"B",
    }
    keys = tokenizer_keys(replace(model, files=files))
    assert keys["tokenizer.chat_template"] == "A"
    assert keys["tokenizer.chat_template.tools"] == "B"
    assert keys["tokenizer.chat_templates"] == ["tools"]


def test_a_difference_names_the_text_and_both_lists() -> None:
    source = hf_tokenizer({"tokenizer.json": zoo.byte_level().encode()})

    class Other:
        by = "another"
        adds_special = True

        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            return [[*made, 5] if "HELLO" in t else made
                    for t, made in zip(texts, ids(source, texts), strict=True)]  # fmt: skip

        def excuse(self, text: str) -> str | None:
            return None

    found = compare_texts(source, Other())
    right = ", ".join(map(str, ids(source, ["HELLO WORLD"])[0]))
    assert (found.compared, found.equal) == (COUNT, COUNT - 1)
    assert found.complaint == (
        f"the text 'HELLO WORLD' has the token ids [{right}] in the model's own tokenizer and "
        f"[{right}, 5] in another"
    )
    assert found.to_dict() == {
        "by": "another", "compared": 200, "equal": 199, "known_limits": {},
    }  # fmt: skip


def test_the_certificate_counts_the_texts(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model = zoo.model_of(zoo.byte_level("qwen2", "NFC"))
    made = convert(model, "genai", tmp_path / "out", Options(context=64))
    assert made.certificate is not None
    texts = made.certificate["texts"]
    assert texts["by"].startswith("onnxruntime-genai ")
    assert texts["compared"] == COUNT
    excused = texts["known_limits"]
    assert texts["equal"] + sum(excused.values()) == COUNT
    assert list(excused) == [
        "onnxruntime-genai does not compose Unicode (NFC), as this model's tokenizer does"
    ]


def test_an_output_with_another_tokenizer_fails_validation(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model, out = zoo.model_of(zoo.byte_level()), tmp_path / "out"
    options = Options(context=64)
    genai.check(model, options)
    genai.write(model, out, options)
    (out / "tokenizer.json").write_text(zoo.byte_level("llama-bpe"))
    report = validate(out, model, "genai", steps=2, threads=1)
    assert not report.passed
    assert "tokenizer.json" in report.explain()
    source = hf_tokenizer(model.files)
    texts = compare_texts(source, genai.tokenizer(out, source))
    assert texts.compared >= COUNT
    assert texts.equal < COUNT
    assert texts.complaint is not None


@pytest.mark.parametrize("scheme", ["first", "never"])
def test_onnxruntime_genai_refuses_what_it_cuts_otherwise(scheme: str) -> None:
    """It puts a space before every text of SentencePiece, whatever Metaspace says."""
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(UnsupportedError, match="onnxruntime-genai would not give the model"):
        genai.check(zoo.model_of(zoo.sentencepiece(scheme)), Options(context=64))


def added_beside() -> Model:
    """A model with an end token that tokenizer_config.json alone holds."""
    document = zoo.byte_level()
    rows = len(json.loads(document)["model"]["vocab"]) + 1
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    config: dict[str, Any] = {
        "bos_token": "<s>",
        "eos_token": "<|stop|>",
        "added_tokens_decoder": {str(rows): {"content": "<|stop|>", "special": True, **plain}},
    }
    return zoo.model_of(document, config)


def test_tokens_of_other_files_reach_every_target(tmp_path: Path) -> None:
    model = added_beside()
    text = "Hi<|stop|>Hi"
    right = Tokenizer(model.files).encode(text)
    stop = hf_tokenizer(model.files).library.token_to_id("<|stop|>")
    assert stop in right
    assert Tokenizer(tokenizer_files(tokenizer_keys(model))[0]).encode(text) == right
    assert stop in Tokenizer(tokenizer_files(tokenizer_keys(model))[0]).eos_ids
    pytest.importorskip("onnxruntime_genai")
    written = genai_module.tokenizer_files(model)
    assert Tokenizer({"tokenizer.json": written["tokenizer.json"]}).encode(text) == right
    assert stop in genai_module.genai_config(model, 64)["model"]["eos_token_id"]


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2"])
def test_published_vocabularies_in_llama_cpp(name: str) -> None:
    """Our reader of GGUF, llama.cpp on the same file, and the ends of a text."""
    pytest.importorskip("llama_cpp")
    from edgeq.converters.gguf.vocab import LlamaVocabulary
    from edgeq.importers.gguf.file import open_gguf

    path = need(f"data/tokenizers/ggml-vocab-{name}.gguf")
    files, _ = tokenizer_files(open_gguf(path).metadata)
    source = hf_tokenizer(files)
    target = LlamaVocabulary(path, source)
    assert compare_texts(source, target).complaint is None
    assert target.end_ids() == sorted(Tokenizer(files).eos_ids)


def test_a_published_tokenizer_goes_everywhere() -> None:
    model = load(real_model(SMOLLM2))
    keys = tokenizer_keys(model)
    assert keys["tokenizer.ggml.pre"] == "smollm"
    assert Tokenizer(tokenizer_files(keys)[0]).eos_ids == Tokenizer(model).eos_ids
    genai_tokenizer = pytest.importorskip("edgeq.converters.ort.genai_tokenizer")
    pytest.importorskip("onnxruntime_genai")
    files = genai_module.tokenizer_files(model)
    files[genai_module.CONFIG] = json.dumps(genai_module.genai_config(model, 512)).encode()
    genai_tokenizer.check_same_ids(hf_tokenizer(model.files), files)


def test_the_demo_goes_everywhere() -> None:
    model = load(DEMO)
    assert tokenizer_keys(model)["tokenizer.ggml.pre"] == "gpt-2"
