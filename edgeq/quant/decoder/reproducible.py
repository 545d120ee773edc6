"""Compare two artifacts that should have the same bytes."""

from __future__ import annotations

import filecmp
from pathlib import Path

from edgeq.formats.safetensors_file import SafetensorsFile


def difference(file: Path, again: Path) -> str | None:
    """The first difference between two safetensors files.

    Args:
        file: an artifact.
        again: the artifact of the same quantization, done again.

    Returns:
        a sentence about the difference; None if all bytes are equal.

    Raises:
        FormatError: one of the files is damaged.
    """
    if filecmp.cmp(file, again, shallow=False):
        return None
    one, other = SafetensorsFile(file), SafetensorsFile(again)
    try:
        if list(one.tensors) != list(other.tensors):
            return "they hold different tensors"
        for name in one.tensors:
            a, b = one.array(name), other.array(name)
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                return f"the tensor {name} has another shape or type"
            if a.tobytes() != b.tobytes():
                return f"the tensor {name} differs"
        for key in sorted({*one.metadata, *other.metadata}):
            if one.metadata.get(key) != other.metadata.get(key):
                return f"all tensors are equal, and {key} of the metadata differs"
        return "all tensors are equal, and the order of the metadata differs"
    finally:
        one.close()
        other.close()
