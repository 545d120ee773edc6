"""The code around the model: one module for each platform writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgeq.packaging import ort_mobile, rpi
from edgeq.packaging.manifest import Manifest
from edgeq.packaging.source import GraphSource, ModelSource

Writer = Callable[[Path, Manifest, ModelSource | GraphSource], None]
WRITERS: dict[str, Writer] = {"rpi": rpi.write, "ort-mobile": ort_mobile.write}
"""Platform -> writes its glue code into the folder of a package."""


def write_glue(folder: Path, made: Manifest, source: ModelSource | GraphSource) -> None:
    """Write the code that runs a package's model on its platform.

    Args:
        folder: of the package.
        made: what it holds so far; its list of files is empty.
        source: of the package.
    """
    WRITERS[made.platform](folder, made, source)
