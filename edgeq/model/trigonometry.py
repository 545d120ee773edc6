"""Sines, cosines, powers and logarithms whose bits are the same on every machine.

NumPy's and the C library's own differ in the last place between processors. These consist of
additions, multiplications and divisions, which IEEE 754 defines, and of decimal arithmetic.

Source: the polynomials are the minimax ones of FreeBSD's msun (k_sin.c, k_cos.c), the reduction is
that of Cody & Waite 1980, "Software manual for the elementary functions".
"""

from __future__ import annotations

from decimal import Context, Decimal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
"""Parts of pi / 2: the first two have 33 bits, so that their products with a count are exact."""
_SIN = (
    -1.66666666666666324348e-01, 8.33333333332248946124e-03, -1.98412698298579493134e-04,
    2.75573137070700676789e-06, -2.50507602534068634195e-08, 1.58969099521155010221e-10,
)  # fmt: skip
_COS = (
    4.16666666666666019037e-02, -1.38888888888741095749e-03, 2.48015872894767294178e-05,
    -2.75573143513906633035e-07, 2.08757232129817482790e-09, -1.13596475577881948265e-11,
)  # fmt: skip
_DECIMAL = Context(prec=40)


def cos_sin(angles: Array) -> tuple[Array, Array]:
    """Cosines and sines within a unit in the last place.

    Args:
        angles: radians, float64, of at most a million turns.

    Example:
        >>> cos, sin = cos_sin(np.array([0.0, np.pi / 2]))
        >>> cos[0], sin[1]
        (np.float64(1.0), np.float64(1.0))
    """
    quarter = np.rint(angles * (2 / np.pi))
    x = angles - quarter * _HALF_PI[0]
    for part in _HALF_PI[1:]:
        x = x - quarter * part
    z = x * x
    sin = x + x * z * _polynomial(z, _SIN)
    cos = 1 - (0.5 * z - z * z * _polynomial(z, _COS))
    turn = quarter.astype(np.int64) & 3
    odd = (turn & 1).astype(bool)
    first, second = np.where(odd, sin, cos), np.where(odd, cos, sin)
    return np.where((turn == 1) | (turn == 2), -first, first), np.where(turn >= 2, -second, second)


def power(base: float, exponent: float) -> float:
    """``base ** exponent`` for a positive base, correctly rounded.

    Example:
        >>> power(10000.0, -0.5)
        0.01
    """
    return float(_DECIMAL.power(Decimal(base), Decimal(exponent)))


def log(value: float) -> float:
    """Natural logarithm of a positive number, correctly rounded.

    Example:
        >>> log(1.0), log(2.718281828459045)
        (0.0, 1.0)
    """
    return float(_DECIMAL.ln(Decimal(value)))


def powers(bases: Array, exponent: float) -> Array:
    """`power` of each of an array of positive numbers."""
    flat = np.asarray(bases, np.float64).reshape(-1)
    return np.array([power(float(base), exponent) for base in flat]).reshape(bases.shape)


def _polynomial(z: Array, coefficients: tuple[float, ...]) -> Array:
    value = np.full_like(z, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = value * z + c
    return value
