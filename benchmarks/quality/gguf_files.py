"""Whole GGUF files as llama.cpp's own tool writes them, and the models that they hold.

``llama_model_quantize`` of the library that llama-cpp-python brings is what ``llama-quantize``
calls: it chooses the type of each tensor and rounds. It takes an importance matrix as arrays.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from edgeq.formats.tensor import FloatTensor, Tensor
from edgeq.importers.gguf.architecture import separate_name
from edgeq.importers.lazy import half_split_order
from edgeq.model.model import Model

FTYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "IQ4_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "IQ3_S": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_S,
    "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "IQ2_M": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_M,
}
"""Kinds of whole files: name -> llama.cpp's number."""


class RefusedError(Exception):
    """llama.cpp does not write such a file; the message is its own."""


def quantize_file(
    source: Path,
    out: Path,
    kind: str,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    threads: int = 1,
) -> None:
    """Have llama.cpp write a file.

    Args:
        source: a GGUF file.
        out: the file to write.
        kind: a key of `FTYPES`.
        importance: edgeq's name of a matrix -> mean square of each of its inputs, float32 [K].
        threads: to round with.

    Raises:
        RefusedError: llama.cpp does not write it, such as IQ2_M without importance.
    """
    errors: list[str] = []

    def take(level: int, text: bytes, _: object) -> None:
        if level == 4:
            errors.append(text.decode(errors="replace").strip())

    log = llama_cpp.llama_log_callback(take)
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread, settings.ftype, settings.allow_requantize = threads, FTYPES[kind], True
    entries = _entries(importance or {})
    if importance:
        settings.imatrix = entries
    try:
        code = llama_cpp.llama_model_quantize(
            str(source).encode(), str(out).encode(), ctypes.byref(settings)
        )
    finally:
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), ctypes.c_void_p(0))
    if code:
        out.unlink(missing_ok=True)
        raise RefusedError(errors[-1] if errors else f"llama.cpp failed with code {code}")


def _entries(
    importance: Mapping[str, NDArray[np.float32]],
) -> ctypes.Array[llama_cpp.llama_model_imatrix_data]:
    """llama.cpp's array of importance; an entry without a name ends it."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, row) in zip(entries, importance.items(), strict=False):
        values = (ctypes.c_float * row.size)(*row.tolist())
        entry.name, entry.size = separate_name(name).encode(), row.size
        entry.data = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
    return entries


def held_by(path: Path, like: Model) -> tuple[Model, dict[str, int]]:
    """The model that a file holds, in float32, and how many of its matrices have which type.

    Args:
        path: a GGUF file of the llama architecture.
        like: a model of the same shape, of which everything but the tensors is taken.
    """
    c = like.config
    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    tensors: dict[str, Tensor] = {}
    kinds: Counter[str] = Counter()
    for name, tensor in like.tensors.items():
        stored = found[separate_name(name)]
        values = dequantize(stored.data, stored.tensor_type).reshape(tensor.shape)
        for part, heads in (("q_proj", c.heads), ("k_proj", c.kv_heads)):
            if part in name:
                values = values[half_split_order(len(values), heads)]
        tensors[name] = FloatTensor("float32", np.ascontiguousarray(values, np.float32))
        if values.ndim == 2:
            kinds[stored.tensor_type.name] += 1
    return replace(like, tensors=tensors), dict(kinds.most_common())
