"""A whole model, one piece of one tensor at a time: read, round, write, forget.

Workers take pieces of some rows in file order, quantize them in buffers of their own and write
them to their place in the artifact; NumPy lets go of the interpreter lock inside its loops, so
they run side by side. The source's pages are given back as the work moves on, and its sha256 is
taken beside it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq._version import __version__
from edgeq.artifact import ArtifactWriter, Held, file_order
from edgeq.cpu import available_cores
from edgeq.errors import SchemeError, UsageError
from edgeq.importers import load, source_sha256
from edgeq.importers.safetensors_file import release
from edgeq.memory import peak_rss_bytes
from edgeq.model import Model
from edgeq.quant.budget import Budget, make_budget
from edgeq.quant.qparams import Groups, QParams, Scratch, check_finite, group_view
from edgeq.quant.recipe import Recipe
from edgeq.quant.rounding import method_named, round_rows, sqnr_db
from edgeq.schemes import FloatScheme, QuantScheme, Scheme
from edgeq.tensor import FloatTensor, QuantTensor, Tensor, float32_to_bf16

Progress = Callable[[str, int, int], None]
_WIDEST_SQNR = -9999.99
"""Takes at least as many characters as any ratio written with two decimals."""


@dataclass(frozen=True)
class TensorSummary:
    """One tensor of the artifact.

    Args:
        name: its name.
        scheme: what it is held in.
        shape: its logical shape.
        nbytes: bytes held.
        sqnr_db: signal to quantization noise in dB; None if it is floating point or exact.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    nbytes: int
    sqnr_db: float | None


@dataclass(frozen=True)
class Summary:
    """What a run of `quantize` did.

    Args:
        tensors: every tensor, in file order.
        file_bytes: size of the artifact.
        source_bytes: bytes of the source's tensors.
        source_sha256: of the source; None if it was a model in memory that did not know.
        seconds: wall-clock time.
        cpu_seconds: processor time of all threads.
        threads: workers.
        peak_rss_bytes: most memory the process has ever held; None if unknown.
    """

    tensors: tuple[TensorSummary, ...]
    file_bytes: int
    source_bytes: int
    source_sha256: str | None
    seconds: float
    cpu_seconds: float
    threads: int
    peak_rss_bytes: int | None

    @property
    def bpw(self) -> float:
        """Bits held per weight over all tensors, scales, padding and vectors counted."""
        weights = sum(int(np.prod(t.shape)) for t in self.tensors)
        return 8 * sum(t.nbytes for t in self.tensors) / weights


