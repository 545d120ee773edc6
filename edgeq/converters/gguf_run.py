"""GGUF files in llama.cpp (by llama-cpp-python's C interface), and read by the gguf package."""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.converters import Past, Precision, Stored, pieces
from edgeq.converters.gguf_bytes import BLOCK, BLOCK_BYTES, Kind, unpack_blocks
from edgeq.converters.gguf_names import Shape
from edgeq.converters.gguf_trace import Recorder, results
from edgeq.cpu import available_cores
from edgeq.errors import EdgeqError, FormatError, MissingDependencyError, UsageError

_BATCH = 256
"""Tokens computed at once; logits are made of all of them."""
_CONTEXT = 4096
"""Tokens to make room for at most."""
_PIECE = 1 << 21
"""Weights turned to levels at once."""
_KEPT: list[Callable[..., None]] = []
"""Functions that llama.cpp calls for as long as the process lives."""
_F32 = 0
"""GGML's number of the type, of the cache's keys and values."""


class LlamaRunner:
    """A GGUF file in llama.cpp on the CPU, with a cache of float32.

    Args:
        path: the file.
        threads: to compute with; all cores if None.
        record: given every tensor that llama.cpp computes.

    Raises:
        MissingDependencyError: no llama-cpp-python, or no gguf package.
        FormatError: llama.cpp does not load the file.
    """

    def __init__(
        self, path: Path, threads: int | None = None, record: Recorder | None = None
    ) -> None:
        self._api = _llama_cpp()
        self._log = _log(self._api)
        self._log.clear()
        self._model = self._state = self._batch = None
        self.shape, self.context, self.precision = _described(path)
        api = self._api
        self.runtime = f"llama.cpp by llama-cpp-python {api.__version__}"
        settings = api.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._model = api.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise FormatError(f"llama.cpp cannot load {path}: {self._said()}")
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        params = api.llama_context_default_params()
        params.n_ctx = self.context
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = threads or available_cores()
        params.type_k = params.type_v = _F32
        params.flash_attn_type = 0
        params.swa_full = True
        params.no_perf = True
        if record is not None:
            # the function object must outlive the context
            self._watch = api.ggml_backend_sched_eval_callback(record)
            params.cb_eval = self._watch
        self._state = api.llama_init_from_model(self._model, params)
        if not self._state:
            said = self._said()
            self.close()
            raise EdgeqError(f"llama.cpp cannot create a context for {path}: {said}")
        self._batch = api.llama_batch_init(_BATCH, 0, 1)
        self._n = 0

    def forward(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of the tokens that follow: float32 [T, V]."""
        if self._n + len(tokens) > self.context:
            raise UsageError(f"the file's context is {self.context} tokens; give fewer")
        parts = [self._decode(tokens[a : a + _BATCH]) for a in range(0, len(tokens), _BATCH)]
        return np.concatenate(parts)

    def _decode(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        batch = cast(Any, self._batch)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = int(token)
            batch.pos[i] = self._n + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = 1
        code = self._api.llama_decode(self._state, batch)
        if code:
            raise EdgeqError(f"llama.cpp failed with code {code}: {self._said()}")
        self._n += len(tokens)
        pointer = self._api.llama_get_logits(self._state)
        shape = (len(tokens), self._vocab)
        return np.ctypeslib.as_array(pointer, shape).astype(np.float32, copy=True)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the file's own tokenizer, special tokens recognised."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        vocab = self._api.llama_model_get_vocab(self._model)
        n = self._api.llama_tokenize(vocab, raw, len(raw), room, len(room), True, True)
        return list(room[:n])

    def reset(self) -> None:
        """Forget all tokens."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._state), True)
        self._n = 0

    def close(self) -> None:
        """Free llama.cpp's memory."""
        if self._batch is not None:
            self._api.llama_batch_free(self._batch)
        if self._state:
            self._api.llama_free(self._state)
        if self._model:
            self._api.llama_model_free(self._model)
        self._batch = self._state = self._model = None

    def _said(self) -> str:
        return " ".join("".join(self._log).split()) or "it does not say why"


def trace_passes(
    path: Path, tokens: Sequence[int], past: Past = ()
) -> dict[str, NDArray[np.float32]]:
    """Results of the pass over ``tokens``, after ``past``, by their names in `decoder`."""
    recorder = Recorder(_llama_cpp().llama_cpp._lib)
    runner = LlamaRunner(path, 1, recorder)
    try:
        for piece in pieces(past):
            runner.forward(np.asarray(piece, np.int64))
        recorder.clear()
        runner.forward(np.asarray(tokens, np.int64))
        return results(recorder, runner.shape)
    finally:
        runner.close()


def read_stored(path: Path) -> Iterator[Stored]:
    """The integers of every quantized matrix, in pieces of whole rows."""
    reader = _reader(path)
    shape = _shape(reader)
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in BLOCK_BYTES:
            continue
        data = cast("NDArray[np.uint8]", tensor.data)
        for our, first, rows in shape.parts(str(tensor.name)):
            whole = data[first : len(data) if rows < 0 else first + rows]
            heads = shape.interleaved(our)
            columns = shape.ffn if our.endswith("down_proj.weight") else int(tensor.shape[0])
            step = max(1, _PIECE // columns)
            step = -(-step // 1024) * 1024 if not heads else len(whole)
            for a in range(0, len(whole), step):
                part = whole[a : a + step]
                if heads:
                    part = part.reshape(heads, -1, 2, part.shape[1]).swapaxes(1, 2)
                    part = part.reshape(len(whole), -1)
                levels, scales, zeros = unpack_blocks(cast(Kind, kind), part)
                groups = -(-columns // BLOCK)
                yield Stored(
                    our,
                    levels[:, :columns],
                    scales[:, :groups],
                    None if zeros is None else zeros[:, :groups],
                    first=a,
                )


def runtime_versions() -> dict[str, str]:
    """The libraries that run and read the file.

    Raises:
        MissingDependencyError: one is not installed.
    """
    _llama_cpp()
    _gguf()
    return {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "gguf")}


def _llama_cpp() -> Any:
    try:
        import llama_cpp
    except ImportError as err:
        raise MissingDependencyError(
            "llama_cpp",
            "llamacpp",
            "to validate GGUF files in llama.cpp (--no-validate does without)",
        ) from err
    return llama_cpp


def load_vocabulary(path: Path) -> tuple[Any, Any]:
    """llama.cpp's interface, and a file of which it has loaded the vocabulary alone.

    Raises:
        MissingDependencyError: no llama-cpp-python.
    """
    api = _llama_cpp()
    _log(api).clear()
    settings = api.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.vocab_only = True
    return api, api.llama_model_load_from_file(str(path).encode(), settings)


@cache
def _log(api: Any) -> list[str]:
    """What llama.cpp says of errors, in place of its writing to stderr."""
    said: list[str] = []

    def take(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # error
            said.append(text.decode(errors="replace"))

    callback = api.llama_log_callback(take)
    _KEPT.append(callback)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    return said


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as err:
        raise MissingDependencyError("gguf", "gguf", "to read GGUF files") from err
    return gguf


def _reader(path: Path) -> Any:
    try:
        return _gguf().GGUFReader(path)
    except (ValueError, IndexError, OSError, KeyError) as err:
        raise FormatError(f"{path} is not a GGUF file that the gguf package reads: {err}") from err


def _described(path: Path) -> tuple[Shape, int, Precision]:
    """A file's shape, the longest context (as much as is sensible), and how llama.cpp computes."""
    reader = _reader(path)
    kinds = {t.tensor_type.name for t in reader.tensors if len(t.shape) == 2}
    precision: Precision = "float32"
    if kinds & set(BLOCK_BYTES):
        precision = "int8"
    elif kinds != {"F32"}:
        precision = "float16"
    keys = _keys(reader)
    context = int(keys[f"{keys['general.architecture']}.context_length"])
    return _shape(reader), min(context, _CONTEXT), precision


def _keys(reader: Any) -> Mapping[str, Any]:
    return {
        name: field.contents()
        for name, field in reader.fields.items()
        if name == "general.architecture" or not name.startswith(("tokenizer.", "general."))
    }


def _shape(reader: Any) -> Shape:
    keys = _keys(reader)
    arch = keys["general.architecture"]
    names = {str(t.name) for t in reader.tensors}
    try:
        padded = int(keys[f"{arch}.feed_forward_length"])
        return Shape(
            arch=arch,
            layers=int(keys[f"{arch}.block_count"]),
            heads=int(keys[f"{arch}.attention.head_count"]),
            kv_heads=int(keys[f"{arch}.attention.head_count_kv"]),
            head_dim=int(keys[f"{arch}.attention.key_length"]),
            ffn=int(keys.get("edgeq.feed_forward", padded)),
            padded=padded,
            tied="output.weight" not in names,
            query_scale=float(keys.get("edgeq.query_scale", 1.0)),
        )
    except KeyError as err:
        raise FormatError(f"the GGUF file has no {err}; was it made by edgeq?") from err
