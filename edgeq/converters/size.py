"""Size of a converted file, computed before it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from edgeq.formats.tensor import QuantTensor, Tensor
from edgeq.model.model import Model


@dataclass(frozen=True)
class Size:
    """A matrix as a target will store it.

    Args:
        name: ours.
        tensor: of the source.
        bits: of each integer; None if it stays floating point.
        nbytes: with scales and zero points.
    """

    name: str
    tensor: Tensor
    bits: int | None
    nbytes: int


def total_bytes(model: Model, sizes: Iterable[Size]) -> int:
    """About the size of the output: matrices, vectors as float32, and the tokenizer."""
    vectors = sum(
        4 * tensor.shape[0] for tensor in model.tensors.values() if len(tensor.shape) == 1
    )
    return sum(size.nbytes for size in sizes) + vectors + sum(map(len, model.files.values()))


def widened(target: str, sizes: Iterable[Size]) -> list[str]:
    """Why integers take more bits than in the source, a sentence for each reason."""
    wider: Counter[tuple[str, int]] = Counter()
    for size in sizes:
        if isinstance(size.tensor, QuantTensor) and (size.bits or 0) > size.tensor.scheme.bits:
            scheme = size.tensor.scheme
            kind = "palettes" if scheme.codebook else f"{scheme.bits}-bit integers"
            if not scheme.symmetric and not scheme.codebook:
                kind += " with zero points"
            wider[kind, size.bits or 0] += 1
    return [
        f"{target} has no {kind}, so {count} matrices are held as {bits}-bit integers of the same "
        "values."
        for (kind, bits), count in wider.items()
    ]
