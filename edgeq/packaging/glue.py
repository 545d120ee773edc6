"""The code around the model: one module for each platform writes it."""

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
"""Platform -> writes its glue code into the folder of a package."""


CHECKS: dict[str, Callable[[ModelSource | GraphSource], None]] = {
    "android": android.check,
    "ios": ios.check,
}
"""Platform -> refuses what its glue code cannot feed."""


def check(platform: str, source: ModelSource | GraphSource) -> None:
    """Refuse a source that a platform's glue code cannot feed, before it is converted.

    Raises:
        UnsupportedError: says what it cannot feed.
    """
    if platform in CHECKS:
        CHECKS[platform](source)


def write_glue(folder: Path, made: Manifest, source: ModelSource | GraphSource) -> None:
    """Write the code that runs a package's model on its platform.

    Args:
        folder: of the package.
        made: what it holds so far; its list of files is empty.
        source: of the package.
    """
    WRITERS[made.platform](folder, made, source)
