"""The error that the outputs of a correct conversion may have, measured on the source itself.

The reference outputs are those of the QDQ file: its integers, with each operator computed in
float32. The same graph is then run with the rounding errors that the target's runtime is known to
make (`edgeq.converters.validate.graph_rounding`). The change of an output, multiplied by one of
`FACTORS`, is its tolerance. So the tolerance is wide for a model that amplifies small errors, and
narrow for one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.validate.graph_decisions import decision
from edgeq.converters.validate.graph_rounding import perturbed
from edgeq.core.errors import FormatError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.execute import Session
from edgeq.graph.feeds import Feeds
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators import BOUNDED, VIEWS

Kind = Literal["float", "half", "static", "dynamic"]

FACTORS: Mapping[Kind, float] = {"float": 20.0, "half": 3.0, "static": 2.5, "dynamic": 3.0}
"""How the target computes -> how many times the measured change is allowed."""
FLOORS: Mapping[Kind, float] = {"float": 2e-6, "half": 1e-3, "static": 2e-6, "dynamic": 2e-6}
"""Relative error that is always allowed: the precision of the last operator."""
MOST: Mapping[Kind, float] = {"float": 0.01, "half": 0.1, "static": 0.3, "dynamic": 1.0}
"""The largest relative error that is ever allowed, however much a model amplifies small errors."""
SENSITIVE = 0.1
"""Tolerance from which on the report says that the outputs can only reveal large faults."""
VANISHED = 0.01
"""Part of an output's power that float16 may make zero before the report says so."""
OUT_OF_HALF = (
    "the model computes with values that float16 does not hold (it makes large ones infinite and "
    "small ones zero); convert with --set precision=float32"
)
_MOVES = VIEWS | {"Cast", "Identity", "Transpose", "Concat", "Slice", "Split"}
_DRAWS = 2
"""Runs with random errors."""
_VALUES = 20000
"""With fewer quantized values than this there are more runs, up to `_MOST_DRAWS`."""
_MOST_DRAWS = 8
_TIE = 6.0
"""A decision may be another one if it is less than so many deviations of its scores from a tie."""


