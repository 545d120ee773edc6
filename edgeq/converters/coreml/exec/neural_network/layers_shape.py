"""Layers of Core ML's older NeuralNetwork format that move and take numbers.

As in `layers`, arrays end with the dimensions C, H, W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec import ops_image, ops_shape
from edgeq.core.errors import UnsupportedError

Array = NDArray[Any]


def flatten(p: Any, inputs: Sequence[Array]) -> Array:
    """Flatten C, H, W into channels, in that order or with the channels last."""
    x = inputs[0]
    if p.mode:  # channels last
        x = np.moveaxis(x, -3, -1)
    return x.reshape(*x.shape[:-3], -1, 1, 1)


def permute(p: Any, inputs: Sequence[Array]) -> Array:
    """Axes are of [S, C, H, W]; the batch stays where it is."""
    x = inputs[0]
    if x.ndim != 5:
        return np.transpose(x, list(p.axis))
    places = (0, 2, 3, 4)
    order = [0, 1, 0, 0, 0]
    for place, axis in zip(places, p.axis, strict=True):
        order[place] = places[axis]
    return np.transpose(x, order)


def reshape(p: Any, inputs: Sequence[Array]) -> Array:
    """C, H, W (and the sequence, if four numbers are given) as other sizes."""
    x, shape = inputs[0], list(p.targetShape)
    lead = [shape.pop(0)] if len(shape) == 4 else [x.shape[0]] if x.ndim == 5 else []
    before = [*lead, x.shape[1]] if x.ndim == 5 else lead
    if p.mode:  # channels last, before and after
        y = np.moveaxis(x, -3, -1).reshape(*before, shape[1], shape[2], shape[0])
        return np.moveaxis(y, -1, -3)
    return x.reshape(*before, *shape)


def border(p: Any, inputs: Sequence[Array]) -> Array:
    """Numbers around H and W: one value, mirrored, or those at the edge."""
    pairs = [(a.startEdgeSize, a.endEdgeSize) for a in p.paddingAmounts.borderAmounts]
    full = [(0, 0)] * (inputs[0].ndim - len(pairs)) + pairs
    which = p.WhichOneof("PaddingType")
    if which == "constant":
        return np.pad(inputs[0], full, constant_values=p.constant.value)
    return np.pad(inputs[0], full, mode="reflect" if which == "reflection" else "edge")


def constant_pad(p: Any, inputs: Sequence[Array]) -> Array:
    """Pad any dimensions with one value."""
    if p.padToGivenOutputSizeMode:
        raise UnsupportedError("padding to a given size cannot be executed")
    return ops_shape.pad(inputs[0], list(p.padAmounts), "constant", p.value)


def crop(p: Any, inputs: Sequence[Array]) -> Array:
    """Part of H and W: less so much at either end, or as large as another input."""
    x = inputs[0]
    if len(inputs) > 1:
        top, left = list(p.offset) or [0, 0]
        h, w = inputs[1].shape[-2:]
        return x[..., top : top + h, left : left + w]
    (a, b), (c, d) = ((e.startEdgeSize, e.endEdgeSize) for e in p.cropAmounts.borderAmounts)
    return ops_image.crop(x, [a, b], [c, d])


def upsample(p: Any, inputs: Sequence[Array]) -> Array:
    """H and W times a factor."""
    factors = list(p.fractionalScalingFactor) or list(p.scalingFactor) or [1, 1]
    if p.mode == 0:
        return ops_image.upsample_nearest_neighbor(inputs[0], *factors)
    height, width = (int(n * f) for n, f in zip(inputs[0].shape[-2:], factors, strict=True))
    mode = ("DEFAULT", "STRICT_ALIGN_CORNERS", "UNALIGN_CORNERS")[p.linearUpsampleMode]
    return ops_image.resize_bilinear(inputs[0], height, width, mode)


def resize(p: Any, inputs: Sequence[Array]) -> Array:
    """H and W to a size, between neighbors."""
    mode = p.mode.Method.Name(p.mode.samplingMethod).removesuffix("_MODE")
    names = {"STRICT_ALIGN_ENDPOINTS": "STRICT_ALIGN_CORNERS", "ALIGN_ENDPOINTS": "ALIGN_CORNERS",
             "UPSAMPLE": "DEFAULT", "ROI_ALIGN": "OFFSET_CORNERS"}  # fmt: skip
    height, width = list(p.targetSize) or [1, 1]
    return ops_image.resize_bilinear(inputs[0], height, width, names[mode])


def slice_axis(p: Any, inputs: Sequence[Array]) -> Array:
    """Part of one of C, H, W."""
    x, axis = inputs[0], (-3, -2, -1)[p.axis]
    stop = p.endIndex if p.endIndex >= 0 else x.shape[axis] + p.endIndex + 1
    return np.take(x, range(p.startIndex, stop, max(1, p.stride)), axis)


def slice_static(p: Any, inputs: Sequence[Array]) -> Array:
    """A slice of each dimension."""
    squeeze = list(p.squeezeMasks) or None
    return ops_shape.slice_by_index(
        inputs[0], list(p.beginIds), list(p.endIds), list(p.strides), list(p.beginMasks),
        list(p.endMasks), squeeze,
    )  # fmt: skip


def split(p: Any, inputs: Sequence[Array]) -> tuple[Array, ...]:
    """Equal parts of the channels."""
    return tuple(np.split(inputs[0], p.nOutputs, -3))


def split_nd(p: Any, inputs: Sequence[Array]) -> tuple[Array, ...]:
    """Parts of any axis."""
    sizes = list(p.splitSizes) or None
    return ops_shape.split(inputs[0], p.axis, p.numSplits, sizes)
