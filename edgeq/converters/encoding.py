"""Which of a target's integer containers holds a tensor's own integers, exactly.

Nothing is ever quantized again. A tensor goes into the narrowest container that holds its levels
and scales as they are; where a target lacks the scheme, these re-encodings are exact:

    fewer bits       levels of 2 or 3 bits are levels of 4 too, with the same scales
    palette          a table entry is an int8 level, so a palette is 8 bits with the same scales
    tensor           one scale for all is the same scale for each channel
    channel          one scale a row is the same scale for each of the row's groups
    longer groups    a group's scale is the scale of each of the shorter groups it is cut into
    zero points      an unsigned code less its zero point is a signed level of one bit more

What no container holds exactly is refused before work starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, UnsupportedError
from edgeq.formats.schemes import BITS, GROUP_SIZES, QuantScheme
from edgeq.formats.tensor import QuantTensor


@dataclass(frozen=True)
class Container:
    """A kind of integer weights a target can hold.

    Args:
        bits: of each number.
        groups: sizes of group it may have scales for; empty if only one scale a row.
        channel: whether it may have one scale a row.
        asymmetric: whether it may have zero points.
        palette: whether its numbers index a table.
        folds: whether, without zero points of its own, it takes levels that have theirs
            subtracted; who writes it asks `levels` for them so.
    """

    bits: int
    groups: tuple[int, ...] = ()
    channel: bool = False
    asymmetric: bool = False
    palette: bool = False
    folds: bool = False


@dataclass(frozen=True)
class Encoding:
    """How a target stores one tensor.

    Args:
        container: the kind.
        group_size: weights a scale, or None for one a row.
    """

    container: Container
    group_size: int | None

    @property
    def bits(self) -> int:
        """Bits of each number."""
        return self.container.bits


def encode(
    name: str, scheme: QuantScheme, k: int, containers: tuple[Container, ...], target: str
) -> Encoding:
    """The narrowest container that holds a tensor exactly; the first of equals.

    Args:
        name: the tensor, for the message.
        scheme: its scheme.
        k: columns.
        containers: what the target has.
        target: its name, for the message.

    Raises:
        UnsupportedError: none does; names the nearest schemes that would be held.
    """
    for container in sorted(containers, key=lambda c: (c.bits, not c.palette)):
        fits, group = _fits(scheme, k, container)
        if fits:
            return Encoding(container, group)
    supported = sorted(
        {str(s) for c in containers for s in _schemes(c)},
        key=lambda text: (abs(int(text[1]) - scheme.bits), len(text), text),
    )
    raise UnsupportedError(
        f"{target} cannot hold {name} as {scheme}; quantize it as one of {', '.join(supported[:4])}"
    )


def levels(
    tensor: QuantTensor, start: int = 0, stop: int | None = None, *, fold: bool = False
) -> tuple[NDArray[np.int16], NDArray[np.float32], NDArray[np.int16] | None]:
    """Rows of a tensor in the terms of `StoredWeight`.

    Args:
        tensor: the tensor.
        start, stop: the rows.
        fold: subtract zero points from the codes, so that there are none.

    Returns:
        levels int16 [rows, K], scales float32 [rows, G], and zero points int16 [rows, G] or None.
    """
    codes = tensor.codes(start, stop)
    scales, zeros = tensor.row_params(start, stop)
    if tensor.palette is not None:
        return tensor.palette.astype(np.int16)[codes], scales, None
    if tensor.zero_points is not None:
        plain, whole = codes.astype(np.int16), zeros.astype(np.int16)
        return (folded(plain, whole), scales, None) if fold else (plain, scales, whole)
    middle = 0 if tensor.scheme.minimum else tensor.scheme.mid
    return codes.astype(np.int16) - np.int16(middle), scales, None


def folded(codes: NDArray[np.int16], zero_points: NDArray[np.int16] | None) -> NDArray[np.int16]:
    """Codes [R, K] less the zero points [R, G] of their groups."""
    if zero_points is None:
        return codes
    k = codes.shape[1]
    return codes - np.repeat(zero_points, group_size(k, zero_points.shape[1]) or k, axis=1)[:, :k]


def group_size(k: int, groups: int) -> int | None:
    """The weights of a group, from how many there are in a row of K; None if it is one a row.

    Raises:
        FormatError: no scheme has so many.
    """
    if groups == 1:
        return None
    for size in GROUP_SIZES:
        # a packed row may end in groups that are padding alone
        if groups in (-(-k // size), QuantScheme(4, group_size=size).n_groups(k)):
            return size
    raise FormatError(f"{groups} groups in a row of {k} weights; groups are {GROUP_SIZES} long")


def spread(
    params: NDArray[np.generic], k: int, have: int | None, want: int | None
) -> NDArray[np.generic]:
    """Parameters [R, G] of groups of ``have`` weights as those of groups of ``want``.

    Args:
        params: scales or zero points.
        k: columns, unpadded.
        have, want: group sizes; None for one a row.

    Returns:
        [R, ceil(K / want)], or [R, 1].
    """
    if have == want:
        # a scheme's last group may be padding that no weight needs
        return params if have is None else params[:, : -(-k // have)]
    if want is None:
        raise ValueError("groups cannot share one scale")
    groups = -(-k // want)
    if have is None:
        return np.repeat(params, groups, axis=1)
    return cast("NDArray[np.generic]", np.repeat(params, have // want, axis=1)[:, :groups])


def _fits(scheme: QuantScheme, k: int, container: Container) -> tuple[bool, int | None]:
    if scheme.minimum or scheme.two_level:  # no container has float minimums or two levels
        return False, None
    if container.palette and not scheme.codebook:
        return False, None
    # without a table, a palette's entries are held themselves
    bits = 8 if scheme.codebook and not container.palette else scheme.bits
    if not scheme.symmetric and not container.asymmetric:
        if not container.folds:
            return False, None
        bits += 1
    if bits > container.bits:
        return False, None
    size = scheme.group_size
    if size is None or size >= k:
        if container.channel:
            return True, None
        # any group will do: the longest keeps the fewest scales
        return bool(container.groups), max(container.groups, default=None)
    if size in container.groups:
        return True, size
    shorter = [g for g in container.groups if size % g == 0]
    return bool(shorter), max(shorter, default=None)


def _schemes(container: Container) -> list[QuantScheme]:
    if container.palette or container.bits not in BITS:
        return []
    schemes = [QuantScheme(container.bits, group_size=g) for g in container.groups]
    if container.channel:
        schemes.append(QuantScheme(container.bits, granularity="channel", group_size=None))
    return schemes
