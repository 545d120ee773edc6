"""What a decoder computes, recorded: its operations, and which matrices share an input.

`RecordingBuilder` runs `edgeq.model.decoder` without computing anything. `linear_groups` derives
from it what calibration, transforms and profiling have to know of a layer:

    kind       linears    input                                 source
    attn_in    q, k, v    norm of x, or x          [T, hidden]  the norm, or None
               (and g)
    attn_out   o          attention's mix of v     [T, H*D]     v
    attn_in    b, c, x    norm of x, or x          [T, hidden]  the norm, or None
    attn_out   o          short convolution        [T, hidden]  c
    attn_in    qkv, z,    norm of x, or x          [T, hidden]  the norm, or None
               beta, decay
    attn_out   o          gated delta net          [T, values]  None
    mlp_in     gate, up   norm of x, or x          [T, hidden]  the norm, or None
    mlp_out    down       activation(gate) * up    [T, ffn]     up, or None where it is clamped
    mlp_in     router     norm of x, or x          [T, hidden]  None, as the experts read it too
    mlp_in     gate, up   an expert's tokens       [t, hidden]  None
    mlp_out    down       an expert's act          [t, ffn]     the expert's up
    inputs     layer_proj the embeddings           [T, hidden]  None
    own_in     input_gate the stream               [T, hidden]  None
    own_out    input_proj activation(gate) * own   [T, P]       None
    head       head       last norm of x           [T, hidden]  the norm

A layer whose attention reads the keys and values of another has q alone in its attn_in, and None as
the source of its attn_out; so has one that norms its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from edgeq.model.block import LAYER_PROJECTION, LAYER_TABLE
from edgeq.model.config import ModelConfig
from edgeq.model.decoder import decoder
from edgeq.model.rope_spec import RopeSpec

GroupKind = Literal[
    "inputs", "attn_in", "attn_out", "mlp_in", "mlp_out", "own_in", "own_out", "head"
]


@dataclass(frozen=True, eq=False)
class RecordedOperation:
    """One call of a builder's method, and the value that it returns.

    Args:
        kind: the method: "norm", "linear", ...
        name: of the result, as `edgeq.model.decoder` lists them.
        inputs: the values that it is computed from.
        weight: name of the tensor it uses, or "".
        layer: of "attend", "attend_shared", "short_conv", "delta_net", "route" and "layer_input".
        rope: of "rope".
        number: of "scaled" and "capped", and the expert of "to_expert".
    """

    kind: str
    name: str
    inputs: tuple[RecordedOperation, ...] = ()
    weight: str = ""
    layer: int | None = None
    rope: RopeSpec | None = None
    number: float = 0.0


class RecordingBuilder:
    """An `edgeq.model.decoder.Builder` that records its calls.

    Attributes:
        operations: in the order of the calls.
    """

    def __init__(self) -> None:
        self.operations: list[RecordedOperation] = []

    def _record(
        self, kind: str, name: str, *inputs: RecordedOperation, **operands: Any
    ) -> RecordedOperation:
        operation = RecordedOperation(kind, name, inputs, **operands)
        self.operations.append(operation)
        return operation

    def embed(self, name: str) -> RecordedOperation:
        """Rows of the embedding matrix."""
        return self._record("embed", name, weight="model.embed_tokens.weight")

    def states(self, name: str) -> RecordedOperation:
        """States of another model."""
        return self._record("states", name)

    def norm(self, name: str, x: RecordedOperation, weight: str) -> RecordedOperation:
        """RMS norm along the last axis."""
        return self._record("norm", name, x, weight=weight)

    def linear(self, name: str, x: RecordedOperation, weight: str) -> RecordedOperation:
        """x times a matrix."""
        return self._record("linear", name, x, weight=weight)

    def heads(self, name: str, x: RecordedOperation, n: int) -> RecordedOperation:
        """x seen as heads."""
        return self._record("heads", name, x)

    def rope(self, name: str, x: RecordedOperation, rope: RopeSpec) -> RecordedOperation:
        """Rotary position embedding."""
        return self._record("rope", name, x, rope=rope)

    def attend(
        self,
        name: str,
        layer: int,
        q: RecordedOperation,
        k: RecordedOperation,
        v: RecordedOperation,
    ) -> RecordedOperation:
        """Attention over the cache, k and v included."""
        return self._record("attend", name, q, k, v, layer=layer)

    def attend_shared(self, name: str, layer: int, q: RecordedOperation) -> RecordedOperation:
        """Attention over the cache of another layer."""
        return self._record("attend_shared", name, q, layer=layer)

    def plain_norm(self, name: str, x: RecordedOperation) -> RecordedOperation:
        """RMS norm without a weight."""
        return self._record("plain_norm", name, x)

    def layer_embed(self, name: str) -> RecordedOperation:
        """Rows of the table of all layers."""
        return self._record("layer_embed", name, weight=LAYER_TABLE)

    def layer_input(self, name: str, x: RecordedOperation, layer: int) -> RecordedOperation:
        """A layer's own input among those of all."""
        return self._record("layer_input", name, x, layer=layer)

    def weighted(self, name: str, x: RecordedOperation, weight: str) -> RecordedOperation:
        """x times a number that is a tensor."""
        return self._record("weighted", name, x, weight=weight)

    def short_conv(
        self,
        name: str,
        layer: int,
        b: RecordedOperation,
        c: RecordedOperation,
        x: RecordedOperation,
        weight: str,
    ) -> RecordedOperation:
        """A gated short convolution."""
        return self._record("short_conv", name, b, c, x, layer=layer, weight=weight)

    def delta_net(
        self,
        name: str,
        layer: int,
        qkv: RecordedOperation,
        z: RecordedOperation,
        beta: RecordedOperation,
        decay: RecordedOperation,
    ) -> RecordedOperation:
        """A gated delta net."""
        return self._record("delta_net", name, qkv, z, beta, decay, layer=layer)

    def output_gate(
        self, name: str, x: RecordedOperation, gate: RecordedOperation
    ) -> RecordedOperation:
        """x * sigmoid(gate)."""
        return self._record("output_gate", name, x, gate)

    def gated(self, name: str, gate: RecordedOperation, up: RecordedOperation) -> RecordedOperation:
        """activation(gate) * up."""
        return self._record("gated", name, gate, up)

    def route(self, name: str, layer: int, logits: RecordedOperation) -> RecordedOperation:
        """The weights of experts."""
        return self._record("route", name, logits, layer=layer)

    def to_expert(
        self, name: str, x: RecordedOperation, routing: RecordedOperation, expert: int
    ) -> RecordedOperation:
        """The rows that go through an expert."""
        return self._record("to_expert", name, x, routing, number=expert)

    def combine(
        self, name: str, routing: RecordedOperation, outputs: Sequence[RecordedOperation]
    ) -> RecordedOperation:
        """The experts' outputs, summed up."""
        return self._record("combine", name, routing, *outputs)

    def add(self, name: str, a: RecordedOperation, b: RecordedOperation) -> RecordedOperation:
        """The residual stream plus a branch."""
        return self._record("add", name, a, b)

    def scaled(self, name: str, x: RecordedOperation, factor: float) -> RecordedOperation:
        """x times a number."""
        return self._record("scaled", name, x, number=factor)

    def capped(self, name: str, x: RecordedOperation, cap: float) -> RecordedOperation:
        """cap * tanh(x / cap)."""
        return self._record("capped", name, x, number=cap)

    def logits(self, name: str, x: RecordedOperation, weight: str) -> RecordedOperation:
        """The head."""
        return self._record("logits", name, x, weight=weight)


