"""Elementwise operators, activations and reductions of MIL in NumPy.

Each function takes MIL's parameters by their names and gives the result; floats are float32,
whatever the program's type. `machine` brings results to the type the program declares, and keeps
NumPy from warning of infinities.

Source: coremltools' definitions, ops/defs/iOS15 (elementwise_*, activation, reduction).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Op = Callable[..., Any]


def channels(values: Any, rank: int) -> Array:
    """A vector [C] shaped to be applied along the second axis."""
    return np.asarray(values).reshape(-1, *(1,) * (rank - 2))


# --- one by one -------------------------------------------------------------------------------


def cast(x: Any, dtype: str) -> Array:
    """Convert to another type; the machine does the rounding of MIL's fp16."""
    names = {"fp16": "float32", "fp32": "float32"}
    return np.asarray(x).astype(names.get(dtype, dtype))


def erf(x: Array) -> Array:
    """The error function, by the standard library's."""
    flat = np.fromiter((math.erf(v) for v in x.reshape(-1)), np.float64, x.size)
    return flat.reshape(x.shape)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return np.asarray(1 / (1 + np.exp(-x)))


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    return np.asarray(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))))


def gelu(x: Array, mode: str = "EXACT") -> Array:
    """GELU, exact or by one of its approximations."""
    if mode == "TANH_APPROXIMATION":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return np.asarray(0.5 * x * (1 + np.tanh(inner)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(1.702 * x)
    return np.asarray(0.5 * x * (1 + erf(x / math.sqrt(2))).astype(x.dtype))


def elu(x: Array, alpha: float) -> Array:
    """x, or alpha * (exp(x) - 1) below zero."""
    return np.where(x < 0, alpha * np.expm1(np.minimum(x, 0)), x)


def clip(x: Array, alpha: float, beta: float) -> Array:
    """x between alpha and beta."""
    return np.clip(x, alpha, beta)


def sigmoid_hard(x: Array, alpha: float, beta: float) -> Array:
    """alpha * x + beta between 0 and 1."""
    return np.clip(alpha * x + beta, 0, 1)


def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    """alpha * log(1 + exp(beta * x)), a pair for each channel."""
    return channels(alpha, x.ndim) * softplus(channels(beta, x.ndim) * x)


def softmax(x: Array, axis: int = -1) -> Array:
    """Softmax along an axis."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True))


def logarithm(x: Array, epsilon: float = 1e-45) -> Array:
    """log(x + epsilon)."""
    return np.log(x + epsilon)


_UNARY: dict[str, Op] = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": erf,
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "identity": lambda x: x,
    "logical_not": np.logical_not,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "round": np.rint,
    "sigmoid": sigmoid,
    "sign": np.sign,
    "silu": lambda x: x * sigmoid(x),
    "sin": np.sin,
    "sinh": np.sinh,
    "softplus": softplus,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
}

_WITH_NUMBERS: dict[str, Op] = {
    "cast": cast,
    "clamped_relu": lambda x, alpha, beta: np.minimum(np.where(x < 0, alpha * x, x), beta),
    "clip": clip,
    "elu": elu,
    "gelu": gelu,
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "leaky_relu": lambda x, alpha: np.where(x < 0, alpha * x, x),
    "linear_activation": lambda x, alpha, beta=0.0: alpha * x + beta,
    "log": logarithm,
    "prelu": lambda x, alpha: np.where(x < 0, channels(alpha, x.ndim) * x, x),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
    "scaled_tanh": lambda x, alpha, beta: alpha * np.tanh(beta * x),
    "sigmoid_hard": sigmoid_hard,
    "softmax": softmax,
    "softplus_parametric": softplus_parametric,
    "threshold": lambda x, alpha: np.maximum(x, alpha),
    "thresholded_relu": lambda x, alpha: np.where(x < alpha, np.zeros_like(x), x),
}

# --- two by two -------------------------------------------------------------------------------


def _integer(x: Any) -> bool:
    return bool(np.issubdtype(np.asarray(x).dtype, np.integer))


def real_div(x: Array, y: Array) -> Array:
    """x / y; of integers, rounded down."""
    if _integer(x) and _integer(y):
        return np.floor_divide(x, y)
    return np.divide(x, y)


_BINARY: dict[str, Op] = {
    "add": np.add,
    "equal": np.equal,
    "floor_div": np.floor_divide,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,
    "mul": np.multiply,
    "not_equal": np.not_equal,
    "pow": np.power,
    "real_div": real_div,
    "sub": np.subtract,
}


def select(cond: Array, a: Array, b: Array) -> Array:
    """a where cond, else b."""
    return np.where(np.asarray(cond) != 0, a, b)


# --- reductions -------------------------------------------------------------------------------


def _reduction(f: Op) -> Op:
    def reduce(x: Array, axes: Any = None, keep_dims: bool = False) -> Array:
        over = None if axes is None else tuple(int(a) for a in np.asarray(axes).reshape(-1))
        # NumPy wants its own notion of a flag
        return np.asarray(f(x, axis=over, keepdims=bool(keep_dims)))

    return reduce


def _log_sum_exp(x: Array, axis: Any, keepdims: bool) -> Array:
    top = x.max(axis=axis, keepdims=True)
    total = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return np.asarray(total if keepdims else total.squeeze(axis))


_REDUCE: dict[str, Op] = {
    "reduce_l1_norm": lambda x, axis, keepdims: np.abs(x).sum(axis=axis, keepdims=keepdims),
    "reduce_l2_norm": lambda x, axis, keepdims: np.sqrt(
        np.square(x).sum(axis=axis, keepdims=keepdims)
    ),
    "reduce_log_sum": lambda x, axis, keepdims: np.log(x.sum(axis=axis, keepdims=keepdims)),
    "reduce_log_sum_exp": _log_sum_exp,
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, axis, keepdims: np.square(x).sum(axis=axis, keepdims=keepdims),
}


def _arg(f: Op) -> Op:
    def reduce(
        x: Array, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
    ) -> Array:
        return np.asarray(f(x, axis=int(axis), keepdims=bool(keep_dims))).astype(output_dtype)

    return reduce


def _of_one(f: Op) -> Op:
    """Take the argument by MIL's name for it, which NumPy's functions do not accept."""
    return lambda x: f(x)


def _of_two(f: Op) -> Op:
    return lambda x, y: f(x, y)


OPS: dict[str, Op] = {
    **{name: _of_one(f) for name, f in _UNARY.items()},
    **_WITH_NUMBERS,
    **{name: _of_two(f) for name, f in _BINARY.items()},
    **{name: _reduction(f) for name, f in _REDUCE.items()},
    "reduce_argmax": _arg(np.argmax),
    "reduce_argmin": _arg(np.argmin),
    "select": select,
}
"""The operators of this module by MIL's names."""