def quantize(
    source: Model | str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    method: str | None = None,
    max_ram: int | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Quantize a model into one artifact.

    Args:
        source: a model, or the path of one.
        out: the file to make or replace.
        recipe: which tensor gets which scheme; w4-g32 with an 8-bit embedding and head if None.
        method: "rtn" or "mse", instead of the recipe's.
        max_ram: most bytes the process may hold, memory-mapped pages included.
        threads: workers; all cores this process may use if None.
        progress: called with the tensor's name, weights done, and of how many.

    Raises:
        DoesNotFitError: max_ram is too little.
        FormatError: the source is damaged, or holds NaN or infinite weights.
        SchemeError: the recipe does not suit the model, or weights are too large.
        UsageError: the source is already quantized, or an argument is out of range.
        EdgeqError: the artifact cannot be written.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    recipe = recipe or Recipe.from_options()
    if method is not None:
        recipe = replace(recipe, method=method)
    method_named(recipe.method)
    path = None if isinstance(source, Model) else Path(source)
    model = source if isinstance(source, Model) else load(source)
    model.validate()
    tensors = {name: model.tensors[name] for name in file_order(_stored(model))}
    schemes = recipe.assign({name: tensor.shape for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantTensor):
            raise UsageError(
                f"{path or 'the model'} is already quantized ({name} is {tensor.scheme}), and "
                "rounding twice loses more; quantize the checkpoint it was made from"
            )
    budget = make_budget([t.shape for t in tensors.values()], threads or available_cores(), max_ram)
    provenance: dict[str, Any] = {
        "source": path.resolve().name if path else model.provenance.get("source"),
        "source_sha256": "0" * 64 if path else model.provenance.get("source_sha256"),
        "edgeq_version": __version__,
        "recipe": recipe.to_dict(),
    }
    held = {name: Held(schemes[name], tuple(t.shape)) for name, t in tensors.items()}
    widest = {n: _WIDEST_SQNR for n, s in schemes.items() if isinstance(s, QuantScheme)}
    digest = _Digest(path) if path else None
    with ArtifactWriter(
        out, model.config, held, model.files, provenance | {"sqnr_db": widest}
    ) as writer:
        work = _Work(tensors, schemes, recipe.method, budget, writer)
        ratios = work.run(progress)
        if digest:
            provenance["source_sha256"] = digest.result()
        provenance["sqnr_db"] = {name: ratios[name] for name in widest}
        file_bytes = writer.commit(provenance)
    rows = (TensorSummary(n, h.scheme, h.shape, h.nbytes, ratios.get(n)) for n, h in held.items())
    return Summary(
        tensors=tuple(rows),
        file_bytes=file_bytes,
        source_bytes=sum(t.nbytes for t in tensors.values()),
        source_sha256=provenance["source_sha256"],
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        threads=budget.threads,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _stored(model: Model) -> Iterator[str]:
    """Names to be written: a tied head is the embedding, and stored once."""
    return (name for name in model.tensors if not (model.config.tied and name == "lm_head.weight"))


class _Digest:
    """The source's sha256, taken by a thread of its own while the work goes on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha256 = ""
        self._error: BaseException | None = None
        # a daemon, so that an interrupted run does not wait for it
        self._thread = threading.Thread(target=self._take, daemon=True, name="edgeq-sha256")
        self._thread.start()

    def _take(self) -> None:
        try:
            self._sha256 = source_sha256(self._path)
        except BaseException as err:  # noqa: BLE001  raised again by whoever asks
            self._error = err

    def result(self) -> str:
        self._thread.join()
        if self._error:
            raise self._error
        return self._sha256


@dataclass(frozen=True)
class _Piece:
    name: str
    tensor: Tensor
    scheme: Scheme
    params: QParams | None
    start: int
    stop: int


class _Chunks:
    """All pieces of one tensor as groups; may be gone through several times."""

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


class _Work:
    """The pieces of all tensors, and what came of them."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        schemes: Mapping[str, Scheme],
        method: str,
        budget: Budget,
        writer: ArtifactWriter,
    ) -> None:
        self._tensors, self._schemes, self._method = tensors, schemes, method
        self._budget, self._writer = budget, writer
        self._local = threading.local()

    def run(self, progress: Progress | None) -> dict[str, float | None]:
        """Quantize and write everything; returns the SQNR in dB of each quantized tensor."""
        total = sum(int(np.prod(t.shape)) for t in self._tensors.values())
        quantized = [name for name, s in self._schemes.items() if isinstance(s, QuantScheme)]
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
        return {name: _rounded(sqnr_db(*both)) for name, both in sums.items()}

    def _pieces(self) -> Iterator[_Piece]:
        for name, tensor in self._tensors.items():
            scheme, params = self._schemes[name], None
            if isinstance(scheme, QuantScheme) and scheme.granularity == "tensor":
                chunks = _Chunks(name, tensor, scheme, self._budget)
                params = method_named(self._method)(chunks, scheme, name, Scratch())
            step = self._budget.rows(tensor.shape)
            for start in range(0, tensor.shape[0], step):
                stop = min(start + step, tensor.shape[0])
                yield _Piece(name, tensor, scheme, params, start, stop)

    def _do(self, piece: _Piece) -> tuple[float, float]:
        """Quantize and write one piece; returns its signal and noise."""
        w = piece.tensor.rows(piece.start, piece.stop)
        check_finite(w, piece.name, piece.start)
        if isinstance(piece.scheme, FloatScheme):
            self._writer.write(piece.name, _narrowed(w, piece.scheme, piece.name), piece.start)
            return 0.0, 0.0
        if not hasattr(self._local, "scratch"):
            self._local.scratch = Scratch()
        rounded = round_rows(
            w, piece.scheme, self._method,
            name=piece.name, params=piece.params, scratch=self._local.scratch,
        )  # fmt: skip
        self._writer.write(piece.name, rounded.tensor, piece.start)
        return rounded.signal, rounded.noise


def _in_order(
    pool: ThreadPoolExecutor,
    do: Callable[[_Piece], tuple[float, float]],
    pieces: Iterable[_Piece],
    window: int,
) -> Iterator[tuple[_Piece, tuple[float, float]]]:
    """Results in the order of the pieces, with so many under way at once."""
    under_way: deque[tuple[_Piece, Future[tuple[float, float]]]] = deque()
    for piece in pieces:
        under_way.append((piece, pool.submit(do, piece)))
        if len(under_way) >= window:
            first, future = under_way.popleft()
            yield first, future.result()
    while under_way:
        first, future = under_way.popleft()
        yield first, future.result()


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 2)


def _narrowed(w: NDArray[np.float32], scheme: FloatScheme, name: str) -> FloatTensor:
    """Float32 to the type of a float scheme, rounded to nearest.

    Raises:
        SchemeError: a weight is beyond that type.
    """
    if scheme.dtype == "f32":
        return FloatTensor("F32", w)
    if scheme.dtype == "bf16":
        bits = float32_to_bf16(w)
        fits = ((bits & 0x7F80) != 0x7F80).all()
        narrow = FloatTensor("BF16", bits)
    else:
        with np.errstate(over="ignore"):
            half = w.astype(np.float16)
        fits = np.isfinite(half).all()
        narrow = FloatTensor("F16", half)
    if not fits:
        raise SchemeError(
            f"tensor {name} holds {float(np.abs(w).max()):.6g}, which {scheme} cannot; "
            f"use f32, as with --tensor-type '{name}=f32'"
        )
    return narrow
