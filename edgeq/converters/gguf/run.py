"""GGUF files in llama.cpp (by llama-cpp-python's C interface), and read back."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.encoding import levels
from edgeq.converters.gguf.bytes import BLOCK_BYTES, Kind, unpack_blocks
from edgeq.converters.gguf.names import MOVED_COLUMNS, ModelShape
from edgeq.converters.gguf.read_back import ReadBackRunner
from edgeq.converters.gguf.trace import TensorRecorder, results
from edgeq.converters.options import Options, WrittenWith
from edgeq.converters.runners import Past, Precision, Trace, pieces
from edgeq.converters.stored import StoredConstant, StoredWeight
from edgeq.converters.validate.kernels import GGML_BLOCK, Kernels, ggml
from edgeq.core.cpu import available_cores
from edgeq.core.errors import EdgeqError, FormatError, MissingDependencyError, UsageError
from edgeq.importers.gguf.blocks import quant_rows
from edgeq.importers.gguf.file import GgufFile, open_gguf
from edgeq.importers.gguf.value_heads import by_heads
from edgeq.importers.huggingface.families import GGUF_FAMILIES
from edgeq.importers.lazy import half_split_order
from edgeq.model.block import DeltaSpec
from edgeq.model.config import ModelConfig
from edgeq.model.formulas import dense

_BATCH = 256
"""Tokens computed at once; logits are made of all of them."""
_CONTEXT = 1024
"""Tokens to make room for at most: more than validation reads. A float32 cache of 4096 would take
twice the bytes of a small model."""
_PIECE = 1 << 21
"""Weights turned to levels at once."""
_KEPT: list[Callable[..., None]] = []
"""Functions that llama.cpp calls for as long as the process lives."""
_UNCOMPARED = ("general.name", "edgeq.version")
"""Keys that say where a file comes from, and nothing of the model."""
_UNPACKED = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")
"""Types that hold schemes of edgeq's own."""
_F32 = 0
"""GGML's number of the type, of the cache's keys and values."""


