"""Whether a file holds an artifact's own integers; if not, which differ, where, and how."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.encoding import folded, group_size, levels, spread
from edgeq.converters.stored import StoredWeight
from edgeq.core.progress import Progress
from edgeq.formats.mapped_file import release
from edgeq.formats.tensor import QuantTensor
from edgeq.model.model import Model

Levels = NDArray[np.int16]
Scales = NDArray[np.float32]


@dataclass(frozen=True)
class TensorFault:
    """A matrix whose integers or scales are others than the artifact's.

    Args:
        name: our name of the tensor.
        row, group: where the first difference is; None where it is the whole.
        what: what was found, in words.
    """

    name: str
    row: int | None
    group: int | None
    what: str

    def __str__(self) -> str:
        where = "" if self.row is None else f", row {self.row}"
        where += "" if self.group is None else f", group {self.group}"
        return f"{self.name}{where}: {self.what}"


def compare_integers(
    model: Model, read: Callable[[], Iterable[StoredWeight]], progress: Progress | None = None
) -> tuple[dict[str, bool], list[TensorFault]]:
    """Compare every quantized matrix of a model with what a file stores.

    Args:
        model: the artifact.
        read: reads the file's integers, anew at each call.
        progress: called with a tensor's name, rows done, and of how many.

    Returns:
        whether each of the model's quantized matrices is equal, and the faults, in the model's
        order.
    """
    wanted = quantized(model)
    total = sum(t.shape[0] for t in wanted.values())
    rows = dict.fromkeys(wanted, 0)
    faults: dict[str, TensorFault] = {}
    done = 0
    for piece in read():
        if piece.name not in wanted:
            faults.setdefault(
                piece.name,
                TensorFault(piece.name, None, None, "is no quantized matrix of the source"),
            )
            continue
        tensor = wanted[piece.name]
        rows[piece.name] += len(piece.levels)
        done += len(piece.levels)
        if piece.name not in faults and (fault := _difference(tensor, piece)):
            faults[piece.name] = fault
        if rows[piece.name] == tensor.shape[0]:
            release(tensor)
        if progress:
            progress(piece.name, done, total)
    for name, tensor in wanted.items():
        if rows[name] != tensor.shape[0] and name not in faults:
            what = f"{rows[name]} of {tensor.shape[0]} rows are in the file"
            faults[name] = TensorFault(name, None, None, what)
    for name in list(faults)[:3]:
        if name in wanted and rows[name] == wanted[name].shape[0]:
            faults[name] = _explained(model, wanted[name], faults[name], read)
    ordered = [faults[n] for n in [*wanted, *(set(faults) - set(wanted))] if n in faults]
    return {name: name not in faults for name in wanted}, ordered


def quantized(model: Model) -> dict[str, QuantTensor]:
    """The quantized matrices that the decoder uses: a tied head is the embedding."""
    unused = "lm_head.weight" if model.config.tied else ""
    return {
        name: tensor
        for name, tensor in model.tensors.items()
        if isinstance(tensor, QuantTensor) and name != unused
    }


def _ours(tensor: QuantTensor, a: int, b: int | None) -> tuple[Levels, Scales]:
    """Signed levels, and scales, of some rows."""
    codes, scales, _ = levels(tensor, a, b, fold=True)
    return codes, scales


def _theirs(piece: StoredWeight, *, of_minimums: bool = False) -> tuple[Levels, Scales]:
    if of_minimums:
        return piece.levels, piece.scales
    return folded(piece.levels, piece.zero_points), piece.scales


def _difference(tensor: QuantTensor, piece: StoredWeight) -> TensorFault | None:
    """The first difference of a piece."""
    stop = piece.first + len(piece.levels)
    if piece.levels.shape[1] != tensor.shape[1] or stop > tensor.shape[0]:
        shape = [stop, piece.levels.shape[1]]
        what = f"is {shape} in the file, {list(tensor.shape)} in the source"
        return TensorFault(piece.name, None, None, what)
    ours, our_scales = _ours(tensor, piece.first, stop)
    minimums = tensor.row_minimums(piece.first, stop)
    theirs, their_scales = _theirs(piece, of_minimums=minimums is not None)
    k = tensor.shape[1]
    sizes = [tensor.scheme.group_size, group_size(k, their_scales.shape[1])]
    finest = min((s for s in sizes if s is not None), default=None)
    mine = spread(our_scales, k, sizes[0], finest)
    other = spread(their_scales, k, sizes[1], finest)
    wrong_level, wrong_scale = ours != theirs, mine != other
    if not wrong_level.any() and not wrong_scale.any():
        return None if minimums is None else _other_minimums(tensor, piece, minimums)
    size = finest or k
    first_places = []
    for wrong, step in ((wrong_level, size), (wrong_scale, 1)):
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            first_places.append((row, column // step))
    row, group = min(first_places)
    columns = slice(group * size, group * size + size)
    words = []
    if wrong_level.any():
        words.append(
            f"{int(wrong_level.sum())} of {wrong_level.size} integers differ "
            f"({_some(theirs[row, columns])} for {_some(ours[row, columns])})"
        )
    if wrong_scale.any():
        words.append(
            f"{int(wrong_scale.sum())} of {wrong_scale.size} scales differ "
            f"({other[row, group]:.6g} for {mine[row, group]:.6g})"
        )
    return TensorFault(piece.name, piece.first + row, group, " and ".join(words))


def _other_minimums(
    tensor: QuantTensor, piece: StoredWeight, minimums: Scales
) -> TensorFault | None:
    """The first minimum that differs."""
    if piece.minimums is None:
        return TensorFault(piece.name, piece.first, None, "has no minimums in the file")
    k = tensor.shape[1]
    sizes = [tensor.scheme.group_size, group_size(k, piece.minimums.shape[1])]
    finest = min((s for s in sizes if s is not None), default=None)
    mine = spread(minimums, k, sizes[0], finest)
    other = spread(piece.minimums, k, sizes[1], finest)
    wrong = mine != other
    if not wrong.any():
        return None
    row, group = (int(i) for i in np.argwhere(wrong)[0])
    what = (
        f"{int(wrong.sum())} of {wrong.size} minimums differ "
        f"({other[row, group]:.6g} for {mine[row, group]:.6g})"
    )
    return TensorFault(piece.name, piece.first + row, group, what)


def _some(values: Levels) -> str:
    return " ".join(map(str, values[:4])) + (" .." if len(values) > 4 else "")


def _explained(
    model: Model,
    tensor: QuantTensor,
    fault: TensorFault,
    read: Callable[[], Iterable[StoredWeight]],
) -> TensorFault:
    """The fault, with a description of the whole matrix if it can be recognized."""
    pieces = sorted((p for p in read() if p.name == fault.name), key=lambda p: p.first)
    least = tensor.scheme.minimum
    theirs = np.concatenate([_theirs(p, of_minimums=least)[0] for p in pieces])
    scales = np.concatenate([p.scales for p in pieces])
    ours, our_scales = _ours(tensor, 0, None)
    for words in _likenesses(ours, theirs, our_scales, scales):
        return TensorFault(fault.name, fault.row, fault.group, f"{words}; {fault.what}")
    wanted = _digest(theirs)
    for name, other in quantized(model).items():
        if (
            name != fault.name
            and other.shape == theirs.shape
            and _digest(_ours(other, 0, None)[0]) == wanted
        ):
            words = f"holds the integers of {name}"
            return TensorFault(fault.name, fault.row, fault.group, f"{words}; {fault.what}")
    return fault


def _digest(values: Levels) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(values).data).digest()


def _likenesses(ours: Levels, theirs: Levels, mine: Scales, other: Scales) -> Iterator[str]:
    """Descriptions that fit the integers, the most likely first."""
    if theirs.shape != ours.shape:
        return
    if np.array_equal(theirs, ours):
        yield from _scale_likenesses(mine, other)
        return
    n, k = ours.shape
    if n == k and np.array_equal(theirs, ours.T):
        yield "the matrix is transposed"
    if not k % 2:
        pairs = theirs.reshape(n, -1, 2)[..., ::-1].reshape(n, k)
        if np.array_equal(pairs, ours):
            yield "the two nibbles of each byte are exchanged"
    if not k % 32:
        halves = theirs.reshape(n, -1, 2, 16)[:, :, ::-1].reshape(n, k)
        if np.array_equal(halves, ours):
            yield "the nibbles of each byte are exchanged: the halves of each block of 32"
    if np.array_equal(-theirs, ours):
        yield "every integer has the other sign"
    difference = np.unique(theirs - ours)
    if len(difference) == 1:
        yield f"every integer is {int(difference[0]):+d} off: another zero point"
    if np.array_equal(np.sort(theirs, axis=0), np.sort(ours, axis=0)):
        yield "the rows are the right ones in another order"


def _scale_likenesses(mine: Scales, other: Scales) -> Iterator[str]:
    if mine.shape != other.shape:
        return
    for axis, what in ((1, "group"), (0, "row")):
        if mine.shape[axis] > 1 and any(
            np.array_equal(mine, np.roll(other, by, axis=axis)) for by in (-1, 1)
        ):
            yield f"each scale is its neighbor's: shifted by one {what}"
            return
    if mine.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.unique((other / mine)[mine != 0])
        if len(ratio) == 1:
            yield f"every scale is {ratio[0]:.6g} times what it should be"
