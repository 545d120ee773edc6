"""Other formats' vocabularies as a Hugging Face ``tokenizer.json``, the only kind edgeq runs.

Two kinds of BPE cover the supported families:

- SentencePiece (Llama 2, Mistral, Gemma): characters and ``▁`` for spaces, merged in the order of
  the resulting pieces' scores; a character without a piece falls back to ``<0x..>`` bytes.
- byte-level (GPT-2, Llama 3, Qwen, SmolLM): bytes written as printable characters, an explicit
  list of merges, and a regular expression that cuts the text first.

Source: https://github.com/google/sentencepiece (bpe_model.cc); the pre-tokenizer expressions are
those of the models' own tokenizer.json files.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError, unknown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces; the numbers of SentencePiece and of GGUF's ``tokenizer.ggml.token_type``."""

SPACE = "▁"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = _CASED % ("", "") + r"|\p{N}" + _REST
_GPT4O = _CASED % (_CONTRACTED, _CONTRACTED) + r"|\p{N}{1,3}" + _REST
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class PreTokenizer:
    """How byte-level BPE cuts the text before merging.

    Args:
        splits: regular expressions, applied one after the other to the pieces so far.
        whole_words: a piece that is a token as it stands is not merged anew (Llama 3).
        nfc: Unicode is composed first (Qwen).
        add_bos: whether a text starts with BOS if the file does not say.
        exact: llama.cpp cuts just so. Of the expressions that keep combining marks with their
            letters it has an approximation, which parts some of them.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False
    exact: bool = True


_LLAMA3_PRE = PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)
_DIGITS_PRE = PreTokenizer((r"\p{N}", _GPT2))
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "llama-bpe": _LLAMA3_PRE,
    "llama-v3": _LLAMA3_PRE,
    "llama3": _LLAMA3_PRE,
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "smollm": _DIGITS_PRE,
    "starcoder": _DIGITS_PRE,
    "refact": _DIGITS_PRE,
    "command-r": _DIGITS_PRE,
    "minerva-7b": _DIGITS_PRE,
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "megrez": PreTokenizer((_QWEN2,)),
    "falcon3": _LLAMA3_PRE,
    "lfm2": _LLAMA3_PRE,
    "pixtral": _LLAMA3_PRE,
    "dbrx": PreTokenizer((_LLAMA3,)),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "phi-2": PreTokenizer((_GPT2,)),
    "olmo": PreTokenizer((_GPT2,)),
    "exaone4": PreTokenizer((_GPT2,)),
    "glm4": PreTokenizer((_LLAMA3,)),
    "chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "hunyuan-dense": PreTokenizer(_DEEPSEEK3),
    "deepseek-v3": PreTokenizer(_DEEPSEEK3),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True, exact=False),
    "gpt-4o": PreTokenizer((_GPT4O,), exact=False),
}
"""Pre-tokenizers by the name GGUF's ``tokenizer.ggml.pre`` gives them."""


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as its file holds it.

    Args:
        tokens: the text of each id.
        kinds: NORMAL .. BYTE for each id.
        bos, eos, unk: ids, or None.
        add_bos: whether a text starts with BOS.
        add_eos: whether a text ends with EOS.
        rstrip: special tokens that take the whitespace after them along.
    """

    tokens: Sequence[str]
    kinds: Sequence[int]
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    rstrip: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if len(self.kinds) != len(self.tokens):
            raise FormatError(
                f"the tokenizer has {len(self.tokens)} tokens and {len(self.kinds)} token types"
            )
        if len(set(self.tokens)) != len(self.tokens):
            seen: set[str] = set()
            twice = next(t for t in self.tokens if t in seen or seen.add(t))  # type: ignore[func-returns-value]
            raise FormatError(f"the tokenizer holds the token {twice!r} twice")
        for name in ("bos", "eos", "unk"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < len(self.tokens):
                raise FormatError(
                    f"the tokenizer's {name} token is {value}, past its {len(self.tokens)} tokens"
                )


def sentencepiece_bpe(
    vocabulary: Vocabulary, scores: Sequence[float], *, add_prefix: bool = True
) -> dict[str, Any]:
    """A tokenizer.json for a SentencePiece BPE vocabulary, by llama.cpp's rules.

    User-defined pieces are looked for in the text itself, and each text between them is one of
    its own.

    Args:
        vocabulary: the pieces.
        scores: of each piece; of two merges the one with the higher score goes first.
        add_prefix: a space is put before each text.

    Raises:
        FormatError: lists of different lengths.
    """
    _check_scores(vocabulary, scores)
    bytes_held = {f"<0x{byte:02X}>" for byte in range(256)} <= set(vocabulary.tokens)
    prefix = [{"type": "Prepend", "prepend": SPACE}] if add_prefix else []
    normalizers = [*prefix, _ESCAPE]
    return _document(
        vocabulary,
        _bpe_by_score(vocabulary, scores, byte_fallback=bytes_held),
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer=None,
        decoder=_sentencepiece_decoder(add_prefix),
        # A user-defined piece holds ▁ where the text has spaces, so it is looked for after
        # normalization; where that puts ▁ before each text it would find nothing, and goes first.
        normalized=not add_prefix,
    )


def sentencepiece(
    vocabulary: Vocabulary,
    scores: Sequence[float],
    *,
    byte_fallback: bool,
    add_prefix: bool,
    squeeze: bool,
    charsmap: bytes,
    pieces: int,
    legacy: bool = True,
) -> dict[str, Any]:
    """A tokenizer.json for a SentencePiece BPE model, by SentencePiece's own rules.

    User-defined pieces are looked for in the normalized text, in which they stay whole.

    Args:
        vocabulary: the pieces, and after them tokens that Transformers adds.
        scores: of each piece; of two merges the one with the higher score goes first.
        byte_fallback: a character without a piece becomes bytes, not the unknown piece.
        add_prefix: a space is put before the text.
        squeeze: runs of spaces become one, and outer ones go.
        charsmap: SentencePiece's precompiled normalization, if it has one.
        pieces: how many of the vocabulary are SentencePiece's own.
        legacy: the space is put before each text between added tokens; if not, before the first
            alone, and not before one that begins with a space. Transformers calls it so.

    Raises:
        FormatError: lists of different lengths.
    """
    _check_scores(vocabulary, scores)
    tokens, kinds = vocabulary.tokens, vocabulary.kinds
    normalizers: list[dict[str, Any]] = []
    if charsmap:
        text = base64.b64encode(charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": text})
    if squeeze:  # spaces alone: other whitespace stays
        for regex, content in ((r"\A +| +\z", ""), (" {2,}", " ")):
            normalizers.append({"type": "Replace", "pattern": {"Regex": regex}, "content": content})
    if add_prefix and legacy:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append(_ESCAPE)
    steps: list[dict[str, Any]] = []
    if add_prefix and not legacy:
        marks = {"type": "Metaspace", "replacement": SPACE, "split": False}
        steps.append({**marks, "prepend_scheme": "first"})
    defined = [tokens[i] for i in range(pieces) if kinds[i] == USER_DEFINED]
    if defined:
        longest_first = sorted(defined, key=len, reverse=True)
        cuts = {
            "type": "Split",
            "pattern": {"Regex": "|".join(re.escape(piece) for piece in longest_first)},
            "behavior": "Isolated",
            "invert": False,
        }
        steps.append(cuts)
    model = _bpe_by_score(vocabulary, scores, byte_fallback=byte_fallback)
    model["ignore_merges"] = bool(defined)
    # user-defined pieces are cut out above, and must not be added tokens as well
    kinds = [NORMAL if i < pieces and k == USER_DEFINED else k for i, k in enumerate(kinds)]
    return _document(
        replace(vocabulary, kinds=kinds),
        model,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps} if steps else None,
        decoder=_sentencepiece_decoder(add_prefix),
        normalized=False,
    )


_ESCAPE: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def _check_scores(vocabulary: Vocabulary, scores: Sequence[float]) -> None:
    if len(scores) != len(vocabulary.tokens):
        raise FormatError(
            f"the tokenizer has {len(vocabulary.tokens)} tokens and {len(scores)} scores"
        )


def _bpe_by_score(
    vocabulary: Vocabulary, scores: Sequence[float], *, byte_fallback: bool
) -> dict[str, Any]:
    tokens = vocabulary.tokens
    return {
        "type": "BPE",
        "unk_token": None if vocabulary.unk is None else tokens[vocabulary.unk],
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "vocab": _vocab(tokens),
        "merges": _merges_by_score(tokens, vocabulary.kinds, scores),
    }


def _sentencepiece_decoder(add_prefix: bool) -> dict[str, Any]:
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": decoders}


def byte_level_bpe(
    vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], pre: str
) -> dict[str, Any]:
    """A tokenizer.json for a byte-level BPE vocabulary.

    Args:
        vocabulary: the tokens, in printable characters.
        merges: pairs, first ones first.
        pre: a name in `PRE_TOKENIZERS`.

    Raises:
        FormatError: a merge of tokens that the vocabulary does not hold.
        UnsupportedError: an unknown pre-tokenizer.
    """
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedError(unknown("pre-tokenizer", pre, PRE_TOKENIZERS))
    how = PRE_TOKENIZERS[pre]
    vocab = _vocab(vocabulary.tokens)
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise FormatError(
                f"the tokenizer merges {left!r} and {right!r}, which its tokens do not hold"
            )
    cuts: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in how.splits
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    cuts.append(byte_level)
    model = {
        "type": "BPE",
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": how.whole_words,
        "vocab": vocab,
        "merges": [list(pair) for pair in merges],
    }
    return _document(
        vocabulary,
        model,
        normalizer={"type": "NFC"} if how.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": cuts},
        decoder={
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        normalized=False,
    )


def files(
    document: Mapping[str, Any],
    vocabulary: Vocabulary,
    *,
    ends: Sequence[int] = (),
    chat_templates: Mapping[str, str] | None = None,
) -> dict[str, bytes]:
    """The tokenizer's files: tokenizer.json and what goes with it.

    Args:
        document: the tokenizer.json.
        vocabulary: where its special tokens stand.
        ends: ids that end a generation, if other than EOS alone.
        chat_templates: name -> Jinja template; the usual one is "default".
    """
    config: dict[str, Any] = {
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
    }
    for name in ("bos", "eos", "unk"):
        value = getattr(vocabulary, name)
        config[f"{name}_token"] = None if value is None else vocabulary.tokens[value]
    chat_templates = chat_templates or {}
    if list(chat_templates) == ["default"]:
        config["chat_template"] = chat_templates["default"]
    elif chat_templates:
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in chat_templates.items()
        ]
    contents: dict[str, Any] = {"tokenizer.json": document, "tokenizer_config.json": config}
    if ends:
        contents["generation_config.json"] = {"eos_token_id": list(ends)}
    return {
        name: json.dumps(content, ensure_ascii=False).encode() for name, content in contents.items()
    }


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def _merges_by_score(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
    """Every way to put a piece together from two others, best score first."""
    normal = {token: i for i, token in enumerate(tokens) if kinds[i] == NORMAL}
    merges = []
    for token, i in normal.items():
        for cut in range(1, len(token)):
            left, right = normal.get(token[:cut]), normal.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[i], left, right))
    merges.sort()
    return [[tokens[left], tokens[right]] for _, left, right in merges]


def _document(
    vocabulary: Vocabulary,
    model: dict[str, Any],
    *,
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    normalized: bool,
) -> dict[str, Any]:
    added = []
    for i, kind in enumerate(vocabulary.kinds):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and vocabulary.tokens[i]:
            special = kind != USER_DEFINED
            added.append(
                {
                    "id": i,
                    "content": vocabulary.tokens[i],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": i in vocabulary.rstrip,
                    # whitespace after a token is found before spaces become ▁
                    "normalized": normalized and not special and i not in vocabulary.rstrip,
                    "special": special,
                }
            )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _post_processor(vocabulary),
        "decoder": decoder,
        "model": model,
    }


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """What puts BOS before a text and EOS after it; None where neither is put."""
    ends = {
        "bos": vocabulary.bos if vocabulary.add_bos else None,
        "eos": vocabulary.eos if vocabulary.add_eos else None,
    }
    tokens = {name: vocabulary.tokens[i] for name, i in ends.items() if i is not None}
    if not tokens:
        return None

    def framed(name: str, type_id: int) -> list[dict[str, Any]]:
        pieces: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": type_id}}]
        if "bos" in tokens:
            pieces.insert(0, {"SpecialToken": {"id": tokens["bos"], "type_id": type_id}})
        if "eos" in tokens:
            pieces.append({"SpecialToken": {"id": tokens["eos"], "type_id": type_id}})
        return pieces

    return {
        "type": "TemplateProcessing",
        "single": framed("A", 0),
        "pair": [*framed("A", 0), *framed("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [ends[name]], "tokens": [text]}
            for name, text in tokens.items()
        },
    }


def _printable_bytes() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(rest)}


_PRINTABLE = _printable_bytes()


def from_printable(token: str) -> bytes:
    """Bytes of a byte-level token; an added token outside the alphabet is plain text."""
    try:
        return bytes(_PRINTABLE[char] for char in token)
    except KeyError:
        return token.encode()
