"""Data-free rounding: round tensors without running the model, in chunks of rows.

Threads take chunks in file order, quantize them in their own buffers and write them to their place
in the artifact. NumPy releases the interpreter lock inside its loops, so that the threads run in
parallel. The pages of the source are released as the work proceeds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import SchemeError
from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.schemes import FloatScheme, QuantScheme, Scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor, float32_to_bf16, part_shapes
from edgeq.model.artifact import ArtifactWriter
from edgeq.quant.decoder.budget import CHUNK_WEIGHTS, RELEASE_EVERY, Budget
from edgeq.quant.rounders.qparams import Groups, Scratch, check_finite, group_view
from edgeq.quant.rounders.rounding import Shared, data_free_method, find_shared, round_rows, sqnr_db

Importance = Mapping[str, NDArray[np.float32]]
"""Name of a tensor -> mean square of its inputs, float32 [K]."""


def round_data_free(
    tensors: Mapping[str, Tensor],
    schemes: Mapping[str, Scheme],
    method: str,
    budget: Budget,
    writer: ArtifactWriter,
    *,
    importance: Importance | None = None,
    progress: Progress | None = None,
) -> dict[str, float | None]:
    """Quantize and write tensors independently of each other.

    Args:
        tensors: name -> float tensor, in the order of the work.
        schemes: name -> scheme.
        method: a name of `edgeq.quant.METHODS`. If it needs the importance of inputs and a tensor
            has none, "mse" is used for that tensor.
        budget: sizes of chunks, and number of threads.
        writer: writes the tensors.
        importance: mean squares of the inputs of tensors, for methods that weight by them.
        progress: called with the tensor's name, weights done, and number of weights.

    Returns:
        name of each quantized tensor -> SQNR in dB; None without an error.

    Raises:
        FormatError: a weight is NaN or infinite.
        SchemeError: a weight is too large for its scheme.
    """
    return _DataFreeRounding(tensors, schemes, method, budget, writer, importance or {}).run(
        progress
    )


def round_matrix(
    tensor: Tensor,
    scheme: QuantScheme,
    method: str,
    name: str,
    importance: NDArray[np.float32] | None = None,
) -> QuantTensor:
    """Round a matrix by itself, as `round_data_free` does.

    Args:
        tensor: the float matrix, which is read in chunks.
        scheme: the scheme to round to.
        method: a name of `edgeq.quant.METHODS`; "mse" is used instead of one that needs inputs.
        name: name of the tensor, for messages.
        importance: mean square of each input, float32 [K]; the method is then "imatrix".
    """
    budget = Budget(1, CHUNK_WEIGHTS, RELEASE_EVERY)
    method = data_free_method(method) if importance is None else "imatrix"
    shared = None
    if scheme.granularity == "tensor" or scheme.codebook:
        chunks = _TensorChunks(name, tensor, scheme, budget)
        shared = find_shared(
            chunks, scheme, method, tensor.shape[1], name=name, importance=importance
        )
    scratch, step = Scratch(), budget.rows(tensor.shape)
    parts = []
    for start in range(0, tensor.shape[0], step):
        w = tensor.rows(start, start + step)
        check_finite(w, name, start)
        rounded = round_rows(
            w, scheme, method,
            name=name, shared=shared, importance=importance, scratch=scratch,
        )  # fmt: skip
        parts.append(rounded.packed(scheme))
    release(tensor)
    joined = {
        part: np.concatenate([getattr(piece, part) for piece in parts])
        for part in part_shapes(scheme, (tensor.shape[0], tensor.shape[1]))
        if part != "palette"
    }
    return QuantTensor(
        scheme, (tensor.shape[0], tensor.shape[1]), palette=parts[0].palette, **joined
    )


def weights_in(tensors: Iterable[Tensor]) -> int:
    """Number of weights of all tensors."""
    return sum(int(np.prod(tensor.shape)) for tensor in tensors)


@dataclass(frozen=True)
class _RowRange:
    name: str
    tensor: Tensor
    scheme: Scheme
    shared: Shared | None
    start: int
    stop: int


class _TensorChunks:
    """The chunks of a tensor as groups, which can be iterated over more than once."""

    def __init__(self, name: str, tensor: Tensor, scheme: QuantScheme, budget: Budget) -> None:
        self._name, self._tensor, self._scheme, self._budget = name, tensor, scheme, budget

    def __iter__(self) -> Iterator[Groups]:
        rows, step = self._tensor.shape[0], self._budget.rows(self._tensor.shape)
        every = max(1, self._budget.release_every // (step * self._tensor.nbytes // rows + 1))
        for index, start in enumerate(range(0, rows, step)):
            w = self._tensor.rows(start, min(start + step, rows))
            check_finite(w, self._name, start)
            yield group_view(w, self._scheme)
            if index % every == every - 1:
                release(self._tensor)


class _DataFreeRounding:
    """Rounds the chunks of all tensors with a pool of threads, and writes them in any order."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        schemes: Mapping[str, Scheme],
        method: str,
        budget: Budget,
        writer: ArtifactWriter,
        importance: Importance,
    ) -> None:
        self._tensors, self._schemes, self._method = tensors, schemes, method
        self._budget, self._writer, self._importance = budget, writer, importance
        self._local = threading.local()

    def run(self, progress: Progress | None) -> dict[str, float | None]:
        """Quantize and write all tensors; returns the SQNR in dB of each quantized tensor."""
        total = weights_in(self._tensors.values())
        quantized = [n for n in self._tensors if isinstance(self._schemes[n], QuantScheme)]
        sums = {name: np.zeros(2) for name in quantized}
        done = unreleased = 0
        pool = ThreadPoolExecutor(self._budget.threads, thread_name_prefix="edgeq-quantize")
        window = 3 * self._budget.threads
        try:
            for piece, result in _in_order(pool, self._do, self._pieces(), window):
                if piece.name in sums:
                    sums[piece.name] += result
                share = (piece.stop - piece.start) / piece.tensor.shape[0]
                done += round(share * int(np.prod(piece.tensor.shape)))
                unreleased += round(share * piece.tensor.nbytes)
                if unreleased >= self._budget.release_every or piece.stop == piece.tensor.shape[0]:
                    release(piece.tensor)
                    unreleased = 0
                if progress:
                    progress(piece.name, done, total)
        finally:
            pool.shutdown(cancel_futures=True)
        return {name: sqnr_db(*both) for name, both in sums.items()}

    def _pieces(self) -> Iterator[_RowRange]:
        for name, tensor in self._tensors.items():
            scheme, shared = self._schemes[name], None
            if isinstance(scheme, QuantScheme) and (
                scheme.granularity == "tensor" or scheme.codebook
            ):
                chunks = _TensorChunks(name, tensor, scheme, self._budget)
                shared = find_shared(chunks, scheme, k=tensor.shape[1], **self._arguments(name))
            step = self._budget.rows(tensor.shape)
            for start in range(0, tensor.shape[0], step):
                stop = min(start + step, tensor.shape[0])
                yield _RowRange(name, tensor, scheme, shared, start, stop)

    def _arguments(self, name: str) -> dict[str, Any]:
        """Keyword arguments of the rounders for a tensor."""
        importance = self._importance.get(name)
        method = data_free_method(self._method) if importance is None else self._method
        return {"method": method, "name": name, "importance": importance}

    def _do(self, piece: _RowRange) -> tuple[float, float]:
        """Quantize and write one chunk; returns the energy of its signal and of its noise."""
        w = piece.tensor.rows(piece.start, piece.stop)
        check_finite(w, piece.name, piece.start)
        if isinstance(piece.scheme, FloatScheme):
            self._writer.write(piece.name, cast_float(w, piece.scheme, piece.name), piece.start)
            return 0.0, 0.0
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        rounded = round_rows(
            w,
            piece.scheme,
            shared=piece.shared,
            scratch=self._local.scratch,
            **self._arguments(piece.name),
        )
        self._writer.write(piece.name, rounded.packed(piece.scheme), piece.start)
        return rounded.signal, rounded.noise


