"""llama.cpp's GGUF: one file with the weights, the tokenizer and the chat template.

    ours                                            in the file
    2..4 bits symmetric, 2 and 3 with zero points   Q4_0
    4 bits with zero points                         Q4_1 if all of scale * zero_point are exact in
                                                    float16, else Q5_0 (code - zero_point)
    8 bits symmetric, palettes                      Q8_0
    minimums, 4 and 5 bits                          Q4_1, Q5_1
    two-level scales; the tables of IQ4_NL, MXFP4   the type of GGUF that has them, in blocks of 256
                                                    or 32
    floating point                                  F32, F16 or BF16, as it is; vectors F32

all but those of 256 in groups of 32; longer groups, one scale a row and one for all are repeated.
llama.cpp rounds activations to 8 bits in blocks as long while it multiplies. What else differs is
undone by `stored`:

- the llama architecture rotates neighbors (2j, 2j+1), so rows of q and k are moved within heads;
- Phi-3 has q, k, v in one matrix, gate and up in another: a common type holds them;
- a feed-forward that is no multiple of 32 gets rows and columns of zeros (``edgeq.feed_forward``
  keeps the true length);
- Gemma's norms hold their offset; a scale of attention that llama.cpp does not assume goes into
  the norm of q.

Sliding windows exist for gemma3 alone: for other families the context is cut to the window,
within which full attention is the same.

Options: ``context``. How keys and values are held is no part of a file: llama.cpp's own
``-ctk`` and ``-ctv`` say it, 16-bit floats by default.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp's model loader and
convert_hf_to_gguf.py for what each architecture expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.encoding import levels, spread
from edgeq.converters.gguf.blocks import block_rows, exact_type
from edgeq.converters.gguf.bytes import ALIGN, Kind, TensorEntry, header, pack_blocks
from edgeq.converters.gguf.family import assumed_scale, check_family, foreign_window, full_rope
from edgeq.converters.gguf.layout import Placed, file_context, layout, metadata
from edgeq.converters.gguf.rope import factor_tensors, rope_in_file
from edgeq.converters.gguf.run import (
    has_llama_cpp,
    open_runner,
    read_constants,
    read_kernels,
    read_options,
    read_weights,
    runtime_versions,
    tracer,
)
from edgeq.converters.gguf.tokenizer import tokenizer_keys
from edgeq.converters.gguf.vocab import file_tokenizer
from edgeq.converters.mixers import check_causal
from edgeq.converters.options import Options, WrittenWith
from edgeq.converters.runners import DecoderRunner, Trace
from edgeq.converters.size import Size
from edgeq.converters.stored import StoredConstant, StoredWeight
from edgeq.converters.target import DecoderTarget
from edgeq.converters.validate.kernels import GGML_BLOCK, Kernels
from edgeq.converters.validate.tokenizer import TargetTokenizer
from edgeq.core.errors import UnsupportedError, UsageError
from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.packing import round_up
from edgeq.formats.schemes import FLOAT_TAGS
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor
from edgeq.importers.gguf.blocks import TYPES
from edgeq.importers.gguf.value_heads import by_heads, file_rows, moved_columns, tiled_places
from edgeq.importers.huggingface.tokenizer import HfTokenizer
from edgeq.importers.lazy import half_split_order
from edgeq.model.model import Model

_STEP = 1 << 21
"""Weights in memory at once."""


class GgufDecoderTarget(DecoderTarget):
    """Decoders in llama.cpp's GGUF files."""

    def check(self, model: Model, options: Options) -> None:
        """Refuse what llama.cpp cannot hold or compute.

        Raises:
            UnsupportedError: a scheme, shape or feature; names the tensor.
            UsageError: an option that has no place in a file.
        """
        for name, value in (
            ("kv", options.kv),
            ("prefill", options.prefill),
            *options.extra.items(),
        ):
            if value:
                raise UsageError(
                    f"a GGUF file does not store {name}; leave it out, and set it in llama.cpp "
                    "when it runs"
                )
        if options.compute == "float":
            raise UsageError(
                "--compute is float, but llama.cpp always rounds activations to 8 bits; "
                "leave it out"
            )
        config = model.config
        if options.context and options.context > config.context:
            raise UsageError(
                f"context is {options.context} tokens; the model supports up to {config.context}"
            )
        check_family(model)
        check_causal(config, "llama.cpp")
        window = foreign_window(config)
        if window and options.context and options.context > window:
            raise UnsupportedError(
                f"llama.cpp has no sliding window for {config.family}: beyond {window} tokens it "
                f"would compute other values; give a context of at most {window}"
            )
        rope_in_file(full_rope(config), file_context(config, options))
        layout(model)
        tokenizer_keys(model)

    def memory(self, model: Model, options: Options) -> int:
        """Bytes that `write` takes at its peak: buffers of a piece, and the tokenizer's JSON."""
        return 24 * _STEP + 24 * len(model.files.get("tokenizer.json", b""))

    def sizes(self, model: Model, options: Options) -> Iterator[Size]:
        """Bits and bytes of each matrix in the file."""
        bits = {kind: form.scheme.bits for kind, form in TYPES.items()}
        for placed in layout(model):
            for name, rows in zip(placed.names, placed.rows, strict=True):
                if len(model.tensors[name].shape) == 2:
                    nbytes = placed.entry.nbytes * rows // placed.entry.shape[0]
                    yield Size(name, model.tensors[name], bits.get(placed.entry.type), nbytes)

    def write(
        self, model: Model, out: Path, options: Options, progress: Progress | None = None
    ) -> None:
        """Write the file, a piece of a tensor at a time."""
        parts = layout(model)
        keys = metadata(model, options, parts) | tokenizer_keys(model, compare=False)
        total = sum(placed.entry.nbytes for placed in parts)
        done = 0
        with out.open("xb") as file:
            file.write(header(keys, [placed.entry for placed in parts]))
            for placed in parts:
                _write_tensor(model, placed, file)
                file.write(bytes(-placed.entry.nbytes % ALIGN))
                done += placed.entry.nbytes
                if progress:
                    progress(placed.entry.name, done, total)

    def open_runner(self, path: Path, *, threads: int | None = None) -> DecoderRunner:
        """The file in llama.cpp with a float32 cache, or in edgeq's reference where that is absent.

        Raises:
            FormatError: the file cannot be read, or llama.cpp does not load it.
            MissingDependencyError: neither llama-cpp-python nor the gguf package is installed.
        """
        return open_runner(path, threads)

    def read_weights(self, path: Path) -> Iterator[StoredWeight]:
        """The integers, read back."""
        return read_weights(path)

    def read_options(self, path: Path) -> WrittenWith:
        """How the file was written."""
        return read_options(path)

    def tracer(self, path: Path) -> AbstractContextManager[Trace]:
        """Passes of llama.cpp's own graph, or of edgeq's reference where that is absent."""
        return tracer(path)

    def tokenizer(self, path: Path, source: HfTokenizer) -> TargetTokenizer | None:
        """The file's tokenizer: llama.cpp's own where that is installed."""
        return file_tokenizer(path, source)

    def versions(self) -> dict[str, str]:
        """The libraries that run and read the file, of those that are installed."""
        return runtime_versions()

    def kernels(self, path: Path, model: Model) -> Kernels:
        """How llama.cpp rounds while it runs the file."""
        return read_kernels(path)

    def read_constants(self, path: Path) -> Iterator[StoredConstant]:
        """Every tensor and key of the file."""
        return read_constants(path)

    def why_not_run(self) -> str | None:
        """Why the file is not run in llama.cpp, if so."""
        if has_llama_cpp():
            return None
        return (
            "llama.cpp was not run, as llama-cpp-python is not installed (pip install "
            "'edgeq[llamacpp]'): the file was read back and compared"
            + (", and computed by edgeq's own reference" if "gguf" in self.versions() else "")
        )


