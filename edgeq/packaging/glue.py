"""The glue code of a package. One module for each platform writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeq.packaging import android, ios, ort_mobile, rpi
from edgeq.packaging.manifest import Manifest
from edgeq.packaging.source import GraphSource, ModelSource

Writer = Callable[[Path, Manifest, ModelSource | GraphSource], None]
WRITERS: dict[str, Writer] = {
    "rpi": rpi.write,
    "ort-mobile": ort_mobile.write,
    "android": android.write,
    "ios": ios.write,
}
"""Platform -> the function that writes its glue code into the folder of a package."""


CHECKS: dict[str, Callable[[ModelSource | GraphSource], None]] = {
    "android": android.check,
    "ios": ios.check,
}
"""Platform -> the function that refuses sources whose inputs its glue code cannot fill."""


def check(platform: str, source: ModelSource | GraphSource) -> None:
    """Refuse a source whose inputs the platform's glue code cannot fill, before it is converted.

    Raises:
        UnsupportedError: an input or output has another type than float32; the message names it.
    """
    if platform in CHECKS:
        CHECKS[platform](source)


def write_glue(folder: Path, made: Manifest, source: ModelSource | GraphSource) -> None:
    """Write the code that runs a package's model on its platform.

    Args:
        folder: folder of the package.
        made: the manifest of the package so far; its list of files is empty.
        source: the model or graph that is packaged.
    """
    WRITERS[made.platform](folder, made, source)
