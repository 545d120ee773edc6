"""Scales, zero points and codes of groups of weights: the arithmetic all rounders share.

Weights come as groups ``w[R, G, S]``: R rows, G groups along K, S weights in each. For
granularity "tensor" the parameters are [1, 1] and hold for all rows.

    levels      symmetric, 8 bits     -127 .. 127               codes 1 .. 255
                symmetric, b bits     -2^(b-1) .. 2^(b-1)-1     codes 0 .. 2^b-1
                asymmetric            -zero_point .. 2^b-1-zero_point
    scale       the smallest with which the group's range, zero included, lies within the levels
    code        clip(rint(w / scale) + zero_point),  ties to even;  w is about
                scale * (code - zero_point)
    palette     the levels are a table's numbers, -127 .. 127 in ascending order, its largest in
                magnitude being 127; the code is the place of the nearest

Scales are exact both in bfloat16 and in float16, so that every target holds the same numbers.
A group so small that its scale would be 0 gets the smallest one, 2**-24 (about 6e-8): all-zero
groups stay exactly zero, and weights below 3e-8 become zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, SchemeError
from edgeq.formats.schemes import QuantScheme
from edgeq.formats.tensor import QuantTensor, bf16_to_float32, float32_to_bf16
from edgeq.quant.kernels.products import row_products

MIN_SCALE = 2.0**-24
"""The smallest positive float16."""
MAX_SCALE = 65280.0
"""The largest number that float16 and bfloat16 share."""

HALVES = 508
"""Half steps from -127 to 127, by which the nearest number of a palette is looked up."""

Groups = NDArray[np.float32]
"""Weights float32 [R, G, S]."""


@dataclass(frozen=True)
class WeightParams:
    """What turns codes into weights.

    Args:
        scales: float32 [R, G], exact in float16 and bfloat16, positive; those of groups may be
            negative where a rounder was told so.
        zero_points: uint8 [R, G] if asymmetric, else None.
        palette: int8 [2**bits], ascending, if the scheme has a codebook, else None.
    """

    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None = None
    palette: NDArray[np.int8] | None = None


@dataclass(frozen=True)
class QuantRows:
    """Rows of a matrix as plain codes, before anything packs them.

    Args:
        codes: uint8 [R, K].
        params: of the rows, [R, G] ([1, 1] for granularity "tensor").
    """

    codes: NDArray[np.uint8]
    params: WeightParams

    def packed(self, scheme: QuantScheme) -> QuantTensor:
        """The rows as a tensor of their own."""
        params = self.params
        return QuantTensor.from_codes(
            scheme.stored, self.codes, params.scales, params.zero_points, params.palette
        )

    @property
    def row_scales(self) -> NDArray[np.float32]:
        """Scales of each row, float32 [R, G]."""
        scales = self.params.scales
        return np.broadcast_to(scales, (len(self.codes), scales.shape[1]))

    def levels(self, scheme: QuantScheme) -> NDArray[np.int8]:
        """The integers that scales multiply, int8 [R, K]; of symmetric schemes and palettes."""
        if self.params.palette is not None:
            return self.params.palette[self.codes]
        return (self.codes.astype(np.int16) - scheme.mid).astype(np.int8)


@dataclass
class Scratch:
    """Buffers a thread uses again for every chunk of weights."""

    _held: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def like(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An uninitialized float32 buffer; the one of the same name is given up."""
        size = int(np.prod(shape))
        buffer = self._held.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._held[name] = np.empty(size, np.float32)
        return buffer[:size].reshape(shape)  # type: ignore[return-value]


def group_view(w: NDArray[np.float32], scheme: QuantScheme) -> Groups:
    """Cut rows [R, K] into groups [R, G, S], K padded with zeros; a view where there is no padding.

    Zeros change neither a range that includes zero nor any error.
    """
    rows, k = w.shape
    padded = scheme.padded_k(k)
    if padded != k:
        w = np.pad(w, ((0, 0), (0, padded - k)))
    return w.reshape(rows, scheme.n_groups(k), -1)


