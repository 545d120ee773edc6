"""Second moments of a matrix's inputs: what a rounding error in its weights costs in its outputs.

    H = mean over tokens of x x^T      [K, K]
    error of Ŵ = tr((W - Ŵ) H (W - Ŵ)^T), the mean squared error of the outputs, summed over rows

Held: H, and the cross moments where they are wanted, in float32 (256 MiB each at K = 8192).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.core.errors import UsageError
from edgeq.quant.kernels.products import product, row_products, total, upper_inverse, upper_root

T = TypeVar("T")

STRIP = 256
"""Rows of H computed at once: a product of these is held besides H itself, and stays in the
second-level cache while it is added."""
ERROR_ROWS = 1024
"""Rows whose errors are summed at once."""
PANEL = 256
"""Columns solved for at once."""
EXACT_K = 4096
"""Up to this K, H is factored in float64."""
TARGET_DAMPING = 10.0
"""Added to H's diagonal, in parts of its mean and times inputs per token (K / n), where weights are
fitted to make up for errors upstream. What is fitted is the noise of a finite text too, the more so
the fewer tokens there are for each weight of a row: with a damping that does not grow with K / n, a
model comes much nearer to the float one on the text that it was calibrated on, and less near on any
other."""


class Hessian:
    """Second moments of a matrix's inputs, taken up piece by piece.

    Args:
        k: width of the inputs.
        crossed: take up the cross moments with the float model's inputs too.

    Attributes:
        n: tokens seen.
    """

    def __init__(self, k: int, *, crossed: bool = False) -> None:
        self.n = 0
        self._moments = np.zeros((k, k), np.float32)
        self._cross = np.zeros((k, k), np.float32) if crossed else None
        self._shift: NDArray[np.float32] | None = None
        self._means = False
        self._inverse: Factor | None = None
        self._shared: tuple[Hashable, Any] | None = None

    @classmethod
    def of(cls, matrix: NDArray[np.float32]) -> Hessian:
        """Second moments that are known already.

        Args:
            matrix: H, float32 [K, K]; held, not copied.
        """
        known = cls(0)
        known.n, known._moments, known._means = 1, matrix, True
        return known

    def add(
        self,
        x: NDArray[np.float32],
        x_float: NDArray[np.float32] | None = None,
        shift: NDArray[np.float32] | None = None,
    ) -> None:
        """Take up some tokens.

        Args:
            x: inputs in the model as it is quantized so far, float32 [t, K].
            x_float: the same tokens' inputs in the float model, float32 [t, K], if ``crossed``.
            shift: what the outputs should make up for besides, float32 [t, N]: at the end of a
                residual branch, the float model's hidden state less that of this one.

        Raises:
            UsageError: another width, or x_float missing or not wanted.
        """
        k = len(self._moments)
        if x.shape[1] != k:
            raise UsageError(f"inputs have a width of {x.shape[1]}; this Hessian is of {k}")
        if (x_float is None) != (self._cross is None):
            wanted = "needs the float model's inputs too" if x_float is None else "is not crossed"
            raise UsageError(f"this Hessian {wanted}; make it with crossed={x_float is not None}")
        self._as_sums()
        for a in range(0, k, STRIP):
            b = min(a + STRIP, k)
            # the lower triangle; `_as_means` mirrors it
            product(x[:, a:b].T, x[:, :b].T, self._moments[a:b, :b], accumulate=True)
            if self._cross is not None and x_float is not None:
                product(x_float[:, a:b].T, x.T, self._cross[a:b], accumulate=True)
        if shift is not None:
            if self._shift is None:
                self._shift = np.zeros((shift.shape[1], k), np.float32)
            product(shift.T, x.T, self._shift, accumulate=True)
        self.n += len(x)
        self._shared = None

    @property
    def matrix(self) -> NDArray[np.float32]:
        """H, float32 [K, K]; not a copy."""
        self._as_means()
        return self._moments

    @property
    def cross(self) -> NDArray[np.float32] | None:
        """Mean of x_float x^T, float32 [K, K], if ``crossed``; not a copy."""
        self._as_means()
        return self._cross

    @property
    def has_target(self) -> bool:
        """Whether there is something to make up for, and `target` is not the weights themselves."""
        return self._cross is not None or self._shift is not None

    @property
    def diagonal(self) -> NDArray[np.float32]:
        """Mean square of each input, float32 [K]."""
        return np.diagonal(self.matrix).copy()

    def target(self, w: NDArray[np.float32]) -> NDArray[np.float32]:
        """The weights that rounding should come near to.

        Those whose outputs, given the inputs of the quantized model, are nearest to what ``w``
        gives for the float model's, plus the shift: ``W + (W (C - H) + D) (H + aI)^-1``, with the
        moments C of x_float x^T and D of shift x^T. They are ``w`` itself where neither is known.

        Source: the least-squares problem of Zhang et al. 2025, "Qronos" (arXiv:2505.11695), whose
        real-valued solution comes before any rounding.

        Args:
            w: float32 [N, K].
        """
        self._as_means()
        if not self.has_target:
            return w
        wanted = np.zeros_like(w)
        if self._cross is not None:
            product(w, self._cross.T, wanted, accumulate=True)
            product(w, self._moments, wanted, accumulate=True, negate=True)
        if self._shift is not None:
            wanted += self._shift
        if self._inverse is None:
            damping = TARGET_DAMPING * len(self._moments) / self.n
            self._inverse = Factor.of(damped(self._moments, damping))
        return w + self._inverse.solve(wanted)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returns; kept for the next matrix of the group, which has the same key.

        One result is kept, until other inputs are taken up or another key is asked for.
        """
        if self._shared is None or self._shared[0] != key:
            self._shared = None
            self._shared = key, make()
        return cast(T, self._shared[1])

    def settle(self) -> None:
        """Give up what only `target` needs, once the targets of all matrices are known."""
        self._cross = self._shift = self._inverse = None

    def _as_sums(self) -> None:
        if self._means:
            self._scale(np.float32(self.n))
            self._means = False
            self._inverse = None

    def _as_means(self) -> None:
        if self._means or not self.n:
            return
        self._scale(np.float32(1 / self.n))
        for a in range(0, len(self._moments), STRIP):
            b = a + STRIP
            block = self._moments[a:b, a:b]
            block[:] = np.tril(block) + np.tril(block, -1).T
            self._moments[a:b, b:] = self._moments[b:, a:b].T
        self._means = True

    def _scale(self, factor: np.float32) -> None:
        for matrix in (self._moments, self._cross, self._shift):
            if matrix is not None:
                matrix *= factor


