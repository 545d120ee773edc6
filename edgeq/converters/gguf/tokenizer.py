"""A model's tokenizer as GGUF's keys: the inverse of `edgeq.importers.gguf.tokenizer`.

llama.cpp has tokenizers of its own and wants only their data. Two kinds cover the families:
"llama" (SentencePiece BPE: pieces, scores, bytes as ``<0x..>``) and "gpt2" (byte-level BPE:
tokens, merges, and the name of one of the expressions that cut the text first, which are compiled
into llama.cpp). A tokenizer.json has merges where SentencePiece has scores; a piece's score is
minus the rank of the first merge that makes it.

What llama.cpp has no key for is refused: normalizers other than SentencePiece's spaces (it never
composes Unicode either, so a tokenizer that does is written only under the names of those that
do), tokens that take the whitespace beside them along (but for Phi-3's, which it knows by the
model's name), and anything that makes its ids differ on the texts of
`edgeq.converters.validate.tokenizer`.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer; llama.cpp's
llama-vocab.cpp for what each key does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgeq.converters.validate.tokenizer import compare_texts
from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.importers.gguf.tokenizer import STRIP_NAMES, STRIP_NEEDS, listed_ends
from edgeq.importers.gguf.tokenizer import tokenizer_files as read_keys
from edgeq.importers.huggingface.tokenizer import (
    HfTokenizer,
    added_tokens,
    end_ids,
    hf_tokenizer,
)
from edgeq.importers.json_object import read_object
from edgeq.importers.tokenizer.chat_templates import DEFAULT, chat_templates
from edgeq.importers.tokenizer.tokenizer_json import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    from_printable,
)
from edgeq.model.model import Model

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_NEVER = -1e9
"""Score of a piece that no merge makes."""
_MOST_TOKENS = 100_000
"""Tokens whose own text is compared."""
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""``tokenizer.ggml.<name>_token_id`` of tokens that llama.cpp ends a generation at."""


