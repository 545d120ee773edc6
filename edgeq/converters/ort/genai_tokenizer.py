"""The tokenizer of onnxruntime-genai, and whether it cuts texts as the model's own does.

It has byte-level BPE exactly. Of SentencePiece it has one form, with or without a space before
each piece of text; a tokenizer.json of another form is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import cast

from edgeq.converters.validate.tokenizer import compare_texts, composes, not_composed
from edgeq.core.errors import FormatError, MissingDependencyError, UnsupportedError
from edgeq.importers.huggingface.tokenizer import HfTokenizer

_MARKS = ("\u2581", "\u00a0")
"""Characters that it takes for spaces in SentencePiece."""


def require() -> ModuleType:
    """onnxruntime-genai.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnxruntime_genai
    except ImportError as err:
        raise MissingDependencyError(
            "onnxruntime_genai", "genai", "to make or run onnxruntime-genai's folders"
        ) from err
    return cast(ModuleType, onnxruntime_genai)


class GenaiTokenizer:
    """A folder's tokenizer in onnxruntime-genai, which adds neither BOS nor EOS.

    Args:
        path: a folder with genai_config.json and the tokenizer's files.
        source: the model's own tokenizer.

    Raises:
        FormatError: onnxruntime-genai cannot read it.
        MissingDependencyError: it is not installed.
    """

    adds_special = False

    def __init__(self, path: Path, source: HfTokenizer) -> None:
        genai = require()
        self.by = f"onnxruntime-genai {genai.__version__}"
        try:
            try:
                self._tokenizer = genai.Tokenizer(str(path))
            except TypeError:  # before 0.15 it was made of a model alone
                self._tokenizer = genai.Tokenizer(genai.Model(str(path)))
        # its errors are RuntimeErrors without a class of their own
        except RuntimeError as err:
            raise FormatError(f"onnxruntime-genai cannot read the tokenizer: {err}") from err
        self._composes = composes(source)
        self._bytes = '"ByteLevel"' in json.dumps(source.document.get("decoder"))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [[int(i) for i in self._tokenizer.encode(text)] for text in texts]

    def excuse(self, text: str) -> str | None:
        """onnxruntime-genai does not compose characters, and takes two of them for spaces."""
        if not self._bytes and any(mark in text for mark in _MARKS):
            return "onnxruntime-genai takes U+2581 and U+00A0 for spaces in SentencePiece"
        return not_composed(text, "onnxruntime-genai") if self._composes else None


def check_same_ids(source: HfTokenizer, files: Mapping[str, bytes]) -> None:
    """Refuse a tokenizer with which onnxruntime-genai gives other ids.

    Args:
        source: the model's own tokenizer.
        files: genai_config.json and the tokenizer's files, as they are to be written.

    Raises:
        UnsupportedError: it does, or it cannot read the tokenizer.
    """
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            report = compare_texts(source, GenaiTokenizer(Path(folder), source))
        except FormatError as err:
            raise UnsupportedError(f"{err}; convert to ort instead") from err
    if report.complaint:
        raise UnsupportedError(
            f"onnxruntime-genai would not give the model the tokens it was trained with: "
            f"{report.complaint}; {report.compared - report.equal} of {report.compared} texts "
            "differ; "
            "convert to litertlm, or to ort and use the model's own tokenizer in the app"
        )
