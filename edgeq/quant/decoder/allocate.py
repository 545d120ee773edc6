"""Choose the best scheme for every tensor within a budget of bytes.

Each tensor gets one of its candidate schemes; bytes and losses are additive:

    minimize    sum_t loss_t(scheme_t)
    subject to  sum_t bytes_t(scheme_t) <= budget

This is the multiple-choice knapsack problem. It is solved exactly by dynamic programming over the
bytes, in units of their greatest common divisor. If that gives more than `UNITS` steps, the units
are coarser and sizes are rounded up, so that the budget is never exceeded; the bytes that are left
over are then spent on the best upgrades, one at a time. The Pareto front that is shown beside the
solution holds the Lagrangian optima: for each price of a byte the choice that minimizes
loss + price * bytes.

Source: Kellerer, Pferschy, Pisinger 2004, "Knapsack Problems", chapter 11; the Lagrangian for bits
is Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.core.errors import DoesNotFitError, UsageError
from edgeq.formats.schemes import Scheme, parse_scheme
from edgeq.model.artifact_layout import TensorLayout
from edgeq.quant.decoder.sensitivity import Sensitivity
from edgeq.quant.rules import OUTER, Rule

UNITS = 100_000
"""Most steps of the dynamic programming."""


@dataclass(frozen=True)
class ParetoPoint:
    """A trade-off between size and loss.

    Args:
        nbytes: bytes of all tensors.
        bpw: bits per weight over all tensors.
        loss: sum of the tensors' losses, in the unit of the sensitivities.
    """

    nbytes: int
    bpw: float
    loss: float


@dataclass(frozen=True)
class Allocation:
    """The schemes chosen for a budget.

    Args:
        schemes: name of every matrix whose scheme was free -> its scheme.
        chosen: size and loss of these schemes.
        front: the Lagrangian optima from the smallest to the largest. No other choice of the same
            size has a lower loss.
    """

    schemes: Mapping[str, Scheme]
    chosen: ParetoPoint
    front: tuple[ParetoPoint, ...]

    def rules(self) -> tuple[Rule, ...]:
        """A rule for every matrix whose scheme was free."""
        return tuple(Rule(f"^{re.escape(name)}$", scheme) for name, scheme in self.schemes.items())


def allocate(
    sensitivity: Sensitivity,
    shapes: Mapping[str, Sequence[int]],
    fixed: Mapping[str, Scheme],
    *,
    nbytes: int | None = None,
    bpw: float | None = None,
) -> Allocation:
    """Choose a scheme for every tensor whose scheme is free.

    Args:
        sensitivity: losses by tensor and scheme.
        shapes: shapes of all tensors of the artifact, including vectors, because all take bytes.
        fixed: schemes of the tensors without a choice: vectors, and matrices with a rule.
        nbytes, bpw: the budget, as one of the two: bytes of all tensors, or their bits per weight
            as `edgeq.quant.Summary.bpw` counts them.

    Raises:
        DoesNotFitError: even the smallest schemes need more than the budget.
        UsageError: none or both of the budgets are given, or a free tensor has no sensitivities.
    """
    if (nbytes is None) == (bpw is None):
        raise UsageError(
            f"nbytes is {nbytes} and bpw is {bpw}; give one budget: bytes, or bits per weight"
        )
    weights = sum(math.prod(shape) for shape in shapes.values())
    budget = int(bpw * weights / 8) if bpw is not None else int(nbytes or 0)
    fixed_bytes = total_bytes(fixed, shapes)
    free = [name for name in shapes if name not in fixed]
    tables = [_table(name, shapes[name], sensitivity) for name in free]
    least = fixed_bytes + sum(table.sizes[0] for table in tables)
    if least > budget:
        raise DoesNotFitError(
            f"the smallest schemes need {least} bytes ({8 * least / weights:.2f} bits per weight), "
            f"and the budget is {budget} ({8 * budget / weights:.2f}); allow more, "
            "or fix fewer tensors with --tensor-type"
        )

    def point(choice: Sequence[int]) -> ParetoPoint:
        size = fixed_bytes + sum(t.sizes[c] for t, c in zip(tables, choice, strict=True))
        loss = math.fsum(t.losses[c] for t, c in zip(tables, choice, strict=True))
        return ParetoPoint(size, 8 * size / weights, loss)

    choice = _solve(tables, budget - fixed_bytes)
    schemes = {name: t.schemes[c] for name, t, c in zip(free, tables, choice, strict=True)}
    front = tuple(point(c) for c in _lagrangian(tables))
    return Allocation(schemes, point(choice), front)


@dataclass(frozen=True)
class Uniform:
    """A uniform choice: one scheme for the matrices of the layers and one for embedding and head.

    Args:
        inner: scheme of the layers' matrices.
        outer: scheme of embedding and head; None if the user gave them one.
        allocation: the same choice for each matrix whose scheme was free.
    """

    inner: Scheme
    outer: Scheme | None
    allocation: Allocation

    def __str__(self) -> str:
        if self.outer is None:
            return str(self.inner)
        return f"{self.inner} with embedding and head in {self.outer}"


def uniform(
    sensitivity: Sensitivity,
    shapes: Mapping[str, Sequence[int]],
    fixed: Mapping[str, Scheme],
    *,
    nbytes: int,
    front: tuple[ParetoPoint, ...] = (),
) -> Uniform | None:
    """The uniform choice with the smallest loss within a budget.

    Args:
        sensitivity, shapes, fixed, nbytes: as for `allocate`.
        front: the Pareto front to return with the choice.

    Returns:
        the choice; None if no pair of schemes fits, or if no matrix of the layers has a choice.
    """
    weights = sum(math.prod(shape) for shape in shapes.values())
    fixed_bytes = total_bytes(fixed, shapes)
    free = [name for name in shapes if name not in fixed]
    outer = [name for name in free if re.match(OUTER, name)]
    inner = [name for name in free if name not in outer]
    best: Uniform | None = None
    outer_totals = _totals(outer, shapes, sensitivity) if outer else {"": (0, 0.0)}
    for inner_text, (inner_bytes, inner_loss) in _totals(inner, shapes, sensitivity).items():
        for outer_text, (outer_bytes, outer_loss) in outer_totals.items():
            size = fixed_bytes + inner_bytes + outer_bytes
            loss = inner_loss + outer_loss
            if size > nbytes or (best is not None and loss >= best.allocation.chosen.loss):
                continue
            scheme = parse_scheme(inner_text)
            chosen = dict.fromkeys(inner, scheme)
            outer_scheme = parse_scheme(outer_text) if outer else None
            if outer_scheme is not None:
                chosen |= dict.fromkeys(outer, outer_scheme)
            point = ParetoPoint(size, 8 * size / weights, loss)
            schemes = {name: chosen[name] for name in free}
            best = Uniform(scheme, outer_scheme, Allocation(schemes, point, front))
    return best


def total_bytes(schemes: Mapping[str, Scheme], shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes of some tensors.

    Args:
        schemes: name -> scheme of these tensors.
        shapes: name -> shape of at least these tensors.
    """
    return sum(TensorLayout(scheme, tuple(shapes[name])).nbytes for name, scheme in schemes.items())


