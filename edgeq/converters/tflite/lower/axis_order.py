"""Orders of axes: a channels-first graph in a channels-last file.

An order says, for each axis of a tensor in the file, which of the value's own axes it is: a value
[N, C, H, W] in the order (0, 2, 3, 1) is a tensor [N, H, W, C]. A transposition of the source only
renames orders, and a tensor is moved no earlier than an operator needs it otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
Order = tuple[int, ...]


def natural(rank: int) -> Order:
    """The order of the source."""
    return tuple(range(rank))


def channels_last(rank: int) -> Order:
    """Axis 1 behind all others; the source's order for fewer than three axes."""
    return (0, *range(2, rank), 1) if rank > 2 else natural(rank)


def placed(shape: Sequence[int], order: Order) -> Shape:
    """Shape of a tensor in an order."""
    return tuple(int(shape[axis]) for axis in order)


def moves(have: Order, want: Order) -> Order:
    """The transposition from one order to another."""
    return tuple(have.index(axis) for axis in want)


def same(shape: Sequence[int], a: Order, b: Order) -> bool:
    """Whether two orders differ by axes of one element only."""
    return _long(shape, a) == _long(shape, b)


def _long(shape: Sequence[int], order: Iterable[int]) -> list[int]:
    return [axis for axis in order if shape[axis] != 1]


def after_transpose(order: Order, perm: Sequence[int]) -> Order:
    """The order of ``x.transpose(perm)`` for which its tensor is that of x."""
    return tuple(list(perm).index(axis) for axis in order)


def after_reduction(order: Order, axes: Iterable[int]) -> Order:
    """The order of the axes that a reduction leaves."""
    gone = set(axes)
    remaining = [axis for axis in order if axis not in gone]
    return tuple(sorted(remaining).index(axis) for axis in remaining)


def with_last(order: Order, axis: int) -> Order:
    """Move one axis of an order behind all others."""
    return (*(i for i in order if i != axis), axis)


def groups(source: Sequence[int], into: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split the axes of two shapes of equal size into the smallest parts that match.

    Axes of one element are in no part.
    """
    a, b = _long(source, range(len(source))), _long(into, range(len(into)))
    pairs: list[tuple[list[int], list[int]]] = []
    while a or b:
        left, right = [a.pop(0)], [b.pop(0)]
        have, want = source[left[0]], into[right[0]]
        while have != want:
            if have < want:
                left.append(a.pop(0))
                have *= source[left[-1]]
            else:
                right.append(b.pop(0))
                want *= into[right[-1]]
        pairs.append((left, right))
    return pairs


def reshaped(source: Shape, order: Order, into: Shape, image: bool) -> tuple[Order, Order]:
    """The order that a tensor needs to be reshaped, and its order afterwards.

    Axes that belong together must follow each other in the value's own order; if they do, they
    stay where they lie. Else they are moved to where they serve best.

    Args:
        source: the value's shape.
        order: in which it lies in the file.
        into: its new shape.
        image: it serves best with channels last, else as in the source.
    """
    parts = groups(source, into)
    long = _long(source, order)
    parts.sort(key=lambda part: long.index(part[0][0]))
    rank = len(into)
    if [axis for left, _ in parts for axis in left] != long:
        best = _long(into, channels_last(rank) if image else natural(rank))
        parts.sort(key=lambda part: best.index(part[1][0]))
    need = [axis for left, _ in parts for axis in left]
    gives = [axis for _, right in parts for axis in right]
    wanted = order if need == long else (*(a for a in order if source[a] == 1), *need)
    for known in (natural(rank), channels_last(rank)):
        if _long(into, known) == gives:
            return wanted, known
    return wanted, (*(axis for axis in range(rank) if into[axis] == 1), *gives)


@dataclass(frozen=True)
class AxisWindow:
    """A sliding window along one axis.

    Args:
        size: of the axis.
        kernel: elements of the window, `dilation` apart.
        stride: of its moves.
        before: zeros put before the axis.
        out: places it is put at.
        dilation: 1 if its elements are neighbors.
    """

    size: int
    kernel: int
    stride: int
    before: int
    out: int
    dilation: int = 1

    @property
    def reach(self) -> int:
        """Elements from the first to the last of the window, with gaps of dilation."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def needed(self) -> int:
        """Zeros that the window needs before and after the axis, including `before`."""
        return max(0, (self.out - 1) * self.stride + self.reach - self.size)

    @property
    def valid(self) -> bool:
        """Whether the padding is TFLite's VALID."""
        return self.before == 0 and self.out == (self.size - self.reach) // self.stride + 1

    @property
    def alike(self) -> bool:
        """Whether the padding is TFLite's SAME, which puts the smaller half before."""
        return self.out == -(-self.size // self.stride) and self.before == self.needed // 2

    @property
    def pads(self) -> tuple[int, int]:
        """Zeros before and after the axis that make the padding VALID."""
        return self.before, max(0, self.needed - self.before)

    def counts(self, padding: tuple[int, int]) -> NDArray[np.int64]:
        """Number of elements in each window [out], including some padding before and after."""
        starts = np.arange(self.out) * self.stride - self.before
        places = starts[:, None] + np.arange(self.kernel) * self.dilation
        counts: NDArray[np.int64] = (
            (places >= -padding[0]) & (places < self.size + padding[1])
        ).sum(1)
        return counts


def row_columns(dims: Sequence[int], order: Order) -> NDArray[np.int64]:
    """Source column of each column of a flattened value [dims] in another order."""
    return np.arange(int(np.prod(dims))).reshape(tuple(dims)).transpose(order).reshape(-1)
