"""The table of emitters: for each operator of a graph, the function that builds it in MIL.

A function registers itself under the operators that it builds:

    @emits("Relu")
    def relu(b, node): ...

The names of MIL's operators stand in the operators' rows (`edgeq.graph.operators`).
"""

from __future__ import annotations

from collections.abc import Callable

from edgeq.converters.coreml.lower.build import Build, CoremlEmitter, Refuse, refuses_nothing
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import OPERATORS

EMITTERS: dict[str, CoremlEmitter] = {}
"""Operator -> how it is built."""


def emits(*operators: str, refuse: Refuse = refuses_nothing) -> Callable[[Build], Build]:
    """Register a function as the emitter of some operators; see `CoremlEmitter`."""

    def register(build: Build) -> Build:
        for name in operators:
            assert name not in EMITTERS, name
            EMITTERS[name] = CoremlEmitter(build, refuse)
        return build

    return register


def mil_name(node: Node) -> str:
    """MIL's name of the main operator that a node becomes."""
    names = OPERATORS[node.op].coreml
    assert isinstance(names, str)
    return names.split()[0]


def computed(graph: Graph, node: Node, first: int = 1) -> str:
    """Refuse where an input from ``first`` on is no constant."""
    names = [n for n in node.inputs[first:] if n and n not in graph.constants]
    return f"{names[0]!r} is computed; nearest: a constant" if names else ""


def not_float(graph: Graph, node: Node) -> str:
    """Refuse values of other types than float32."""
    if graph.info(node.inputs[0]).dtype != "float32":
        return f"{graph.info(node.inputs[0]).dtype} values; nearest: Cast to float32 before"
    return ""
