"""What is in a model file: of a decoder, a graph, or a file made for another runtime."""

from __future__ import annotations

import math
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from edgeq.converters.targets import graph_target, graph_target_of, is_written_graph
from edgeq.converters.tflite.foreign import read_or_open
from edgeq.core.errors import check_type
from edgeq.devices.model_header import facts_of
from edgeq.formats.packing import TILE, round_up
from edgeq.formats.tensor import QuantTensor, Tensor
from edgeq.graph.ir import Graph
from edgeq.importers import load, source_kind
from edgeq.model.model import Model
from edgeq.quant.graph.stored_samples import META_SAMPLES
from edgeq.quant.graph.summary import arena_bytes, constants_bytes, operator_rows, precisions


def inspect(model: Model | str | Path, *, path: str | None = None) -> dict[str, Any]:
    """Describe a model: sizes, tensors or operators, quantization, and where it came from.

    Args:
        model: a decoder, or the path of a decoder, of a graph, or of a file for another runtime
            (.ort, .tflite or .mlpackage that edgeq wrote).
        path: how the record calls the model; its path if None.

    Returns:
        A record that JSON can hold. Of a decoder: "config", "n_params", "nbytes", "bpw" (bits per
        weight, scales and padding included), "tensors" (each with scheme, shape, size and SQNR),
        "files", "integers" (which were kept from another program's file, and which edgeq rounded)
        and "provenance". Of a graph: "inputs", "outputs", "nbytes", "arena_bytes",
        "precisions" and "operators". Of a file for another runtime: "weights" and "quants".

    Raises:
        FormatError: the file cannot be read, or edgeq did not write it.
        MissingDependencyError: a package that reads the format is not installed.

    Example:
        >>> record = edgeq.inspect("model.edgeq")
        >>> record["config"]["family"], round(record["bpw"], 1)
        ('llama', 5.1)
    """
    check_type("model", model, Model, str, PathLike)
    if path is None:
        path = "" if isinstance(model, Model) else str(model)
    if not isinstance(model, Model) and (kind := source_kind(model)) != "model":
        return _inspect_converted(Path(model)) if kind == "program" else _inspect_graph(
            Path(model), path
        )  # fmt: skip
    opened = model if isinstance(model, Model) else load(model)
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
        "integers": opened.integers(),
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


def _inspect_graph(path: Path, name: str) -> dict[str, Any]:
    if is_written_graph(path):
        converted = _inspect_converted(path)
        if converted["weights"] or converted["quants"]:  # else it is a graph of floats
            return converted
    graph = read_or_open(path)
    if not isinstance(graph, Graph):
        record = {"path": str(path), "nbytes": path.stat().st_size, **graph.describe()}
        graph.close()
        return record
    rows = operator_rows(graph)
    float_bytes, nbytes = constants_bytes(graph)
    return {
        "path": name,
        "name": graph.name,
        "inputs": _shapes(graph, graph.inputs),
        "outputs": _shapes(graph, graph.outputs),
        "float_bytes": float_bytes,
        "nbytes": nbytes,
        "arena_bytes": arena_bytes(graph),
        "meta": {key: text for key, text in graph.meta.items() if key != META_SAMPLES},
        "precisions": precisions(rows),
        "operators": [vars(row) for row in rows],
    }


def _shapes(graph: Graph, names: Iterable[str]) -> dict[str, str]:
    infos = {name: graph.info(name) for name in names}
    return {name: f"{info.dtype} {list(info.shape)}" for name, info in infos.items()}


def _inspect_converted(path: Path) -> dict[str, Any]:
    """What edgeq packed into a file for another runtime."""
    target = graph_target(graph_target_of(path))
    weights, quants = dict(target.read_weights(path)), target.read_quants(path)
    return {
        "path": str(path),
        "weights": {
            name: {"bits": weight.bits, "shape": list(weight.shape), "nbytes": weight.nbytes}
            for name, weight in weights.items()
        },
        "quants": {name: vars(quant) for name, quant in quants.items()},
    }
