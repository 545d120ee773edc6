"""A few calibration samples that are stored in the file of a quantized graph.

Validation of a conversion compares the outputs for real inputs. Random inputs reach other parts of
a network or saturate it, and then correct files can fail and wrong files can pass. The quantized
ONNX file stores as many samples as fit in `LIMIT` bytes; converted files do not contain them.
"""

from __future__ import annotations

import base64
import binascii
import io
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import FormatError
from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import Graph

META_SAMPLES = "edgeq.samples"
"""Key of the entry in the file's metadata."""
LIMIT = 1 << 20
"""Most bytes of the entry."""
MOST = 8
"""Most samples that are stored."""


def stored_samples_entry(graph: Graph, samples: Iterable[Feeds]) -> dict[str, str]:
    """The metadata entry that stores samples; empty if not even one sample fits.

    Rounded inputs are stored as integers, other float inputs as float16.

    Args:
        graph: the quantized graph.
        samples: inputs by name; at most the first `MOST` are stored.
    """
    rows: list[Feeds] = []
    for feeds in samples:
        rows.append(feeds)
        if len(rows) == MOST:
            break
    while rows:
        packed = _packed(graph, rows)
        if len(packed) <= LIMIT:
            return {META_SAMPLES: packed}
        rows = rows[: len(rows) * LIMIT // len(packed) if len(rows) > 1 else 0]
    return {}


def stored_samples(graph: Graph) -> list[dict[str, NDArray[Any]]]:
    """Read the samples stored with a graph; empty if there are none.

    Raises:
        FormatError: the entry is damaged, or its arrays are not the graph's inputs.
    """
    text = graph.meta.get(META_SAMPLES)
    if not text:
        return []
    try:
        loaded = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
        arrays = {name: loaded[f"input{i}"] for i, name in enumerate(graph.inputs)}
    except (binascii.Error, ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as err:
        raise FormatError(
            f"the samples stored with the graph {graph.name} cannot be read ({err}); quantize the "
            "model again, or give --data"
        ) from err
    return [
        {name: _unpacked(graph, name, array[i, ...]) for name, array in arrays.items()}
        for i in range(min((len(array) for array in arrays.values()), default=0))
    ]


def _packed(graph: Graph, rows: list[Feeds]) -> str:
    arrays: dict[str, Any] = {}
    for i, name in enumerate(graph.inputs):
        stacked = np.stack([np.asarray(feeds[name]) for feeds in rows])
        quant = graph.quants.get(name)
        if quant is not None:
            stacked = quant.quantize(stacked)
        elif stacked.dtype == np.float32:
            with np.errstate(over="ignore"):
                half = stacked.astype(np.float16)
            stacked = half if np.isfinite(half).all() else stacked
        arrays[f"input{i}"] = stacked
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _unpacked(graph: Graph, name: str, array: NDArray[Any]) -> NDArray[Any]:
    info, quant = graph.info(name), graph.quants.get(name)
    if array.shape != info.shape:
        raise FormatError(
            f"a sample stored with the graph {graph.name} has the shape {list(array.shape)} for "
            f"the input {name!r}, which takes {list(info.shape)}; quantize the model again"
        )
    if quant is not None and array.dtype == np.int8:
        return quant.dequantize(array)
    return array.astype(info.dtype)
