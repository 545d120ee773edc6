"""The best scheme for every tensor within a budget of bytes.

Each tensor picks one of its candidate schemes; bytes and losses add up:

    minimize    sum_t loss_t(scheme_t)
    subject to  sum_t bytes_t(scheme_t) <= budget

which is the multiple-choice knapsack. It is solved exactly by dynamic programming over the bytes,
in units of their greatest common divisor; where that makes too fine a grid, in coarser units with
sizes rounded up, so that the budget is never passed, and what is left over then buys the best
upgrades one by one. The front that is shown beside it holds the Lagrangian optima: for each price
of a byte the choice that minimizes loss + price * bytes.

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
"""Most steps of the grid of bytes."""


@dataclass(frozen=True)
class ParetoPoint:
    """A trade-off between size and loss.

    Args:
        nbytes: of all tensors.
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
        schemes: the scheme of every matrix that was free.
        chosen: their size and loss.
        front: the Lagrangian optima from smallest to largest; no loss among the choices that
            they span is lower at their sizes.
    """

    schemes: Mapping[str, Scheme]
    chosen: ParetoPoint
    front: tuple[ParetoPoint, ...]

    def rules(self) -> tuple[Rule, ...]:
        """A rule for every matrix that was free."""
        return tuple(Rule(f"^{re.escape(name)}$", scheme) for name, scheme in self.schemes.items())


def allocate(
    sensitivity: Sensitivity,
    shapes: Mapping[str, Sequence[int]],
    fixed: Mapping[str, Scheme],
    *,
    nbytes: int | None = None,
    bpw: float | None = None,
) -> Allocation:
    """Choose a scheme for every tensor that has a choice.

    Args:
        sensitivity: losses by tensor and scheme.
        shapes: every tensor of the artifact, vectors too: all count as bytes.
        fixed: tensors that have no choice: vectors, and matrices the user gave a scheme.
        nbytes, bpw: the budget, one of the two: bytes of all tensors, or their bits per weight
            (as `edgeq.quant.Summary.bpw` counts them).

    Raises:
        DoesNotFitError: even the smallest schemes take more.
        UsageError: not just one budget, or a free tensor without sensitivities.
    """
    if (nbytes is None) == (bpw is None):
        raise UsageError("give one budget: bytes, or bits per weight")
    weights = sum(math.prod(shape) for shape in shapes.values())
    budget = int(bpw * weights / 8) if bpw is not None else int(nbytes or 0)
    fixed_bytes = sum(
        TensorLayout(scheme, tuple(shapes[name])).nbytes for name, scheme in fixed.items()
    )
    free = [name for name in shapes if name not in fixed]
    tables = [_table(name, shapes[name], sensitivity) for name in free]
    least = fixed_bytes + sum(table.sizes[0] for table in tables)
    if least > budget:
        raise DoesNotFitError(
            f"the smallest schemes take {least} bytes ({8 * least / weights:.2f} bits per weight) "
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
        inner: of the layers' matrices.
        outer: of embedding and head; None where the user gave them one.
        allocation: the same for each matrix that was free.
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
    """The pair of schemes, of layers and of embedding and head, that loses least within a budget.

    Args:
        sensitivity, shapes, fixed, nbytes: as for `allocate`.
        front: the Pareto front to return with it.

    Returns:
        None where no pair fits, or where no matrix of the layers has a choice.
    """
    weights = sum(math.prod(shape) for shape in shapes.values())
    fixed_bytes = sum(
        TensorLayout(scheme, tuple(shapes[name])).nbytes for name, scheme in fixed.items()
    )
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


def _totals(
    names: Sequence[str], shapes: Mapping[str, Sequence[int]], sensitivity: Sensitivity
) -> dict[str, tuple[int, float]]:
    """Bytes and loss of some tensors together, in each scheme that all of them can have."""
    tables = [sensitivity.losses.get(name, {}) for name in names]
    return {
        text: (
            sum(TensorLayout(parse_scheme(text), tuple(shapes[name])).nbytes for name in names),
            math.fsum(table[text] for table in tables),
        )
        for text in (tables[0] if tables else ())
        if all(text in table for table in tables)  # else its groups are longer than some rows
    }


@dataclass(frozen=True)
class _Table:
    """A tensor's choices: sizes rise, losses fall; what is larger and no better is left out."""

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
    """Indices of the optimal choices; ``budget`` is at least the smallest sizes' sum."""
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
    """Spend the bytes that rounding to units left over on the best gain per byte that fits."""
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
    # dearest gains first; hulls are convex, so each tensor's moves come in their order
    for _, at, stop in sorted(moves, key=lambda move: -move[0]):
        choice[at] = stop
        front.append(list(choice))
    return front


def _hull(table: _Table) -> list[tuple[int, int]]:
    """Steps from corner to corner of a tensor's own hull, as pairs of indices."""
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