def record(config: ModelConfig) -> tuple[RecordedOperation, ...]:
    """The operations of a model's decoder, in order.

    Example:
        >>> from edgeq.importers.shapes import shape
        >>> [operation.name for operation in record(shape("smollm2-135m"))[:5]]
        ['embed', 'layers.0.attn_norm', 'layers.0.q', 'layers.0.k', 'layers.0.v']
    """
    builder = RecordingBuilder()
    decoder(builder, config)
    return tuple(builder.operations)


@dataclass(frozen=True)
class LinearGroup:
    """The matrices that are multiplied with one and the same input.

    Args:
        layer: of the model; the number of layers for the head, and 0 for the inputs of all layers.
        kind: what its input is.
        linears: names of the matrices.
        source: the weight that the input is proportional to, column by column: a norm's, or a
            matrix whose rows make it. None where the input is the residual stream itself, or is
            read by other operations too.
        adds_to_residual: whether the output is added to the residual stream as it is, without a
            norm or a factor in between.
        expert: the expert whose matrices they are, or None.
    """

    layer: int
    kind: GroupKind
    linears: tuple[str, ...]
    source: str | None
    adds_to_residual: bool
    expert: int | None = None

    def __str__(self) -> str:
        if self.expert is not None:
            return f"layer {self.layer} expert {self.expert} {self.kind}"
        return self.kind if self.kind == "head" else f"layer {self.layer} {self.kind}"