def _in_order(
    pool: ThreadPoolExecutor,
    do: Callable[[_RowRange], tuple[float, float]],
    pieces: Iterable[_RowRange],
    window: int,
) -> Iterator[tuple[_RowRange, tuple[float, float]]]:
    """Results in the order of the chunks, with at most ``window`` chunks submitted at a time."""
    under_way: deque[tuple[_RowRange, Future[tuple[float, float]]]] = deque()
    for piece in pieces:
        under_way.append((piece, pool.submit(do, piece)))
        if len(under_way) >= window:
            first, future = under_way.popleft()
            yield first, future.result()
    while under_way:
        first, future = under_way.popleft()
        yield first, future.result()


def cast_float(w: NDArray[np.float32], scheme: FloatScheme, name: str) -> FloatTensor:
    """Convert float32 to the type of a float scheme, rounded to nearest.

    Raises:
        SchemeError: a weight is too large for that type.
    """
    if scheme.dtype == "float32":
        return FloatTensor("float32", w)
    if scheme.dtype == "bfloat16":
        bits = float32_to_bf16(w)
        fits = ((bits & 0x7F80) != 0x7F80).all()
        narrow = FloatTensor("bfloat16", bits)
    else:
        with np.errstate(over="ignore"):
            half = w.astype(np.float16)
        fits = np.isfinite(half).all()
        narrow = FloatTensor("float16", half)
    if not fits:
        raise SchemeError(
            f"tensor {name} holds {float(np.abs(w).max()):.6g}, which {scheme} cannot hold; "
            f"use f32, as with --tensor-type '{name}=f32'"
        )
    return narrow