def check_finite(w: NDArray[np.float32], name: str, first_row: int = 0) -> None:
    """Refuse NaN and infinities.

    Args:
        w: float32 [R, K] or [R].
        name: the tensor, for the message.
        first_row: the row of the tensor that ``w`` begins with.

    Raises:
        FormatError: names the first bad element.
    """
    finite = np.isfinite(w)
    if finite.all():
        return
    row, *rest = (int(i) for i in np.unravel_index(int(np.argmin(finite)), w.shape))
    index = ", ".join(map(str, (row + first_row, *rest)))
    raise FormatError(
        f"tensor {name} holds {w[(row, *rest)]} at [{index}]; "
        "weights must be finite numbers: the checkpoint is damaged or its training diverged"
    )


def snap_scales(
    ideal: NDArray[np.float32], name: str = "weights", *, up: bool = False
) -> NDArray[np.float32]:
    """The nearest scales that are exact in bfloat16 and float16, at least ``MIN_SCALE``.

    The sign is kept, and all bounds are those of the magnitude.

    Args:
        ideal: float32 of any shape; not negative if ``up``.
        name: the tensor, for the message.
        up: take the next one up instead of the nearest.

    Raises:
        SchemeError: a scale is beyond float16.
    """
    near = bf16_to_float32(float32_to_bf16(np.abs(ideal)))
    if up:
        # positive floats are ordered as their bits: the next bfloat16 is 2**16 further on
        near = np.where(near < ideal, (near.view(np.uint32) + 0x10000).view(np.float32), near)
    if not (near <= MAX_SCALE).all():
        raise SchemeError(
            f"tensor {name} needs a scale of {float(np.abs(ideal).max()):.6g}, and float16 ends at "
            "65504: "
            "its weights are too large to be quantized; keep it floating point, "
            f"as with --tensor-type '{name}=bf16'"
        )
    if up:
        half = near.astype(np.float16)
        # only subnormals can still move
        snapped = np.where(half < near, np.nextafter(half, np.float16(np.inf)), half)
    else:
        snapped = near.astype(np.float16)
    magnitude = np.maximum(snapped.astype(np.float32), np.float32(MIN_SCALE))
    return np.where(ideal < 0, -magnitude, magnitude)


def levels(scheme: QuantScheme) -> tuple[int, int]:
    """The lowest and highest ``code - zero_point`` of a symmetric scheme."""
    return (-127 if scheme.bits == 8 else -scheme.mid), scheme.mid - 1


