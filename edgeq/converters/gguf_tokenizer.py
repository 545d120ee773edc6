"""A model's tokenizer as GGUF's keys: the inverse of `edgeq.importers.gguf_tokenizer`.

llama.cpp has tokenizers of its own and wants only their data. Two kinds cover the families:
"llama" (SentencePiece BPE: pieces, scores, bytes as ``<0x..>``) and "gpt2" (byte-level BPE:
tokens, merges, and the name of one of the expressions that cut the text first, which are compiled
into llama.cpp). A tokenizer.json has merges where SentencePiece has scores; a piece's score is
minus the rank of the first merge that makes it.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer; llama.cpp's
llama-vocab.cpp for what each key does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from edgeq.errors import FormatError, UnsupportedError
from edgeq.importers.tokenizer_json import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from edgeq.model import Model

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER = -1e9
"""Score of a piece that no merge makes."""


def tokenizer_keys(model: Model) -> dict[str, Any]:
    """The ``tokenizer.`` keys of a model; "none" if it has no tokenizer.

    Raises:
        FormatError: tokenizer.json is damaged, or has more tokens than the embedding rows.
        UnsupportedError: a tokenizer that llama.cpp has not.
    """
    if "tokenizer.json" not in model.files:
        return {"tokenizer.ggml.model": "none"}
    document = _json(model.files, "tokenizer.json")
    settings = _json(model.files, "tokenizer_config.json")
    bpe = document.get("model") or {}
    if bpe.get("type") != "BPE":
        raise UnsupportedError(
            f"the tokenizer is a {bpe.get('type')} model; llama.cpp files hold BPE ones"
        )
    tokens, kinds = _tokens(document, bpe, model.config.vocab)
    keys: dict[str, Any] = {}
    if _is_sentencepiece(document, bpe):
        keys["tokenizer.ggml.model"] = "llama"
        keys["tokenizer.ggml.pre"] = "default"
        keys["tokenizer.ggml.scores"] = _scores(tokens, kinds, bpe)
        keys["tokenizer.ggml.add_space_prefix"] = _adds_prefix(document)
        kinds = [
            BYTE if kind == NORMAL and _BYTE_PIECE.fullmatch(token) else kind
            for token, kind in zip(tokens, kinds, strict=True)
        ]
    else:
        keys["tokenizer.ggml.model"] = "gpt2"
        keys["tokenizer.ggml.pre"] = _pre_tokenizer(document)
        keys["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(bpe)]
    keys["tokenizer.ggml.tokens"] = tokens
    keys["tokenizer.ggml.token_type"] = kinds
    keys |= _special(model, document, settings, tokens)
    keys |= _templates(model.files, settings)
    return keys


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, b"{}"))
    except ValueError as err:
        raise FormatError(f"{name} is not JSON ({err})") from err
    if not isinstance(found, dict):
        raise FormatError(f"{name} holds a {type(found).__name__}, expected an object")
    return found


def _tokens(
    document: Mapping[str, Any], bpe: Mapping[str, Any], vocab: int
) -> tuple[list[str], list[int]]:
    """Text and kind of each id; ids that the tokenizer leaves out are unused."""
    texts = {i: text for text, i in bpe["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for added in document.get("added_tokens") or ():
        i, text = added["id"], added["content"]
        kinds[i] = CONTROL if added.get("special") else USER_DEFINED
        if text == bpe.get("unk_token"):
            kinds[i] = UNKNOWN
        # what users define is looked for in the text itself, where spaces are spaces
        texts[i] = text.replace(SPACE, " ") if kinds[i] == USER_DEFINED else text
    if max(texts, default=-1) >= vocab:
        raise FormatError(
            f"the tokenizer has a token {max(texts)}, past the {vocab} rows of the embedding"
        )
    return (
        [texts.get(i, f"[PAD{i}]") for i in range(vocab)],
        [kinds.get(i, UNUSED) for i in range(vocab)],
    )


def _is_sentencepiece(document: Mapping[str, Any], bpe: Mapping[str, Any]) -> bool:
    steps = [step.get("type") for step in _steps(document.get("decoder"), "decoders")]
    if "ByteLevel" in steps:
        return False
    if bpe.get("byte_fallback") or "Metaspace" in steps or "ByteFallback" in steps:
        return True
    raise UnsupportedError(
        f"the tokenizer decodes by {', '.join(map(str, steps)) or 'nothing'}; llama.cpp has "
        "SentencePiece (ByteFallback, Metaspace) and byte-level BPE"
    )


def _steps(entry: Any, within: str) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, one after the other."""
    if not isinstance(entry, dict):
        return []
    if entry.get("type") == "Sequence":
        return [step for inner in entry.get(within) or () for step in _steps(inner, within)]
    return [entry]


