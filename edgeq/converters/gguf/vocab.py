"""The tokenizer of a GGUF file in llama.cpp, where llama-cpp-python is installed."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from edgeq.converters.gguf.run import load_vocabulary
from edgeq.converters.gguf.tokenizer import ReadBack
from edgeq.converters.validate.tokenizer import TargetTokenizer, composes, not_composed
from edgeq.core.errors import FormatError
from edgeq.importers.gguf.file import open_gguf
from edgeq.importers.huggingface.tokenizer import HfTokenizer


def file_tokenizer(path: Path, source: HfTokenizer) -> TargetTokenizer | None:
    """The tokenizer of a written file: llama.cpp's, or edgeq's reader of it without llama.cpp.

    Args:
        path: the file.
        source: the model's own tokenizer.

    Returns:
        None if the file has no tokenizer.

    Raises:
        FormatError: the file is damaged, or llama.cpp does not load its vocabulary.
    """
    metadata = open_gguf(path).metadata
    if metadata.get("tokenizer.ggml.model", "none") == "none":
        return None
    if importlib.util.find_spec("llama_cpp") is None:
        return ReadBack(metadata, "edgeq's reader, by llama.cpp's rules")
    return LlamaVocabulary(path, source)


class LlamaVocabulary:
    """A GGUF file's vocabulary in llama.cpp; its tensors are not loaded.

    Args:
        path: the file.
        source: the model's own tokenizer.

    Raises:
        FormatError: llama.cpp does not load it.
    """

    adds_special = True

    def __init__(self, path: Path, source: HfTokenizer) -> None:
        self._api, self._model = load_vocabulary(path)
        if not self._model:
            raise FormatError(f"llama.cpp does not load the vocabulary of {path}")
        self.by = f"llama.cpp by llama-cpp-python {self._api.__version__}"
        self._composes = composes(source)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        vocab = self._api.llama_model_get_vocab(self._model)
        return [self._encode(vocab, text) for text in texts]

    def _encode(self, vocab: object, text: str) -> list[int]:
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        n = self._api.llama_tokenize(vocab, raw, len(raw), room, len(room), True, True)
        return list(room[:n])

    def excuse(self, text: str) -> str | None:
        """llama.cpp does not compose characters."""
        return not_composed(text, "llama.cpp") if self._composes else None

    def end_ids(self) -> list[int]:
        """Every token that llama.cpp ends a generation at."""
        vocab = self._api.llama_model_get_vocab(self._model)
        n = self._api.llama_vocab_n_tokens(vocab)
        return [i for i in range(n) if self._api.llama_vocab_is_eog(vocab, i)]

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._api.llama_model_free(self._model)
