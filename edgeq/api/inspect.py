"""What is in a model file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edgeq.devices.model_header import facts_of
from edgeq.formats.packing import TILE, round_up
from edgeq.formats.tensor import QuantTensor, Tensor
from edgeq.importers import load
from edgeq.model.model import Model


def inspect(model: Model | str | Path, *, path: str | None = None) -> dict[str, Any]:
    """Describe a decoder: config, size, tensors, tokenizer files and where it came from.

    Args:
        model: a model or the path of one.
        path: how the record calls the model; its path if None.

    Returns:
        A record that JSON can hold: "config", "n_params", "nbytes", "bpw" (bits per weight, scales
        and padding included), "tensors" (each with scheme, shape, size and SQNR), "files" and
        "provenance".

    Raises:
        FormatError: the model cannot be opened.

    Example:
        >>> record = edgeq.inspect("model.edgeq")
        >>> record["config"]["family"], round(record["bpw"], 1)
        ('llama', 5.1)
    """
    opened = model if isinstance(model, Model) else load(model)
    if path is None:
        path = "" if isinstance(model, Model) else str(model)
    schemes = {name: known.scheme for name, known in facts_of(opened, path).tensors.items()}
    tensors = [
        _describe(opened, name, tensor, schemes[name]) for name, tensor in opened.tensors.items()
    ]
    weights = sum(math.prod(tensor["shape"]) for tensor in tensors)
    return {
        "path": path,
        "config": opened.config.to_dict(),
        "n_params": weights,
        "nbytes": opened.nbytes,
        "bpw": _bits_per_weight(opened.nbytes, weights),
        "tensors": tensors,
        "files": {name: len(content) for name, content in opened.files.items()},
        "provenance": dict(opened.provenance),
    }


def _bits_per_weight(nbytes: int, weights: int) -> float:
    return 8 * nbytes / weights


def _describe(model: Model, name: str, tensor: Tensor, scheme: str) -> dict[str, Any]:
    shape = [int(n) for n in tensor.shape]
    padded = None
    if isinstance(tensor, QuantTensor):
        full = [round_up(shape[0], TILE), tensor.scheme.padded_k(shape[1])]
        padded = full if full != shape else None
    sqnr = model.provenance.get("sqnr_db", {}).get(name)
    return {
        "name": name,
        "scheme": scheme,
        "shape": shape,
        "padded": padded,
        "nbytes": int(tensor.nbytes),
        "bpw": _bits_per_weight(tensor.nbytes, math.prod(shape)),
        "sqnr_db": sqnr,
    }