class LlamaRunner:
    """A GGUF file in llama.cpp on the CPU, with a cache of float32.

    Args:
        path: the file.
        threads: to compute with; all cores if None.
        record: given every tensor that llama.cpp computes.

    Raises:
        MissingDependencyError: no llama-cpp-python.
        FormatError: llama.cpp does not load the file.
    """

    config: ModelConfig | None = None

    def __init__(
        self, path: Path, threads: int | None = None, record: TensorRecorder | None = None
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
            raise FormatError(f"llama.cpp cannot load {path}: {self._log_text()}")
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
            reason = self._log_text()
            self.close()
            raise EdgeqError(f"llama.cpp cannot create a context for {path}: {reason}")
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
            raise EdgeqError(f"llama.cpp failed with code {code}: {self._log_text()}")
        self._n += len(tokens)
        pointer = self._api.llama_get_logits(self._state)
        shape = (len(tokens), self._vocab)
        return np.ctypeslib.as_array(pointer, shape).astype(np.float32, copy=True)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text by the file's own tokenizer, special tokens recognized."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 8))()
        vocab = self._api.llama_model_get_vocab(self._model)
        n = self._api.llama_tokenize(vocab, raw, len(raw), room, len(room), True, True)
        return list(room[:n])

    def reset(self) -> None:
        """Empty the cache."""
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

    def _log_text(self) -> str:
        return " ".join("".join(self._log).split()) or "it does not say why"


@cache
def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed and whole."""
    try:
        _llama_cpp()
    except MissingDependencyError:
        return False
    return True


def open_runner(path: Path, threads: int | None) -> LlamaRunner | ReadBackRunner:
    """The file in llama.cpp, or in edgeq's own reference where that is not installed."""
    if has_llama_cpp():
        return LlamaRunner(path, threads)
    shape, context, _ = _described(path)
    return ReadBackRunner(path, context, shape)


@contextmanager
def tracer(path: Path) -> Iterator[Trace]:
    """Results of passes by their names in `decoder`; the file is loaded once."""
    if not has_llama_cpp():
        shape, context, _ = _described(path)
        yield ReadBackRunner(path, context, shape).traced
        return
    recorder = TensorRecorder(_llama_cpp().llama_cpp._lib)
    runner = LlamaRunner(path, 1, recorder)

    def run(tokens: Sequence[int], past: Past = ()) -> dict[str, NDArray[np.float32]]:
        runner.reset()
        for piece in pieces(past):
            runner.forward(np.asarray(piece, np.int64))
        recorder.clear()
        runner.forward(np.asarray(tokens, np.int64))
        return results(recorder, runner.shape)

    try:
        yield run
    finally:
        runner.close()


def read_weights(path: Path) -> Iterator[StoredWeight]:
    """The integers of every quantized matrix, in pieces of whole rows."""
    file = open_gguf(path)
    shape = _shape(file)
    for name, entry in file.tensors.items():
        if entry.type not in BLOCK_BYTES:
            continue
        height = int(np.prod(entry.shape[:-1]))
        data = file.mapping.array(np.uint8, (height, entry.row_bytes), entry.start)
        for our, first, rows in shape.parts(name):
            whole = data[first : len(data) if rows < 0 else first + rows]
            heads, order = shape.interleaved(our), shape.by_head(our)
            if order is None:
                order = shape.value_rows(our)
            if order is not None:
                whole = data[order]
            columns = shape.inner(our) if our.endswith("down_proj.weight") else entry.shape[-1]
            step = max(1, _PIECE // columns)
            step = -(-step // 1024) * 1024 if not heads else len(whole)
            for a in range(0, len(whole), step):
                part = whole[a : a + step]
                if heads:
                    part = part[half_split_order(len(whole), heads, shape.rotated)]
                stored = _stored(our, entry.type, part, columns, a)
                places = shape.moved(our)
                yield stored if places is None else _moved_back(stored, shape.delta, places)
        file.mapping.release()


def _stored(
    name: str, kind: str, data: NDArray[np.uint8], columns: int, first: int
) -> StoredWeight:
    """Rows of blocks, unpadded."""
    groups = -(-columns // GGML_BLOCK)
    if kind in _UNPACKED:
        codes, scale, zero = unpack_blocks(cast(Kind, kind), data)
        zeros = None if zero is None else zero[:, :groups]
        least = None
        if kind == "Q4_1":  # of zero points or of minimums, as the source's scheme has them
            least = quant_rows(kind, data, codes.shape[1]).row_minimums()
            least = None if least is None else least[:, :groups]
        return StoredWeight(name, codes[:, :columns], scale[:, :groups], zeros, first, least)
    rows = quant_rows(kind, data, columns)
    values, scales, _ = levels(rows)
    return StoredWeight(name, values, scales, None, first, rows.row_minimums())


def _moved_back(
    stored: StoredWeight, delta: DeltaSpec | None, places: NDArray[np.intp]
) -> StoredWeight:
    """Rows with the columns of each value head, and their parameters, in the source's order."""
    assert delta is not None  # for which columns are moved

    def back(values: Any) -> Any:
        return None if values is None else by_heads(values, delta, places)

    return replace(
        stored,
        levels=back(stored.levels),
        scales=back(stored.scales),
        zero_points=back(stored.zero_points),
        minimums=back(stored.minimums),
    )


def read_constants(path: Path) -> Iterator[StoredConstant]:
    """Every tensor as bytes or floats, by edgeq's name if it has one, and every key."""
    file = open_gguf(path)
    shape = _shape(file)
    kinds = {"F32": np.float32, "F16": np.float16}
    for name, entry in file.tensors.items():
        ours = [our for our, _, _ in shape.parts(name)]
        label = ours[0] if len(ours) == 1 else name
        if entry.type in kinds:
            yield StoredConstant(
                label, file.mapping.array(kinds[entry.type], entry.shape, entry.start)
            )
        else:
            rows = (int(np.prod(entry.shape[:-1])), entry.row_bytes)
            yield StoredConstant(label, file.mapping.array(np.uint8, rows, entry.start))
    for key, value in file.metadata.items():
        if key in _UNCOMPARED:
            continue
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield StoredConstant(key, np.asarray(value))
        else:
            yield StoredConstant(key, np.frombuffer(repr(value).encode() or b"0", np.uint8))


def read_options(path: Path) -> WrittenWith:
    """How a file was written."""
    keys = open_gguf(path).metadata
    if "edgeq.version" not in keys:
        raise FormatError(
            f"{path} was not made by edgeq (it has no key 'edgeq.version'), so that there is no "
            "conversion to compare it with"
        )
    context = int(keys[f"{keys['general.architecture']}.context_length"])
    return WrittenWith(Options(context), str(keys["edgeq.version"]))


def read_kernels(path: Path) -> Kernels:
    """How llama.cpp rounds, by the types of a file's tensors; not at all where it is absent."""
    if not has_llama_cpp():
        return Kernels()
    file = open_gguf(path)
    shape = _shape(file)
    kinds = {
        our: entry.type for name, entry in file.tensors.items() for our, _, _ in shape.parts(name)
    }
    if shape.tied:
        kinds["lm_head.weight"] = kinds["model.embed_tokens.weight"]
    if not set(kinds.values()) & set(BLOCK_BYTES):
        return Kernels((ggml(kinds), dense))
    return Kernels(
        (ggml(kinds), dense),
        None,
        "llama.cpp rounds the inputs of every 32 weights to 8 bits",
        "keep the weights floating point or convert to another target, as every build of llama.cpp "
        "rounds so",
    )


def runtime_versions() -> dict[str, str]:
    """The libraries that run and read the file, of those that are installed."""
    names = {"llama-cpp-python": "llama_cpp", "gguf": "gguf"}
    return {
        name: importlib.metadata.version(name)
        for name, package in names.items()
        if importlib.util.find_spec(package) is not None
    }


def _llama_cpp() -> Any:
    try:
        import llama_cpp
    except ImportError as err:
        raise MissingDependencyError("llama_cpp", "llamacpp", "to run GGUF files") from err
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
    """llama.cpp's error messages, which it would otherwise write to stderr."""
    lines: list[str] = []

    def take(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # error
            lines.append(text.decode(errors="replace"))

    callback = api.llama_log_callback(take)
    _KEPT.append(callback)
    api.llama_log_set(callback, ctypes.c_void_p(0))
    return lines


def _described(path: Path) -> tuple[ModelShape, int, Precision]:
    """A file's shape, the longest context (as much as is sensible), and how llama.cpp computes."""
    file = open_gguf(path)
    kinds = {
        entry.type
        for name, entry in file.tensors.items()
        # a router is float32 beside matrices of any type
        if len(entry.shape) >= 2 and not name.endswith("ffn_gate_inp.weight")
    }
    precision: Precision = "float32"
    if kinds & set(BLOCK_BYTES):
        precision = "int8"
    elif kinds != {"F32"}:
        precision = "float16"
    keys = file.metadata
    context = int(keys[f"{keys['general.architecture']}.context_length"])
    return _shape(file), min(context, _CONTEXT), precision


def _shape(file: GgufFile) -> ModelShape:
    keys = file.metadata
    try:
        arch = keys["general.architecture"]
        padded = int(keys[f"{arch}.feed_forward_length"])
        expert_padded = int(keys.get(f"{arch}.expert_feed_forward_length", padded))
        family = GGUF_FAMILIES[arch]
        assert family.gguf is not None  # by which it is listed
        kv_heads = keys[f"{arch}.attention.head_count_kv"]
        by_layer = kv_heads if isinstance(kv_heads, list) else [kv_heads]
        return ModelShape(
            arch=family.gguf,
            layers=int(keys[f"{arch}.block_count"]),
            heads=int(keys[f"{arch}.attention.head_count"]),
            kv_heads=max(map(int, by_layer)),
            head_dim=int(keys[f"{arch}.attention.key_length"]),
            rotated=int(keys[f"{arch}.rope.dimension_count"]),
            ffn=int(keys.get("edgeq.feed_forward", padded)),
            padded=padded,
            tied="output.weight" not in file.tensors,
            query_scale=float(keys.get("edgeq.query_scale", 1.0)),
            hidden=int(keys[f"{arch}.embedding_length"]),
            experts=int(keys.get(f"{arch}.expert_count", 0)),
            expert_ffn=int(keys.get("edgeq.expert_feed_forward", expert_padded)),
            expert_padded=expert_padded,
            dense=int(keys.get(f"{arch}.leading_dense_block_count", 0)),
            convolutions=frozenset(i for i, heads in enumerate(by_layer) if not heads),
            deltas=frozenset(_deltas(keys, arch)) if family.gguf.delta_net else frozenset(),
            delta=_delta_sizes(keys, arch) if family.gguf.delta_net else None,
            moved_columns=bool(keys.get(MOVED_COLUMNS, False)),
        )
    except (KeyError, TypeError, ValueError) as err:
        raise FormatError(f"the GGUF file has no {err}; was it made by edgeq?") from err


def _delta_sizes(keys: Mapping[str, Any], arch: str) -> DeltaSpec:
    """The sizes of the gated delta nets."""
    size = int(keys[f"{arch}.ssm.state_size"])
    return DeltaSpec(
        key_heads=int(keys[f"{arch}.ssm.group_count"]),
        value_heads=int(keys[f"{arch}.ssm.time_step_rank"]),
        key_dim=size,
        value_dim=size,
    )


def _deltas(keys: Mapping[str, Any], arch: str) -> list[int]:
    """The layers that are gated delta nets."""
    interval = int(keys[f"{arch}.full_attention_interval"])
    return [i for i in range(int(keys[f"{arch}.block_count"])) if (i + 1) % interval]