def ranges(
    chunks: Iterable[Groups], scheme: QuantScheme
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest and largest weight of each group, zero included: float32 [R, G] each.

    Args:
        chunks: one array of groups, or, for granularity "tensor", all the tensor's in turn.
        scheme: tells the granularity; "tensor" gives [1, 1].
    """
    lows, highs = [], []
    for w in chunks:
        rows, groups, size = w.shape
        flat, starts = w.reshape(-1), np.arange(0, w.size, size)
        # reduceat over the flat array is twice as fast as a reduction over short last axes
        low = np.minimum.reduceat(flat, starts).reshape(rows, groups)
        high = np.maximum.reduceat(flat, starts).reshape(rows, groups)
        if scheme.granularity == "tensor":
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        lows.append(low)
        highs.append(high)
    zero = np.float32(0)
    return np.minimum(np.minimum.reduce(lows), zero), np.maximum(np.maximum.reduce(highs), zero)


def from_range(
    low: NDArray[np.float32],
    high: NDArray[np.float32],
    scheme: QuantScheme,
    name: str = "weights",
    palette: NDArray[np.int8] | None = None,
) -> WeightParams:
    """Scales, and zero points if asymmetric, for ranges that include zero.

    Args:
        low: float32 [R, G], at most 0.
        high: float32 [R, G], at least 0.
        scheme: the scheme.
        name: the tensor, for the message.
        palette: the levels, if the scheme has a codebook.

    Raises:
        SchemeError: a scale is beyond float16.
    """
    if palette is not None:
        most: NDArray[np.float32] = np.maximum(high, -low)
        return WeightParams(snap_scales(most / np.float32(127), name), None, palette)
    if scheme.symmetric:
        lowest, highest = levels(scheme)
        ideal = np.maximum(high / np.float32(highest), low / np.float32(lowest))
        return WeightParams(snap_scales(ideal, name))
    with np.errstate(over="ignore"):
        ideal = (high - low) / np.float32(scheme.n_codes - 1)
    # 255 steps of a scale that is 1/256 too small would cut off a whole step
    scales = snap_scales(ideal, name, up=scheme.bits == 8)
    zeros = np.clip(np.rint(-low / scales), 0, scheme.n_codes - 1)
    return WeightParams(scales, zeros.astype(np.uint8))


def round_steps(
    steps: NDArray[np.float32],
    scheme: QuantScheme,
    zeros: NDArray[np.float32] | None = None,
    palette: NDArray[np.int8] | None = None,
    *,
    out: NDArray[np.float32],
) -> NDArray[np.float32]:
    """The nearest levels.

    Args:
        steps: weights in units of their scale, float32 of any shape.
        scheme: the scheme.
        zeros: zero points, if asymmetric; whole numbers of a shape that broadcasts.
        palette: the levels, if the scheme has a codebook.
        out: takes the levels; may be ``steps``.

    Returns:
        ``out``, whole numbers.
    """
    if palette is not None:
        # "clip" brings weights beyond the table to its ends, and is the fast way to take
        return np.take(palette_levels(palette), half_steps(steps), out=out, mode="clip")
    np.rint(steps, out=out)
    if zeros is None:
        np.clip(out, *map(np.float32, levels(scheme)), out=out)
    else:
        out += zeros
        np.clip(out, np.float32(0), np.float32(scheme.n_codes - 1), out=out)
        out -= zeros
    return out


def half_steps(steps: NDArray[np.float32]) -> NDArray[np.intp]:
    """Which half step each weight lies in, counted from -127; outside of 0 .. 507 beyond the table.

    Halfway between two whole numbers is on a border of half steps, so the half step tells the
    nearest number of any palette.
    """
    halves: NDArray[np.float32] = np.floor(steps * np.float32(2))
    halves += np.float32(HALVES // 2)
    return halves.astype(np.intp)


def palette_levels(palette: NDArray[np.int8]) -> NDArray[np.float32]:
    """The palette's nearest number for each half step, float32 [508]; up where two tie."""
    middles = (np.arange(HALVES) - HALVES // 2 + 0.5) / 2
    borders = (palette[1:].astype(np.float64) + palette[:-1]) / 2
    return palette[np.searchsorted(borders, middles)].astype(np.float32)


def to_levels(
    w: Groups, params: WeightParams, scheme: QuantScheme, scratch: Scratch
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights in units of their scale, and the levels they are rounded to.

    Args:
        w: float32 [R, G, S].
        params: of those groups, or [1, 1].
        scheme: the scheme.
        scratch: gives the two results' memory.

    Returns:
        steps = w / scale and their nearest levels, whole numbers: float32 [R, G, S] each.
    """
    steps, rounded = scratch.like("steps", w.shape), scratch.like("levels", w.shape)
    np.divide(w, params.scales[:, :, None], out=steps)
    zeros = None
    if params.zero_points is not None:
        zeros = params.zero_points.astype(np.float32)[:, :, None]
    return steps, round_steps(steps, scheme, zeros, params.palette, out=rounded)


def squared_error(
    steps: NDArray[np.float32],
    rounded: NDArray[np.float32],
    params: WeightParams,
    importance: Groups | None = None,
) -> NDArray[np.float64]:
    """Squared error of each group, float64 [R, G]; ``steps`` is overwritten.

    ``importance``, float32 [1, G, S], weights the squares.
    """
    np.subtract(steps, rounded, out=steps)
    error: NDArray[np.float64]
    if importance is None:
        error = row_products(steps, steps).astype(np.float64)
    else:
        np.square(steps, out=steps)
        error = row_products(steps, importance).astype(np.float64)
    error *= np.square(params.scales, dtype=np.float64)
    return error


def to_codes(
    rounded: NDArray[np.float32], params: WeightParams, scheme: QuantScheme
) -> NDArray[np.uint8]:
    """Levels [R, G, S] to codes uint8 [R, G*S]; ``rounded`` is overwritten."""
    if params.palette is not None:
        # two equal numbers of a palette are as good as each other: the first is taken
        places = np.searchsorted(params.palette, np.arange(-127, 128)).astype(np.uint8)
        return places[(rounded + np.float32(127)).astype(np.intp)].reshape(len(rounded), -1)
    if params.zero_points is None:
        rounded += np.float32(scheme.mid)
    else:
        rounded += params.zero_points.astype(np.float32)[:, :, None]
    return rounded.astype(np.uint8).reshape(len(rounded), -1)