def weighted_error(
    w: NDArray[np.float32], w_hat: NDArray[np.float32], hessian: Hessian | None
) -> float:
    """``tr((W - Ŵ) H (W - Ŵ)^T)``: the mean squared error of the outputs, summed over rows.

    Args:
        w, w_hat: float32 [N, K].
        hessian: of the inputs; None for the squared error of the weights themselves.
    """
    error = 0.0
    for a in range(0, len(w), ERROR_ROWS):
        e = w[a : a + ERROR_ROWS] - w_hat[a : a + ERROR_ROWS]
        pulled = e if hessian is None else product(e, hessian.matrix)
        error += total(row_products(pulled, e))
    return max(error, 0.0)


def damped(matrix: NDArray[np.float32], damping: float) -> NDArray[np.floating]:
    """``H + aI`` with ``a`` in parts of the mean of H's diagonal: float64 up to `EXACT_K`."""
    exact = len(matrix) <= EXACT_K
    out: NDArray[np.floating] = matrix.astype(np.float64 if exact else np.float32)
    out[np.diag_indices(len(matrix))] += ridge(matrix, damping)
    return out


def ridge(matrix: NDArray[np.float32], damping: float) -> float:
    """What damping adds to H's diagonal; 1 if no input ever differed from zero."""
    mean = total(np.diagonal(matrix)) / len(matrix)
    return damping * mean if mean > 0 else 1.0


@dataclass(frozen=True)
class Factor:
    """A positive definite matrix as ``M D M^T``.

    Args:
        mix: M, upper triangular with a unit diagonal, float32 [K, K].
        pivots: D's diagonal, float32 [K].
    """

    mix: NDArray[np.float32]
    pivots: NDArray[np.float32]
    _inverses: dict[int, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, matrix: NDArray[np.floating]) -> Factor:
        """Factor a matrix [K, K] of float64 or float32, which is overwritten.

        Raises:
            numpy.linalg.LinAlgError: it is not positive definite.
        """
        root = upper_root(matrix)
        roots = np.diagonal(root).copy()
        for start in range(0, len(root), PANEL):
            root[start : start + PANEL] /= roots
        return cls(root.astype(np.float32, copy=False), np.square(roots).astype(np.float32))

    def solve(self, b: NDArray[np.float32]) -> NDArray[np.float32]:
        """``b`` [N, K] times the matrix's inverse: float32 [N, K]."""
        x = b.copy()
        k = len(self.pivots)
        for start in range(_last(k), -1, -PANEL):
            part = slice(start, min(start + PANEL, k))
            product(
                x[:, part.stop :], self.mix[part, part.stop :], x[:, part],
                accumulate=True, negate=True,
            )  # fmt: skip
            x[:, part] = product(x[:, part], self._inverse(start))
        x /= self.pivots
        for start in range(0, k, PANEL):
            part = slice(start, min(start + PANEL, k))
            product(
                x[:, :start], self.mix[:start, part].T, x[:, part], accumulate=True, negate=True
            )
            x[:, part] = product(x[:, part], self._inverse(start).T)
        return x

    def _inverse(self, start: int) -> NDArray[np.float32]:
        """The inverse of the panel from ``start``; kept, as every matrix needs it twice."""
        if start not in self._inverses:
            part = slice(start, start + PANEL)
            self._inverses[start] = upper_inverse(self.mix[part, part]).astype(np.float32)
        return self._inverses[start]


def _last(k: int) -> int:
    return (k - 1) // PANEL * PANEL
