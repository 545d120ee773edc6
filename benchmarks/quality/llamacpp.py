"""llama.cpp's quantized types: rounded by its own code, and its whole model's bytes.

`ggml_quantize_chunk` of the library that llama-cpp-python brings does the rounding, with or
without an importance matrix; the gguf package says what the blocks are worth. Which type a tensor
gets is what llama.cpp's own tool gives it (`llama-quantize`, src/llama-quant.cpp): the embedding,
which is the head too, Q6_K where rows are a multiple of 256 and Q8_0 elsewhere; rows that a type's
blocks do not divide fall back to a larger type, at last to F16; norms stay F32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize
from numpy.typing import NDArray

from edgeq.converters.gguf.run import LlamaRunner
from edgeq.evaluation.text import LogitsFn
from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.importers.gguf.architecture import separate_name
from edgeq.model.model import Model

TYPES = ("Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_K", "Q5_0", "Q3_K")
"""Types of the matrices; the 3- and 5-bit ones show the neighborhood."""
FALLBACK = {"Q3_K": "Q4_0", "Q4_K": "Q5_0", "IQ4_XS": "IQ4_NL", "Q6_K": "Q8_0"}
"""What stands in for a type whose blocks of 256 do not divide the rows."""


@dataclass(frozen=True)
class Blocks:
    """A matrix as llama.cpp holds it.

    Args:
        kind: the type it got.
        raw: uint8 [N, bytes of a row].
        values: what they are worth, float32 [N, K].
    """

    kind: GGMLQuantizationType
    raw: NDArray[np.uint8]
    values: NDArray[np.float32]


@cache
def _library() -> ctypes.CDLL:
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def type_for(wanted: str, k: int) -> GGMLQuantizationType:
    """The type that a matrix with rows of K gets where ``wanted`` is asked for."""
    for name in (wanted, FALLBACK.get(wanted, "F16")):
        kind = GGMLQuantizationType[name]
        if k % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return GGMLQuantizationType.F16


def rounded(w: NDArray[np.float32], wanted: str, importance: NDArray[np.float32] | None) -> Blocks:
    """Round one matrix.

    Args:
        w: float32 [N, K].
        wanted: the type asked for.
        importance: mean square of each input, float32 [K], or None.
    """
    n, k = w.shape
    kind = type_for(wanted, k)
    if kind == GGMLQuantizationType.F16:
        half = w.astype(np.float16)
        return Blocks(kind, half.view(np.uint8), half.astype(np.float32))
    block, nbytes = GGML_QUANT_SIZES[kind]
    w = np.ascontiguousarray(w)
    raw = np.empty((n, k // block * nbytes), np.uint8)
    row = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = _library().ggml_quantize_chunk(
        kind, w.ctypes.data, raw.ctypes.data, 0, n, k, None if row is None else row.ctypes.data
    )
    if written != raw.nbytes:
        raise RuntimeError(f"{kind.name}: llama.cpp wrote {written} bytes, not {raw.nbytes}")
    return Blocks(kind, raw, dequantize(raw, kind).reshape(n, k))


def blocks_of(
    model: Model, kind: str, importance: Mapping[str, NDArray[np.float32]] | None
) -> dict[str, Blocks]:
    """Every matrix of a model with a tied head, rounded as a whole model of ``kind`` has it."""
    found = {}
    for name, _ in model.config.linears():
        outer = "embed_tokens" in name
        row = None if importance is None or outer else importance[name]
        found[name] = rounded(model.tensors[name].numpy(), "Q6_K" if outer else kind, row)
    return found


def as_model(model: Model, blocks: Mapping[str, Blocks]) -> tuple[Model, int]:
    """The model that these blocks are worth, and the bytes they and the norms take."""
    tensors: dict[str, Tensor] = {
        name: FloatTensor("float32", t.numpy()) for name, t in model.tensors.items()
    }
    nbytes = 0
    for name, tensor in tensors.items():
        if name in blocks:
            tensors[name] = FloatTensor("float32", blocks[name].values)
            nbytes += blocks[name].raw.nbytes
        else:
            nbytes += tensor.nbytes
    return replace(model, tensors=tensors), nbytes


def write(model: Model, blocks: Mapping[str, Blocks], path: Path) -> None:
    """A GGUF file that llama.cpp runs, of a Llama model without its tokenizer."""
    c = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.ropes[0].base)
    writer.add_rope_dimension_count(c.ropes[0].dim)
    writer.add_vocab_size(c.vocab)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.tensors.items():
        if name not in blocks:
            writer.add_tensor(separate_name(name), tensor.numpy())
            continue
        kind, raw = blocks[name].kind, blocks[name].raw
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp rotates neighbors, not halves
            halves = np.arange(len(raw)).reshape(-1, 2, c.head_dim // 2)
            raw = raw[halves.swapaxes(1, 2).reshape(-1)]
        if kind == GGMLQuantizationType.F16:
            writer.add_tensor(separate_name(name), raw.view(np.float16))
        else:
            writer.add_tensor(separate_name(name), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def running(path: Path) -> Iterator[LogitsFn]:
    """Logits of a GGUF file by llama.cpp itself."""
    runner = LlamaRunner(path, threads=1)

    def logits(window: NDArray[np.int64]) -> NDArray[np.floating]:
        runner.reset()
        return runner.forward(window)

    try:
        yield logits
    finally:
        runner.close()
