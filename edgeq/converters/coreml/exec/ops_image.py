"""Resizing, resampling and boxes of MIL in NumPy; images are [..., H, W].

Source: coremltools' definitions, ops/defs/iOS15/image_resizing.py, iOS17/image_resizing.py and
iOS15/tensor_operation.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.ops_shape import ints
from edgeq.core.errors import UnsupportedError

Array = NDArray[Any]


def _points(mode: str, size: int, count: int) -> Array:
    """Where along a line of ``size`` pixels each of ``count`` samples is taken."""
    i = np.arange(count, dtype=np.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            return np.full(1, 0.0 if mode == "STRICT_ALIGN_CORNERS" else (size - 1) / 2)
        points = i * (size - 1) / (count - 1)
    elif mode == "DEFAULT":
        points = i * (size / count) if count > 1 else i
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / count
        points = 0.5 * delta + i * delta
    elif mode == "UNALIGN_CORNERS":
        points = (i + 0.5) * size / count - 0.5
    else:
        raise UnsupportedError(f"the sampling mode {mode!r} cannot be executed")
    return np.clip(points, 0, size - 1)


def _along(x: Array, points: Array, axis: int, nearest: bool) -> Array:
    """Values at points along an axis, between neighbors or of the nearest."""
    if nearest:
        return np.take(x, np.floor(points + 1e-6).astype(np.intp), axis)
    low = np.floor(points).astype(np.intp)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    part = (points - low).astype(np.float32).reshape(shape)
    return np.asarray(np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part)


def _both(x: Array, height: int, width: int, mode: str, nearest: bool = False) -> Array:
    x = _along(x, _points(mode, x.shape[-2], height), x.ndim - 2, nearest)
    return _along(x, _points(mode, x.shape[-1], width), x.ndim - 1, nearest)


def resize_bilinear(
    x: Array, target_size_height: int = 1, target_size_width: int = 1,
    sampling_mode: str = "DEFAULT",
) -> Array:  # fmt: skip
    """Resize to a size, interpolating between neighbors."""
    return _both(x, int(target_size_height), int(target_size_width), sampling_mode)


def resize_nearest_neighbor(x: Array, target_size_height: int, target_size_width: int) -> Array:
    """Resize to a size, taking the nearest pixel."""
    return _both(x, int(target_size_height), int(target_size_width), "DEFAULT", nearest=True)


def _scaled(x: Array, height: Any, width: Any) -> tuple[int, int]:
    return math.floor(x.shape[-2] * height), math.floor(x.shape[-1] * width)


def upsample_bilinear(
    x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1,
    align_corners: bool = True, half_pixel_centers: Any = None,
) -> Array:  # fmt: skip
    """Resize by factors, interpolating between neighbors."""
    if half_pixel_centers is None:
        half_pixel_centers = not align_corners
    if align_corners:
        mode = "STRICT_ALIGN_CORNERS"
    else:
        mode = "UNALIGN_CORNERS" if half_pixel_centers else "DEFAULT"
    return _both(x, *_scaled(x, scale_factor_height, scale_factor_width), mode)


def upsample_nearest_neighbor(
    x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1
) -> Array:
    """Resize by factors, taking the nearest pixel."""
    return _both(x, *_scaled(x, scale_factor_height, scale_factor_width), "DEFAULT", nearest=True)


def resize(
    x: Array, shape: Any, resized_dims: int, interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Array:  # fmt: skip
    """Resize the last dimensions to those of a shape; 0 leaves a dimension as it is."""
    n = int(resized_dims)
    for i, size in enumerate(ints(shape)[-n:] if n else []):
        axis = x.ndim - n + i
        if size and size != x.shape[axis]:
            points = _points(sampling_mode, x.shape[axis], size)
            x = _along(x, points, axis, interpolation_mode == "NEAREST_NEIGHBOR")
    return x


def crop(x: Array, crop_height: Any, crop_width: Any) -> Array:
    """Remove so many rows and columns at either end."""
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


# --- sampling at given points -----------------------------------------------------------------


def _reflected(at: Array, size: int, edge: bool) -> Array:
    """Coordinates mirrored into the image, at the pixels' centers or at its edge."""
    if edge:
        at, span = at + 0.5, float(size)
    else:
        span = float(size - 1)
    if span:
        at = np.abs(np.mod(at + span, 2 * span) - span)
    else:
        at = np.zeros_like(at)
    return np.clip(at - 0.5, 0, size - 1) if edge else at