def _totals(
    names: Sequence[str], shapes: Mapping[str, Sequence[int]], sensitivity: Sensitivity
) -> dict[str, tuple[int, float]]:
    """Total bytes and loss of some tensors, for each scheme that all of them can have."""
    tables = [sensitivity.losses.get(name, {}) for name in names]
    return {
        text: (
            sum(TensorLayout(parse_scheme(text), tuple(shapes[name])).nbytes for name in names),
            math.fsum(table[text] for table in tables),
        )
        for text in (tables[0] if tables else ())
        if all(text in table for table in tables)  # not if its groups are longer than some rows
    }


@dataclass(frozen=True)
class _Table:
    """The choices of a tensor by rising size and falling loss, without dominated choices."""

    schemes: tuple[Scheme, ...]
    sizes: tuple[int, ...]
    losses: tuple[float, ...]


def _table(name: str, shape: Sequence[int], sensitivity: Sensitivity) -> _Table:
    losses = sensitivity.losses.get(name)
    if not losses:
        raise UsageError(
            f"the sensitivity file has no entry for {name}; measure again with 'edgeq sensitivity'"
        )
    rows = []
    for text, loss in losses.items():
        scheme = parse_scheme(text)
        rows.append((TensorLayout(scheme, tuple(shape)).nbytes, loss, scheme))
    rows.sort(key=lambda row: row[:2])
    kept: list[tuple[int, float, Scheme]] = []
    for row in rows:
        if not kept or row[1] < kept[-1][1]:
            kept.append(row)
    sizes, falling, schemes = zip(*kept, strict=True)
    return _Table(schemes, sizes, falling)