@dataclass
class OutputError:
    """The error of one output over all inputs, and the error that is accepted.

    Args:
        error: root mean square of the difference over that of the reference; for integers, the
            share that differs and is not a tie.
        allowed: the tolerance.
        price: the change by the target's own rounding, measured on the source; as ``error``.
        note: a further remark, or "".
    """

    error: float
    allowed: float
    price: float = 0.0
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; one that is not a number is not."""
        return self.error <= self.allowed


@dataclass
class _Sums:
    """Sums over the elements of an output."""

    wrong: float = 0.0
    size: float = 0.0
    moved: float = 0.0
    largest: float = 0.0
    different: int = 0
    rival_different: int = 0
    count: int = 0
    bad: str = ""
    overflow: bool = False
    vanished: float = 0.0
    scores: list[float] = field(default_factory=list)
    gaps: list[NDArray[np.float64]] = field(default_factory=list)


class OutputTolerance:
    """The source and perturbed copies of it, with which a target's outputs are compared.

    Args:
        graph: the source, quantized or not.
        kind: how the target computes.
        half: whether its floats are float16.
    """

    def __init__(self, graph: Graph, kind: Kind, *, half: bool = False) -> None:
        self._graph, self._kind = graph, kind
        self._half = half or kind == "half"
        self._decided = {name: made for name in graph.outputs if (made := decision(graph, name))}
        watch = [score for made in self._decided.values() for score in made.scores]
        self._truth = Session(graph, watch, optimize=False)
        values = sum(int(np.prod(graph.info(name).shape)) for name in graph.quants)
        draws = _DRAWS
        if kind == "static":
            draws = int(np.clip(_VALUES // max(values, 1), _DRAWS, _MOST_DRAWS))
        elif self._half:
            draws = 1
        self._rivals = [
            Session(
                perturbed(graph, seed=seed, half=self._half, static=kind == "static",
                          dynamic=kind == "dynamic"),
                watch, optimize=False,
            )
            for seed in range(draws)
        ]  # fmt: skip
        self._sums = {name: _Sums() for name in graph.outputs}
        self.top1: list[bool] = []
        """Whether the largest score of each sample is the same, ties counted as the same."""

    def add(self, feeds: Feeds, got: Feeds) -> None:
        """Compare the target's outputs for an input.

        Raises:
            FormatError: an output has another shape.
        """
        want = self._truth(feeds)
        rivals = [run(feeds) for run in self._rivals]
        for name in self._graph.outputs:
            if got[name].shape != want[name].shape:
                raise FormatError(
                    f"the output {name} is {list(got[name].shape)}, its source's is "
                    f"{list(want[name].shape)}"
                )
            if want[name].dtype.kind == "f":
                self._floats(name, want[name], got[name], [r[name] for r in rivals])
            else:
                self._whole(name, want, got[name], rivals)
        self._top(want, got)

    def _floats(
        self, name: str, want: NDArray[Any], got: NDArray[Any], rivals: list[NDArray[Any]]
    ) -> None:
        s, a, b = self._sums[name], want.astype(np.float64), got.astype(np.float64)
        sound = np.isfinite(a)
        if not np.isfinite(b[sound]).all():
            s.bad = "is not finite where the source's is"
            return
        a, b = a[sound], b[sound]
        s.count += a.size
        s.wrong += float(np.square(b - a).sum())
        s.size += float(np.square(a).sum())
        s.largest = max(s.largest, float(np.abs(b - a).max(initial=0)))
        for rival in rivals:
            c = rival.astype(np.float64)[sound]
            if not np.isfinite(c).all():
                s.overflow = True
                continue
            s.moved += float(np.square(c - a).sum()) / len(rivals)
            if self._half:
                s.vanished += float(np.square(a[c == 0]).sum()) / len(rivals)

    def _whole(self, name: str, want: Feeds, got: NDArray[Any], rivals: Sequence[Feeds]) -> None:
        s = self._sums[name]
        s.count += want[name].size
        unequal = got != want[name]
        s.different += int(unequal.sum())
        s.rival_different = max(
            s.rival_different, max(int((r[name] != want[name]).sum()) for r in rivals)
        )
        made = self._decided.get(name)
        if made is None:
            return
        for score in made.scores:
            right = want[score].astype(np.float64)
            for rival in rivals:
                moved = rival[score].astype(np.float64) - right
                s.scores.append(float(np.sqrt(np.mean(np.square(moved)))))
        if unequal.any():
            s.gaps.append(made.gaps(want, got)[unequal.reshape(-1)])

    def _top(self, want: Feeds, got: Feeds) -> None:
        name = self._graph.outputs[0]
        scores = want[name]
        if scores.ndim == 2 and scores.shape[1] > 1 and scores.dtype.kind == "f":
            self.top1 += list(got[name].argmax(1) == scores.argmax(1))

    def found(self) -> dict[str, OutputError]:
        """Output -> what was found."""
        return {name: self._judged(name, s) for name, s in self._sums.items()}

    def _judged(self, name: str, s: _Sums) -> OutputError:
        if s.bad:
            return OutputError(float("inf"), 0.0, note=s.bad)
        if not s.count:
            return OutputError(0.0, 0.0)
        if self._graph.info(name).dtype[:5] != "float":
            return self._judged_whole(name, s)
        rms = float(np.sqrt(s.size / s.count))
        scale = rms or 1.0
        error, moved = (float(np.sqrt(part / s.count)) for part in (s.wrong, s.moved))
        allowed = FACTORS[self._kind] * moved + FLOORS[self._kind] * rms
        maker = _maker(self._graph, name)
        if maker is not None and maker.op in BOUNDED:
            allowed += 1e-3 if self._half else 1e-6
        allowed = min(allowed, MOST[self._kind] * rms) if rms else allowed
        note = ""
        if self._kind != "dynamic" and allowed >= SENSITIVE * scale:
            note = (
                f"the rounding errors of a right runtime change {moved / scale:.2g} of it, so the "
                "outputs show coarse faults only"
            )
        if s.overflow or s.vanished > VANISHED * s.size:
            note = OUT_OF_HALF
        quant = self._graph.quants.get(name)
        if quant is not None and self._kind == "static":
            # whole steps of its grid are all that an output can differ by
            one = quant.scale * 1.01
            if s.largest <= one:
                allowed = max(allowed, error)
        return OutputError(error / scale, float(allowed / scale), moved / scale, note)

    def _judged_whole(self, name: str, s: _Sums) -> OutputError:
        if s.gaps:
            tie = _TIE * max(s.scores, default=0.0)
            if self._kind == "static":  # scores move by whole steps of their grid
                tie = max([tie, *(1.01 * q.scale for q in self._grids(name))])
            faults = int((np.concatenate(s.gaps) > tie).sum())
            return OutputError(faults / s.count, 0.0)
        rival = s.rival_different
        allowed = max(1.5 * rival, rival + 3 * rival**0.5)  # as counts of rare events scatter
        return OutputError(s.different / s.count, allowed / s.count)

    def _grids(self, name: str) -> list[QuantParams]:
        """The grids of the scores that an output decides on."""
        grids = []
        for score in self._decided[name].scores:
            while score not in self._graph.quants:
                maker = self._graph.producers.get(score)
                if maker is None or maker.op not in _MOVES:
                    break
                score = maker.inputs[0]
            grids.append(self._graph.quants.get(score))
        return [quant for quant in grids if quant is not None]


def _maker(graph: Graph, name: str) -> Node | None:
    """The node that computes a value, behind those that only move it."""
    node = graph.producers.get(name)
    while node is not None and node.op in _MOVES and node.inputs[0] in graph.producers:
        node = graph.producers[node.inputs[0]]
    return node
