"""LiteRT (TensorFlow Lite): a canonical graph of operators as one .tflite file.

Images lie channels last, and weights and activations have the graph's own integers. How each
operator is lowered stands in `edgeq.converters.tflite.lower`.

Options: layout "nhwc" (images as the runtime has them) or "nchw" (as the source has them); io
"float32" or "int8"; compute, of integer weights with float values: "auto" (rounds the values as it
runs where the recipe says "dynamic", and otherwise takes the weights back to float), "int8" (always
rounds them where the runtime has such an operator) or "float" (never); int4 "packed" or "bytes" (a
byte for each 4-bit level with a scale for its row or channel: LiteRT's fastest kernels read no 4
bits of convolutions).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeq._version import __version__
from edgeq.converters.metadata_blob import blob_bytes
from edgeq.converters.runners import GraphRunner
from edgeq.converters.target import GraphTarget
from edgeq.converters.tflite.file import TfliteFile
from edgeq.converters.tflite.graph_run import (
    METADATA,
    LiteRTGraphRunner,
    arena_bytes,
    read_parts,
    read_quants,
    read_weights,
)
from edgeq.converters.tflite.interpreter import interpreter
from edgeq.converters.tflite.lower import support
from edgeq.converters.tflite.lower.axis_order import Order, channels_last, natural, placed
from edgeq.converters.tflite.lower.lowering import LoweringOptions, Out, TfliteLowering
from edgeq.converters.tflite.lower.math_ops import bounds
from edgeq.converters.tflite.lower.shape_ops import file_type
from edgeq.converters.tflite.operators import Value
from edgeq.converters.tflite.read import VERSION, has_metadata
from edgeq.core.errors import UnsupportedError, UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import ACTIVATIONS
from edgeq.graph.tflite.schema import schema

_CHOICES = {
    "layout": ("nhwc", "nchw"), "io": ("float32", "int8"),
    "compute": ("auto", "int8", "float"), "int4": ("packed", "bytes"),
}  # fmt: skip


class LiteRTGraphTarget(GraphTarget):
    """Graphs in LiteRT."""

    def check(self, graph: Graph, options: Mapping[str, Any]) -> None:
        """Refuse what cannot be lowered, before any work.

        Raises:
            MissingDependencyError: LiteRT is not installed.
            UnsupportedError: lists every offending node with the nearest supported form.
            UsageError: an option out of range.
        """
        schema()
        settings(options)
        support.check(graph)

    def write(
        self,
        graph: Graph,
        path: Path,
        options: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> None:
        """Write the file.

        Args:
            graph: a graph that `check` accepted.
            path: the file, which does not exist.
            options: layout, io, compute and int4.
            progress: called with what is written, bytes done, and of how many.
        """
        low = _lowered(graph, settings(options))
        low.file.save(path, progress)
        _check_opens(path, low)

    def wrote(self, path: Path) -> bool:
        """Whether the file's metadata describes a graph that edgeq converted."""
        return has_metadata(path, METADATA)

    def open_runner(self, path: Path, *, threads: int = 1) -> GraphRunner:
        """Open the file in LiteRT.

        Raises:
            FormatError: edgeq did not write it, or LiteRT cannot load it.
            MissingDependencyError: LiteRT is not installed.
        """
        return LiteRTGraphRunner(path, threads=threads)

    def read_weights(self, path: Path) -> Iterator[tuple[str, QuantWeight]]:
        """The integers of every quantized constant, in the source's own axes."""
        return read_weights(path)

    def read_quants(self, path: Path) -> dict[str, QuantParams]:
        """Scale and zero point of each rounded value."""
        return read_quants(path)

    def read_parts(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Every constant and operator of the file."""
        return read_parts(path)

    def arena_bytes(self, graph: Graph, options: Mapping[str, Any]) -> int:
        """Bytes of all activations that are in memory together at most, if buffers are reused."""
        return arena_bytes(_lowered(graph, settings(options)).file.model)

    def versions(self) -> dict[str, str]:
        """The libraries that take part.

        Raises:
            MissingDependencyError: LiteRT is not installed.
        """
        schema()
        return {"ai-edge-litert": version("ai-edge-litert")}


def settings(options: Mapping[str, Any]) -> LoweringOptions:
    """The options with their defaults.

    Raises:
        UsageError: an option is unknown, or has another value than it may.
    """
    for key, value in options.items():
        if key not in _CHOICES:
            raise UsageError(unknown("option of the target tflite", key, _CHOICES))
        if value not in _CHOICES[key]:
            raise UsageError(f"{key} is {value!r}; it can be {' or '.join(_CHOICES[key])}")
    return LoweringOptions(**options)


def _check_opens(path: Path, low: TfliteLowering) -> None:
    """Refuse a file that LiteRT does not load, with the node its operator is made of."""
    opened = interpreter(path, threads=1, delegate=False)
    try:
        opened.allocate_tensors()
    except (ValueError, RuntimeError) as err:
        number = re.search(r"Node number (\d+)", str(err))
        place = int(number.group(1)) if number else len(low.made_by)
        node = low.made_by[place] if place < len(low.made_by) else f"the graph {low.graph.name}"
        raise UnsupportedError(f"{node}: LiteRT refuses what it is lowered to: {err}") from err


def _lowered(graph: Graph, how: LoweringOptions) -> TfliteLowering:
    file = TfliteFile()
    low = TfliteLowering(graph, file, how)
    inputs = {name: _input(low, name) for name in graph.inputs}
    taken_in: set[str] = set()
    for node in graph.nodes:
        if node.name not in taken_in:
            low.node = node
            try:
                taken_in |= _node(low, node)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
                raise UnsupportedError(f"{node} cannot be lowered to TFLite: {err}") from err
    low.node = Node("", "output", (), ())
    used = {id(value) for value in inputs.values()}
    outputs = {name: _output(low, name, used) for name in graph.outputs}
    orders = {name: low.home(name) for name in graph.inputs}
    orders |= {name: _output_order(low, name) for name in graph.outputs}
    low.g.finish(inputs, outputs)
    file.metadata(METADATA, blob_bytes(_described(low, orders)))
    return low


def _input(low: TfliteLowering, name: str) -> Value:
    info, quant = low.graph.info(name), low.graph.quants.get(name)
    image = low.settings.layout == "nhwc" and name in low.images
    order = channels_last(len(info.shape)) if image else natural(len(info.shape))
    shape, kind = placed(info.shape, order), file_type(info.dtype)
    if quant and low.settings.io == "int8":
        value = Value(name, shape, "int8", scales=low.params_table(quant))
    else:
        value = low.g.input(name, shape, kind)
    inside = value
    if quant and value.scales is None:
        inside = low.op("QUANTIZE", [value], quant=quant)
    if quant:
        low.rounded[name] = inside
    low.put(name, inside, order)
    return value


def _node(low: TfliteLowering, node: Node) -> set[str]:
    """Lower a node; gives the names of those that it took into itself."""
    graph, emitter = low.graph, support.EMITTERS[node.op]
    after = graph.only_consumer(node.output) if emitter.activation else None
    out = Out(node.output)
    if (
        after is not None
        and node.output not in graph.quants
        and graph.info(node.output).dtype == "float32"
        and after.op in ACTIVATIONS
        and after.inputs[0] == node.output
    ):
        out.name = after.output
        out.low, out.high = bounds(low, after)
    else:
        after = None
    quant = graph.quants.get(out.name)
    out.quant = quant if quant and support.integer(graph, node, quant) else None
    emitted = emitter.emit(low, node, out)
    if isinstance(emitted, list):
        for name, (value, order) in zip(node.outputs, emitted, strict=True):
            if name:
                low.finish(Out(name), value, order)
    else:
        low.finish(out, *emitted)
    return {after.name} if after else set()


def _output_order(low: TfliteLowering, name: str) -> Order:
    rank = len(low.shape(name))
    known = channels_last(rank)
    if low.settings.layout == "nhwc" and name in low.graph.values and low.home(name) == known:
        return known
    return natural(rank)


def _output(low: TfliteLowering, name: str, used: set[int]) -> Value:
    """A tensor of its own for an output."""
    if name in low.graph.constants:
        value = low.array(low.graph.array(name))
    else:
        rounded = low.settings.io == "int8" and name in low.graph.quants
        value = low.get(name, _output_order(low, name), rounded)
    if id(value) in used or name in low.graph.constants:
        shape = low.ints(value.shape)
        value = low.op("RESHAPE", [value, shape], like=True, newShape=list(value.shape))
    used.add(id(value))
    inside = low.rounded.get(name)
    if inside is not None and inside is not value and low.g.name_of(inside) == name:
        low.g.rename(inside, low.short("t"))
    low.g.rename(value, name)
    return value


def _described(low: TfliteLowering, orders: Mapping[str, Order]) -> dict[str, Any]:
    graph = low.graph

    def ends(names: tuple[str, ...]) -> dict[str, Any]:
        return {
            name: {"shape": list(graph.info(name).shape), "dtype": graph.info(name).dtype,
                   "order": list(orders[name])}
            for name in names
        }  # fmt: skip

    return {
        "format_version": VERSION,
        "edgeq_version": __version__,
        "name": graph.name,
        "meta": dict(graph.meta),
        "precision": "int8" if low.hybrid else "float32",
        "inputs": ends(graph.inputs),
        "outputs": ends(graph.outputs),
        "weights": low.weights,
        "quants": {
            name: tensor if (tensor := low.g.name_of(value)) != name else ""
            for name, value in low.rounded.items()
        },
    }
