"""Summary of a quantized graph: precision, error and size of each operator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.graph.arena import lay_out, lives
from edgeq.graph.feeds import Feeds, OpenSession
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import LAYERS, OPERATORS
from edgeq.quant.graph.calibrate import BUDGET, parts
from edgeq.quant.graph.integer_plan import activation_behind, data_inputs
from edgeq.quant.kernels.products import squares
from edgeq.quant.recipe import Recipe
from edgeq.quant.summary import QuantizationSummary


@dataclass(frozen=True)
class OpRow:
    """One operator of a quantized graph.

    Args:
        op, node: type and name of the operator.
        weight: scheme of its weight, such as "int8 channel", "int4 g32", "palette channel", "fp16"
            or "f32"; "" without a weight.
        activations: "int8" if the operator computes on integers, else "float".
        nbytes: bytes of its constants as they are stored.
        float_bytes: bytes of its constants in float32.
        sqnr_db: SQNR of its output relative to the float graph, in dB; None if it was not measured
            or if there is no error.
    """

    op: str
    node: str
    weight: str
    activations: str
    nbytes: int
    float_bytes: int
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Agreement:
    """Agreement of the outputs of the quantized graph with those of the float graph.

    Args:
        samples: number of samples that were compared.
        cosine: cosine similarity, mean over samples and outputs.
        sqnr_db: SQNR of all outputs in dB; None if they are equal.
        top1: fraction of samples with the same top class in the first output, if that output is
            scores [1, classes]; else None.
        classes: number of different top classes of the float graph; None without scores.
        varied: fraction of the float outputs' power that differs between samples.
        varied_sqnr_db: SQNR of that part in dB; None if it is equal or zero.
        undefined: fraction of the float outputs' elements that are NaN or infinite. They are left
            out of the other figures.
    """

    samples: int
    cosine: float
    sqnr_db: float | None
    top1: float | None
    classes: int | None
    varied: float
    varied_sqnr_db: float | None
    undefined: float = 0.0


@dataclass(frozen=True, eq=False)
class GraphSummary(QuantizationSummary):
    """A quantized graph, with its sizes and its agreement with the float graph.

    Args:
        graph: the quantized graph.
        recipe: the recipe by which it was quantized.
        rows: the operators of the graph.
        float_bytes, packed_bytes: bytes of all constants, in float32 and as they are stored.
        float_arena, arena: peak bytes of activations with reused buffers, before and after.
        kept: names of the nodes to which mixed precision gave more bits.
        agreement: agreement with the float graph on calibration samples; None without samples.
        seconds: duration of the quantization.
        warnings: warnings about the samples, one sentence each.
    """

    graph: Graph
    recipe: Recipe
    rows: tuple[OpRow, ...]
    float_bytes: int
    packed_bytes: int
    float_arena: int
    arena: int
    kept: tuple[str, ...]
    agreement: Agreement | None
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def bpw(self) -> float:
        """Stored bits per weight over all constants, which have 32 bits in float32."""
        return 32 * self.packed_bytes / self.float_bytes if self.float_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON with everything but the graph."""
        return {
            "recipe": self.recipe.to_dict(),
            "float_bytes": self.float_bytes,
            "packed_bytes": self.packed_bytes,
            "float_arena_bytes": self.float_arena,
            "arena_bytes": self.arena,
            "kept": list(self.kept),
            "agreement": None if self.agreement is None else vars(self.agreement),
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "operators": [vars(row) for row in self.rows],
        }


def operator_rows(graph: Graph) -> tuple[OpRow, ...]:
    """A row for each operator of a graph, quantized or not."""
    return tuple(
        OpRow(
            node.op,
            node.name,
            _weight_text(graph, node),
            "int8" if computes_in_integers(graph, node) else "float",
            sum(stored_bytes(graph, name) for name in _constants(graph, node)),
            sum(_float_bytes(graph, name) for name in _constants(graph, node)),
        )
        for node in graph.nodes
    )


def computes_in_integers(graph: Graph, node: Node) -> bool:
    """Whether a node computes on integers: its float inputs, output and weight are rounded."""
    inputs = [name for name in data_inputs(node) if graph.info(name).dtype == "float32"]
    producer = graph.producers.get(inputs[0]) if inputs else None
    inside = (
        producer is not None
        and activation_behind(graph, producer) is node
        and producer.output not in graph.quants
    )
    if inside and producer is not None:  # the node is fused with the one before it
        return node.output in graph.quants and computes_in_integers(graph, producer)
    behind = activation_behind(graph, node)
    outputs = node.outputs
    if behind is not None and node.output not in graph.quants:
        outputs = behind.outputs
    weights = [name for name in inputs if name in graph.constants]
    weights += [name for name in node.inputs[1:2] if node.op in LAYERS]
    return (
        bool(inputs)
        and all(name in graph.quants or name in graph.constants for name in inputs)
        and not all(name in graph.constants for name in inputs)
        and all(out in graph.quants for out in outputs if out)
        and all(isinstance(graph.constants.get(name), QuantWeight) for name in weights)
    )


def stored_bytes(graph: Graph, name: str) -> int:
    """Bytes of a constant as it is stored."""
    return int(graph.constants[name].nbytes)


def constants_bytes(graph: Graph) -> tuple[int, int]:
    """Bytes of all constants: in float32, and as they are stored."""
    return (
        sum(_float_bytes(graph, name) for name in graph.constants),
        sum(stored_bytes(graph, name) for name in graph.constants),
    )


def arena_bytes(graph: Graph) -> int:
    """Peak bytes of a graph's activations with reused buffers; fused nodes need no buffer."""
    return lay_out(lives(join_activations(graph))).nbytes


