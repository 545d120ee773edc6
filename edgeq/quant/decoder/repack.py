"""Repack a checkpoint that is quantized already: keep its integers and write an artifact."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from edgeq._version import __version__
from edgeq.core.errors import UnsupportedError, UsageError, check_type
from edgeq.core.files import check_target
from edgeq.core.progress import Progress
from edgeq.formats.kept import KeptTensor
from edgeq.formats.mapped_file import release
from edgeq.formats.packing import TILE
from edgeq.formats.schemes import FloatScheme, Scheme
from edgeq.formats.tensor import FloatTensor, QuantTensor, Tensor, row_blocks
from edgeq.importers import load
from edgeq.model.artifact import ArtifactWriter
from edgeq.model.artifact_layout import TensorLayout
from edgeq.model.model import Model
from edgeq.quant.decoder.bit_search import stored
from edgeq.quant.decoder.source import BackgroundDigest, quantized_types, type_counts


@dataclass(frozen=True)
class RepackSummary:
    """The result of `repack`.

    Args:
        kept: type in the source -> number of tensors whose integers were kept.
        floats: number of tensors that are floating point, as in the source.
        weights: number of weights of all tensors.
        tensor_bytes: bytes of all tensors.
        file_bytes: size of the artifact.
        source_bytes: bytes of the source's tensors.
        source_sha256: SHA-256 of the source; None for a model in memory of unknown origin.
        seconds: wall-clock time.
    """

    kept: Mapping[str, int]
    floats: int
    weights: int
    tensor_bytes: int
    file_bytes: int
    source_bytes: int
    source_sha256: str | None
    seconds: float

    @property
    def bpw(self) -> float:
        """Stored bits per weight over all tensors, including scales, padding and vectors."""
        return 8 * self.tensor_bytes / self.weights

    def to_dict(self) -> dict[str, Any]:
        """The summary as a dictionary for JSON."""
        return vars(self) | {"kept": dict(self.kept), "bpw": self.bpw}

    def __repr__(self) -> str:
        return f"<RepackSummary {type_counts(self.kept)}, {self.file_bytes} bytes>"


def repack(
    source: Model | str | Path, out: str | Path, *, progress: Progress | None = None
) -> RepackSummary:
    """Write a quantized checkpoint's own integers, scales and minimums to an artifact.

    Nothing is rounded: the artifact has exactly the values of the source, in the layout that the
    kernels read. Floating-point tensors are copied. The artifact records the type that each tensor
    had in the source.

    Args:
        source: a model, or the path of one: a GGUF file, or a folder in a quantized layout of
            Hugging Face (GPTQ, AWQ, compressed-tensors, AutoRound, MLX).
        out: the file to write or replace.
        progress: called with a tensor's name, weights done, and number of weights.

    Raises:
        UsageError: the source is not quantized, or is an artifact already.
        FormatError: the source is damaged.
        UnsupportedError: edgeq's schemes cannot represent a number of the source exactly.
        EdgeqError: the artifact cannot be written.

    Example:
        >>> summary = edgeq.repack("model-Q4_1.gguf", "model.edgeq")  # doctest: +SKIP
        >>> summary.kept  # doctest: +SKIP
        {'Q4_1': 210, 'Q8_0': 1}
    """
    started = time.perf_counter()
    check_type("source", source, Model, str, PathLike)
    check_type("out", out, str, PathLike)
    check_target(Path(out))
    model = source if isinstance(source, Model) else load(source)
    model.validate()
    origin = model.origin
    where = str(origin.path) if origin else "the model"
    if not any(isinstance(tensor, KeptTensor) for tensor in model.tensors.values()):
        if quantized_types(model):
            raise UsageError(f"{where} is an artifact of edgeq already; copy the file")
        raise UsageError(
            f"{where} is not quantized, so there are no integers to keep; leave out --repack (in "
            "Python call edgeq.quantize)"
        )
    digest = BackgroundDigest(origin) if origin else None
    tensors = {name: model.tensors[name] for name in stored(model)}
    layouts = {
        name: TensorLayout(_scheme(name, tensor), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    provenance: dict[str, Any] = {
        "source": origin.name if origin else model.provenance.get("source"),
        "source_sha256": "0" * 64 if origin else model.provenance.get("source_sha256"),
        "edgeq_version": __version__,
        "kept": model.kept(),
    }
    weights = sum(int(np.prod(tensor.shape)) for tensor in tensors.values())
    done = 0
    with ArtifactWriter(out, model.config, layouts, model.files, provenance) as writer:
        for name, tensor in tensors.items():
            for part in row_blocks(tensor.shape, multiple=TILE):
                writer.write(name, _rows(tensor, part.start, part.stop), part.start)
                release(tensor)
                done += (part.stop - part.start) * int(np.prod(tensor.shape[1:]))
                if progress:
                    progress(name, done, weights)
        if digest:
            provenance["source_sha256"] = digest.result()
        file_bytes = writer.commit(provenance)
    kept = {name: t for name, t in tensors.items() if isinstance(t, KeptTensor)}
    return RepackSummary(
        kept=quantized_types(model),
        floats=len(tensors) - len(kept),
        weights=weights,
        tensor_bytes=sum(layout.nbytes for layout in layouts.values()),
        file_bytes=file_bytes,
        source_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        source_sha256=provenance["source_sha256"],
        seconds=time.perf_counter() - started,
    )


def _scheme(name: str, tensor: Tensor) -> Scheme:
    if isinstance(tensor, KeptTensor | QuantTensor):
        return tensor.scheme
    if isinstance(tensor, FloatTensor):
        return FloatScheme(tensor.dtype)
    if isinstance(getattr(tensor, "data", None), KeptTensor | QuantTensor):
        raise UnsupportedError(
            f"{name} is a rearrangement of a quantized tensor, whose integers cannot be kept; use "
            "--requantize"
        )
    return FloatScheme("float32")


def _rows(tensor: Tensor, start: int, stop: int) -> QuantTensor | FloatTensor:
    if isinstance(tensor, KeptTensor):
        return tensor.quantized(start, stop)
    if isinstance(tensor, FloatTensor):
        return FloatTensor(tensor.dtype, tensor.data[start:stop])
    return FloatTensor("float32", tensor.rows(start, stop))
