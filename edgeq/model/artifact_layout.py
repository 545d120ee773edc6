"""The bytes of an artifact: a safetensors container in the layout the kernels read.

    offset 0    u64 little-endian: length H of the header; 8 + H is a multiple of 64
    offset 8    JSON, padded with spaces to H bytes:
                  "__metadata__": {
                      "format": "edgeq",  "format_version": "1",
                      "config":     JSON text of the model's hyperparameters,
                      "tensors":    JSON text {NAME: {"scheme": "w4-g32", "shape": [N, K]}},
                      "provenance": JSON text: source, its sha256, recipe, SQNR of each tensor }
                  and dtype, shape and data_offsets of every array below
    offset 8+H  the arrays, each at a file offset that is a multiple of 64:

      quantized tensor   NAME.packed       U8   [tiles, blocks, bits*64]   see edgeq.formats.packing
                         NAME.scales       F16  [tiles, groups, 16]
                         NAME.zero_points  U8   [tiles, groups, 16]        if asymmetric
                         NAME.palette      I8   [2**bits]                  if it has a codebook
                         NAME.minimums     F16  [tiles, groups, 16]        if it has minimums
                         NAME.scales       U8   [tiles, K/256, bytes]      if of two levels, see
                                                                           edgeq.formats.two_level
      float tensor       NAME              F32, F16 or BF16, its own shape
      tokenizer file     file:tokenizer.json ...  U8 [length]
      filler             pad.0001 ...      U8 zeros, at most 63: safetensors allows no holes

Tensors come in the order a decoder reads them: embedding, layers, last norm, head; then files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeq.core.errors import SchemeError
from edgeq.formats.packing import round_up
from edgeq.formats.safetensors_file import TYPE_NAMES
from edgeq.formats.schemes import FloatScheme, Scheme
from edgeq.formats.tensor import part_shapes
from edgeq.model.config import ModelConfig

FORMAT = "edgeq"
VERSION = 1
ALIGN = 64
"""Bytes; one cache line, and one vector of the widest kernels."""
FILE, PAD = "file:", "pad."
"""Prefixes of the names of arrays that are not tensors."""
_FLOATS: dict[str, tuple[Any, str]] = {
    "float32": (np.float32, "F32"),
    "float16": (np.float16, "F16"),
    "bfloat16": (np.uint16, "BF16"),
}


@dataclass(frozen=True)
class TensorLayout:
    """How one tensor is stored in an artifact.

    Args:
        scheme: quantized, or the float type.
        shape: its logical shape, without padding.
    """

    scheme: Scheme
    shape: tuple[int, ...]

    def arrays(self, name: str) -> Iterator[tuple[str, Any, str, tuple[int, ...]]]:
        """The arrays of the container: name, NumPy type, safetensors type, shape."""
        if isinstance(self.scheme, FloatScheme):
            kind, dtype = _FLOATS[self.scheme.dtype]
            yield name, kind, dtype, self.shape
            return
        if len(self.shape) != 2:
            raise SchemeError(
                f"tensor {name} has shape {list(self.shape)}; {self.scheme} is for matrices"
            )
        for part, (kind, shape) in part_shapes(self.scheme, (self.shape[0], self.shape[1])).items():
            yield f"{name}.{part}", kind, TYPE_NAMES[kind], shape

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(
            np.dtype(kind).itemsize * math.prod(shape) for _, kind, _, shape in self.arrays("")
        )


@dataclass(frozen=True)
class ArraySpan:
    """Where an array is in the file.

    Args:
        dtype: safetensors type.
        shape: of the array.
        start: its first byte, counted from the first array's.
        nbytes: its length.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def describe(self) -> dict[str, Any]:
        """Its entry in the header."""
        offsets = [self.start, self.start + self.nbytes]
        return {"dtype": self.dtype, "shape": list(self.shape), "data_offsets": offsets}


def file_order(names: Iterable[str]) -> list[str]:
    """Names in the order a decoder reads them: embedding, layers by number, norm, head."""

    def key(name: str) -> tuple[int, int, str]:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer:
            return 1, int(layer[1]), name
        first = name.startswith("model.embed_tokens")
        return (0 if first else 3 if name.startswith("lm_head") else 2), 0, name

    return sorted(names, key=key)


def overhead(
    config: ModelConfig,
    tensors: Mapping[str, TensorLayout],
    files: Mapping[str, bytes],
    provenance: Mapping[str, Any],
) -> int:
    """Bytes of an artifact that are not its tensors': header, tokenizer files and filler.

    Args:
        config, tensors, files, provenance: as `ArtifactWriter` takes them.
    """
    spans = layout(tensors, files)
    header = round_up(8 + len(header_bytes(config, tensors, spans, provenance)), ALIGN)
    of_tensors = sum(tensor.nbytes for tensor in tensors.values())
    return header + sum(span.nbytes for span in spans.values()) - of_tensors


def header_bytes(
    config: ModelConfig,
    tensors: Mapping[str, TensorLayout],
    spans: Mapping[str, ArraySpan],
    provenance: Mapping[str, Any],
) -> bytes:
    """The header's JSON, without the padding."""
    described = {
        name: {"scheme": str(tensor.scheme), "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(VERSION),
        "config": _json(config.to_dict()),
        "tensors": _json(described),
        "provenance": _json(dict(provenance)),
    }
    arrays = {name: span.describe() for name, span in spans.items()}
    return _json({"__metadata__": metadata, **arrays}).encode("ascii")


def layout(tensors: Mapping[str, TensorLayout], files: Mapping[str, bytes]) -> dict[str, ArraySpan]:
    """The place of every array, fillers included.

    Raises:
        SchemeError: a tensor has a name that is reserved.
    """
    spans: dict[str, ArraySpan] = {}
    position = 0
    pads = 0

    def add(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal position, pads
        if position % ALIGN:
            pads += 1
            gap = -position % ALIGN
            spans[f"{PAD}{pads:04}"] = ArraySpan("U8", (gap,), position, gap)
            position += gap
        spans[name] = ArraySpan(dtype, shape, position, nbytes)
        position += nbytes

    for name, tensor in tensors.items():
        if name.startswith((FILE, PAD)):
            raise SchemeError(f"a tensor cannot be named {name!r}: {FILE} and {PAD} are taken")
        for array, kind, dtype, shape in tensor.arrays(name):
            add(array, dtype, shape, np.dtype(kind).itemsize * math.prod(shape))
    for name, content in files.items():
        add(FILE + name, "U8", (len(content),), len(content))
    return spans


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