def _solve(tables: Sequence[_Table], budget: int) -> list[int]:
    """Indices of the optimal choices. The budget must be at least the sum of the smallest sizes."""
    extras = [[size - table.sizes[0] for size in table.sizes] for table in tables]
    room = budget - sum(table.sizes[0] for table in tables)
    room = min(room, sum(extra[-1] for extra in extras))
    unit = max(math.gcd(*(e for extra in extras for e in extra)), 1)
    unit = max(unit, -(-room // UNITS))
    steps = room // unit
    best = np.zeros(steps + 1)
    picks = []
    for table, extra in zip(tables, extras, strict=True):
        total = np.full(steps + 1, np.inf)
        pick = np.zeros(steps + 1, np.int8)
        for index, (size, loss) in enumerate(zip(extra, table.losses, strict=True)):
            taken = -(-size // unit)
            if taken > steps:
                break
            trial = best[: steps + 1 - taken] + loss
            better = trial < total[taken:]
            total[taken:][better] = trial[better]
            pick[taken:][better] = index
        best = total
        picks.append(pick)
    choice, left = [], steps
    for pick, extra in zip(reversed(picks), reversed(extras), strict=True):
        index = int(pick[left])
        choice.append(index)
        left -= -(-extra[index] // unit)
    choice.reverse()
    spare = room - sum(extra[c] for extra, c in zip(extras, choice, strict=True))
    return _upgraded(tables, choice, spare)


def _upgraded(tables: Sequence[_Table], choice: list[int], spare: int) -> list[int]:
    """Spend bytes that are left over on upgrades, those with the best gain per byte first."""
    while True:
        best, gain = None, 0.0
        for at, (table, now) in enumerate(zip(tables, choice, strict=True)):
            for index in range(now + 1, len(table.sizes)):
                cost = table.sizes[index] - table.sizes[now]
                if cost > spare:
                    break
                if (table.losses[now] - table.losses[index]) / cost > gain:
                    gain = (table.losses[now] - table.losses[index]) / cost
                    best = at, index, cost
        if best is None:
            return choice
        at, index, cost = best
        choice[at] = index
        spare -= cost


def _lagrangian(tables: Sequence[_Table]) -> list[list[int]]:
    """The choices on the lower convex hull of (bytes, loss), from the smallest to the largest."""
    moves = []
    for at, table in enumerate(tables):
        for start, stop in _hull(table):
            cost = table.sizes[stop] - table.sizes[start]
            moves.append(((table.losses[start] - table.losses[stop]) / cost, at, stop))
    choice = [0] * len(tables)
    front = [list(choice)]
    # largest gain per byte first; hulls are convex, so the moves of each tensor stay in order
    for _, at, stop in sorted(moves, key=lambda move: -move[0]):
        choice[at] = stop
        front.append(list(choice))
    return front


def _hull(table: _Table) -> list[tuple[int, int]]:
    """The edges of the convex hull of a tensor's choices, as pairs of indices."""
    corners = [0]
    while corners[-1] < len(table.sizes) - 1:
        now = corners[-1]
        corners.append(
            max(
                range(now + 1, len(table.sizes)),
                key=lambda i: (
                    (table.losses[now] - table.losses[i]) / (table.sizes[i] - table.sizes[now])
                ),
            )
        )
    return list(itertools.pairwise(corners))