@lru_cache(maxsize=4)
def linear_groups(config: ModelConfig) -> tuple[LinearGroup, ...]:
    """Every group of a model, in the order they are computed."""
    operations = record(config)
    by_input: dict[int, list[RecordedOperation]] = {}
    users: dict[int, list[RecordedOperation]] = {}
    for operation in operations:
        if operation.kind in ("linear", "logits"):
            by_input.setdefault(id(operation.inputs[0]), []).append(operation)
        for value in operation.inputs:
            users.setdefault(id(value), []).append(operation)
    groups = []
    for linears in by_input.values():
        first = linears[0]
        kind, layer = _kind(first, users), config.layers
        if kind != "head":
            layer = 0 if kind == "inputs" else int(first.name.split(".")[1])
        names = tuple(linear.weight for linear in linears)
        adds = first.kind == "linear" and users[id(first)][0].kind == "add"
        value = first.inputs[0]
        source = _source(value) if len(users[id(value)]) == len(linears) else None
        if value.kind == "gated" and config.activation == "clamped_swiglu":
            source = None  # up is clamped and one is added
        expert = int(value.number) if value.kind == "to_expert" else None
        if value.kind == "gated" and value.inputs[0].inputs[0].kind == "to_expert":
            expert = int(value.inputs[0].inputs[0].number)
        groups.append(LinearGroup(layer, kind, names, source, adds, expert))
    return tuple(groups)


_MIXED = ("attend", "attend_shared", "short_conv", "delta_net", "output_gate")
"""Kinds of operations that end a mixer."""


def _kind(linear: RecordedOperation, users: dict[int, list[RecordedOperation]]) -> GroupKind:
    if linear.kind == "logits":
        return "head"
    if linear.weight == LAYER_PROJECTION:
        return "inputs"
    value, user = linear.inputs[0], users[id(linear)][0]
    if value.kind in _MIXED:
        return "attn_out"
    if value.kind == "gated":
        return "own_out" if value.inputs[1].kind == "layer_input" else "mlp_out"
    if user.kind == "gated" and user.inputs[1].kind == "layer_input":
        return "own_in"
    while user.kind in ("heads", "norm", "rope"):
        user = users[id(user)][0]
    return "attn_in" if user.kind in _MIXED else "mlp_in"


def _source(value: RecordedOperation) -> str | None:
    """The weight that each column of a value is proportional to."""
    if value.kind == "output_gate":
        value = value.inputs[0]
    if value.kind == "short_conv":
        return value.inputs[1].weight  # c
    if value.kind in ("attend", "gated"):  # the last input is v, or up
        value = value.inputs[-1]
        while value.kind == "heads":
            value = value.inputs[0]
        return value.weight if value.kind == "linear" else None
    return value.weight if value.kind == "norm" else None
