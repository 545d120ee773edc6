"""Turn pictures into inputs of a model: size, value range and order of axes as in its training.

pixel 0 .. 255  ->  (pixel * scale - mean) / std     float32, channels first
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError, MissingDependencyError, UsageError, require, unknown
from edgeq.graph.ir import Shape

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})
COLORS = {1: "L", 3: "RGB", 4: "RGBA"}
"""Channels -> Pillow's name of such a picture."""
RESIZES = ("stretch", "crop", "pad")
LAYOUTS = ("auto", "nchw", "nhwc")
META = "edgeq.preprocess"
"""Where a graph's meta holds it, as JSON."""


@dataclass(frozen=True)
class Preprocess:
    """How pictures, and arrays in another order of axes, become inputs.

    Args:
        size: height and width; None for the input's own.
        mean, std: one number, or one for each channel, of the scaled pixels.
        scale: what a pixel of 0 to 255 is multiplied with first.
        layout: order of the axes: of the model's input for pictures ("auto": told from its
            shape), of the arrays for arrays ("auto": the input's).
        resize: "stretch" both sides; "crop" the middle after the shorter side fits; "pad" with
            black after the longer side fits.

    Raises:
        UsageError: a number or name that cannot be.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    layout: Literal["auto", "nchw", "nhwc"] = "auto"
    resize: Literal["stretch", "crop", "pad"] = "stretch"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UsageError(unknown("layout", self.layout, LAYOUTS))
        if self.resize not in RESIZES:
            raise UsageError(unknown("way to resize", self.resize, RESIZES))
        numbers = (*self.mean, *self.std, self.scale)
        if not np.isfinite(numbers).all() or not all(self.std) or not self.scale:
            raise UsageError("mean, std and scale must be finite, and std and scale not 0")
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"the image size is {self.size}; use at least 1")

    def to_meta(self) -> dict[str, str]:
        """What a graph's meta holds."""
        return {META: json.dumps(asdict(self))}

    @classmethod
    def from_meta(cls, meta: Mapping[str, str]) -> Preprocess:
        """What a graph was quantized with; the defaults if it holds nothing.

        Raises:
            FormatError: it is damaged.
        """
        if META not in meta:
            return cls()
        try:
            data = json.loads(meta[META])
            size = data.pop("size")
            mean, std = tuple(map(float, data.pop("mean"))), tuple(map(float, data.pop("std")))
            return cls(
                size=None if size is None else (size[0], size[1]), mean=mean, std=std, **data
            )
        except (ValueError, TypeError, KeyError, AttributeError, UsageError) as err:
            raise FormatError(f"the preprocessing in the graph is not readable: {err}") from err

    def for_pictures(self, name: str, shape: Shape) -> Preprocess:
        """The same with the size and layout of an input.

        Args:
            name: of the input.
            shape: of the input, with the batch.

        Raises:
            UsageError: pictures do not fit the input.
            MissingDependencyError: Pillow is absent.
        """
        require("vision", ("PIL",), "to read pictures")
        if len(shape) != 4:
            raise UsageError(
                f"the input {name!r} is {list(shape)}, which images do not fit; give arrays: an "
                ".npz file or a folder of .npy files"
            )
        layout = self.layout
        if layout == "auto":
            layout = "nchw" if shape[1] in COLORS else "nhwc"
        channels, *size = shape[1:] if layout == "nchw" else (shape[3], *shape[1:3])
        if channels not in COLORS:
            raise UsageError(
                f"the input {name!r} is {list(shape)}: {channels} channels as {layout.upper()}, "
                "and images have 1, 3 or 4; try "
                f"--layout {'nhwc' if layout == 'nchw' else 'nchw'}, or give arrays"
            )
        if self.size is not None and self.size != tuple(size):
            raise UsageError(
                f"--image-size is {self.size[0]}x{self.size[1]} and the input {name!r} takes "
                f"{size[0]}x{size[1]} ({list(shape)}, {layout.upper()}); give that, or leave it out"
            )
        for what, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, channels):
                raise UsageError(
                    f"--{what} has {len(numbers)} numbers and the input {name!r} has {channels} "
                    f"channels; give one, or {channels}"
                )
        return replace(self, size=(size[0], size[1]), layout=layout)

    def read(self, path: Path, shape: Shape) -> NDArray[np.float32]:
        """One picture, float32 [1, ...] in the order of the input's axes.

        Args:
            path: the file.
            shape: of the input; `for_pictures` was called with it.

        Raises:
            FormatError: it is no picture that can be read.
            MissingDependencyError: Pillow is absent.
        """
        try:
            from PIL import Image
        except ImportError as err:
            raise MissingDependencyError("PIL", "vision", "to read pictures") from err
        assert self.size is not None
        height, width = self.size
        channels = shape[1] if self.layout == "nchw" else shape[3]
        try:
            with Image.open(path) as picture:
                fitted = self._fitted(picture.convert(COLORS[channels]), (width, height))
                pixels = np.asarray(fitted, np.float32).reshape(height, width, channels)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
            raise FormatError(f"{path} is not an image that can be read: {err}") from err
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        x = (pixels * np.float32(self.scale) - mean) / std
        if self.layout == "nchw":
            x = x.transpose(2, 0, 1)
        return np.ascontiguousarray(x[None], np.float32)

    def _fitted(self, picture: Any, size: tuple[int, int]) -> Any:
        from PIL import Image, ImageOps

        if picture.size == size:
            return picture
        if self.resize == "crop":
            return ImageOps.fit(picture, size, Image.Resampling.BILINEAR)
        if self.resize == "pad":
            return ImageOps.pad(picture, size, Image.Resampling.BILINEAR)
        return picture.resize(size, Image.Resampling.BILINEAR)


def parse_numbers(text: str, what: str) -> tuple[float, ...]:
    """Numbers separated by commas, as ``0.485,0.456,0.406``.

    Raises:
        UsageError: it is none.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{what} is {text!r}; write a number, or one for each channel: 0.485,0.456,0.406"
        ) from None


def parse_size(text: str) -> tuple[int, int]:
    """A height and width, as ``224`` or ``240x320``.

    Raises:
        UsageError: it is none.
    """
    parts = text.lower().split("x")
    if not all(part.isdecimal() for part in parts) or len(parts) > 2:
        raise UsageError(f"the image size is {text!r}; write 224, or HEIGHTxWIDTH such as 240x320")
    return int(parts[0]), int(parts[-1])


def parse_ratio(text: str, what: str) -> float:
    """A number or a ratio, as ``0.5`` or ``1/255``.

    Raises:
        UsageError: it is none.
    """
    above, slash, below = text.partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{what} is {text!r}; write a number, or a ratio such as 1/255") from None