def tokenizer_keys(model: Model, *, compare: bool = True) -> dict[str, Any]:
    """The ``tokenizer.`` keys of a model; "none" if it has no tokenizer.

    Args:
        model: the model.
        compare: check on texts that llama.cpp makes the same ids.

    Raises:
        FormatError: tokenizer.json is damaged, or has more tokens than the embedding rows.
        UnsupportedError: a tokenizer that llama.cpp does not have.
    """
    if "tokenizer.json" not in model.files:
        return {"tokenizer.ggml.model": "none"}
    document: Mapping[str, Any] = read_object(model.files, "tokenizer.json")
    bpe = document.get("model") or {}
    if bpe.get("type") != "BPE":
        raise UnsupportedError(
            f"the tokenizer is a {bpe.get('type')} model; llama.cpp files hold BPE ones"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if bpe.get(key):
            raise UnsupportedError(f"the tokenizer sets {key}, which llama.cpp does not have")
    sentencepiece = _is_sentencepiece(document, bpe)
    tokenizer = hf_tokenizer(model.files)
    document = tokenizer.document
    added = added_tokens(tokenizer)
    tokens, kinds = _tokens(added, bpe, model.config.vocab)
    keys: dict[str, Any] = {}
    if sentencepiece:
        _check_sentencepiece(document, bpe)
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
        keys["tokenizer.ggml.pre"] = _pre_tokenizer(document, bpe)
        keys["tokenizer.ggml.merges"] = [" ".join(pair) for pair in _merges(bpe)]
    keys["tokenizer.ggml.tokens"] = tokens
    keys["tokenizer.ggml.token_type"] = kinds
    keys |= _special(model, tokenizer, tokens)
    keys |= _templates(model.files)
    keys |= _name(model, added, tokens)
    if compare:
        _check_same_ids(tokenizer, keys, sentencepiece)
    return keys


class ReadBack:
    """A GGUF file's tokenizer by edgeq's own reader, which follows llama.cpp's rules.

    Args:
        keys: the file's metadata.
        by: whose rules they are, for messages.
    """

    adds_special = True

    def __init__(self, keys: Mapping[str, Any], by: str = "llama.cpp") -> None:
        self.by = by
        self._tokenizer = hf_tokenizer(read_keys(keys)[0])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        tokenizer = self._tokenizer
        return [[*tokenizer.prefix, *ids, *tokenizer.suffix] for ids in tokenizer.encode_all(texts)]

    def excuse(self, text: str) -> str | None:
        """Nothing is excused."""
        return None


def _check_same_ids(tokenizer: HfTokenizer, keys: Mapping[str, Any], sentencepiece: bool) -> None:
    """Refuse a tokenizer that llama.cpp's rules make other ids of."""
    report = compare_texts(tokenizer, ReadBack(keys), _token_texts(keys, sentencepiece))
    if report.complaint:
        raise UnsupportedError(
            f"llama.cpp would not give the model the tokens it was trained with: "
            f"{report.complaint}; {report.compared - report.equal} of {report.compared} texts "
            "differ; "
            "convert to litertlm or genai"
        )


def _token_texts(keys: Mapping[str, Any], sentencepiece: bool) -> Iterator[str]:
    """The text of ordinary tokens that are text by themselves; of every one in most models."""
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    step = -(-len(tokens) // _MOST_TOKENS)
    for token, kind in zip(tokens[::step], kinds[::step], strict=True):
        if kind == NORMAL and sentencepiece:
            yield token.replace(SPACE, " ")
        elif kind == NORMAL:
            try:
                yield from_printable(token).decode()
            except UnicodeDecodeError:
                continue


def _tokens(
    added: Mapping[int, Mapping[str, Any]], bpe: Mapping[str, Any], vocab: int
) -> tuple[list[str], list[int]]:
    """Text and kind of each id; ids that the tokenizer leaves out are unused."""
    texts = {i: text for text, i in bpe["vocab"].items()}
    if max(texts, default=-1) >= vocab:
        raise FormatError(
            f"the tokenizer has a token {max(texts)}, past the {vocab} rows of the embedding"
        )
    kinds = dict.fromkeys(texts, NORMAL)
    for i, token in added.items():
        if i >= vocab:  # named in a file, but of no row in the model
            continue
        text = token["content"]
        kinds[i] = CONTROL if token["special"] else USER_DEFINED
        if text == bpe.get("unk_token"):
            kinds[i] = UNKNOWN
        # what users define is looked for in the text itself, where spaces are spaces
        texts[i] = text.replace(SPACE, " ") if kinds[i] == USER_DEFINED else text
    return (
        [texts.get(i, f"[PAD{i}]") for i in range(vocab)],
        [kinds.get(i, UNUSED) for i in range(vocab)],
    )


def _name(
    model: Model, added: Mapping[int, Mapping[str, Any]], tokens: Sequence[str]
) -> dict[str, str]:
    """A name by which llama.cpp lets the right tokens take whitespace along: Phi-3's, or none."""
    for token in added.values():
        for flag in ("lstrip", "single_word"):
            if token[flag]:
                raise UnsupportedError(
                    f"the token {token['content']!r} is one with {flag}, which llama.cpp does not "
                    "have; convert to litertlm or genai"
                )
    stripping = {token["content"] for token in added.values() if token["rstrip"]}
    all_of_phi3 = {token["content"] for token in added.values()} - set(STRIP_NEEDS) | {"</s>"}
    name = str(model.provenance.get("source") or model.config.family)
    named = any(part in name.lower() for part in STRIP_NAMES)
    if not stripping:
        # llama.cpp would strip by the name alone, and would not load the file without the tokens
        return {"general.name": re.sub("(?i)phi-?3", "Phi 3", name)} if named else {}
    if stripping != all_of_phi3 or not {*STRIP_NEEDS, "</s>"} <= set(tokens):
        raise UnsupportedError(
            f"the token {min(stripping)!r} takes the whitespace after it along (rstrip), which "
            "llama.cpp does for the tokens of Phi-3 only; convert to litertlm or genai"
        )
    return {"general.name": name if named else f"Phi-3 {name}"}


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


def _check_sentencepiece(document: Mapping[str, Any], bpe: Mapping[str, Any]) -> None:
    """Refuse what SentencePiece in llama.cpp does not do."""
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in bpe["vocab"]]
    if missing or not bpe.get("byte_fallback"):
        raise UnsupportedError(
            f"the tokenizer has no bytes to fall back to ({', '.join(missing[:3]) or 'by a flag'}),"
            " which llama.cpp needs; convert to litertlm or genai"
        )
    spaces = {"String": " "}
    for step in _steps(document.get("normalizer"), "normalizers"):
        kind, pattern, content = step.get("type"), step.get("pattern"), step.get("content")
        known = (kind == "Prepend" and step.get("prepend") == SPACE) or (
            kind == "Replace" and pattern == spaces and content == SPACE
        )
        if not known:
            raise _no_normalizer(step)
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        kind = step.get("type")
        if kind == "Split" and step.get("pattern") == spaces:
            continue  # of Gemma's: there are no spaces left
        if kind != "Metaspace" or step.get("replacement", SPACE) != SPACE:
            raise UnsupportedError(
                f"the tokenizer cuts texts by {kind}, which llama.cpp "
                "does not do for SentencePiece; convert to litertlm or genai"
            )


def _no_normalizer(step: Mapping[str, Any]) -> UnsupportedError:
    detail = step.get("pattern") or step.get("prepend")
    return UnsupportedError(
        f"the tokenizer normalizes texts by {step.get('type')}{f' {detail}' if detail else ''}, "
        "which llama.cpp has no key for; convert to litertlm or genai"
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


def _pre_tokenizer(document: Mapping[str, Any], bpe: Mapping[str, Any]) -> str:
    """The name llama.cpp knows the tokenizer's cutting of texts by."""
    composes = False
    for step in _steps(document.get("normalizer"), "normalizers"):
        if step.get("type") != "NFC":
            raise _no_normalizer(step)
        composes = True
    splits: list[str] = []
    for step in _steps(document.get("pre_tokenizer"), "pretokenizers"):
        kind, pattern = step.get("type"), step.get("pattern") or {}
        isolated = step.get("behavior", "Isolated") == "Isolated" and not step.get("invert")
        if kind == "Split" and "Regex" in pattern and isolated:
            splits.append(pattern["Regex"])
        elif kind == "Digits" and step.get("individual_digits"):
            splits.append(r"\p{N}")
        elif kind == "ByteLevel":
            if step.get("add_prefix_space"):
                raise UnsupportedError(
                    "the tokenizer puts a space before each text (add_prefix_space), which "
                    "llama.cpp does not do for byte-level BPE; convert to "
                    "litertlm or genai"
                )
            if step.get("use_regex", True):
                splits += PRE_TOKENIZERS["gpt-2"].splits
        else:
            splits.append(f"{kind} {pattern}")
    same = [name for name, known in PRE_TOKENIZERS.items() if known.splits == tuple(splits)]
    if not same:
        raise UnsupportedError(
            f"the tokenizer cuts texts by {splits}, which llama.cpp has no name for "
            f"(known: {', '.join(PRE_TOKENIZERS)})"
        )
    fitting = [name for name in same if PRE_TOKENIZERS[name].nfc == composes]
    if not fitting:
        raise UnsupportedError(
            "the tokenizer composes Unicode (NFC), which llama.cpp never does"
            if composes
            else "llama.cpp's name for how this tokenizer cuts texts stands for one that composes "
            "Unicode (NFC) first, which this one does not; convert to litertlm or genai"
        )
    fitting = [name for name in fitting if PRE_TOKENIZERS[name].exact]
    if not fitting:
        raise UnsupportedError(
            f"llama.cpp's {same[0]} parts combining marks from their letters, which this tokenizer "
            "keeps together; convert to litertlm or genai"
        )
    whole = bool(bpe.get("ignore_merges"))
    return next((n for n in fitting if PRE_TOKENIZERS[n].whole_words == whole), fitting[0])


def _special(model: Model, tokenizer: HfTokenizer, tokens: Sequence[str]) -> dict[str, Any]:
    """Special tokens, those that end a generation, and what is put before and after a text."""
    where = {token: i for i, token in enumerate(tokens)}
    ids = {
        name: where.get(tokenizer.special.get(f"{name}_token", ""))
        for name in ("bos", "unk", "pad")
    }
    keys: dict[str, Any] = {}
    bos = model.config.bos if ids["bos"] is None else ids["bos"]
    if tokenizer.prefix:
        bos = tokenizer.prefix[0]
    ends = [
        i
        for i in dict.fromkeys((*end_ids(model.files, tokenizer), *model.config.eos))
        if i < len(tokens)
    ]
    if tokenizer.suffix:
        ends = list(dict.fromkeys((tokenizer.suffix[0], *ends)))
    if len(tokenizer.prefix) > 1 or len(tokenizer.suffix) > 1:
        raise UnsupportedError(
            f"the tokenizer puts the tokens {list(tokenizer.prefix)} before a text and "
            f"{list(tokenizer.suffix)} after it; llama.cpp puts BOS and EOS, one token each"
        )
    if bos is not None:
        keys["tokenizer.ggml.bos_token_id"] = bos
    if ends:
        keys["tokenizer.ggml.eos_token_id"] = ends[0]
    known = listed_ends(keys, tokens, ends[0] if ends else None)
    further = [i for i in ends if i not in known]
    names = _END_KEYS[1:]
    if len(further) > len(names):
        raise UnsupportedError(
            f"the model has {len(ends)} end tokens, and a GGUF file names at most {len(_END_KEYS)}"
        )
    for name, i in zip(names, further, strict=False):
        keys[f"tokenizer.ggml.{name}_token_id"] = i
    if ids["unk"] is not None:
        keys["tokenizer.ggml.unknown_token_id"] = ids["unk"]
    if ids["pad"] is not None:
        keys["tokenizer.ggml.padding_token_id"] = ids["pad"]
    keys["tokenizer.ggml.add_bos_token"] = bool(tokenizer.prefix)
    keys["tokenizer.ggml.add_eos_token"] = bool(tokenizer.suffix)
    return keys


def _templates(files: Mapping[str, bytes]) -> dict[str, Any]:
    prefix, templates = "tokenizer.chat_template", chat_templates(files)
    keys: dict[str, Any] = {
        prefix if name == DEFAULT else f"{prefix}.{name}": text for name, text in templates.items()
    }
    if others := [name for name in templates if name != DEFAULT]:
        keys["tokenizer.chat_templates"] = others
    return keys