def _merges(bpe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in bpe["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right


def _scores(tokens: list[str], kinds: list[int], bpe: Mapping[str, Any]) -> list[float]:
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(bpe)):
        ranks.setdefault(left + right, rank)
    return [
        -float(ranks[token])
        if token in ranks
        else (0.0 if len(token) == 1 or kind != NORMAL else _NEVER)
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _adds_prefix(document: Mapping[str, Any]) -> bool:
    for step in _steps(document.get("normalizer"), "normalizers"):
        if step.get("type") == "Prepend":
            return True
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _pre_tokenizer(document: Mapping[str, Any]) -> str:
    """The name llama.cpp knows the tokenizer's cutting of texts by."""
    splits: list[str] = []
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        kind, pattern = step.get("type"), step.get("pattern") or {}
        if kind == "Split" and "Regex" in pattern:
            splits.append(pattern["Regex"])
        elif kind == "Digits" and step.get("individual_digits"):
            splits.append(r"\p{N}")
        elif kind == "ByteLevel":
            if step.get("use_regex", True):
                splits += PRE_TOKENIZERS["gpt-2"].splits
        else:
            splits.append(f"{kind} {pattern}")
    for name, known in PRE_TOKENIZERS.items():
        if known.splits == tuple(splits):
            return name
    raise UnsupportedError(
        f"the tokenizer cuts texts by {splits}, which llama.cpp has no name for "
        f"(known: {', '.join(PRE_TOKENIZERS)})"
    )


def _special(
    model: Model, document: Mapping[str, Any], settings: Mapping[str, Any], tokens: list[str]
) -> dict[str, Any]:
    where = {token: i for i, token in enumerate(tokens)}
    found: dict[str, int | None] = {}
    for name in ("bos", "eos", "unk", "pad"):
        value = settings.get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        found[name] = where.get(text) if isinstance(text, str) else None
    bos = model.config.bos if found["bos"] is None else found["bos"]
    ends = [i for i in (found["eos"], *model.config.eos) if i is not None]
    keys: dict[str, Any] = {}
    if bos is not None:
        keys["tokenizer.ggml.bos_token_id"] = bos
    if ends:
        keys["tokenizer.ggml.eos_token_id"] = ends[0]
        other = next((i for i in ends if i != ends[0]), None)
        if other is not None:
            keys["tokenizer.ggml.eot_token_id"] = other
    if found["unk"] is not None:
        keys["tokenizer.ggml.unknown_token_id"] = found["unk"]
    if found["pad"] is not None:
        keys["tokenizer.ggml.padding_token_id"] = found["pad"]
    adds = settings.get("add_bos_token")
    if not isinstance(adds, bool):
        adds = bos is not None and _starts_with(document.get("post_processor"), bos)
    keys["tokenizer.ggml.add_bos_token"] = adds
    keys["tokenizer.ggml.add_eos_token"] = False
    return keys


def _starts_with(processor: Any, bos: int) -> bool:
    """Whether a post-processor puts the token before every text."""
    for step in _steps(processor, "processors"):
        single = step.get("single") or [{}]
        name = (single[0].get("SpecialToken") or {}).get("id")
        if step.get("type") == "TemplateProcessing" and name is not None:
            return bos in ((step.get("special_tokens") or {}).get(name) or {}).get("ids", ())
    return False


def _templates(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> dict[str, Any]:
    prefix = "tokenizer.chat_template"
    if "chat_template.jinja" in files:
        return {prefix: files["chat_template.jinja"].decode()}
    template = settings.get("chat_template")
    if isinstance(template, str):
        return {prefix: template}
    keys: dict[str, Any] = {}
    for entry in template if isinstance(template, list) else ():
        name = entry["name"]
        keys[prefix if name == "default" else f"{prefix}.{name}"] = entry["template"]
    return keys