def join_activations(graph: Graph) -> Graph:
    """The graph with every Relu or Clip merged into the node that it is fused with."""
    parts_of = {
        node.name: behind for node in graph.nodes if (behind := activation_behind(graph, node))
    }
    inside = {behind.name for behind in parts_of.values()}
    nodes = tuple(
        replace(node, outputs=parts_of[node.name].outputs) if node.name in parts_of else node
        for node in graph.nodes
        if node.name not in inside
    )
    return replace(graph, nodes=nodes)


def with_sqnr(
    rows: Iterable[OpRow],
    original: Graph,
    quantized: Graph,
    samples: Iterable[Feeds],
    session_of: OpenSession,
) -> tuple[OpRow, ...]:
    """Add the SQNR of each node's output, in dB, to its row.

    Args:
        rows: rows of `operator_rows`.
        original: the float graph.
        quantized: the quantized graph.
        samples: inputs on which the SQNR is measured.
        session_of: opens a session that runs a graph.
    """
    watch = [
        node.output
        for node in quantized.nodes
        if node.output in original.values and original.info(node.output).dtype == "float32"
    ]
    sqnr: dict[str, float | None] = {}
    for part in parts(original, watch, BUDGET // 2):
        power, error = dict.fromkeys(part, 0.0), dict.fromkeys(part, 0.0)
        runs = session_of(original, part), session_of(quantized, part)
        for feeds in samples:
            expected, actual = (run(feeds) for run in runs)
            for name in part:
                right, made = _comparable(expected[name], actual[name])
                power[name] += _energy(right)
                error[name] += _energy(made - right)
        sqnr.update({name: _decibel(power[name], error[name]) for name in part})
    outputs = {node.name: node.output for node in quantized.nodes}
    return tuple(replace(row, sqnr_db=sqnr.get(outputs[row.node])) for row in rows)


def compare(
    original: Graph, quantized: Graph, samples: Iterable[Feeds], session_of: OpenSession
) -> Agreement:
    """Compare the outputs of the quantized graph with those of the float graph on samples."""
    runs = session_of(original, ()), session_of(quantized, ())
    cosines: list[float] = []
    same: list[bool] = []
    classes: set[int] = set()
    power = error = 0.0
    sums = {name: [np.zeros(1), np.zeros(1)] for name in original.outputs}
    undefined, elements = dict.fromkeys(original.outputs, 0), 0
    n = 0
    for feeds in samples:
        n += 1
        expected, actual = (run(feeds) for run in runs)
        for name in original.outputs:
            undefined[name] += int(np.sum(~np.isfinite(expected[name])))
            elements += expected[name].size
            pair = _comparable(expected[name], actual[name])
            a, b = (x.astype(np.float64).ravel() for x in pair)
            power, error = power + _energy(a), error + _energy(b - a)
            sums[name] = [sums[name][0] + a, sums[name][1] + (b - a)]
            lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
            cosines.append(float(a @ b) / lengths if lengths else float(np.array_equal(a, b)))
        first = original.outputs[0]
        if _is_scores(original, first):
            same += list(expected[first].argmax(-1) == actual[first].argmax(-1))
            classes.update(int(i) for i in expected[first].argmax(-1))
    # the energy of the mean over the samples, which is the same for all of them
    still_power, still_error = (
        sum(_energy(pair[i]) for pair in sums.values()) / max(n, 1) for i in (0, 1)
    )
    varied = max(power - still_power, 0.0)
    return Agreement(
        n,
        float(np.mean(cosines)),
        _decibel(power, error),
        float(np.mean(same)) if same else None,
        len(classes) if same else None,
        varied / power if power else 0.0,
        _decibel(varied, max(error - still_error, 0.0)),
        sum(undefined.values()) / max(elements, 1),
    )


def _comparable(want: NDArray[Any], got: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Two arrays with 0 where the first is not finite, and where the second alone is not."""
    if want.dtype.kind != "f" or (np.isfinite(want).all() and np.isfinite(got).all()):
        return want, got
    sound = np.isfinite(want)
    return np.where(sound, want, 0), np.where(sound & np.isfinite(got), got, 0)


def _is_scores(graph: Graph, name: str) -> bool:
    shape = graph.info(name).shape
    return len(shape) == 2 and shape[1] > 1 and graph.info(name).dtype == "float32"


def _energy(x: NDArray[Any]) -> float:
    if x.dtype == np.float32:
        return squares(x.reshape(1, -1))
    return float(np.sum(np.square(x, dtype=np.float64)))


def _decibel(power: float, error: float) -> float | None:
    return 10 * float(np.log10(power / error)) if error and power else None


def _constants(graph: Graph, node: Node) -> list[str]:
    return [name for name in dict.fromkeys(node.inputs) if name in graph.constants]


def _float_bytes(graph: Graph, name: str) -> int:
    return graph.info(name).nbytes


def _weight_text(graph: Graph, node: Node) -> str:
    row = OPERATORS.get(node.op)
    if row is None or row.weight is None:
        return ""
    weight = graph.constants.get(node.inputs[row.weight.input])
    if weight is None:
        return ""
    if isinstance(weight, QuantWeight):
        kind = "palette" if weight.palette is not None else f"int{weight.bits}"
        if weight.block is not None:
            return f"{kind} g{weight.block}"
        return f"{kind} {'tensor' if weight.axis is None else 'channel'}"
    return {np.dtype(np.float16): "fp16", np.dtype(np.float32): "f32"}.get(weight.dtype, "")


def precisions(rows: Iterable[OpRow]) -> Mapping[str, int]:
    """Number of operators by precision, such as "int8 channel weights, int8 activations" -> 12."""
    counts: dict[str, int] = {}
    for row in rows:
        weights = f"{row.weight} weights, " if row.weight else ""
        key = f"{weights}{row.activations} activations"
        counts[key] = counts.get(key, 0) + 1
    return counts
