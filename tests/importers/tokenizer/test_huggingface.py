"""A tokenizer put together from several files, against Transformers' own."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from edgeq.converters.validate.hard_strings import hard_strings
from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.huggingface.tokenizer import complete_document, hf_tokenizer
from edgeq.runtime.tokenizer import Tokenizer
from tests import tokenizer_zoo as zoo

DOCUMENT = zoo.byte_level()
ROWS = len(json.loads(DOCUMENT)["model"]["vocab"]) + 1  # and <tool>
TEXTS = [
    *hard_strings(["<|im_end|>", "<tool>", "<|y|>", "<|z|>"]),
    "a<|y|> b", "a <|y|>b", "x<|y|>y", "<|y|>\n<|z|>", " <tool> ",
]  # fmt: skip


def token(content: str, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content, "special": True, **plain, **flags}


def listed(*tokens: dict[str, Any]) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(ROWS + i): entry for i, entry in enumerate(tokens)}}


CASES: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "tokenizer.json alone": (None, {}),
    "named": (zoo.CONFIG, {}),
    "the list of the configuration alone": ({**listed(token("<|y|>")), "eos_token": "<|y|>"}, {}),
    "the list in any order": (
        {"added_tokens_decoder": {str(ROWS + 1): token("<|y|>"), str(ROWS): token("<|z|>")}},
        {},
    ),
    "flags of the configuration": (
        {"added_tokens_decoder": {"3": token("<|im_end|>", rstrip=True, lstrip=True)}},
        {},
    ),
    "single words": (listed(token("<|y|>", single_word=True)), {}),
    "not special": (listed(token("<|y|>", special=False, normalized=True)), {}),
    "end token as text": ({"eos_token": "<|y|>"}, {}),
    "end token with flags": (
        {"eos_token": {**token("<|y|>", rstrip=True), "__type": "AddedToken"}},
        {},
    ),
    "further special tokens": ({"additional_special_tokens": ["<|y|>", "<|z|>"]}, {}),
    "extra special tokens": ({"extra_special_tokens": {"video_token": "<|y|>"}}, {}),
    "a special token by another name": ({"image_token": "<|y|>"}, {}),
    "the map alone": (
        None,
        {"special_tokens_map.json": {"eos_token": "<|im_end|>", "bos_token": "<s>"}},
    ),
    "the map before the configuration": (
        {"eos_token": "</s>"},
        {"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}},
    ),
    "the list before the map": (
        {**listed(token("<|y|>")), "eos_token": "</s>"},
        {"special_tokens_map.json": {"eos_token": "<|im_end|>"}},
    ),
    "added_tokens.json": (zoo.CONFIG, {"added_tokens.json": {"<|z|>": ROWS + 1, "<|y|>": ROWS}}),
    "added_tokens.json beside the list": (
        listed(token("<|y|>")),
        {"added_tokens.json": {"<|z|>": ROWS + 1}},
    ),
    "no end token": ({"eos_token": None, "bos_token": None}, {}),
    "flags beside a post-processor": ({**zoo.CONFIG, "add_bos_token": False}, {}),
    "special tokens split": ({**zoo.CONFIG, "split_special_tokens": True}, {}),
    "an end token that is in the vocabulary alone": ({**zoo.CONFIG, "eos_token": "Hello"}, {}),
    "an end token that is listed as ordinary": ({**zoo.CONFIG, "eos_token": "<tool>"}, {}),
    "tokens that a class assumes and the vocabulary has not": (
        {**zoo.CONFIG, "tokenizer_class": "LlamaTokenizer"},
        {},
    ),
    "EOS by a flag": ({**zoo.CONFIG, "add_eos_token": True}, {}),
}
"""tokenizer_config.json and further files."""


def made(config: dict[str, Any] | None, further: dict[str, Any]) -> dict[str, bytes]:
    files = {"tokenizer.json": DOCUMENT.encode()}
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    return files | {name: json.dumps(content).encode() for name, content in further.items()}


def by_transformers(files: dict[str, bytes], folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("case", CASES)
def test_ids_are_transformers_own(case: str, tmp_path: Path) -> None:
    files = made(*CASES[case])
    theirs, ours = by_transformers(files, tmp_path), Tokenizer(files)
    starts_alike = [text for text in TEXTS if not text.startswith("<s>")]
    assert [ours.encode(t) for t in starts_alike] == [theirs.encode(t) for t in starts_alike]
    eos = theirs.eos_token_id
    assert ours.eos_ids == (() if eos is None else (eos,))
    for text in ("Hello World", "a<tool>b", "<|y|> c", " d"):
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
    if theirs.bos_token_id is not None:
        assert ours.bos == theirs.bos_token_id


@pytest.mark.parametrize("kind", ["GPT2TokenizerFast", "Qwen2Tokenizer"])
@pytest.mark.parametrize("spaced", [True, False])
@pytest.mark.parametrize("flag", [True, False, None])
def test_the_configuration_says_whether_a_space_goes_first(
    kind: str, spaced: bool, flag: bool | None, tmp_path: Path
) -> None:
    """Of the classes that ask it."""
    transformers = pytest.importorskip("transformers")
    document = zoo.byte_level("qwen2", prefix_space=spaced)
    if kind != "Qwen2Tokenizer":
        cut = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
        document = zoo.edited(document, pre_tokenizer=cut | {"add_prefix_space": spaced})
    config = {**zoo.CONFIG, "tokenizer_class": kind}
    if flag is not None:
        config["add_prefix_space"] = flag
    files = {
        "tokenizer.json": document.encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    texts = ["Hello World", " Hello", "a1b22c333", "def f(x):\n    return x"]
    assert [Tokenizer(files).encode(t) for t in texts] == [theirs.encode(t) for t in texts]


@pytest.mark.parametrize(
    ("document", "right"),
    [
        (zoo.edited(DOCUMENT, post_processor=None), lambda ids: ids),
        (DOCUMENT, lambda ids: [0, *ids]),
        (
            DOCUMENT.replace('{"Sequence":{"id":"A","type_id":0}}]', '{"Sequence":{"id":"A",'
                             '"type_id":0}},{"SpecialToken":{"id":"<s>","type_id":0}}]', 1),
            lambda ids: [0, *ids, 0],
        ),
    ],
)  # fmt: skip
def test_what_goes_before_and_after_a_text(document: str, right: Any) -> None:
    """The post-processor says it; a prompt to be continued does without what goes after."""
    tokenizer = Tokenizer({"tokenizer.json": document.encode()})
    plain = tokenizer.encode("Hello", add_bos=False)
    assert tokenizer.encode("Hello") == right(plain)
    assert (
        tokenizer.encode("Hello", add_eos=False) == right(plain)[: len(plain) + tokenizer.add_bos]
    )
    assert tokenizer.encode("<s>Hello", add_eos=False) == [0, *plain]  # once


def test_a_configuration_names_bos_no_file_does() -> None:
    """Without tokenizer_config.json, what the post-processor writes is BOS."""
    assert Tokenizer({"tokenizer.json": DOCUMENT.encode()}).bos == 0


def test_one_document_says_what_all_files_say() -> None:
    files = made({**listed(token("<|y|>", rstrip=True)), "eos_token": "<|y|>"}, {})
    alone = hf_tokenizer({"tokenizer.json": complete_document(files)})
    together = hf_tokenizer(files)
    assert [alone.encode(text) for text in TEXTS] == [together.encode(text) for text in TEXTS]
    plain = made(zoo.CONFIG, {})
    assert complete_document(plain) == plain["tokenizer.json"]


@pytest.mark.parametrize(
    ("config", "further", "words"),
    [
        ({"added_tokens_decoder": {str(ROWS + 5): token("<|y|>")}}, {}, "the next free id is"),
        ({"added_tokens_decoder": {"x": token("<|y|>")}}, {}, "added_tokens_decoder is not read"),
        ({"added_tokens_decoder": [7]}, {}, "added_tokens_decoder is not readable"),
        ({"added_tokens_decoder": {"9": {"content": 7}}}, {}, "added_tokens_decoder is not read"),
        ({"added_tokens_decoder": {"9": token("a", rstrip=7)}}, {}, "is not readable"),  # type: ignore[arg-type]
        ({}, {"added_tokens.json": {"<|y|>": "7"}}, r"added_tokens\.json must map"),
        ({}, {"special_tokens_map.json": [7]}, r"special_tokens_map\.json holds a list"),
    ],
)
def test_lists_that_are_refused(
    config: dict[str, Any], further: dict[str, Any], words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        Tokenizer(made(config, further))


FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=len(FLAGS))))
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "metaspace", "lower case"])
def test_every_flag_of_an_added_token(kind: str, flags: tuple[bool, ...], tmp_path: Path) -> None:
    lower = {"type": "Lowercase"}
    document = {
        "byte level": DOCUMENT,
        "sentencepiece": zoo.sentencepiece(),
        "metaspace": zoo.sentencepiece("first"),
        "lower case": zoo.edited(DOCUMENT, normalizer=lower),
    }[kind]
    found = json.loads(document)
    added = {"content": "<|y|>", **dict(zip(FLAGS, flags, strict=True))}
    rows = 1 + max((*found["model"]["vocab"].values(), *(t["id"] for t in found["added_tokens"])))
    found["added_tokens"].append({"id": rows, **added})
    files = {
        "tokenizer.json": json.dumps(found).encode(),
        "tokenizer_config.json": json.dumps(zoo.CONFIG).encode(),
    }
    theirs, ours = by_transformers(files, tmp_path), Tokenizer(files)
    texts = [text for text in TEXTS if not text.startswith("<s>")]
    ids = [ours.encode(text) for text in texts]
    assert ids == [theirs.encode(text) for text in texts]
    if added["special"]:
        return  # the library writes out a special token whose normalized text is another
    for text, tokens in zip(texts, ids, strict=True):
        right = theirs.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if "\ufffd" not in right:
            assert ours.decode(tokens) == right, text


def test_merges_are_never_left_out_by_chance() -> None:
    """BPE-dropout belongs to training."""
    model = json.loads(DOCUMENT)["model"]
    document = zoo.edited(DOCUMENT, model={**model, "dropout": 0.5})
    plain, random = (Tokenizer({"tokenizer.json": d.encode()}) for d in (DOCUMENT, document))
    assert [random.encode(text) for text in TEXTS] == [plain.encode(text) for text in TEXTS]
    written = json.loads(complete_document({"tokenizer.json": document.encode()}))
    assert written["model"]["dropout"] is None


def test_several_steps_of_cutting_stay_as_they_are() -> None:
    """``add_prefix_space`` is for the byte-level step alone, which here follows others."""
    config = {**zoo.CONFIG, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    document = zoo.byte_level("smollm")
    plain = Tokenizer({"tokenizer.json": document.encode()})
    assert Tokenizer(
        {"tokenizer.json": document.encode(), "tokenizer_config.json": json.dumps(config).encode()}
    ).encode("a1b 22") == plain.encode("a1b 22")


def test_a_vocabulary_that_makes_the_library_panic_is_refused() -> None:
    model = json.loads(DOCUMENT)["model"]
    document = zoo.edited(DOCUMENT, model={**model, "continuing_subword_prefix": "##"})
    with pytest.raises(FormatError, match=r"tokenizer\.json is not readable"):
        Tokenizer({"tokenizer.json": document.encode()})


@pytest.mark.parametrize("ends", [{"start": 2, "stop": 0}, {"start": 1, "stop": 1}])
def test_decoders_that_strip_more_are_refused(ends: dict[str, int]) -> None:
    strip = {"type": "Strip", "content": " ", **ends}
    document = zoo.edited(zoo.sentencepiece(), decoder=strip)
    with pytest.raises(UnsupportedError, match="edgeq strips one character"):
        Tokenizer({"tokenizer.json": document.encode()})


def test_what_goes_around_a_text_of_a_vocabulary_without_letters() -> None:
    """It is found with a text that has tokens, whatever the vocabulary holds."""
    frame = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
             {"SpecialToken": {"id": "</s>", "type_id": 0}}]  # fmt: skip
    special = {text: {"id": text, "ids": [i], "tokens": [text]}
               for i, text in enumerate(("<s>", "</s>"))}  # fmt: skip
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "decoder": None,
        "post_processor": {"type": "TemplateProcessing", "single": frame, "pair": frame[:2],
                           "special_tokens": special},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "vocab": {"<s>": 0, "</s>": 1, "\u03b1": 2},
                  "merges": []},
    }  # fmt: skip
    made = hf_tokenizer({"tokenizer.json": json.dumps(document).encode()})
    assert (made.prefix, made.suffix) == ((0,), (1,))
