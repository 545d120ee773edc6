"""SentencePiece's ``tokenizer.model``, a protocol buffer, as tokenizer.json.

    ModelProto      1 pieces (repeated)   2 trainer_spec   3 normalizer_spec
    piece           1 text   2 score (float32)   3 kind (default NORMAL)
    trainer_spec    3 model_type (1 unigram, 2 BPE)   24 treat_whitespace_as_suffix
                    35 byte_fallback   40 unk_id   41 bos_id   42 eos_id
    normalizer_spec 2 precompiled_charsmap   3 add_dummy_prefix   4 remove_extra_whitespaces
                    5 escape_whitespaces

Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.core.files import STAND_IN_BYTES, stand_in
from edgeq.importers.huggingface.tokenizer import CONFIG
from edgeq.importers.json_object import read_json
from edgeq.importers.tokenizer.tokenizer_json import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    files,
    sentencepiece,
)

_BPE = 2
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* 0\r?\n[A-Za-z0-9+/]+=* 1\r?\n")
"""The first two lines of a tiktoken vocabulary: tokens in base64, each with its rank."""


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json for a SentencePiece model.

    Tokens that a ``tokenizer_config.json`` in the same folder adds are included, and so are its
    ``add_bos_token`` (true if it does not say), ``add_eos_token`` (false) and ``legacy`` (true:
    each text between added tokens begins with a space of its own).

    Raises:
        FormatError: the file is damaged.
        UnsupportedError: a unigram, word or character model, or a setting that edgeq cannot follow.
    """
    try:
        content = path.read_bytes()
        if words := stand_in(content[:STAND_IN_BYTES]):
            raise FormatError(f"{path} {words}")
        if _TIKTOKEN.match(content):
            raise UnsupportedError(
                f"{path} is a tiktoken vocabulary, not a SentencePiece model, and edgeq does not "
                "read it; put the model's tokenizer.json beside it"
            )
        fields = list(_fields(content))
        trainer = dict(_fields(next((v for k, v in fields if k == 2), b"")))
        normalizer = dict(_fields(next((v for k, v in fields if k == 3), b"")))
        pieces = [dict(_fields(value)) for key, value in fields if key == 1]
        tokens = [piece[1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
        kinds = [int(piece.get(3, NORMAL)) for piece in pieces]
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as err:
        raise FormatError(f"{path} is not a SentencePiece model, or is damaged") from err
    if not tokens:
        raise FormatError(f"{path} is not a SentencePiece model: it holds no pieces")
    if trainer.get(3, 1) != _BPE:
        raise UnsupportedError(
            f"{path}: SentencePiece model type {trainer.get(3, 1)} (1 unigram, 3 word, "
            "4 character) is not supported; edgeq reads BPE (2), or a tokenizer.json"
        )
    for refused, name in (
        (trainer.get(24, 0), "treat_whitespace_as_suffix is true"),
        (not normalizer.get(5, 1), "escape_whitespaces is false"),
    ):
        if refused:
            raise UnsupportedError(
                f"{path}: {name}, which edgeq cannot follow; use the model's tokenizer.json"
            )
    config = _config(path.parent)
    for i, token, piece_kind in _added(path.parent, config):
        if i == len(tokens):
            tokens.append(token)
            kinds.append(piece_kind)
            scores.append(0.0)
        elif i < len(pieces) and token not in tokens:  # a placeholder that gets its name there
            tokens[i], kinds[i] = token, piece_kind
        elif i > len(tokens):
            raise FormatError(
                f"{path.parent / CONFIG}: added_tokens_decoder leaves gaps after token "
                f"{len(tokens) - 1}"
            )
    adds_bos = _flag(path.parent, config, "add_bos_token", True)
    adds_eos = _flag(path.parent, config, "add_eos_token", False)
    vocabulary = Vocabulary(
        tokens,
        kinds,
        bos=_id(trainer.get(41, 1)),
        eos=_id(trainer.get(42, 2)),
        unk=_id(trainer.get(40, 0)),
        add_bos=adds_bos,
        add_eos=adds_eos,
    )
    document = sentencepiece(
        vocabulary,
        scores,
        byte_fallback=bool(trainer.get(35, 0)),
        add_prefix=bool(normalizer.get(3, 1)),
        squeeze=bool(normalizer.get(4, 1)),
        charsmap=normalizer.get(2, b""),
        pieces=len(pieces),
        legacy=_flag(path.parent, config, "legacy", True),
    )
    contents = files(document, vocabulary)
    settings = {**json.loads(contents[CONFIG]), **config}
    contents[CONFIG] = json.dumps(settings, ensure_ascii=False).encode()
    return contents


def _config(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json in the same folder; empty if there is none."""
    path = folder / CONFIG
    return read_json(path) if path.exists() else {}


def _flag(folder: Path, config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A setting of tokenizer_config.json that is true or false."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"{folder / CONFIG}: {key} is {value!r}; it must be true or false")
    return default if value is None else value


def _id(value: int) -> int | None:
    """Negative numbers, which mean "none", are 64-bit two's complement on the wire."""
    return None if value >= 1 << 31 else value


def _added(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[int, str, int]]:
    """Id, text and kind of the tokens that Transformers keeps in tokenizer_config.json."""
    try:
        listed = config.get("added_tokens_decoder", {})
        added = sorted((int(i), v["content"], v.get("special", True)) for i, v in listed.items())
    except (ValueError, AttributeError, KeyError, TypeError) as err:
        raise FormatError(f"{folder / CONFIG}: added_tokens_decoder is not readable") from err
    for i, content, special in added:
        yield i, content, CONTROL if special else USER_DEFINED


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) pairs of a message: int, or bytes for everything else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("varint too long")