def _pixels(image: Array, row: Array, column: Array, outside: float | None) -> Array:
    """image [C, H, W] at whole coordinates; ``outside`` where they lie out of it."""
    h, w = image.shape[-2:]
    r, c = np.clip(row, 0, h - 1).astype(np.intp), np.clip(column, 0, w - 1).astype(np.intp)
    pixels = image[:, r, c]
    if outside is None:
        return pixels
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    return np.where(inside, pixels, np.float32(outside))


def _sampled(image: Array, y: Array, x: Array, nearest: bool, outside: float | None) -> Array:
    """image [C, H, W] at points y, x."""
    if nearest:
        return _pixels(image, np.rint(y), np.rint(x), outside)
    top, left = np.floor(y), np.floor(x)
    dy, dx = (y - top).astype(np.float32), (x - left).astype(np.float32)
    return np.asarray(
        _pixels(image, top, left, outside) * (1 - dy) * (1 - dx)
        + _pixels(image, top, left + 1, outside) * (1 - dy) * dx
        + _pixels(image, top + 1, left, outside) * dy * (1 - dx)
        + _pixels(image, top + 1, left + 1, outside) * dy * dx
    )


def _unnormalized(at: Array, size: int, mode: str, align_corners: bool) -> Array:
    """Coordinates in pixels."""
    if mode == "unnormalized":
        return at
    if mode == "normalized_minus_one_to_one":
        at = (at + 1) / 2
    return at * (size - 1) if align_corners else at * size - 0.5


def resample(
    x: Array, coordinates: Array, sampling_mode: str, padding_mode: str, padding_value: float,
    coordinates_mode: str, align_corners: bool,
) -> Array:  # fmt: skip
    """x [B, C, H, W] at points [B, H2, W2, (x, y)]."""
    h, w = x.shape[-2:]
    points = coordinates.astype(np.float32)
    column = _unnormalized(points[..., 0], w, coordinates_mode, align_corners)
    row = _unnormalized(points[..., 1], h, coordinates_mode, align_corners)
    outside = float(padding_value) if padding_mode == "constant" else None
    if padding_mode in ("reflection", "symmetric"):
        edge = padding_mode == "symmetric" or not align_corners
        column, row = _reflected(column, w, edge), _reflected(row, h, edge)
    elif padding_mode == "border":
        column, row = np.clip(column, 0, w - 1), np.clip(row, 0, h - 1)
    nearest = sampling_mode == "nearest"
    return np.stack([_sampled(image, r, c, nearest, outside)
                     for image, r, c in zip(x, row, column, strict=True)])  # fmt: skip


def affine(
    x: Array, transform_matrix: Array, output_height: int, output_width: int, sampling_mode: str,
    padding_mode: str, padding_value: float, coordinates_mode: str, align_corners: bool,
) -> Array:  # fmt: skip
    """x [B, C, H, W] at the points that a matrix turns a regular grid into."""
    grid_y, grid_x = np.meshgrid(
        np.linspace(-1, 1, int(output_height)), np.linspace(-1, 1, int(output_width)),
        indexing="ij",
    )  # fmt: skip
    matrices = np.broadcast_to(transform_matrix, (x.shape[0], 6))[:, :, None, None]
    points = np.stack(
        [
            matrices[:, 0] * grid_x + matrices[:, 1] * grid_y + matrices[:, 2],
            matrices[:, 3] * grid_x + matrices[:, 4] * grid_y + matrices[:, 5],
        ],
        axis=-1,
    )
    return resample(
        x, points, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners
    )


def _corners(box: Array, mode: str) -> tuple[float, float, float, float]:
    """top, left, bottom, right."""
    a, b, c, d = (float(v) for v in box)
    if mode == "CORNERS_HEIGHT_FIRST":
        return a, b, c, d
    if mode == "CORNERS_WIDTH_FIRST":
        return b, a, d, c
    if mode == "CENTER_SIZE_WIDTH_FIRST":
        a, b, c, d = b, a, d, c
    return a - c / 2, b - d / 2, a + c / 2, b + d / 2


