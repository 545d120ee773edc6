"""A graph as a Core ML package: an ML Program with the quantized file's own integers, packed.

Each operator has an emitter in the modules layers, math, shape and resize of
`edgeq.converters.coreml.lower`; its module build puts the program together, and weights writes the
constants. Images stay channels first, as Core ML has them too. On other systems than Apple's a
package is executed by `edgeq.converters.coreml.exec`, in NumPy and float32: that shows that the
program means what it should, and says nothing of Apple's compiler, the Neural Engine, or speed.

Options:
    target_os  "ios18" (also macOS 15; the default), "ios17" (rounds activations too), or "ios16"
    precision  "float16" (for the Neural Engine; the default) or "float32"

A quantized bias is held as the floats it stands for, as Core ML has no bias of integers. Where
they are float32 and its levels below 2**23, the very same levels are read back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeq.converters.coreml.exec.load import library, open_file, protobuf, versions
from edgeq.converters.coreml.graph_run import (
    ENTRY,
    FORMAT,
    CoreMLGraphRunner,
    read_parts,
    read_quants,
    read_weights,
)
from edgeq.converters.coreml.lower import support, weights
from edgeq.converters.coreml.lower.build import CoremlLowering, output_kind
from edgeq.converters.coreml.package import VERSIONS, write_package
from edgeq.converters.metadata_blob import blob_text
from edgeq.converters.runners import GraphRunner
from edgeq.converters.target import GraphTarget
from edgeq.core.errors import UnsupportedError, UsageError, unknown
from edgeq.core.progress import Progress
from edgeq.formats.qparams import QuantParams
from edgeq.graph.arena import lay_out, lives
from edgeq.graph.ir import Graph, Node, QuantWeight
from edgeq.graph.operators import ACTIVATIONS

TARGETS = ("ios18", "ios17", "ios16")
PRECISIONS = ("float16", "float32")


@dataclass(frozen=True)
class CoreMLGraphSettings:
    """The options, parsed and checked.

    Args:
        target: "ios16", "ios17" or "ios18".
        precision: "float16" or "float32".
    """

    target: str
    precision: str


def settings(options: Mapping[str, Any]) -> CoreMLGraphSettings:
    """Options, checked.

    Raises:
        UsageError: one that is not known, or outside what is allowed.
    """
    allowed = {"target_os": TARGETS, "precision": PRECISIONS}
    for name, got in options.items():
        if name not in allowed:
            raise UsageError(unknown("option of coreml", name, allowed))
        if got not in allowed[name]:
            raise UsageError(unknown(name, str(got), allowed[name]))
    return CoreMLGraphSettings(
        options.get("target_os", TARGETS[0]), options.get("precision", PRECISIONS[0])
    )


_GROWING = {"Add", "Sub", "Mul", "Pow", "Neg", "CumSum", "ReduceSum", "ReduceProd"}
"""Operators that may make numbers beyond those that they take."""


class CoreMLGraphTarget(GraphTarget):
    """Graphs in Core ML packages."""

    def check(self, graph: Graph, options: Mapping[str, Any]) -> None:
        """Refuse what Core ML cannot hold, before any work.

        Raises:
            UnsupportedError: operators or constants that the system has nothing for; all of them,
                each with its node and the nearest form that can be.
            UsageError: an option outside what is allowed.
            MissingDependencyError: coremltools is not installed.
        """
        chosen = settings(options)
        refusals = support.faults(graph, chosen.target)
        if refusals:
            raise UnsupportedError(
                f"Core ML on {chosen.target} cannot hold {graph.name}:\n  " + "\n  ".join(refusals)
            )
        protobuf("to write Core ML packages")

    def remarks(self, graph: Graph, options: Mapping[str, Any]) -> list[str]:
        """Warn of integers that may not fit in the 32 bits that Core ML has for them."""
        long = [
            str(node)
            for node in graph.nodes
            if node.op in _GROWING and graph.info(node.output).dtype == "int64"
        ]
        if not long:
            return []
        more = f" and {len(long) - 3} more" if len(long) > 3 else ""
        return [
            f"Core ML has whole numbers of 32 bits: the int64 results of {', '.join(long[:3])}"
            f"{more} must lie within 2147483647, or they wrap around."
        ]

    def write(
        self,
        graph: Graph,
        path: Path,
        options: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> None:
        """Write a package.

        Args:
            graph: float or quantized.
            path: the folder to make, NAME.mlpackage.
            options: see the module.
            progress: called with what is done, how many parts are done, and of how many.

        Raises:
            EdgeqError: it cannot be written; nothing is left behind.
        """
        self.check(graph, options)
        library()
        chosen = settings(options)
        lowering = CoremlLowering(graph, chosen.target, chosen.precision, support.EMITTERS)
        program = lowering.program()
        if progress:
            progress("program", 1, 2)
        about = {
            "format": FORMAT,
            "target_os": chosen.target,
            "precision": chosen.precision,
            "arena": self.arena_bytes(graph, options),
            "inputs": [_described(graph, *item) for item in lowering.inputs.items()],
            "outputs": [_described(graph, *item) for item in lowering.outputs.items()],
            "constants": {
                name: {
                    "id": label,
                    "scales": scales,
                    **weights.describe(_quant_weight(graph, name)),
                }
                for name, (label, scales) in lowering.constants.items()
            },
            "biases": lowering.biases,
            "quants": lowering.quants,
        }
        write_package(
            Path(path),
            program,
            VERSIONS[chosen.target],
            {},
            {**graph.meta, ENTRY: blob_text(about)},
            f"{graph.name}, by edgeq",
            None,
        )
        if progress:
            progress("package", 2, 2)

    def wrote(self, path: Path) -> bool:
        """Whether the package's metadata describes a graph that edgeq converted."""
        return ENTRY in open_file(path).metadata

    def open_runner(self, path: Path, *, threads: int = 1) -> GraphRunner:
        """Open a package in edgeq's executor of Core ML programs.

        Args:
            path: the package.
            threads: not used; NumPy chooses its own.

        Raises:
            FormatError: the package is damaged, or edgeq did not write it.
            MissingDependencyError: coremltools is not installed.
        """
        return CoreMLGraphRunner(path)

    def read_weights(self, path: Path) -> Iterator[tuple[str, QuantWeight]]:
        """Quantized constants by the graph's names, with integers and scales of the package."""
        return read_weights(path)

    def read_quants(self, path: Path) -> dict[str, QuantParams]:
        """Scale and zero point of each rounded value."""
        return read_quants(path)

    def read_parts(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Every constant and operator of the file."""
        return read_parts(path)

    def arena_bytes(self, graph: Graph, options: Mapping[str, Any]) -> int | None:
        """Bytes of the activations at their peak, if buffers are reused.

        This is edgeq's own plan: rounded values take a byte, an activation function the place of
        what it is applied to, others the float type of the program. What Apple's runtime does is
        not known.
        """
        precision = settings(options).precision
        planned = {
            name: replace(life, nbytes=life.nbytes // 2)
            if _is_half(graph, name, precision)
            else life
            for name, life in lives(_fused(graph)).items()
        }
        return lay_out(planned).nbytes

    def versions(self) -> dict[str, str]:
        """The libraries that take part.

        Raises:
            MissingDependencyError: coremltools is not installed.
        """
        return versions()


def _described(graph: Graph, name: str, label: str) -> dict[str, Any]:
    info = graph.info(name)
    return {"name": name, "id": label, "shape": info.shape, "dtype": info.dtype}


def _quant_weight(graph: Graph, name: str) -> QuantWeight:
    constant = graph.constants[name]
    assert isinstance(constant, QuantWeight)
    return constant


# --- memory -----------------------------------------------------------------------------------


def _is_half(graph: Graph, name: str, precision: str) -> bool:
    floats = graph.info(name).dtype == "float32" and name not in graph.quants
    # what comes in is float32
    return floats and name in graph.producers and output_kind(graph, name, precision) == "fp16"


def _fused(graph: Graph) -> Graph:
    """The graph with activations made part of the node before them."""
    nodes: list[Node] = []
    node_of: dict[str, int] = {}
    for node in graph.nodes:
        source = node.inputs[0] if node.inputs else ""
        alone = graph.only_consumer(source) is node and source not in graph.quants
        if node.op in ACTIVATIONS and alone and source in node_of:
            at = node_of[source]
            nodes[at] = replace(nodes[at], outputs=(node.output,))
        else:
            at = len(nodes)
            nodes.append(node)
        if len(nodes[at].outputs) == 1:
            node_of[node.output] = at
    return replace(graph, nodes=tuple(nodes))
