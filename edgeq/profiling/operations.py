"""The time of every step of our decoder, and what timing them costs.

The decoder itself reads the clock at the end of every step (`edgeq.runtime.step_times`), so the
steps are those of the real run: same data, same order, same threads. Timed runs alternate with
plain ones, whose times show what the clock costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeq.core.errors import UnsupportedError
from edgeq.model.block import LAYER_PROJECTION, LAYER_TABLE, ROUTER, tensor_name
from edgeq.model.memory_layout import BATCH, layer_position_bytes, state_bytes
from edgeq.model.recording import GroupKind, linear_groups
from edgeq.profiling.candidates import EngineCandidate
from edgeq.profiling.session import Workload, random_tokens
from edgeq.runtime.engine import Engine

if TYPE_CHECKING:
    from edgeq.runtime.step_times import StepTimes

LEAST_SECONDS, MOST = 0.5, 50
"""Steps are timed for so long, or so many times: the median of short work that something else
interrupts now and then needs many repeats."""


@dataclass(frozen=True)
class Operation:
    """One operation of one layer.

    Args:
        layer: whose; None if it is of none.
        op: what it does: a step of the decoder, or an operator of a graph.
        name: of the graph's node; "" in our decoder.
        calls: how often it ran in a repeat; of a graph that was only counted, how often it occurs.
        ns: nanoseconds of all calls of each repeat; None where only their number is known.
        nbytes: bytes of weights and cache that the calls of a repeat had to read; None if unknown.
    """

    layer: int | None
    op: str
    name: str
    calls: int
    ns: tuple[int, ...] | None
    nbytes: int | None = None


@dataclass(frozen=True)
class Phase:
    """Operations of the same kind of work.

    Args:
        name: "prefill", "decode" or "run".
        units: tokens, or runs of a graph, in a repeat.
        rows: the operations.
        wall_ns: nanoseconds of the work as a whole, of each repeat; empty if it was only counted.
        plain_ns: nanoseconds of the same work without timing inside, in turns with the others;
            empty if that was not run.
    """

    name: str
    units: int
    rows: tuple[Operation, ...]
    wall_ns: tuple[int, ...] = ()
    plain_ns: tuple[int, ...] = ()

    @property
    def covered(self) -> float | None:
        """The part of the whole that the operations add up to: the median of the repeats."""
        known = [row.ns for row in self.rows if row.ns is not None]
        if not known or not self.wall_ns:
            return None
        return float(np.median(np.sum(known, axis=0) / np.array(self.wall_ns)))

    @property
    def cost(self) -> float | None:
        """What timing inside added, as a part of the plain time, by medians; below 0 is noise."""
        if not self.plain_ns or not self.wall_ns:
            return None
        return float(np.median(self.wall_ns) / np.median(self.plain_ns)) - 1

    @property
    def middle(self) -> int | None:
        """The repeat that took the median time: tables are of this one, so that they add up."""
        order = sorted(range(len(self.wall_ns)), key=lambda i: self.wall_ns[i])
        return order[(len(order) - 1) // 2] if order else None


@dataclass(frozen=True)
class Operations:
    """What is known of a subject's operations.

    Args:
        source: who told.
        phases: none if nothing could be told.
        reason: why times are missing; None if none is.
    """

    source: str
    phases: tuple[Phase, ...]
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "source": self.source,
            "reason": self.reason,
            "phases": [
                {
                    "name": p.name,
                    "units": p.units,
                    "wall_ns": list(p.wall_ns),
                    "plain_ns": list(p.plain_ns),
                    "rows": [asdict(row) for row in p.rows],
                }
                for p in self.phases
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Operations:
        """What `to_json` wrote."""
        phases = tuple(
            Phase(
                p["name"],
                p["units"],
                tuple(
                    Operation(**{**row, "ns": row["ns"] and tuple(row["ns"])}) for row in p["rows"]
                ),
                tuple(p["wall_ns"]),
                tuple(p["plain_ns"]),
            )
            for p in data["phases"]
        )
        return cls(data["source"], phases, data["reason"])


def engine_operations(candidate: EngineCandidate, workload: Workload) -> Operations:
    """The steps of reading the prompt and of generating, repeated as the workload says or more.

    Generation is greedy without Python in between, as `edgeq bench` times it.
    """
    source = "stamps of the decoder's own clock at the end of each step"
    engine = candidate.engine
    tokens = random_tokens(candidate, workload)
    before, prompt = tokens[: workload.n_depth], tokens[workload.n_depth :]
    phases = []
    try:
        if workload.n_prompt:
            phases.append(
                _phase(candidate, workload, "prefill", workload.n_prompt,
                       before, lambda: engine.forward(prompt))
            )  # fmt: skip
        if workload.n_gen:
            past = tokens if workload.n_prompt else before
            first = int(prompt[-1])
            phases.append(
                _phase(candidate, workload, "decode", workload.n_gen,
                       past, lambda: engine.greedy(first, workload.n_gen))
            )  # fmt: skip
    except UnsupportedError as err:
        return Operations(source, (), str(err))
    return Operations(source, tuple(phases))


def _phase(
    candidate: EngineCandidate,
    workload: Workload,
    name: str,
    units: int,
    past: Any,
    work: Callable[[], object],
) -> Phase:
    engine = candidate.engine
    plain: list[int] = []
    timed: list[int] = []
    step_times: list[StepTimes] = []
    with engine.timed_steps():  # a refusal comes before any work
        pass
    begun = time.monotonic()
    while len(timed) < workload.repeats or (
        len(timed) < MOST and time.monotonic() - begun < LEAST_SECONDS
    ):
        candidate.begin(past)
        plain.append(_ns(work))
        candidate.begin(past)
        with engine.timed_steps() as times:
            timed.append(_ns(work))
        step_times.append(times)
    decode = name == "decode"
    passes = units if decode else -(-units // BATCH)
    cached = len(past) + units // 2 if decode else None
    rows = []
    tensors, c = engine.model.tensors, engine.config
    read_by = {  # of a prompt, the last token alone needs logits
        "embed": (passes, tensors["model.embed_tokens.weight"].nbytes // c.vocab * units),
        "head": (passes if decode else 1, tensors[c.head_name].nbytes * (passes if decode else 1)),
    }
    if c.layer_input:
        read_by["layer_proj"] = (passes, tensors[LAYER_PROJECTION].nbytes * passes)
        read_by["layer_inputs"] = (passes, tensors[LAYER_TABLE].nbytes // c.vocab * units)
    sums = [times.ns for times in step_times]
    for layer, step in sums[0]:
        ns = tuple(run[layer, step] for run in sums)
        if layer is not None:
            read = _layer_bytes(engine, layer, step, cached)
            rows.append(Operation(layer, step, "", passes, ns, read and read * passes))
        elif any(ns):
            calls, nbytes = read_by.get(step, (passes, None))
            rows.append(Operation(None, step, "", calls, ns, nbytes))
    return Phase(name, units, tuple(rows), tuple(timed), tuple(plain))


_READ_BY: dict[str, GroupKind] = {
    "qkv": "attn_in",
    "in_proj": "attn_in",
    "o_proj": "attn_out",
    "gate_up": "mlp_in",
    "down_proj": "mlp_out",
    "input_gate": "own_in",
    "input_proj": "own_out",
}
"""Steps of a layer -> the kind of group of matrices that they read."""


def _layer_bytes(engine: Engine, layer: int, step: str, cached: int | None) -> int | None:
    """Bytes of weights, or of the cache of so many positions, that one call of a step reads."""
    c = engine.config
    if step in ("attention", "short_conv", "delta_net") and cached is not None:
        nbytes = layer_position_bytes(c, layer, engine.kv_bits)
        return c.blocks[layer].positions_seen(cached) * nbytes + state_bytes(c, layer)
    if step == "router":
        return engine.model.tensors[tensor_name(layer, ROUTER)].nbytes
    if step == "experts":  # of a prompt it depends on which experts its tokens go through
        return None if cached is None else _expert_bytes(engine, layer)
    if step not in _READ_BY:
        return None
    groups = (group for group in linear_groups(c) if group.layer == layer)
    names = next(group.linears for group in groups if group.kind == _READ_BY[step])
    return sum(engine.model.tensors[name].nbytes for name in names)


def _expert_bytes(engine: Engine, layer: int) -> int:
    """Bytes of the experts of a layer that one token goes through."""
    c, tensors = engine.config, engine.model.tensors
    groups = (group for group in linear_groups(c) if group.layer == layer)
    names = (name for group in groups if group.expert is not None for name in group.linears)
    return int(sum(tensors[name].nbytes * c.tokens_share(name) for name in names))


def _ns(work: Callable[[], object]) -> int:
    start = time.monotonic_ns()
    work()
    return time.monotonic_ns() - start
