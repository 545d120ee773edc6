"""Recurrent operators of MIL in NumPy; sequences are [S, B, I].

Source: coremltools' definitions, ops/defs/iOS15/recurrent.py and iOS18/recurrent.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec.ops_math import sigmoid
from edgeq.core.errors import UnsupportedError

Array = NDArray[Any]

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "tanh": np.tanh,
    "sigmoid": sigmoid,
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
    "scaled_tanh": lambda x: 1.7159 * np.tanh(x * 2 / 3),
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "sigmoid_hard": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
}


def _activation(name: str) -> Callable[[Array], Array]:
    if name.lower() not in _ACTIVATIONS:
        raise UnsupportedError(f"the recurrent activation {name!r} cannot be executed")
    return _ACTIVATIONS[name.lower()]


def _steps(x: Array, reverse: bool) -> range:
    return range(x.shape[0] - 1, -1, -1) if reverse else range(x.shape[0])


def _sequence(outputs: dict[int, Array], last: Array, whole: bool) -> Array:
    """The result of every step in the order of the sequence, or that of the last step."""
    return np.stack([outputs[t] for t in sorted(outputs)]) if whole else last[None]


def rnn(
    x: Array, initial_h: Array, weight_ih: Array, weight_hh: Array, bias: Any = 0,
    direction: str = "forward", output_sequence: bool = False, activation: str = "tanh",
) -> tuple[Array, Array]:  # fmt: skip
    """h = activation(Wi x + Wh h + b)."""
    f, h, outputs = _activation(activation), initial_h, {}
    for t in _steps(x, direction == "reverse"):
        h = outputs[t] = f(x[t] @ weight_ih.T + h @ weight_hh.T + bias)
    return _sequence(outputs, h, output_sequence), h


def gru(
    x: Array, initial_h: Array, weight_ih: Array, weight_hh: Array, bias: Any = None,
    direction: str = "forward", output_sequence: bool = False,
    recurrent_activation: str = "sigmoid", activation: str = "tanh",
    reset_after: bool = False, input_bias: Any = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Gates in the order reset, output, update."""
    gate, f, h, outputs = _activation(recurrent_activation), _activation(activation), initial_h, {}
    size = h.shape[-1]
    hidden = np.zeros(3 * size, np.float32) if bias is None else np.asarray(bias)
    input_biases = np.zeros_like(hidden) if input_bias is None else np.asarray(input_bias)
    r_, o_, z_ = (slice(i * size, (i + 1) * size) for i in range(3))
    for t in _steps(x, direction == "reverse"):
        i = x[t] @ weight_ih.T + input_biases
        r = gate(i[:, r_] + h @ weight_hh[r_].T + hidden[r_])
        z = gate(i[:, z_] + h @ weight_hh[z_].T + hidden[z_])
        if reset_after:
            o = f(i[:, o_] + r * (h @ weight_hh[o_].T + hidden[o_]))
        else:
            o = f(i[:, o_] + (r * h) @ weight_hh[o_].T + hidden[o_])
        h = outputs[t] = (1 - z) * o + z * h
    return _sequence(outputs, h, output_sequence), h


def lstm(
    x: Array, initial_h: Array, initial_c: Array, weight_ih: Array, weight_hh: Array,
    bias: Any = None, peephole: Any = None, weight_ih_back: Any = None, weight_hh_back: Any = None,
    bias_back: Any = None, peephole_back: Any = None, direction: str = "forward",
    output_sequence: bool = False, recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh", activation: str = "tanh", clip: Any = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gates in the order input, forget, output, cell; both directions side by side."""
    functions = tuple(map(_activation, (recurrent_activation, cell_activation, activation)))
    way = (weight_ih, weight_hh, bias, peephole)
    back = (weight_ih_back, weight_hh_back, bias_back, peephole_back)
    if direction != "bidirectional":
        ways = [(way, direction == "reverse")]
    else:
        ways = [(way, False), (back, True)]
    size = weight_hh.shape[1]
    directions = []
    for i, (weights, reverse) in enumerate(ways):
        at = slice(i * size, (i + 1) * size)
        start = (initial_h[:, at], initial_c[:, at])
        directions.append(_lstm(x, start, weights, reverse, output_sequence, functions, clip))
    y, h, c = (np.concatenate(parts, axis=-1) for parts in zip(*directions, strict=True))
    return y, h, c


def _lstm(
    x: Array, start: tuple[Array, Array], weights: tuple[Any, Any, Any, Any], reverse: bool,
    whole: bool, functions: tuple[Callable[[Array], Array], ...], clip: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    (h, c), (w_i, w_h, bias, peephole) = start, weights
    gate, cell, out = functions
    size = h.shape[-1]
    peep = np.zeros(3 * size, np.float32) if peephole is None else np.asarray(peephole)
    outputs = {}
    for t in _steps(x, reverse):
        gates = x[t] @ w_i.T + h @ w_h.T
        if bias is not None:
            gates = gates + bias
        i, f, o, z = (gates[:, j * size : (j + 1) * size] for j in range(4))
        i = gate(i + peep[:size] * c)
        f = gate(f + peep[size : 2 * size] * c)
        z = cell(z)
        c = f * c + i * z
        if clip is not None:
            c = np.clip(c, -clip, clip)
        o = gate(o + peep[2 * size :] * c)
        h = outputs[t] = o * out(c)
    return _sequence(outputs, h, whole), h, c


OPS: dict[str, Callable[..., Any]] = {"gru": gru, "lstm": lstm, "rnn": rnn}
"""The operators of this module by MIL's names."""
