"""Turn sentences into the inputs of an encoder: token ids, attention mask and token types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UsageError
from edgeq.graph.ir import Graph

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
        self._graph = graph
        self._kinds = {name: _kind(name, graph) for name in graph.inputs}
        ids = next((name for name, kind in self._kinds.items() if kind == "ids"), None)
        if ids is None:
            raise UsageError(
                f"the graph has no input for token ids (its inputs: {', '.join(graph.inputs)}); "
                "give arrays as an .npz file"
            )
        self._length = graph.info(ids).shape[-1]
        self._tokenizer.enable_truncation(self._length)
        self._tokenizer.no_padding()
        numbers = (self._tokenizer.token_to_id(token) for token in _PADS)
        self._pad = next((token for token in numbers if token is not None), 0)

    def encode(self, text: str) -> dict[str, NDArray[Any]]:
        """The inputs of the graph for one sentence, padded or truncated to the graph's length."""
        encoded = self._tokenizer.encode(text)
        n = len(encoded.ids)
        values = {
            "ids": np.full(self._length, self._pad),
            "mask": (np.arange(self._length) < n).astype(np.int64),
            "types": np.zeros(self._length, np.int64),
            "positions": np.arange(self._length),
        }
        values["ids"][:n] = encoded.ids
        values["types"][:n] = encoded.type_ids
        feeds = {}
        for name, kind in self._kinds.items():
            info = self._graph.info(name)
            feeds[name] = np.broadcast_to(values[kind], info.shape).astype(info.dtype)
        return feeds


def _kind(name: str, graph: Graph) -> str:
    short = name.lower()
    if "position" in short:
        return "positions"
    for kind, parts in (("mask", _MASK), ("types", _TYPES), ("ids", _IDS)):
        if any(part in short for part in parts):
            return kind
    raise UsageError(
        f"the input {name!r} {list(graph.info(name).shape)} cannot be computed from sentences; "
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