def _write_tensor(model: Model, placed: Placed, file: BinaryIO) -> None:
    if not placed.names:  # computed from the configuration
        factors = factor_tensors(full_rope(model.config))[placed.entry.name]
        file.write(factors.astype("<f4").tobytes())
        return
    if placed.by_head:
        _write_by_head(model, placed, file)
        return
    for name, height, heads in zip(placed.names, placed.rows, placed.heads, strict=True):
        tensor = model.tensors[name]
        n = tensor.shape[0]
        if (rows := file_rows(model.config, name)) is not None:
            _write_runs(model, name, placed.entry, rows, file)
            continue
        order = np.arange(n)
        if heads:  # the inverse of what the importer does
            order = np.argsort(half_split_order(n, heads, model.config.ropes[0].dim))
        columns = placed.entry.shape[-1] if len(placed.entry.shape) == 2 else 1
        whole = max(n // heads if heads else 1, 1)
        step = round_up(max(1, _STEP // columns), whole)
        for a in range(0, n, step):
            b = min(a + step, n)
            # rows move within heads, of which each piece has whole ones
            raw = _encoded(model, name, placed.entry, a, b)[order[a:b] - a]
            file.write(np.ascontiguousarray(raw).data)
            release(tensor)
        file.write(bytes((height - n) * (placed.entry.nbytes // placed.entry.shape[0])))


def _write_runs(
    model: Model, name: str, entry: TensorEntry, rows: NDArray[np.intp], file: BinaryIO
) -> None:
    """A tensor whose row i is row ``rows[i]`` of the file."""
    order = np.argsort(rows)
    ends = [*(np.flatnonzero(np.diff(order) != 1) + 1), len(order)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        raw = _encoded(model, name, entry, int(order[begin]), int(order[end - 1]) + 1)
        file.write(np.ascontiguousarray(raw).data)
    release(model.tensors[name])


def _write_by_head(model: Model, placed: Placed, file: BinaryIO) -> None:
    """Tensors of as many rows, the first head of each, then the second of each, and so on."""
    size = placed.rows[0] // placed.by_head
    for head in range(placed.by_head):
        for name in placed.names:
            raw = _encoded(model, name, placed.entry, head * size, (head + 1) * size)
            file.write(np.ascontiguousarray(raw).data)
            release(model.tensors[name])


def _encoded(model: Model, name: str, entry: TensorEntry, a: int, b: int) -> NDArray[Any]:
    """Rows of a tensor in the file's type, their columns in its order."""
    raw = _in_type(model, name, entry, a, b)
    delta = moved_columns(model.config, name)
    return raw if delta is None else by_heads(raw, delta, np.argsort(tiled_places(delta)))


def _in_type(model: Model, name: str, entry: TensorEntry, a: int, b: int) -> NDArray[Any]:
    """Rows of a tensor in the file's type."""
    tensor = model.tensors[name]
    if not isinstance(tensor, QuantTensor):
        return _floats(_adjusted(model, name, tensor, a, b), entry)
    k, padded = tensor.shape[1], entry.shape[1]
    kind = cast(Kind, entry.type)
    if exact_type(tensor) == kind:
        return block_rows(kind, tensor, a, b)
    codes, scales, zeros = levels(tensor, a, b, fold=kind != "Q4_1")
    wide = np.zeros((b - a, padded), np.int16)
    wide[:, :k] = codes
    size = tensor.scheme.group_size
    d = cast("NDArray[np.float32]", spread(scales, k, size, GGML_BLOCK))
    if zeros is not None:
        zeros = cast("NDArray[np.int16]", spread(zeros, k, size, GGML_BLOCK))
        wide[:, k:] = zeros[:, -1:]  # padding is worth exactly zero
    return pack_blocks(kind, wide, d, zeros)


def _adjusted(model: Model, name: str, tensor: Tensor, a: int, b: int) -> Tensor | NDArray[Any]:
    """Floating-point rows, with norms as llama.cpp stores them."""
    c = model.config
    if name.endswith("linear_attn.A_log"):
        return -np.exp(tensor.rows(a, b).astype(np.float64)).astype(np.float32)
    if not name.endswith("norm.weight") or name.endswith("linear_attn.norm.weight"):
        return (
            FloatTensor(tensor.dtype, tensor.data[a:b])
            if isinstance(tensor, FloatTensor)
            else tensor.rows(a, b)
        )
    values = tensor.rows(a, b) + np.float32(c.norm_offset)
    if name.endswith("self_attn.q_norm.weight"):
        values *= np.float32(c.attn_scale / assumed_scale(c))
    return values


def _floats(values: Tensor | NDArray[Any], entry: TensorEntry) -> NDArray[Any]:
    """Rows in the entry's float type, columns padded by zeros."""
    if isinstance(values, FloatTensor) and FLOAT_TAGS[values.dtype].upper() == entry.type:
        raw: NDArray[Any] = values.data
    else:
        wide = values if isinstance(values, np.ndarray) else values.numpy()
        raw = wide.astype({"F32": "<f4", "F16": "<f2"}[entry.type])
    if raw.ndim == 2 and raw.shape[1] < entry.shape[1]:
        raw = np.pad(raw, ((0, 0), (0, entry.shape[1] - raw.shape[1])))
    return raw
