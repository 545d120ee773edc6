"""The tokenizer inside a GGUF file, as Hugging Face's tokenizer files, by llama.cpp's rules.

A GGUF file names one end token where a model has several, and cannot say that a token strips the
whitespace around it. llama.cpp infers both from the texts of tokens and from the model's name, and
so does this module.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer; llama.cpp's
llama-vocab.cpp (load) for the end tokens and the tokens of Phi-3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError, unknown
from edgeq.importers.tokenizer.tokenizer_json import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    byte_level_bpe,
    files,
    sentencepiece_bpe,
)

_PREFIX = "tokenizer.ggml."
_KINDS = {"llama": "SentencePiece BPE", "gpt2": "byte-level BPE"}
_END_KEYS = ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")
"""``tokenizer.ggml.<name>_token_id`` of tokens that end a generation, as EOS does."""
_END_TEXTS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
        "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
    )
)  # fmt: skip
"""Texts of tokens that end a generation wherever a vocabulary holds them."""
_FILE_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
"""Padding and file separators of models that fill in the middle: by key, the texts of the token
that ends a generation where the key is absent."""
STRIP_NAMES = ("phi-3", "phi3")
"""A model whose name contains one of these has special tokens that strip the whitespace after
them."""
STRIP_NEEDS = ("<unk>", "<s>", "<|endoftext|>")
"""Special tokens of Phi-3 that do not strip the whitespace after them; all others do."""


def tokenizer_files(metadata: Mapping[str, Any]) -> tuple[dict[str, bytes], Vocabulary | None]:
    """Build the tokenizer's files from a file's metadata.

    Returns:
        the files and the vocabulary in them; no files and None if the file has no tokenizer.

    Raises:
        FormatError: a part is missing or of another type or length than the rest.
        UnsupportedError: a tokenizer or pre-tokenizer edgeq does not know.
    """
    kind = metadata.get(_PREFIX + "model", "none")
    if kind == "none":
        return {}, None
    if kind not in _KINDS:
        raise UnsupportedError(unknown("GGUF tokenizer", str(kind), _KINDS))
    tokens = _list(metadata, "tokens", str)
    kinds = _list(metadata, "token_type", int) if _PREFIX + "token_type" in metadata else None
    kinds = [NORMAL] * len(tokens) if kinds is None else list(kinds)
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
    spm = kind == "llama"
    pre = metadata.get(_PREFIX + "pre", "default")
    if not spm and pre not in PRE_TOKENIZERS:
        raise UnsupportedError(unknown("GGUF pre-tokenizer", str(pre), PRE_TOKENIZERS))
    vocabulary = Vocabulary(
        tokens,
        kinds,
        bos=_token(metadata, "bos_token_id", 1 if spm else None),
        eos=_token(metadata, "eos_token_id", 2 if spm else None),
        unk=_token(metadata, "unknown_token_id", 0) if spm else None,
        add_bos=bool(
            metadata.get(_PREFIX + "add_bos_token", True if spm else PRE_TOKENIZERS[pre].add_bos)
        ),
        add_eos=bool(metadata.get(_PREFIX + "add_eos_token", False)),
    )
    ends = end_tokens(metadata, vocabulary)
    _retype(tokens, kinds, ends)
    vocabulary = replace(vocabulary, kinds=kinds, rstrip=_rstrip(metadata, vocabulary))
    if spm:
        document = sentencepiece_bpe(
            vocabulary,
            _list(metadata, "scores", float),
            add_prefix=bool(metadata.get(_PREFIX + "add_space_prefix", True)),
        )
    else:
        document = byte_level_bpe(vocabulary, _merges(metadata), pre)
    contents = files(
        document,
        vocabulary,
        ends=ends,
        chat_templates=_chat_templates(metadata),
    )
    return contents, vocabulary


def end_tokens(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Every id that ends a generation: EOS, the end of a turn, and tokens known by their text."""
    return listed_ends(metadata, vocabulary.tokens, vocabulary.eos)


def listed_ends(
    metadata: Mapping[str, Any], tokens: Sequence[str], eos: int | None
) -> tuple[int, ...]:
    """Like `end_tokens`, from the texts of the tokens and EOS alone."""
    where = {text: i for i, text in enumerate(tokens)}
    named = {key: _token(metadata, f"{key}_token_id", None) for key in _END_KEYS}
    for key, texts in _FILE_TEXTS.items():
        if named[key] is None:
            named[key] = min((where[text] for text in texts if text in where), default=None)
    ends = [i for i in (eos, *named.values()) if i is not None and 0 <= i < len(tokens)]
    ends += [i for i, text in enumerate(tokens) if text in _END_TEXTS]
    by_text = {tokens[i]: i for i in ends}
    calls = by_text.keys() & {"<|call|>", "<|calls|>"}
    if calls and by_text.keys() & {"<|return|>", "<|flush|>"}:
        by_text.pop("<|end|>", None)  # it ends a message there, not the answer
    if "<|tool_response>" in by_text:
        by_text.pop("</s>", None)
    return tuple(dict.fromkeys(i for i in ends if tokens[i] in by_text))


def _retype(tokens: Sequence[str], kinds: list[int], ends: Sequence[int]) -> None:
    """Give tokens that llama.cpp recognizes by their text the type that it gives them."""
    if len(kinds) != len(tokens):
        return  # refused elsewhere
    files = {text for texts in _FILE_TEXTS.values() for text in texts}
    for i in ends:
        if tokens[i] in _END_TEXTS or tokens[i] in files:
            kinds[i] = CONTROL
    for i, text in enumerate(tokens):
        if i not in ends and text == "<|end|>":
            kinds[i] = USER_DEFINED
        elif i not in ends and text == "</s>":
            kinds[i] = NORMAL


def _rstrip(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> frozenset[int]:
    """Tokens that strip the whitespace after them: Phi-3's, which is recognized by its name."""
    name = str(metadata.get("general.name", "")).lower()
    if not any(part in name for part in STRIP_NAMES):
        return frozenset()
    return frozenset(
        i
        for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN) and text not in STRIP_NEEDS
    )


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = metadata.get(_PREFIX + key)
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise FormatError(f"the GGUF file's {_PREFIX}{key} is not an array of {kind.__name__}")
    return values


def _token(metadata: Mapping[str, Any], key: str, default: int | None) -> int | None:
    value = metadata.get(_PREFIX + key, default)
    if value is not None and type(value) is not int:
        raise FormatError(f"the GGUF file's {_PREFIX}{key} is {value!r}; expected a token id")
    return value


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for line in _list(metadata, "merges", str):
        left, space, right = line.partition(" ")
        if not space:
            raise FormatError(f"the GGUF file's {_PREFIX}merges holds {line!r}, no pair")
        merges.append((left, right))
    return merges


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    prefix = "tokenizer.chat_template"
    templates = {}
    for key, value in metadata.items():
        if (key == prefix or key.startswith(prefix + ".")) and isinstance(value, str):
            templates[key.removeprefix(prefix).removeprefix(".") or "default"] = value
    return templates
