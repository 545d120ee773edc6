"""Fuse the operations of a decoder into the steps of the compiled engine.

`fuse` turns what `edgeq.model.recording` recorded into the few steps that one compiled function
runs (`edgeq.runtime.kernels.program`):

    EMBED       rows of the embedding
    NORM        add of a branch (normed and scaled before, where it is) + norm + quantize
    LINEARS     linears of one input
    SHORT_CONV  gated short convolution of three linears
    DELTA_NET   gated delta net of four linears
    ATTENTION   heads + norms and rotary embedding of q and k + append to the cache + attention
    OUTPUT_GATE attention's result times the sigmoid of a linear
    QUANTIZE    the input of a linear that no norm precedes
    GATED       two linears of one input + activation(gate) * up
    EXPERTS     routing + gate, up, activation and down of each expert + their weighted sum
    LAYER_INPUTS  norm of the projected embeddings + rows of the table of all layers
    OWN_INPUT   activation(linear) * the layer's own input + quantize
    STATES      states of another model, which a multi-token-prediction head reads
    SUM         the sum of two linears
    HEAD        logits, scaled and capped

NORM multiplies the residual stream by the scale of a layer, where it has one.

`fuse` follows what each buffer of rows holds, so a decoder that orders these operations
differently gets another program without any change here. An operation for which there is no step
is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgeq.core.errors import UnsupportedError
from edgeq.model.block import LAYER_PROJECTION
from edgeq.model.recording import RecordedOperation
from edgeq.model.rope_spec import RopeSpec
from edgeq.runtime.kernels.abi import Step

_INPUT_LABELS = {
    "q": "norm_in", "b": "norm_in", "qkv": "norm_in", "gate": "norm_ffn", "logits": "final_norm",
    "head": "final_norm", "router": "norm_ffn", "input_gate": "norm_own",
}  # fmt: skip
"""Last part of a linear's name -> label of the norm before it."""
_STEP_LABELS = {
    "q": "qkv", "b": "in_proj", "qkv": "in_proj", "mix": "attention", "o": "o_proj",
    "gate": "gate_up", "down": "down_proj", "experts": "experts",
}  # fmt: skip
"""Last part of a result's name -> label of the step that computes it."""
_LINEAR_ROWS = {1: ("branch",), 3: ("q", "k", "v"), 4: ("q", "k", "v", "g")}
"""Number of linears of one input -> the buffers of rows for their results."""
_HEAD_CHAINS = {
    ("heads",), ("heads", "rope"), ("heads", "norm"), ("heads", "norm", "rope"),
    ("norm", "heads"), ("norm", "heads", "rope"), ("heads", "rope", "norm"),
}  # fmt: skip
"""What ATTENTION can do to q and k between linear and cache. A norm before the split into heads
spans all of them."""
_VALUE_CHAINS = {("heads",), ("heads", "plain_norm")}
"""What it can do to v."""


@dataclass
class ProgramStep:
    """A step of the program, its operands by name.

    Args:
        kind: what it computes.
        label: what its time is listed under; see `edgeq.runtime.step_times`.
        layer: number of the layer, or None.
        x, out: buffers of rows that it reads and writes ("" for none).
        branch: buffer of rows that NORM adds to x, or "".
        norm, post_norm: weights of NORM: of the sum, and of the branch before it is added ("" for
            none).
        stream_scale: the number that NORM multiplies the sum by, a tensor's name, or "".
        linears: weights of the matrices.
        q_norm, k_norm: weights of ATTENTION's norms, or "".
        taps: weight of SHORT_CONV.
        norm_spans_heads: whether q and k are normed as one vector each, not head by head.
        norm_last: whether heads are normed after they are rotated.
        norm_values: whether the heads of the values are normed.
        borrowed: whether ATTENTION reads the keys and values of another layer.
        rope: how ATTENTION rotates q, and by its `for_keys` k, or None.
        scale: factor on the branch of NORM, or on the logits of HEAD.
        cap: of HEAD: the soft cap of the scaled logits, or 0 for none.
        factors: of LAYER_INPUTS: on the projection and on the sum.
    """

    kind: Step
    label: str
    layer: int | None = None
    x: str = ""
    out: str = ""
    branch: str = ""
    norm: str = ""
    post_norm: str = ""
    stream_scale: str = ""
    linears: tuple[str, ...] = ()
    q_norm: str = ""
    k_norm: str = ""
    taps: str = ""
    norm_spans_heads: bool = False
    norm_last: bool = False
    norm_values: bool = False
    borrowed: bool = False
    rope: RopeSpec | None = None
    scale: float = 1.0
    cap: float = 0.0
    factors: tuple[float, ...] = ()


