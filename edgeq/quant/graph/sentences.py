"""Turn sentences into the inputs of an encoder: token ids, attention mask and token types."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError
from edgeq.graph.ir import Graph, Info

if TYPE_CHECKING:
    import tokenizers

KEYS = ("text", "sentence", "content", "query")
"""Keys that may hold the sentence of a JSON object."""
_IDS, _MASK, _TYPES = ("input_ids", "ids", "tokens"), ("attention_mask", "mask"), ("token_type",)
_PADS = ("[PAD]", "<pad>", "<|endoftext|>")


class Sentences:
    """Encodes sentences for the inputs of a graph.

    Args:
        path: ``tokenizer.json``, or a folder with that file.
        graph: a graph whose inputs are named input_ids, attention_mask, token_type_ids or
            position_ids.

    Raises:
        FormatError: the tokenizer cannot be read.
        UsageError: an input has another name, or no input takes token ids.
    """

    def __init__(self, path: str | Path, graph: Graph) -> None:
        import tokenizers

        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as err:  # the library raises bare Exception
            raise FormatError(f"the tokenizer {file} is not readable: {err}") from err
        self._inputs = {name: graph.info(name) for name in graph.inputs}
        self._kinds = input_kinds(self._inputs)
        self._length = self._inputs[ids_input(self._kinds)].shape[-1]
        self._tokenizer.enable_truncation(self._length)
        self._tokenizer.no_padding()
        self._pad = padding(self._tokenizer)

    def encode(self, text: str) -> dict[str, NDArray[Any]]:
        """The inputs of the graph for one sentence, padded or truncated to the graph's length."""
        encoded = self._tokenizer.encode(text)
        return text_inputs(
            self._inputs, self._kinds, encoded.ids, self._length, self._pad, encoded.type_ids
        )


def text_inputs(
    inputs: Mapping[str, Info],
    kinds: Mapping[str, str],
    ids: Sequence[int],
    length: int,
    pad: int,
    type_ids: Sequence[int] = (),
) -> dict[str, NDArray[Any]]:
    """The inputs of an encoder for one text, padded to a length.

    Args:
        inputs: shape and type of each input; an axis of -1 takes the length that it is given.
        kinds: see `input_kinds`.
        ids: tokens of the text.
        length: tokens of the inputs.
        pad: the token after the text.
        type_ids: of the tokens; zeros if there are none.
    """
    n = len(ids)
    values = {
        "ids": np.full(length, pad),
        "mask": (np.arange(length) < n).astype(np.int64),
        "types": np.zeros(length, np.int64),
        "positions": np.arange(length),
    }
    values["ids"][:n] = ids
    values["types"][: len(type_ids)] = type_ids
    feeds = {}
    for name, kind in kinds.items():
        info = inputs[name]
        ends = (1,) * (len(info.shape) - 1) + (length,)
        shape = [end if axis < 0 else axis for axis, end in zip(info.shape, ends, strict=True)]
        feeds[name] = np.broadcast_to(values[kind], shape).astype(info.dtype)
    return feeds


def input_kinds(inputs: Mapping[str, Info]) -> dict[str, str]:
    """What each input of an encoder takes: ids, mask, types or positions.

    Raises:
        UsageError: an input has another name.
    """
    return {name: _kind(name, info) for name, info in inputs.items()}


def ids_input(kinds: Mapping[str, str]) -> str:
    """The input that takes token ids.

    Raises:
        UsageError: there is none.
    """
    found = next((name for name, kind in kinds.items() if kind == "ids"), None)
    if found is None:
        raise UsageError(
            f"the graph has no input for token ids (its inputs: {', '.join(kinds)}); "
            "give arrays as an .npz file"
        )
    return found


def padding(tokenizer: tokenizers.Tokenizer) -> int:
    """The token that fills up a text, 0 if none is named so."""
    numbers = (tokenizer.token_to_id(token) for token in _PADS)
    return next((token for token in numbers if token is not None), 0)


def _kind(name: str, info: Info) -> str:
    short = name.lower()
    if "position" in short:
        return "positions"
    for kind, parts in (("mask", _MASK), ("types", _TYPES), ("ids", _IDS)):
        if any(part in short for part in parts):
            return kind
    raise UsageError(
        f"the input {name!r} {list(info.shape)} cannot be computed from sentences; "
        "inputs must be named input_ids, attention_mask, token_type_ids or position_ids; give "
        "arrays as .npz"
    )


def read_lines(path: Path) -> list[str]:
    """Read the sentences of a .txt file (one per line) or of a .jsonl file (one per object).

    Raises:
        FormatError: the file or a line of it cannot be read; the message names the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as err:
        raise FormatError(f"{path} cannot be read: {err.strerror or err}") from err
    except UnicodeDecodeError as err:
        raise FormatError(f"{path} is not UTF-8: {err}") from err
    if path.suffix == ".txt":
        return [line.strip() for line in lines if line.strip()]
    return [_sentence(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]


def _sentence(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as err:
        raise FormatError(f"{where} is not JSON: {err}") from err
    if isinstance(row, str):
        return row
    if isinstance(row, Mapping):
        for key in KEYS:
            if isinstance(row.get(key), str):
                return str(row[key])
    raise FormatError(
        f"{where} has no sentence; write a string, or an object with one of the keys "
        f"{', '.join(KEYS)}"
    )