def crop_resize(
    x: Array, roi: Any = None, boxes: Any = None, box_indices: Any = None, target_height: int = 1,
    target_width: int = 1, normalized_coordinates: bool = False, spatial_scale: float = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST", sampling_mode: str = "DEFAULT",
    pad_value: float = 0.0,
) -> Array:  # fmt: skip
    """Boxes of x [B, C, H, W] to one size: [N, B or 1, C, h, w], or [N, C, h, w] of boxes."""
    h, w = x.shape[-2:]
    modern = boxes is not None
    rows = np.asarray(boxes if modern else roi)
    rows = rows.reshape(rows.shape[0], -1)
    which: Any = box_indices
    if rows.shape[1] == 5:
        which, rows = rows[:, 0], rows[:, 1:]
    if modern and which is None:
        which = np.zeros(len(rows))
    results = []
    for i, box in enumerate(rows):
        top, left, bottom, right = (v * spatial_scale for v in _corners(box, box_coordinate_mode))
        if normalized_coordinates:
            top, bottom, left, right = (
                top * (h - 1), bottom * (h - 1), left * (w - 1), right * (w - 1)
            )  # fmt: skip
        ys = _inside(top, bottom, int(target_height), sampling_mode)
        xs = _inside(left, right, int(target_width), sampling_mode)
        images = x if which is None else x[int(np.asarray(which).reshape(-1)[i]) :][:1]
        y, z = np.meshgrid(ys, xs, indexing="ij")
        outside = ((y < 0) | (y > h - 1) | (z < 0) | (z > w - 1)) if pad_value else None
        crops = np.stack([_sampled(image, np.clip(y, 0, h - 1), np.clip(z, 0, w - 1), False, None)
                          for image in images])  # fmt: skip
        results.append(crops if outside is None else np.where(outside, pad_value, crops))
    stacked = np.stack(results)
    return stacked[:, 0] if modern else stacked


def _inside(begin: float, end: float, count: int, mode: str) -> Array:
    """``count`` points between the ends of a box."""
    i = np.arange(count, dtype=np.float64)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            return np.array([begin if mode == "STRICT_ALIGN_CORNERS" else (begin + end) / 2])
        return begin + i * (end - begin) / (count - 1)
    if mode == "DEFAULT":
        return begin + i * (end - begin + 1) / count if count > 1 else np.array([begin])
    if mode == "OFFSET_CORNERS":
        delta = max(1.0, end - begin) / count
        return begin + (i + 0.5) * delta
    if mode == "UNALIGN_CORNERS":
        return begin + (i + 0.5) * (end - begin + 1) / count - 0.5
    raise UnsupportedError(f"the sampling mode {mode!r} cannot be executed")


# --- boxes ------------------------------------------------------------------------------------


def non_maximum_suppression(
    boxes: Array, scores: Array, iou_threshold: float, max_boxes: int,
    score_threshold: float = -np.inf, per_class_suppression: bool = False,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Boxes [n, B, (x, y, w, h)] in the order of scores [n, B, K], without those that overlap."""
    n, m = boxes.shape[0], int(max_boxes)
    out_boxes = np.zeros((n, m, 4), boxes.dtype)
    out_scores = np.zeros((n, m, scores.shape[2]), scores.dtype)
    out_index = np.full((n, m), -1, np.int32)
    counts = np.zeros(n, np.int32)
    for i in range(n):
        best = scores[i].max(axis=1)
        classes = scores[i].argmax(axis=1)
        chosen: list[int] = []
        for j in np.argsort(-best, kind="stable"):
            if best[j] < score_threshold or len(chosen) == m:
                break
            rivals = [k for k in chosen if not per_class_suppression or classes[k] == classes[j]]
            if all(_overlap(boxes[i, j], boxes[i, k]) <= iou_threshold for k in rivals):
                chosen.append(int(j))
        counts[i] = len(chosen)
        out_boxes[i, : len(chosen)], out_scores[i, : len(chosen)] = (
            boxes[i, chosen],
            scores[i, chosen],
        )
        out_index[i, : len(chosen)] = chosen
    return out_boxes, out_scores, out_index, counts


def _overlap(a: Array, b: Array) -> float:
    """Intersection over union of two boxes given by center and size."""
    low = np.maximum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2)
    high = np.minimum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2)
    common = float(np.prod(np.maximum(high - low, 0)))
    union = float(a[2] * a[3] + b[2] * b[3]) - common
    return common / union if union > 0 else 0.0


OPS: dict[str, Callable[..., Any]] = {
    "affine": affine,
    "crop": crop,
    "crop_resize": crop_resize,
    "non_maximum_suppression": non_maximum_suppression,
    "resample": resample,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
"""The operators of this module by MIL's names."""
