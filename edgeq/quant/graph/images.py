"""Turn images into inputs of a model, with the size, value range and layout of its training.

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
"""Number of channels -> Pillow's mode of such an image."""
RESIZES = ("stretch", "crop", "pad")
LAYOUTS = ("auto", "nchw", "nhwc")
META = "edgeq.preprocess"
"""Key of a graph's metadata that holds the preprocessing as JSON."""


@dataclass(frozen=True)
class Preprocess:
    """How images, and arrays with another layout, become inputs of a graph.

    Args:
        size: height and width in pixels; None for the size of the input.
        mean, std: mean and standard deviation of the scaled pixels: one number, or one for each
            channel.
        scale: factor on the pixels of 0 to 255, which is applied first.
        layout: order of the axes. For images it is that of the model's input ("auto" infers it from
            the shape); for arrays it is that of the arrays ("auto" is that of the input).
        resize: "stretch" scales both sides to the size; "crop" scales the shorter side to fit and
            cuts out the center; "pad" scales the longer side to fit and pads with black.

    Raises:
        UsageError: a number is out of range, or a name is unknown.
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
            raise UsageError(
                f"mean is {self.mean}, std is {self.std} and scale is {self.scale}; use finite "
                "numbers, and no 0 for std and scale"
            )
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"the image size is {self.size}; use at least 1 pixel each way")

    def to_meta(self) -> dict[str, str]:
        """The entry of a graph's metadata."""
        return {META: json.dumps(asdict(self))}

    @classmethod
    def from_meta(cls, meta: Mapping[str, str]) -> Preprocess:
        """The preprocessing that a graph was quantized with; the defaults if none is recorded.

        Raises:
            FormatError: the entry of the metadata is damaged.
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
        """The same preprocessing with the size and layout of an input.

        Args:
            name: name of the input.
            shape: shape of the input with the batch axis.

        Raises:
            UsageError: images do not fit the input.
            MissingDependencyError: Pillow is not installed.
        """
        require("vision", ("PIL",), "to read pictures")
        if len(shape) != 4:
            raise UsageError(
                f"the input {name!r} has the shape {list(shape)}, which images do not fit; give "
                "arrays: an .npz file or a folder of .npy files"
            )
        layout = self.layout
        if layout == "auto":
            layout = "nchw" if shape[1] in COLORS else "nhwc"
        channels, *size = shape[1:] if layout == "nchw" else (shape[3], *shape[1:3])
        if channels not in COLORS:
            raise UsageError(
                f"the input {name!r} has the shape {list(shape)}: {channels} channels as "
                f"{layout.upper()}, and images have 1, 3 or 4; try "
                f"--layout {'nhwc' if layout == 'nchw' else 'nchw'}, or give arrays"
            )
        if self.size is not None and self.size != tuple(size):
            raise UsageError(
                f"--image-size is {self.size[0]}x{self.size[1]}, and the input {name!r} takes "
                f"{size[0]}x{size[1]} ({list(shape)}, {layout.upper()}); give that size, or leave "
                "--image-size out"
            )
        for what, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, channels):
                raise UsageError(
                    f"--{what} has {len(numbers)} numbers, and the input {name!r} has {channels} "
                    f"channels; give 1 or {channels} numbers"
                )
        return replace(self, size=(size[0], size[1]), layout=layout)

    def read(self, path: Path, shape: Shape) -> NDArray[np.float32]:
        """Read an image as float32 [1, ...] in the layout of the input.

        Args:
            path: the file.
            shape: shape of the input for which `for_pictures` was called.

        Raises:
            FormatError: the file is not an image that Pillow can read.
            MissingDependencyError: Pillow is not installed.
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
    """Parse numbers separated by commas, such as ``0.485,0.456,0.406``.

    Args:
        text: the text.
        what: name of the option, for the message.

    Raises:
        UsageError: a part of the text is not a number.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{what} is {text!r}; write a number, or one for each channel: 0.485,0.456,0.406"
        ) from None


def parse_size(text: str) -> tuple[int, int]:
    """Parse a height and width in pixels, such as ``224`` or ``240x320``.

    Raises:
        UsageError: the text has another form.
    """
    parts = text.lower().split("x")
    if not all(part.isdecimal() for part in parts) or len(parts) > 2:
        raise UsageError(f"the image size is {text!r}; write 224, or HEIGHTxWIDTH such as 240x320")
    return int(parts[0]), int(parts[-1])


def parse_ratio(text: str, what: str) -> float:
    """Parse a number or a ratio, such as ``0.5`` or ``1/255``.

    Args:
        text: the text.
        what: name of the option, for the message.

    Raises:
        UsageError: the text is neither.
    """
    above, slash, below = text.partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{what} is {text!r}; write a number, or a ratio such as 1/255") from None