def fuse(operations: Sequence[RecordedOperation]) -> list[ProgramStep]:
    """The steps that compute what was recorded.

    Args:
        operations: of `edgeq.model.recording`.

    Raises:
        UnsupportedError: the compiled engine has no step for an operation in this place.

    Example:
        >>> from edgeq.model.recording import RecordingBuilder
        >>> recorder = RecordingBuilder()
        >>> x = recorder.embed("embed")
        >>> h = recorder.norm("final_norm", x, "model.norm.weight")
        >>> _ = recorder.logits("logits", h, "lm_head.weight")
        >>> [step.kind.name for step in fuse(recorder.operations)]
        ['EMBED', 'NORM', 'HEAD']
    """
    return _Fusion(operations).run()


@dataclass
class _Fusion:
    """Goes through the operations, knowing what each buffer of rows holds.

    Attributes:
        rows: buffer of rows -> the value in it.
        quantized: the value whose quantized rows the next linears read.
        fused: names of the operations that are part of a step.
    """

    operations: Sequence[RecordedOperation]
    steps: list[ProgramStep] = field(default_factory=list)
    rows: dict[str, RecordedOperation] = field(default_factory=dict)
    quantized: RecordedOperation | None = None
    fused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._users: dict[RecordedOperation, list[RecordedOperation]] = {}
        for operation in self.operations:
            for value in operation.inputs:
                self._users.setdefault(value, []).append(operation)

    def run(self) -> list[ProgramStep]:
        for operation in self.operations:
            if operation.name in self.fused:
                continue
            if operation.kind == "embed":
                self._step(Step.EMBED, "embed", None, out="x", linears=(operation.weight,))
                self.rows["x"] = operation
                self._fuse(operation)
            elif operation.kind == "linear":
                self._linears(operation.inputs[0])
            elif operation.kind in ("attend", "attend_shared"):
                self._attention(operation)
            elif operation.kind == "short_conv":
                self._short_conv(operation)
            elif operation.kind == "delta_net":
                self._delta_net(operation)
            elif operation.kind == "output_gate":
                self._output_gate(operation)
            elif operation.kind == "route":
                self._experts(operation)
            elif operation.kind == "layer_embed":
                self._layer_inputs(operation)
            elif operation.kind == "gated":
                self._own_input(operation)
            elif operation.kind == "states":
                self._step(Step.STATES, "states", None, out="x")
                self.rows["x"] = operation
                self._fuse(operation)
            elif operation.kind == "add" and all(v.kind == "linear" for v in operation.inputs):
                self._sum(operation)
            elif operation.kind == "logits":
                self._head(operation)
        for operation in self.operations:
            if operation.name not in self.fused:
                raise _no_step(operation, "no step uses its result")
        return self.steps

    def _step(self, kind: Step, label: str, layer: int | None, **operands: Any) -> None:
        self.steps.append(ProgramStep(kind, label, layer, **operands))

    def _fuse(self, *operations: RecordedOperation) -> None:
        """Note that a step computes these."""
        self.fused.update(operation.name for operation in operations)

    def _linears(self, x: RecordedOperation) -> None:
        """Linears that share an input, with the activation if they are a gate and its factor."""
        group = tuple(user for user in self._users[x] if user.kind == "linear")
        weights = tuple(operation.weight for operation in group)
        layer, part = _layer_and_part(group[0])
        label, row = _STEP_LABELS.get(part, part), self._input(group[0])
        self._fuse(*group)
        for gated in self._users.get(group[0], ()):
            if gated.kind == "gated" and gated.inputs == group:
                self._step(Step.GATED, label, layer, x=row, out="gate", linears=weights)
                self.rows["gate"] = gated
                self._fuse(gated)
                return
        outputs = _LINEAR_ROWS.get(len(group))
        used_by = [user.kind for user in self._users.get(group[0], ())]
        if used_by == ["route"]:
            outputs = ("router",)
        elif used_by == ["heads"] and len(group) == 1:  # of attention to another layer's keys
            outputs = ("q",)
        elif used_by == ["gated"] and len(group) == 1:
            outputs = ("gate",)
        elif group[0].weight == LAYER_PROJECTION:
            outputs = ("inputs",)
        elif len(group) == 1 and self._is_needed(self.rows.get("branch")):
            outputs = ("q",)
        if outputs is None:
            raise _no_step(group[0], f"{len(group)} linears have the same input")
        self._step(Step.LINEARS, label, layer, x=row, out=outputs[0], linears=weights)
        self.rows.update(zip(outputs, group, strict=True))

    def _is_needed(self, value: RecordedOperation | None) -> bool:
        """Whether a step that is still to come reads a value."""
        users = () if value is None else self._users.get(value, ())
        return any(user.name not in self.fused for user in users)

    def _sum(self, add: RecordedOperation) -> None:
        """The sum of two linears, which becomes the residual stream."""
        one, other = (self._row(value) for value in add.inputs)
        self._fuse(add)
        self._step(Step.SUM, "sum", None, x=one, out="x", branch=other)
        self.rows["x"] = add

    def _head(self, logits: RecordedOperation) -> None:
        """The head, and what its result goes through: a factor, then a cap."""
        x, scale, cap, value = self._input(logits), 1.0, 0.0, logits
        self._fuse(logits)
        for kind in ("scaled", "capped"):
            following = [user for user in self._users.get(value, ()) if user.kind == kind]
            if following:
                (value,) = following
                scale, cap = (value.number, cap) if kind == "scaled" else (scale, value.number)
                self._fuse(value)
        self._step(
            Step.HEAD, "head", None, x=x, linears=(logits.weight,), scale=scale, cap=cap
        )  # fmt: skip

    def _attention(self, attend: RecordedOperation) -> None:
        """Attention, from the three linears to the values that it mixes."""
        chains: list[list[RecordedOperation]] = []
        for value, row in zip(attend.inputs, _LINEAR_ROWS[3], strict=False):
            chain: list[RecordedOperation] = []
            while value.kind != "linear":
                chain.insert(0, value)
                value = value.inputs[0]
            if self._row(value) != row:
                raise _no_step(attend, f"{value.name} is not in the rows of {row}")
            chains.append(chain)
            self._fuse(*chain)
        kinds = [tuple(operation.kind for operation in chain) for chain in chains]
        q_norm, q_rope = _norm_and_rope(chains[0])
        k_norm, k_rope = _norm_and_rope(chains[1]) if len(chains) > 1 else ("", None)
        borrowed = len(chains) == 1
        alike = borrowed or k_rope == (q_rope and q_rope.for_keys)
        of_values = kinds[2] if len(kinds) == 3 else ("heads",)
        if (
            kinds[0] not in _HEAD_CHAINS
            or kinds[1:2] != ([] if borrowed else [kinds[0]])
            or of_values not in _VALUE_CHAINS
            or not alike
        ):
            raise _no_step(attend, "q, k and v go through " + "; ".join(map(", ".join, kinds)))
        layer, part = _layer_and_part(attend)
        self._fuse(attend)
        self._step(
            Step.ATTENTION, _STEP_LABELS.get(part, part), layer, x="q", out="att", q_norm=q_norm,
            k_norm=k_norm, norm_spans_heads=kinds[0][0] == "norm", rope=q_rope,
            norm_last=kinds[0][-1] == "norm" and "rope" in kinds[0], borrowed=borrowed,
            norm_values=of_values[-1] == "plain_norm",
        )  # fmt: skip
        self.rows["att"] = attend

    def _short_conv(self, operation: RecordedOperation) -> None:
        """A short convolution of three linears."""
        for value, row in zip(operation.inputs, _LINEAR_ROWS[3], strict=True):
            if self._row(value) != row:
                raise _no_step(operation, f"{value.name} is not in the rows of {row}")
        layer, _ = _layer_and_part(operation)
        self._fuse(operation)
        # not "att": beyond the values of attention its rows must remain zeros
        self._step(Step.SHORT_CONV, "short_conv", layer, x="q", out="normed", taps=operation.weight)
        self.rows["normed"] = operation

    def _delta_net(self, operation: RecordedOperation) -> None:
        """A gated delta net of four linears."""
        for value, row in zip(operation.inputs, _LINEAR_ROWS[4], strict=True):
            if self._row(value) != row:
                raise _no_step(operation, f"{value.name} is not in the rows of {row}")
        layer, _ = _layer_and_part(operation)
        self._fuse(operation)
        self._step(Step.DELTA_NET, "delta_net", layer, x="q", out="mixed")
        self.rows["mixed"] = operation

    def _output_gate(self, operation: RecordedOperation) -> None:
        """Attention's result times the sigmoid of a linear, in place."""
        mix, gate = operation.inputs
        if (self._row(mix), self._row(gate)) != ("att", "g"):
            raise _no_step(operation, "its inputs are not attention and its fourth linear")
        layer, _ = _layer_and_part(operation)
        self._fuse(operation)
        self._step(Step.OUTPUT_GATE, "output_gate", layer, x="att", out="att", branch="g")
        self.rows["att"] = operation

    def _experts(self, route: RecordedOperation) -> None:
        """Experts, from the router's logits to their weighted sum."""
        combined = [user for user in self._users[route] if user.kind == "combine"]
        if len(combined) != 1 or self._row(route.inputs[0]) != "router":
            raise _no_step(route, "its experts are not summed up once")
        (combine,) = combined
        weights: list[str] = []
        inputs = set()
        for number, down in enumerate(combine.inputs[1:]):
            act = down.inputs[0]
            if (down.kind, act.kind) != ("linear", "gated"):
                raise _no_step(combine, f"{down.name} is not a linear of a gated value")
            gate, up = act.inputs
            rows = gate.inputs[0]
            if rows.kind != "to_expert" or up.inputs[0] is not rows or rows.number != number:
                raise _no_step(combine, f"{gate.name} and {up.name} are not of expert {number}")
            inputs.add(rows.inputs[0])
            weights += [gate.weight, up.weight, down.weight]
            self._fuse(rows, gate, up, act, down)
        if len(inputs) != 1 or self.quantized not in inputs:
            raise _no_step(combine, "the experts do not have the router's input")
        layer, part = _layer_and_part(combine)
        self._fuse(route, combine)
        self._step(
            Step.EXPERTS, _STEP_LABELS[part], layer, x=self._row(inputs.pop()), out="branch",
            linears=tuple(weights),
        )  # fmt: skip
        self.rows["branch"] = combine

    def _layer_inputs(self, embed: RecordedOperation) -> None:
        """The inputs of all layers, from the projection of the embeddings to the scaled sum."""
        chain = [embed]
        for kind in ("add", "scaled"):
            users = self._users.get(chain[-1], [])
            if [user.kind for user in users] != [kind]:
                raise _no_step(embed, f"its result is not {kind}, once")
            chain += users
        summed, result = chain[1:]
        value = summed.inputs[0]
        before: list[RecordedOperation] = []
        for kind in ("norm", "heads", "scaled"):
            if value.kind != kind:
                raise _no_step(embed, f"it is added to {value.name} ({value.kind}, not {kind})")
            before.append(value)
            value = value.inputs[0]
        if self._row(value) != "inputs":
            raise _no_step(embed, f"{value.name} is not the projection of the embeddings")
        self._fuse(*chain, *before)
        self._step(
            Step.LAYER_INPUTS, "layer_inputs", None, x="inputs", out="own",
            linears=(embed.weight,), norm=before[0].weight,
            factors=(before[2].number, result.number),
        )  # fmt: skip
        self.rows["inputs"] = result

    def _own_input(self, gated: RecordedOperation) -> None:
        """A layer's own input, times the activation of a linear."""
        gate, own = gated.inputs
        if own.kind != "layer_input" or self._row(gate) != "gate":
            raise _no_step(gated, "its inputs are not a linear and a layer's own input")
        if self._row(own.inputs[0]) != "inputs":
            raise _no_step(gated, f"{own.name} is not of the inputs of all layers")
        layer, _ = _layer_and_part(gated)
        self._fuse(gated, own)
        self._step(Step.OWN_INPUT, "own_input", layer, x="gate", out="own", branch="inputs")
        self.rows["own"], self.quantized = gated, gated

    def _input(self, consumer: RecordedOperation) -> str:
        """Quantize the input of linears; returns the buffer of its float rows."""
        value, (layer, part) = consumer.inputs[0], _layer_and_part(consumer)
        if self.quantized is not value:
            label = _INPUT_LABELS.get(part, _STEP_LABELS.get(part, part))
            if value in self.rows.values():
                self._step(Step.QUANTIZE, label, layer, x=self._row(value))
            else:
                self._norm(value, label, layer)
            self.quantized = value
        return self._row(value)

    def _norm(self, value: RecordedOperation, label: str, layer: int | None) -> None:
        """The residual stream, with the branch before it added, normed or as it is."""
        stream = value.inputs[0] if value.kind == "norm" else value
        branch, post_norm, scale, stream_scale, after = "", "", 1.0, "", stream
        self._fuse(value, stream)
        if self.rows.get("x") is not stream:
            if stream.kind == "weighted":
                stream_scale, stream = stream.weight, stream.inputs[0]
                self._fuse(stream)
            if stream.kind != "add" or stream.inputs[0] is not self.rows.get("x"):
                raise _no_step(stream, "it is not the residual stream plus one branch")
            added = stream.inputs[1]
            if added.kind == "scaled":
                self._fuse(added)
                scale, added = added.number, added.inputs[0]
            if added.kind == "norm":
                self._fuse(added)
                post_norm, added = added.weight, added.inputs[0]
            branch = self._row(added)
            if branch != "branch":
                raise _no_step(stream, f"{added.name} is not the result of a single linear")
        self.rows["x"] = after
        norm = ""
        if value is not after:
            norm, self.rows["normed"] = value.weight, value
        self._step(
            Step.NORM, label, layer, x="x", out="normed", branch=branch, norm=norm,
            post_norm=post_norm, scale=scale, stream_scale=stream_scale,
        )  # fmt: skip

    def _row(self, value: RecordedOperation) -> str:
        """The buffer of rows that holds a value."""
        for row, other in self.rows.items():
            if other is value:
                return row
        raise _no_step(value, "its result is not in memory when it is needed")


def _layer_and_part(operation: RecordedOperation) -> tuple[int | None, str]:
    """The layer of an operation and the last part of its name: (3, "q") of layers.3.q."""
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", operation.name)
    return (int(match[1]), match[2]) if match else (None, operation.name)


def _norm_and_rope(chain: list[RecordedOperation]) -> tuple[str, RopeSpec | None]:
    """The norm's weight and the rotation in a chain of operations, where there are any."""
    norm = "".join(operation.weight for operation in chain if operation.kind == "norm")
    return norm, next((operation.rope for operation in chain if operation.rope), None)


def _no_step(operation: RecordedOperation, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"the compiled engine has no step for {operation.name} ({operation.kind}): {why}; "
        "run this model with the NumPy backend (backend='numpy')"
    )
