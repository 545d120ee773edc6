"""Values for the glue code that turns an image into the input of a graph."""

from __future__ import annotations

from typing import Any

from edgeq.packaging.manifest import Manifest


def picture_holes(made: Manifest) -> dict[str, Any]:
    """Values of the templates that turn an image into the input of the graph.

    Args:
        made: the manifest of a graph.

    Returns:
        the values by name; empty if the graph has several inputs, its input is no image with
        three channels, or the preprocessing of images is not recorded.
    """
    known, inputs = made.model["preprocess"], made.model["inputs"]
    if not known or len(inputs) != 1 or len(inputs[0]["shape"]) != 4:
        return {}
    shape = inputs[0]["shape"]
    first = shape[1] == 3
    if not first and shape[3] != 3:
        return {}
    height, width = shape[2:] if first else shape[1:3]
    return {
        "width": width,
        "height": height,
        "scale": f"{known['scale']:.9g}",
        "mean": _three(known["mean"]),
        "std": _three(known["std"]),
        "resize": known["resize"],
        "place": "channel * width * height + pixel" if first else "3 * pixel + channel",
    }


def _three(values: list[float]) -> list[str]:
    return [f"{value:.9g}" for value in (list(values) * 3)[:3]]
