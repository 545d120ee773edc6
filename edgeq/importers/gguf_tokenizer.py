"""The tokenizer inside a GGUF file, as Hugging Face's tokenizer files.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgeq.errors import FormatError, UnsupportedError, unknown
from edgeq.importers.tokenizer_json import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    USER_DEFINED,
    Vocabulary,
    byte_level_bpe,
    files,
    sentencepiece_bpe,
)

_PREFIX = "tokenizer.ggml."
_KINDS = {"llama": "SentencePiece BPE", "gpt2": "byte-level BPE"}
_END_TEXTS = frozenset(
    ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
)
"""Special tokens that end a turn; a GGUF file names one end token where a model has several."""


def tokenizer_files(metadata: Mapping[str, Any]) -> tuple[dict[str, bytes], Vocabulary | None]:
    """Build the tokenizer's files from a file's metadata.

    Returns:
        the files and the vocabulary they were made from; nothing where there is no tokenizer.

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
    kinds = [NORMAL] * len(tokens) if kinds is None else kinds
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
    )
    if spm:
        document = sentencepiece_bpe(
            vocabulary,
            _list(metadata, "scores", float),
            add_prefix=bool(metadata.get(_PREFIX + "add_space_prefix", True)),
            squeeze=bool(metadata.get(_PREFIX + "remove_extra_whitespaces", False)),
        )
    else:
        document = byte_level_bpe(vocabulary, _merges(metadata), pre)
    made = files(
        document,
        vocabulary,
        ends=end_tokens(metadata, vocabulary),
        chat_templates=_chat_templates(metadata),
    )
    return made, vocabulary


def end_tokens(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Every id that ends a generation: EOS, end of turn, and special tokens known as such."""
    ends = [vocabulary.eos, _token(metadata, "eot_token_id", None)]
    for i, kind in enumerate(vocabulary.kinds):
        if kind in (CONTROL, USER_DEFINED) and vocabulary.tokens[i] in _END_TEXTS:
            ends.append(i)
    return tuple(dict.fromkeys(i for i in ends if i is not None))


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    found = metadata.get(_PREFIX + key)
    if not isinstance(found, list) or not all(type(value) is kind for value in found):
        raise FormatError(f"the GGUF file's {_PREFIX}{key} is not an array of {kind.__name__}")
    return found


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
