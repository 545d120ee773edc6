"""The cases of `operator_matrix`: every operator at every value of its attributes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.operator_matrix import Case

Array = NDArray[Any]
TYPES = {1: np.float32, 6: np.int32, 7: np.int64, 2: np.uint8, 3: np.int8, 9: np.bool_}
"""ONNX's number of a type -> NumPy's, of the types that edgeq's graphs hold."""


def floats(*shape: int, seed: int = 0) -> Array:
    """Normal numbers, none of them near a tie or another's value."""
    rng = np.random.default_rng([seed, *shape])
    return np.asarray(rng.standard_normal(shape), np.float32)


def numbers(dtype: Any, *shape: int, seed: int = 0, low: int = -9, high: int = 10) -> Array:
    """Numbers of a type; whole ones from low (0 if it has no sign) to high."""
    rng = np.random.default_rng([seed, *shape])
    kind = np.dtype(dtype)
    if kind == np.bool_:
        return np.asarray(rng.random(shape) < 0.5)
    if kind.kind == "f":
        return floats(*shape, seed=seed)
    return np.asarray(rng.integers(0 if kind.kind == "u" else low, high, shape), kind)


def ints(*values: int) -> Array:
    """A list of int64."""
    return np.array(values, np.int64)


def one(
    name: str,
    opset: int,
    op: str,
    x: Array,
    *constants: Array | None,
    behind: bool = False,
    **attrs: Any,
) -> Case:
    """A case with one computed input, constants behind it."""
    names = ["" if c is None else f"c{i}" for i, c in enumerate(constants)]
    held = {f"c{i}": c for i, c in enumerate(constants) if c is not None}
    return Case(f"{op}-{opset}-{name}", opset, op, {"x": x}, ("x", *names), held, attrs,
                behind=behind)  # fmt: skip


def computed(name: str, opset: int, op: str, *inputs: Array, **attrs: Any) -> Case:
    """A case all of whose inputs are computed."""
    feeds = {f"x{i}": a for i, a in enumerate(inputs)}
    return Case(f"{op}-{opset}-{name}", opset, op, feeds, tuple(feeds), {}, attrs)


def label(**attrs: Any) -> str:
    """A case's name of its attributes."""
    return ",".join(f"{k}={v}" for k, v in attrs.items()).replace(" ", "") or "plain"


def given(**attrs: Any) -> dict[str, Any]:
    """Attributes but those that are None."""
    return {k: v for k, v in attrs.items() if v is not None}


# --- reductions -------------------------------------------------------------------------------

REDUCTIONS = {
    "ReduceMean": 18, "ReduceSum": 13, "ReduceMax": 18, "ReduceMin": 18, "ReduceL1": 18,
    "ReduceL2": 18, "ReduceProd": 18, "ReduceSumSquare": 18, "ReduceLogSum": 18,
    "ReduceLogSumExp": 18,
}  # fmt: skip
"""Reduction -> the opset since which its axes are an input."""


def reductions() -> Iterator[Case]:
    """All reductions, with axes as attribute and as input, and the meaning of none."""
    for op, since in REDUCTIONS.items():
        x = floats(2, 3, 1, 4)
        x = np.abs(x) + 0.5 if op == "ReduceLogSum" else x
        for keep, axes in product((None, 0, 1), ((1,), (-1, 1), (0, 1, 2, 3), (2,))):
            more = given(keepdims=keep)
            name = f"{label(axes=axes, **more)}"
            yield one(name, since, op, x, ints(*axes), **more)
            if axes == (-1, 1):
                yield one(name, since - 1, op, x, axes=list(axes), **more)
        yield one("no-axes", since - 1, op, x)
        yield one("no-axes", 7, op, x, keepdims=0)
        for noop, keep in product((None, 0, 1), (0, 1)):
            more = given(noop_with_empty_axes=noop, keepdims=keep)
            yield one(f"left-out,{label(**more)}", since, op, x, **more)
            yield one(f"empty,{label(**more)}", since, op, x, ints(), **more)
        yield one("some-axes,noop=1", since, op, x, ints(1), noop_with_empty_axes=1)
        yield one("behind,axes=(2,3)", since, op, np.abs(x), ints(2, 3), behind=True)
        yield one("behind,axes=1,keepdims=0", since, op, np.abs(x), ints(1), behind=True,
                  keepdims=0)  # fmt: skip
        for dtype in (np.int32, np.int64):
            if op not in ("ReduceLogSum", "ReduceLogSumExp", "ReduceL2"):
                yield one(np.dtype(dtype).name, since, op, numbers(dtype, 2, 3, 2), ints(1))
    for op in ("ReduceMax", "ReduceMin"):
        for dtype in (np.uint8, np.int8, np.bool_):
            yield one(np.dtype(dtype).name, 20, op, numbers(dtype, 2, 3, 2), ints(-1), keepdims=0)
    for op in ("ArgMax", "ArgMin"):
        x = np.array([[[1, 3, 3, 0]], [[2, 0, 2, 0]]], np.float32)
        for axis, keep, last in product((None, 0, 1, -1), (None, 0), (None, 0, 1)):
            more = given(axis=axis, keepdims=keep, select_last_index=last)
            yield one(label(**more), 13, op, x, **more)
        yield one("behind", 12, op, floats(1, 3, 2, 4), axis=1, behind=True)
        for dtype in (np.int32, np.uint8, np.int8):
            yield one(np.dtype(dtype).name, 13, op, numbers(dtype, 3, 5), axis=1)
    x = floats(2, 5, 3)
    for axis, largest, sort in product((None, 1, 0), (None, 0), (None, 0)):
        more = given(axis=axis, largest=largest, sorted=sort)
        used = ((0,), (1,), (0, 1))
        for outs in used if sort is None else ((0,),):
            yield Case(f"TopK-11-{label(**more)},used={outs}", 11, "TopK", {"x": x}, ("x", "k"),
                       {"k": ints(2)}, more, 2, outs)  # fmt: skip
    yield Case("TopK-9", 9, "TopK", {"x": x}, ("x",), {}, {"k": 2, "axis": 1}, 2, (0,))
    yield Case("TopK-10", 10, "TopK", {"x": x}, ("x", "k"), {"k": ints(1)}, {}, 2, (1,))
    yield Case("TopK-24-int64", 24, "TopK", {"x": numbers(np.int64, 2, 5, low=0)}, ("x", "k"),
               {"k": ints(3)}, {}, 2, (0,))  # fmt: skip
    for reverse, exclusive, axis in product((None, 1), (None, 1), (0, -1, -2)):
        more = given(reverse=reverse, exclusive=exclusive)
        yield one(f"{label(**more)},axis={axis}", 14, "CumSum", x, np.array(axis, np.int64), **more)
    yield one("int64", 11, "CumSum", numbers(np.int64, 3, 4), np.array(1, np.int32))
    yield one("int32", 11, "CumSum", numbers(np.int32, 3, 4), np.array([0], np.int64))
    yield one("behind", 14, "CumSum", floats(1, 3, 2, 4), np.array(1, np.int64), behind=True)


# --- windows ----------------------------------------------------------------------------------


def windows() -> Iterator[Case]:
    """Convolutions and pools."""
    for pool in ("MaxPool", "AveragePool"):
        shapes = ((1, 2, 5, 5), (1, 2, 7, 4))
        for ceil, pads, strides, count, shape in product(
            (0, 1), ([0] * 4, [1] * 4, [0, 0, 1, 1], [1, 0, 0, 1]), ([1, 1], [2, 2], [3, 2]),
            (0, 1), shapes,
        ):  # fmt: skip
            if (pool == "MaxPool" and count) or (shape == shapes[1] and strides == [1, 1]):
                continue
            more = {"ceil_mode": ceil, "pads": pads, "strides": strides}
            more |= {"count_include_pad": 1} if count else {}
            name = f"{label(**more)},{shape[2]}x{shape[3]}"
            yield one(name, 19, pool, floats(*shape), kernel_shape=[2, 2], **more)
            if strides == [2, 2]:
                yield one(f"{name},3x3", 19, pool, floats(*shape), kernel_shape=[3, 3], **more)
        for auto, stride, ceil in product(("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"), (1, 2),
                                          (0, 1)):  # fmt: skip
            yield one(
                f"{auto},{stride},{ceil}", 19, pool, floats(1, 2, 6, 5), kernel_shape=[3, 2],
                auto_pad=auto, strides=[stride] * 2, ceil_mode=ceil,
            )  # fmt: skip
            if pool == "AveragePool":
                yield one(
                    f"{auto},{stride},{ceil},counted", 19, pool, floats(1, 2, 6, 5),
                    kernel_shape=[3, 2], auto_pad=auto, strides=[stride] * 2, ceil_mode=ceil,
                    count_include_pad=1,
                )  # fmt: skip
        for opset, ceil, dilation, pads in product((19, 22), (0, 1), ([2, 1], [2, 2]), (0, 1)):
            yield one(
                f"dilations={dilation},{ceil},{pads}", opset, pool, floats(1, 2, 7, 6),
                kernel_shape=[2, 2], dilations=dilation, ceil_mode=ceil, pads=[pads] * 4,
            )  # fmt: skip
        for ceil in (0, 1):
            for length in (7, 8):
                yield one(f"1d,{ceil},{length}", 12 if pool == "MaxPool" else 11, pool,
                          floats(1, 2, length), kernel_shape=[3], strides=[2], pads=[1, 0],
                          ceil_mode=ceil)  # fmt: skip
            yield one(f"3d,{ceil}", 12, pool, floats(1, 2, 4, 5, 4), kernel_shape=[2, 2, 2],
                      strides=[2, 2, 2], ceil_mode=ceil)  # fmt: skip
        yield one("7", 7, pool, floats(1, 2, 5, 5), kernel_shape=[2, 2])
        yield one("whole", 11, pool, floats(1, 2, 5, 5), kernel_shape=[5, 5])
        yield one("behind", 19, pool, floats(1, 2, 5, 5), kernel_shape=[2, 2], strides=[2, 2],
                  pads=[1, 1, 1, 1], ceil_mode=1, behind=True)  # fmt: skip
    for used in ((0,), (0, 1), (1,)):
        yield Case(f"MaxPool-12-indices-{used}", 12, "MaxPool", {"x": floats(1, 1, 4, 4)}, ("x",),
                   {}, {"kernel_shape": [2, 2], "strides": [2, 2], "storage_order": 1}, 2,
                   used)  # fmt: skip
    for dtype in (np.int8, np.uint8):
        yield one(np.dtype(dtype).name, 12, "MaxPool", numbers(dtype, 1, 2, 5, 4),
                  kernel_shape=[2, 2])  # fmt: skip
    for pool in ("GlobalAveragePool", "GlobalMaxPool"):
        for shape in ((1, 2, 3, 4), (2, 3, 1, 1), (1, 3, 5), (1, 2, 2, 3, 2)):
            yield one(f"{len(shape)}d{shape[-1]}", 8, pool, floats(*shape))
    yield from convolutions()


def convolutions() -> Iterator[Case]:
    """Conv and ConvTranspose."""
    for group, stride, dilation, bias in product((1, 2, 4), (1, 2), (1, 2), (0, 1)):
        more = {"group": group, "strides": [stride] * 2, "dilations": [dilation] * 2}
        w, b = floats(4, 4 // group, 3, 3), floats(4, seed=1) if bias else None
        yield one(f"{label(**more)},bias={bias}", 11, "Conv", floats(1, 4, 7, 6), w, b,
                  pads=[1, 2, 0, 1], **more)  # fmt: skip
    for auto, stride, dilation in product(("SAME_UPPER", "SAME_LOWER", "VALID"), (1, 2, 3), (1, 2)):
        if stride > 1 and dilation > 1:
            continue
        yield one(f"{auto},{stride},{dilation}", 11, "Conv", floats(1, 2, 8, 7),
                  floats(3, 2, 3, 2), auto_pad=auto, strides=[stride] * 2,
                  dilations=[dilation] * 2)  # fmt: skip
    yield one("1d", 7, "Conv", floats(2, 2, 9), floats(3, 2, 3), pads=[2, 1], strides=[2])
    yield one("3d", 11, "Conv", floats(1, 2, 3, 4, 5), floats(3, 2, 2, 2, 2))
    yield one("1x1", 22, "Conv", floats(1, 2, 1, 1), floats(3, 2, 1, 1))
    yield computed("weight", 11, "Conv", floats(1, 2, 4, 4), floats(3, 2, 3, 3))
    for group, stride, over, bias in product((1, 2), (1, 2, 3), (0, 1), (0, 1)):
        if over >= stride:
            continue
        more = {"group": group, "strides": [stride] * 2, "output_padding": [over] * 2}
        for pads in ([0] * 4, [1, 1, 1, 1], [0, 1, 1, 0]):
            w = floats(4, 3, 3, 3)
            b = floats(3 * group, seed=1) if bias else None
            yield one(f"{label(**more)},bias={bias},pads={pads}", 11, "ConvTranspose",
                      floats(1, 4, 4, 3), w, b, pads=pads, **more)  # fmt: skip
    for auto, stride, shape in product(("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"), (2, 3),
                                       (None, [9, 7], [8, 6])):  # fmt: skip
        if auto == "VALID" and shape:
            continue
        more = given(output_shape=shape)
        yield one(f"{auto},{stride},{label(**more)}", 11, "ConvTranspose", floats(1, 2, 4, 3),
                  floats(2, 3, 3, 3), auto_pad=auto, strides=[stride] * 2, **more)  # fmt: skip
    yield one("dilations", 11, "ConvTranspose", floats(1, 2, 4, 3), floats(2, 3, 2, 2),
              dilations=[2, 2], strides=[2, 1])  # fmt: skip
    yield one("1d", 11, "ConvTranspose", floats(1, 2, 5), floats(2, 3, 4), strides=[2], pads=[1, 1])
    yield one("depthwise", 11, "ConvTranspose", floats(1, 3, 4, 4), floats(3, 1, 3, 3), group=3,
              strides=[2, 2])  # fmt: skip


# --- norms ------------------------------------------------------------------------------------


def norms() -> Iterator[Case]:
    """Normalizations, dropout, and their outputs beside the first."""
    for opset, epsilon, shape in product(
        (7, 9, 14, 15), (None, 1e-2), ((2, 3, 4, 4), (2, 3), (1, 3, 5), (1, 3, 2, 2, 2))
    ):
        x = floats(*shape)
        held = [np.abs(floats(3, seed=n)) + 0.5 for n in range(4)]
        more = given(epsilon=epsilon)
        yield one(f"{label(**more)},{len(shape)}d", opset, "BatchNormalization", x, *held, **more)
    held = {f"c{i}": np.abs(floats(3, seed=i)) + 0.5 for i in range(4)}
    names = ("x", *held)
    x = {"x": floats(2, 3, 4, 4)}
    for training, opset, outputs in ((1, 15, 1), (1, 14, 3), (0, 15, 1), (1, 15, 3)):
        yield Case(f"BatchNormalization-{opset}-training={training},outputs={outputs}", opset,
                   "BatchNormalization", x, names, held, {"training_mode": training},
                   outputs)  # fmt: skip
    for n in (3, 5):
        yield Case(f"BatchNormalization-9-outputs={n}", 9, "BatchNormalization", x, names, held,
                   {}, n)  # fmt: skip
    yield Case("BatchNormalization-7-spatial=0", 7, "BatchNormalization", x, names,
               {k: np.abs(floats(3, 4, 4, seed=i)) + 0.5 for i, k in enumerate(held)},
               {"spatial": 0})  # fmt: skip
    yield Case("BatchNormalization-15-computed", 15, "BatchNormalization", x | dict(held), names)
    for shape, epsilon in product(((2, 3, 4, 4), (1, 3, 5), (2, 3, 2, 2, 2)), (None, 1e-2)):
        scale, bias = floats(3), floats(3, seed=1)
        more = given(epsilon=epsilon)
        name = f"{len(shape)}d,{label(**more)}"
        yield one(name, 7, "InstanceNormalization", floats(*shape), scale, bias, **more)
        yield one(name, 22, "InstanceNormalization", floats(*shape), scale, bias, **more)
    yield computed("computed", 14, "InstanceNormalization", floats(2, 3, 4), floats(3),
                   floats(3, seed=1))  # fmt: skip
    for opset, groups, epsilon, shape in product(
        (18, 20, 21, 22), (1, 2, 4), (None, 1e-2), ((2, 4, 3, 3), (1, 4, 5), (2, 4))
    ):
        n = groups if opset < 21 else 4
        more = given(epsilon=epsilon, num_groups=groups)
        yield one(f"{label(**more)},{len(shape)}d", opset, "GroupNormalization", floats(*shape),
                  floats(n, seed=3), floats(n, seed=4), **more)  # fmt: skip
    yield computed("computed", 21, "GroupNormalization", floats(2, 4, 3), floats(4),
                   floats(4, seed=1), num_groups=2)  # fmt: skip
    yield one("behind", 21, "GroupNormalization", floats(1, 4, 3, 3), floats(4), floats(4, seed=1),
              num_groups=2, behind=True)  # fmt: skip
    yield one("stash", 21, "GroupNormalization", floats(1, 4, 3), floats(4), floats(4, seed=1),
              num_groups=2, stash_type=1)  # fmt: skip
    for axis, epsilon, bias in product((None, 0, 1, -1, -2), (None, 1e-2), (0, 1)):
        shape = (2, 3, 4)
        at = -1 if axis is None else axis
        scale, more = floats(*shape[at:]), given(axis=axis, epsilon=epsilon)
        b = floats(*shape[at:], seed=1) if bias else None
        yield one(f"{label(**more)},bias={bias}", 17, "LayerNormalization", floats(*shape), scale,
                  b, **more)  # fmt: skip
    yield one("wide-scale", 17, "LayerNormalization", floats(2, 3, 4), floats(1, 4),
              floats(4, seed=1))  # fmt: skip
    yield one("one-scale", 17, "LayerNormalization", floats(2, 3, 4), floats(1), axis=1)
    yield computed("computed", 17, "LayerNormalization", floats(2, 3, 4), floats(4),
                   floats(4, seed=1))  # fmt: skip
    yield one("behind", 17, "LayerNormalization", floats(1, 3, 4, 2), floats(3, 4, 2), axis=1,
              behind=True)  # fmt: skip
    for used in ((0,), (0, 1), (0, 1, 2)):
        yield Case(f"LayerNormalization-17-outputs-{used}", 17, "LayerNormalization",
                   {"x": floats(2, 4)}, ("x", "c"), {"c": floats(4)}, {}, 3, used)  # fmt: skip
    for axis, epsilon in product((None, -1, 1, -2, 0), (None, 1e-2)):
        shape, more = (2, 3, 4), given(axis=axis, epsilon=epsilon)
        scale = floats(*shape[-1 if axis is None else axis :])
        yield one(label(**more), 23, "RMSNormalization", floats(*shape), scale, **more)
    for axis, p in product((None, 0, 1, -1), (None, 1, 2)):
        more = given(axis=axis, p=p)
        x = floats(2, 3, 4)
        yield one(label(**more), 7, "LpNormalization", x, **more)
        if axis == 1:
            x = x.copy()
            x[0, :, 0] = 0
            yield one(f"zeros,{label(**more)}", 22, "LpNormalization", x, **more)
    for opset, outputs, used in ((7, 1, (0,)), (7, 2, (0,)), (10, 2, (0, 1)), (12, 2, (0,)),
                                 (13, 2, (0, 1)), (13, 2, (1,))):  # fmt: skip
        attrs = {"ratio": 0.5} if opset < 12 else {"seed": 1}
        yield Case(f"Dropout-{opset}-{outputs},{used}", opset, "Dropout", {"x": floats(2, 3)},
                   ("x",), {}, attrs, outputs, used)  # fmt: skip
    half = np.array(0.5, np.float32)
    for training in (False, True):
        yield one(f"training={training}", 13, "Dropout", floats(8, 8), half, np.array(training))
        yield one(f"no-ratio,training={training}", 13, "Dropout", floats(8, 8), None,
                  np.array(training))  # fmt: skip
    yield one("ratio", 13, "Dropout", floats(8, 8), half)


# --- element by element -----------------------------------------------------------------------

UNARY = {
    "Sqrt": 13, "Exp": 13, "Log": 13, "Neg": 13, "Abs": 13, "Erf": 13, "Sin": 7, "Cos": 7,
    "Floor": 13, "Ceil": 13, "Round": 11, "Sign": 13, "Relu": 14, "Sigmoid": 13, "Tanh": 13,
    "HardSwish": 14, "Softplus": 7, "Softsign": 7, "Mish": 18, "Reciprocal": 13, "Identity": 13,
}  # fmt: skip
"""Operator without attributes -> an opset that has it."""
_WHOLE = ("Neg", "Abs", "Sign", "Relu", "Identity")
_HALVES = np.array([-3.5, -2.5, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5, 3.49, 7.0], np.float32)


def elementwise() -> Iterator[Case]:
    """Operators of each element, of every type and way of broadcasting."""
    for op, opset in UNARY.items():
        x = floats(2, 3, 2, 4)
        x = np.abs(x) + 0.1 if op in ("Sqrt", "Log", "Reciprocal") else x
        yield one("float32", opset, op, x)
        yield one("no-axes", opset, op, np.array(0.75, np.float32))
        yield one("behind", opset, op, np.abs(floats(1, 3, 2, 4)) + 0.1, behind=True)
        if op in ("Floor", "Ceil", "Round", "Sign", "Abs"):
            yield one("halves", opset, op, _HALVES)
        for dtype in (np.int32, np.int64, np.int8, np.uint8) if op in _WHOLE else ():
            if not (dtype == np.uint8 and op in ("Neg", "Relu")):
                yield one(np.dtype(dtype).name, opset, op, numbers(dtype, 3, 4))
    yield one("bool", 13, "Identity", numbers(np.bool_, 3, 4))
    yield one("bool", 7, "Not", numbers(np.bool_, 3, 4))
    pairs = {
        "Add": "fi", "Sub": "fi", "Mul": "fi", "Div": "fi", "Max": "fi", "Min": "fi", "Pow": "f",
        "Mod": "i", "Equal": "fib", "Greater": "fi", "Less": "fi", "GreaterOrEqual": "fi",
        "LessOrEqual": "fi", "And": "b", "Or": "b", "Xor": "b",
    }  # fmt: skip
    shapes = (((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (4,)), ((2, 1, 4), (3, 1)), ((1,), (2, 3, 1, 4)),
              ((2, 3), ()), ((1, 3, 2, 4), (3, 1, 1)))  # fmt: skip
    for op, kinds in pairs.items():
        types: list[Any] = [np.float32] * ("f" in kinds)
        types += [np.int32, np.int64] * ("i" in kinds) + [np.bool_] * ("b" in kinds)
        types += [np.uint8, np.int8] * (op in ("Add", "Mul", "Max", "Min", "Equal"))
        for dtype in types:
            for a, b in shapes if dtype == np.float32 else (shapes[1], shapes[2], shapes[4]):
                x, y = numbers(dtype, *a), numbers(dtype, *b, seed=1)
                if op in ("Div", "Mod"):
                    y = np.where(y == 0, 3, y).astype(dtype)
                if op == "Pow":
                    x = np.abs(x)
                name = f"{np.dtype(dtype).name},{a},{b}"
                yield computed(name, 18, op, x, y)
                yield one(f"{name},right", 18, op, x, y)
                held = {"c": x}
                yield Case(f"{op}-18-{name},left", 18, op, {"x": y}, ("c", "x"), held)
    behind = floats(3, 1, 1)
    for op in ("Add", "Sub", "Mul", "Div", "Max", "Min"):
        yield one("behind", 18, op, floats(1, 3, 2, 4), behind, behind=True)
        yield one("7", 7, op, floats(2, 3), floats(3))
    for fmod, dtype in product((None, 0, 1), (np.int32, np.int64, np.float32)):
        if dtype == np.float32 and fmod != 1:
            continue
        y = np.where(numbers(dtype, 3, 5, seed=2) == 0, 4, numbers(dtype, 3, 5, seed=2))
        yield computed(f"{np.dtype(dtype).name},fmod={fmod}", 13, "Mod", numbers(dtype, 3, 5),
                       y.astype(dtype), **given(fmod=fmod))  # fmt: skip
    signed = floats(3, 4)
    for power in (2.0, 3.0, 0.5, -1.0, 0.0, 1.0):
        base = np.abs(signed) + 0.1 if power == 0.5 else signed
        yield one(f"{power}", 13, "Pow", base, np.array(power, np.float32))
    for dtype in (np.int32, np.int64):
        kind = np.dtype(dtype).name
        yield one(f"by-{kind}", 13, "Pow", signed, np.array(2, dtype))
        yield computed(f"by-computed-{kind}", 13, "Pow", signed, numbers(dtype, 3, 4, low=-2))
        yield one(f"{kind}", 13, "Pow", numbers(dtype, 3, 4, low=-3, high=4), np.array(2, dtype))
        yield one(f"{kind}-by-float", 13, "Pow", numbers(dtype, 3, 4, low=0, high=4),
                  np.array(2, np.float32))  # fmt: skip
    for op, n in product(("Sum", "Mean", "Max", "Min"), (1, 2, 3, 4)):
        many = [floats(*((2, 3), (3,), (1, 3), (2, 1))[i], seed=i) for i in range(n)]
        yield computed(f"{n}", 13, op, *many)
    for op in ("Max", "Min"):
        for dtype in (np.int32, np.int64):
            yield computed(f"3,{np.dtype(dtype).name}", 13, op,
                           *(numbers(dtype, 4, seed=i) for i in range(3)))  # fmt: skip
        yield one("bound", 13, op, floats(2, 3), np.array(0.5, np.float32))
        yield one("zero", 13, op, floats(2, 3), np.array(0, np.float32))
        yield one("bound,wider", 13, op, floats(3), np.full((1, 1), 0.5, np.float32))
    flag = numbers(np.bool_, 2, 3)
    for dtype in (np.float32, np.int32, np.int64, np.uint8):
        for a, b in (((2, 3), (3,)), ((1,), (2, 1)), ((2, 2, 3), (3,))):
            yield computed(f"{np.dtype(dtype).name},{a},{b}", 16, "Where", flag,
                           numbers(dtype, *a), numbers(dtype, *b, seed=1))  # fmt: skip
    yield Case("Where-9-constants", 9, "Where", {"x": flag}, ("x", "a", "b"),
               {"a": np.array(0, np.float32), "b": np.array(-np.inf, np.float32)})  # fmt: skip
    yield from casts()
    yield from activations()


def casts() -> Iterator[Case]:
    """Cast between all types, and CastLike."""
    for (to, dtype), source in product(TYPES.items(), TYPES.values()):
        x = numbers(source, 3, 4, low=-5, high=6)
        if source == np.float32:
            x = np.array([0.0, 0.4, 1.5, 2.5, 99.9, 3.0], np.float32)
            if dtype not in (np.uint8,):
                x = np.array([*x, -0.6, -2.5, -100.2], np.float32)
        elif np.dtype(dtype).kind == "u":
            x = numbers(source, 3, 4, low=0)
        name = f"{np.dtype(source).name}-{np.dtype(dtype).name}"
        yield one(name, 13, "Cast", x, to=to)
        if source != dtype:
            yield one(name, 19, "CastLike", x, np.zeros(1, dtype))
    yield one("wide", 13, "Cast", np.array([3_000_000_000, -5, 7], np.int64), to=1)
    yield one("float16", 13, "Cast", floats(4), to=10)
    yield one("saturate", 19, "Cast", floats(4), to=1, saturate=0)


def activations() -> Iterator[Case]:
    """Activations with attributes."""
    x = np.concatenate([floats(2, 3, 4) * 3, np.zeros((2, 3, 1), np.float32)], 2)
    for alpha in (None, 0.0, 0.1, 1.0, 2.0, -0.5):
        more = given(alpha=alpha)
        yield one(label(**more), 16, "LeakyRelu", x, **more)
        yield one(label(**more), 7, "Elu", x, **more)
        yield one(label(**more), 24, "Swish", x, **more)
        yield one(label(**more), 12, "Celu", x, **given(alpha=alpha or None))
        yield one(label(**more), 10, "ThresholdedRelu", x, **more)
        for beta in (None, 0.0, 0.3):
            more = given(alpha=alpha, beta=beta)
            yield one(label(**more), 7, "HardSigmoid", x, **more)
    yield one("plain", 7, "Selu", x)
    yield one("gamma", 7, "Selu", x, alpha=1.5, gamma=2.0)
    for lambd, bias in product((None, 0.0, 1.0), (None, 0.5)):
        more = given(lambd=lambd, bias=bias)
        yield one(label(**more), 9, "Shrink", x, **more)
    for opset, slope in product((7, 9, 16), ((1,), (5,), (3, 1), (3, 5), (1, 3, 1))):
        yield one(f"{slope}", opset, "PRelu", x, floats(*slope))
    yield one("behind", 16, "PRelu", floats(1, 3, 2, 4), floats(3, 1, 1), behind=True)
    yield computed("computed", 16, "PRelu", floats(2, 3), floats(3))
    for how in (None, "none", "tanh"):
        yield one(f"{how}", 20, "Gelu", x, **given(approximate=how))
    for op, axis in product(("Softmax", "LogSoftmax", "Hardmax"), (None, 0, 1, 2, -1, -2, 3, -4)):
        y = floats(2, 3, 4, 2)
        more = given(axis=axis)
        for opset in (7, 11, 12, 13):
            if not (opset < 11 and axis is not None and axis < 0):
                yield one(label(**more), opset, op, y, **more)
    for op in ("Softmax", "LogSoftmax"):
        yield one("one", 13, op, floats(3))
        yield one("one", 11, op, floats(3), axis=0)
        yield one("size-one", 13, op, floats(2, 1, 3), axis=1)
        yield one("behind", 13, op, floats(1, 3, 2, 4), axis=1, behind=True)
        yield one("behind", 11, op, floats(1, 3, 2, 4), axis=1, behind=True)
        yield one("5d", 13, op, floats(1, 2, 2, 3, 2), axis=2)
    yield from clips()


def clips() -> Iterator[Case]:
    """Clip with bounds left out, crossed, infinite, computed, of every type."""
    x = floats(2, 3, 4) * 4
    for low, high in product((None, 0.0, -1.0, 2.0, -np.inf), (None, 6.0, 1.0, 0.0, np.inf)):
        more = given(min=low, max=high)
        held = [None if b is None else np.array(b, np.float32) for b in (low, high)]
        if high is None:
            held = [] if low is None else held[:1]
        yield one(label(**more), 13, "Clip", x, *held)
        if low in (None, 0.0, 2.0) and high in (None, 6.0, 1.0):
            yield one(label(**more), 7, "Clip", x, **more)
    for dtype in (np.int32, np.int64, np.uint8, np.int8):
        y = numbers(dtype, 3, 5)
        for low, high in ((1, 4), (None, 4), (1, None), (5, 2)):
            held = [None if b is None else np.array(b, dtype) for b in (low, high)]
            yield one(f"{np.dtype(dtype).name},{low},{high}", 13, "Clip", y, *held)
    low, high = np.array(-1, np.float32), np.array(1.5, np.float32)
    yield computed("computed", 13, "Clip", x, low, high)
    yield computed("computed,min", 13, "Clip", x, low)
    yield Case("Clip-13-computed,max", 13, "Clip", {"x": x, "high": high}, ("x", "", "high"))
    yield Case("Clip-13-computed,crossed", 13, "Clip", {"x": x, "low": high}, ("x", "low", "c"),
               {"c": low})  # fmt: skip
    yield Case("Clip-13-computed,both,crossed", 13, "Clip", {"x": x, "low": high, "high": low},
               ("x", "low", "high"))  # fmt: skip
    yield Case("Clip-13-computed,int64", 13, "Clip",
               {"x": numbers(np.int64, 5), "high": np.array(3, np.int64)},
               ("x", "c", "high"), {"c": np.array(0, np.int64)})  # fmt: skip


# --- products ---------------------------------------------------------------------------------


def products() -> Iterator[Case]:
    """MatMul and Gemm."""
    pairs = (((3, 4), (4, 2)), ((2, 3, 4), (4, 2)), ((4,), (4, 2)), ((3, 4), (4,)), ((4,), (4,)),
             ((2, 3, 4), (2, 4, 2)), ((2, 1, 3, 4), (5, 4, 2)), ((1, 4), (3, 4, 2)),
             ((2, 3, 4), (1, 4, 2)), ((2, 3, 1), (1, 2)))  # fmt: skip
    for a, b in pairs:
        yield computed(f"{a},{b}", 13, "MatMul", floats(*a), floats(*b, seed=1))
        yield one(f"{a},{b},right", 13, "MatMul", floats(*a), floats(*b, seed=1))
        yield Case(f"MatMul-13-{a},{b},left", 13, "MatMul", {"x": floats(*b, seed=1)}, ("c", "x"),
                   {"c": floats(*a)})  # fmt: skip
    for dtype in (np.int32, np.int64):
        yield computed(np.dtype(dtype).name, 13, "MatMul", numbers(dtype, 2, 3),
                       numbers(dtype, 3, 2))  # fmt: skip
        yield one(f"{np.dtype(dtype).name},constant", 13, "MatMul", numbers(dtype, 2, 3),
                  numbers(dtype, 3, 2))  # fmt: skip
    for ta, tb, alpha, beta in product((0, 1), (0, 1), (None, 0.5, 0.0), (None, 2.0, 0.0)):
        x, w = floats(*((4, 3) if ta else (3, 4))), floats(*((2, 4) if tb else (4, 2)))
        more = given(transA=ta, transB=tb, alpha=alpha, beta=beta)
        for c in ((2,), (1, 2), (3, 1), (3, 2), (), None) if alpha != 0.0 else ((2,), None):
            held = [w] if c is None else [w, floats(*c, seed=1)]
            yield one(f"{label(**more)},c={c}", 13, "Gemm", x, *held, **more)
    yield one("7", 7, "Gemm", floats(3, 4), floats(4, 2), floats(2))
    yield computed("computed", 13, "Gemm", floats(3, 4), floats(2, 4), floats(3, 2), transB=1,
                   beta=0.5)  # fmt: skip
    yield Case("Gemm-13-left", 13, "Gemm", {"x": floats(4, 2)}, ("c", "x"), {"c": floats(3, 4)})


# --- shapes -----------------------------------------------------------------------------------


def shapes() -> Iterator[Case]:
    """Operators that move, cut, join and repeat."""
    x = floats(2, 3, 4)
    for shape in ((6, 4), (0, -1), (2, 0, 4), (-1,), (1, 24), (2, 1, 3, 4)):
        yield one(f"{shape}", 13, "Reshape", x, ints(*shape))
    yield one("allowzero", 14, "Reshape", x, ints(6, 4), allowzero=1)
    yield one("allowzero=0", 14, "Reshape", x, ints(0, 12), allowzero=0)
    yield one("no-axes", 13, "Reshape", floats(1, 1), ints())
    yield one("behind", 13, "Reshape", floats(1, 3, 2, 4), ints(1, -1), behind=True)
    y = floats(1, 3, 1, 4)
    for opset, axes in product((11, 13, 21), ((0,), (0, 2), (-2,), (2, -4))):
        if opset == 11:
            yield one(f"{axes}", opset, "Squeeze", y, axes=list(axes))
        else:
            yield one(f"{axes}", opset, "Squeeze", y, ints(*axes))
    yield one("all", 7, "Squeeze", y)
    yield one("all", 13, "Squeeze", y)
    yield one("empty", 13, "Squeeze", y, ints())
    yield one("to-none", 13, "Squeeze", floats(1, 1))
    for opset, axes in product((11, 13, 21), ((0,), (0, 4), (-1,), (2, -1), (3, 1))):
        if opset == 11:
            yield one(f"{axes}", opset, "Unsqueeze", x, axes=list(axes))
        else:
            yield one(f"{axes}", opset, "Unsqueeze", x, ints(*axes))
    yield one("no-axes", 13, "Unsqueeze", np.array(1.5, np.float32), ints(0))
    for axis in (None, 0, 1, 2, 3, -1, -3):
        yield one(label(**given(axis=axis)), 13, "Flatten", x, **given(axis=axis))
    yield one("behind", 13, "Flatten", floats(1, 3, 2, 4), behind=True)
    for perm in (None, (0, 1, 2), (2, 0, 1), (1, 0, 2)):
        yield one(f"{perm}", 13, "Transpose", x, **given(perm=perm))
    for perm in ((0, 2, 3, 1), (0, 3, 1, 2), (3, 2, 1, 0), (1, 0, 2, 3)):
        yield one(f"{perm}", 13, "Transpose", floats(2, 3, 1, 4), perm=perm)
        yield one(f"{perm},behind", 13, "Transpose", floats(2, 3, 1, 4), perm=perm, behind=True)
    yield one("6d", 13, "Transpose", floats(1, 2, 2, 1, 3, 2), perm=(5, 0, 4, 2, 3, 1))
    for shape in ((2, 3, 4), (5, 2, 3, 4), (1,), (3, 1), (2, 1, 1, 1)):
        yield one(f"{shape}", 13, "Expand", x, ints(*shape))
        yield one(f"{shape},narrow", 8, "Expand", floats(3, 1), ints(*shape))
    yield one("no-axes", 13, "Expand", np.array(1, np.float32), ints(2, 3))
    for times in ((1, 1, 1), (2, 1, 3), (1, 2, 1), (3, 2, 2)):
        yield one(f"{times}", 13, "Tile", x, ints(*times))
    yield one("behind", 13, "Tile", floats(1, 3, 2, 4), ints(1, 2, 1, 3), behind=True)
    for axis in (0, 1, -1, -3):
        yield computed(f"{axis}", 13, "Concat", x, floats(2, 3, 4, seed=1), axis=axis)
        yield one(f"{axis},constant", 13, "Concat", x, floats(2, 3, 4, seed=1), axis=axis)
    yield computed("one", 13, "Concat", x, axis=1)
    yield one("behind", 13, "Concat", floats(1, 3, 2, 4), floats(1, 2, 2, 4), axis=1, behind=True)
    for block, mode in product((1, 2), (None, "DCR", "CRD")):
        more = given(blocksize=block, mode=mode)
        yield one(label(**more), 11, "DepthToSpace", floats(1, 8, 2, 3), **more)
        yield one(f"{label(**more)},behind", 13, "DepthToSpace", floats(1, 8, 2, 3), behind=True,
                  **more)  # fmt: skip
        yield one(label(**more), 28, "SpaceToDepth", floats(1, 2, 4, 6), **more)
    yield one("13", 13, "SpaceToDepth", floats(2, 3, 4, 2), blocksize=2)
    for op in ("Reshape", "Squeeze", "Transpose", "Concat", "Expand", "Tile", "Identity"):
        held = {"Reshape": ints(4, 3), "Squeeze": ints(1), "Expand": ints(2, 3, 1, 4),
                "Tile": ints(2, 1, 1)}.get(op)  # fmt: skip
        for dtype in (np.int32, np.int64, np.uint8, np.int8, np.bool_):
            z, more = numbers(dtype, 3, 1, 4), {"axis": 1} if op == "Concat" else {}
            args = [] if held is None else [held]
            if op == "Concat":
                args = [numbers(dtype, 3, 2, 4)]
            yield one(np.dtype(dtype).name, 13, op, z, *args, **more)
    yield from cuts()
    yield from gathers()
    yield from pads()


def cuts() -> Iterator[Case]:
    """Slice and Split."""
    x = floats(2, 5, 4)
    big = 2**62
    for start, end, axis, step in (
        (1, 3, 1, 1), (-3, -1, 1, 1), (0, big, 1, 2), (-1, -big, 1, -1), (4, 0, 1, -2),
        (1, 4, -1, 2), (3, 1, 1, 1), (0, -1, 2, 1), (-big, big, 0, 1), (1, 2, 0, 1),
        (3, -6, 1, -1),
    ):  # fmt: skip
        name = f"{start}:{end}:{step},axis={axis}".replace(str(big), "max")
        yield one(name, 13, "Slice", x, ints(start), ints(end), ints(axis), ints(step))
        if step == 1:
            yield one(name, 10, "Slice", x, ints(start), ints(end), ints(axis))
            yield one(name, 9, "Slice", x, starts=[start], ends=[end], axes=[axis])
    yield one("no-axes", 13, "Slice", x, ints(0, 1), ints(1, 4))
    yield one("no-axes,steps", 13, "Slice", x, ints(0, 1), ints(2, 4), None, ints(1, 2))
    yield one("two", 13, "Slice", x, ints(1, -2), ints(4, big), ints(1, -1), ints(2, 1))
    yield one("9", 9, "Slice", x, starts=[0, 1], ends=[1, 9])
    yield one("behind", 13, "Slice", floats(1, 4, 3, 5), ints(1, 0), ints(3, 5), ints(1, 3),
              ints(1, 2), behind=True)  # fmt: skip
    for dtype in (np.int32, np.int64, np.uint8, np.bool_):
        yield one(np.dtype(dtype).name, 13, "Slice", numbers(dtype, 3, 4), ints(1), ints(3),
                  ints(1))  # fmt: skip
        yield one(f"{np.dtype(dtype).name},back", 13, "Slice", numbers(dtype, 3, 4), ints(-1),
                  ints(-9), ints(1), ints(-1))  # fmt: skip
    yield computed("computed", 13, "Slice", x, ints(1), ints(3))
    for axis, sizes in ((0, (1, 1)), (1, (2, 3)), (-1, (1, 3)), (1, (5,)), (2, (1, 2, 1))):
        for used in {(0,), tuple(range(len(sizes))), (len(sizes) - 1,)}:
            outs = len(sizes)
            yield Case(f"Split-13-{axis},{sizes},{used}", 13, "Split", {"x": x}, ("x", "c"),
                       {"c": ints(*sizes)}, {"axis": axis}, outs, used)  # fmt: skip
            yield Case(f"Split-11-{axis},{sizes},{used}", 11, "Split", {"x": x}, ("x",), {},
                       {"axis": axis, "split": list(sizes)}, outs, used)  # fmt: skip
    for n, used in product((2, 3, 4), ((0,), (1,), (0, 1))):
        yield Case(f"Split-18-{n},{used}", 18, "Split", {"x": x}, ("x",), {},
                   {"axis": 1, "num_outputs": n}, n, used)  # fmt: skip
    yield Case("Split-13-equal", 13, "Split", {"x": x}, ("x",), {}, {"axis": -1}, 2, (0, 1))
    yield Case("Split-7-default", 7, "Split", {"x": x}, ("x",), {}, {}, 2, (1,))
    for used in ((0,), (1,), (0, 2)):
        yield Case(f"Split-13-behind,{used}", 13, "Split", {"x": floats(1, 5, 3, 2)}, ("x", "c"),
                   {"c": ints(1, 3, 1)}, {"axis": 1}, 3, used, True)  # fmt: skip
    for dtype in (np.int64, np.int32, np.uint8, np.bool_):
        yield Case(f"Split-13-{np.dtype(dtype).name}", 13, "Split",
                   {"x": numbers(dtype, 4, 3)}, ("x",), {}, {"axis": 0}, 2, (1,))  # fmt: skip


def gathers() -> Iterator[Case]:
    """Gather and GatherElements with negative places, of constants and values."""
    table = floats(5, 4, 3)
    for axis, kind in product((None, 1, -1, -3), (np.int32, np.int64)):
        more = given(axis=axis)
        places = np.array([[0, 2], [-1, 1]], kind)
        name = f"{label(**more)},{np.dtype(kind).name}"
        yield one(f"{name},fixed", 13, "Gather", table, places, **more)
        yield Case(f"Gather-13-{name},table", 13, "Gather", {"x": np.abs(places)}, ("c", "x"),
                   {"c": table}, more)  # fmt: skip
        yield Case(f"Gather-13-{name},table,negative", 13, "Gather", {"x": places}, ("c", "x"),
                   {"c": table}, more)  # fmt: skip
        yield computed(f"{name},both", 13, "Gather", table, np.abs(places), **more)
    yield one("one", 13, "Gather", table, np.array(1, np.int64), axis=1)
    yield one("minus-one", 11, "Gather", table, np.array(-1, np.int64), axis=1)
    yield Case("Gather-13-no-axes", 13, "Gather", {"x": np.array(2, np.int64)}, ("c", "x"),
               {"c": floats(5, 4)})  # fmt: skip
    yield one("behind", 13, "Gather", floats(1, 4, 3, 2), ints(2, 0), axis=1, behind=True)
    for dtype in (np.int32, np.int64, np.uint8, np.bool_):
        yield one(np.dtype(dtype).name, 13, "Gather", numbers(dtype, 3, 4), ints(2, 0), axis=1)
    for axis, kind in product((None, 1, -1), (np.int32, np.int64)):
        more = given(axis=axis)
        places = np.array([[0, 1, 2, 0], [2, -1, 0, 1]], kind)
        yield one(f"{label(**more)},{np.dtype(kind).name}", 13, "GatherElements", floats(3, 4),
                  places, **more)  # fmt: skip
        yield computed(f"{label(**more)},{np.dtype(kind).name},both", 13, "GatherElements",
                       floats(3, 4), np.abs(places), **more)  # fmt: skip


def pads() -> Iterator[Case]:
    """Pad in every mode, with negative pads and axes, of every type."""
    x = floats(2, 3, 4)
    for mode, laid in product(
        (None, "constant", "reflect", "edge", "wrap"),
        ((0, 1, 2, 0, 1, 0), (0, 0, 0, 0, 0, 0), (0, -1, 1, 0, 0, -1), (1, 0, 0, 1, 2, 1)),
    ):
        more = given(mode=mode)
        name = f"{label(**more)},{laid}"
        opset = 19 if mode == "wrap" else 18
        yield one(name, opset, "Pad", x, ints(*laid), **more)
        if mode in (None, "constant"):
            yield one(f"{name},value", 13, "Pad", x, ints(*laid), np.array(1.5, np.float32), **more)
            yield one(f"{name},value", 7, "Pad", x, pads=list(laid), value=-2.0, **more)
        if mode != "wrap":
            yield one(f"{name},axes", 18, "Pad", x, ints(1, 2), None, ints(-1), **more)
            yield one(f"{name},axes=1", 18, "Pad", x, ints(1, 0, 2, 1), None, ints(1, 0),
                      **({} if mode == "reflect" else more))  # fmt: skip
    for dtype in (np.int32, np.int64, np.uint8, np.int8, np.bool_):
        yield one(np.dtype(dtype).name, 13, "Pad", numbers(dtype, 2, 3), ints(0, 1, 1, 0))
        yield one(f"{np.dtype(dtype).name},value", 13, "Pad", numbers(dtype, 2, 3),
                  ints(0, 1, 1, 0), np.array(1, dtype))  # fmt: skip
    for mode in ("constant", "reflect", "edge"):
        yield one(f"behind,{mode}", 13, "Pad", floats(1, 3, 4, 3), ints(0, 0, 1, 2, 0, 0, 0, 1),
                  mode=mode, behind=True)  # fmt: skip
    yield one("inf", 13, "Pad", x, ints(0, 1, 0, 0, 0, 0), np.array(-np.inf, np.float32))
    yield computed("computed", 13, "Pad", x, ints(0, 1, 0, 0, 0, 0))


# --- resizing ---------------------------------------------------------------------------------

COORDINATES = ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners",
               "asymmetric", "tf_crop_and_resize")  # fmt: skip
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


def resizes() -> Iterator[Case]:
    """Resize and Upsample."""
    x = floats(1, 2, 4, 5)
    sizes = ((8, 10), (1, 1), (2, 3), (7, 1), (4, 9))
    roi = np.array([0, 0, 0.1, 0.2, 1, 1, 0.8, 0.9], np.float32)
    for mode, way in product(("nearest", "linear", "cubic"), COORDINATES):
        near: Sequence[str | None] = NEAREST if mode == "nearest" else (None,)
        for rounding, (h, w) in product(near, sizes):
            more = given(mode=mode, coordinate_transformation_mode=way, nearest_mode=rounding)
            crop = roi if way == "tf_crop_and_resize" else None
            yield one(f"{label(**more)},{h}x{w}", 19, "Resize", x, crop, None, ints(1, 2, h, w),
                      **more)  # fmt: skip
    for mode, way, (a, b) in product(
        ("nearest", "linear"), COORDINATES[:5], ((2.0, 2.0), (1.5, 0.6), (0.3, 1.0), (2.3, 1.7))
    ):
        more = {"mode": mode, "coordinate_transformation_mode": way}
        scales = np.array([1, 1, a, b], np.float32)
        for opset in (11, 19):
            if not (opset == 11 and way == "half_pixel_symmetric"):
                first = np.zeros(0, np.float32) if opset == 11 else None
                yield one(f"{label(**more)},{a}x{b}", opset, "Resize", x, first, scales, **more)
    two = ints(6, 7)
    for policy in ("stretch", "not_larger", "not_smaller"):
        yield one(f"axes,{policy}", 19, "Resize", x, None, None, two, axes=[2, 3],
                  keep_aspect_ratio_policy=policy)  # fmt: skip
        yield one(f"axes,{policy},down", 19, "Resize", x, None, None, ints(2, 3), axes=[3, 2],
                  keep_aspect_ratio_policy=policy, mode="linear")  # fmt: skip
    scale = np.array([2, 1.5], np.float32)
    yield one("axes,scales", 18, "Resize", x, None, scale, axes=[-2, -1], mode="linear")
    yield one("antialias", 18, "Resize", x, None, None, ints(1, 2, 2, 3), antialias=1,
              mode="linear")  # fmt: skip
    yield one("antialias,up", 18, "Resize", x, None, None, ints(1, 2, 8, 9), antialias=1,
              mode="linear")  # fmt: skip
    yield one("exclude", 13, "Resize", x, None, None, ints(1, 2, 7, 7), exclude_outside=1,
              mode="cubic")  # fmt: skip
    yield one("cubic_a", 13, "Resize", x, None, None, ints(1, 2, 7, 7), cubic_coeff_a=-0.5,
              mode="cubic")  # fmt: skip
    yield one("1d", 13, "Resize", floats(1, 2, 5), None, None, ints(1, 2, 9), mode="linear")
    yield one("1d,nearest", 13, "Resize", floats(1, 2, 5), None, None, ints(1, 2, 9))
    yield one("channels", 13, "Resize", x, None, None, ints(1, 4, 8, 10))
    yield one("same", 13, "Resize", x, None, None, ints(1, 2, 4, 5))
    yield one("behind", 13, "Resize", x, None, None, ints(1, 2, 8, 10), mode="linear", behind=True)
    yield one("uint8", 13, "Resize", numbers(np.uint8, 1, 2, 3, 3), None, None, ints(1, 2, 6, 6))
    scales = np.array([1, 1, 2, 3], np.float32)
    for mode in ("nearest", "linear"):
        yield one(mode, 9, "Upsample", x, scales, mode=mode)
        yield one(f"{mode},half", 9, "Upsample", x, np.array([1, 1, 1.5, 1], np.float32), mode=mode)
        yield one(mode, 7, "Upsample", x, scales=[1.0, 1.0, 2.0, 3.0], mode=mode)
        yield one(mode, 10, "Resize", x, scales, mode=mode)


GROUPS = {
    "reductions": reductions, "windows": windows, "norms": norms, "elementwise": elementwise,
    "products": products, "shapes": shapes, "resizes": resizes,
}  # fmt: skip
"""Part of the matrix -> what makes its cases."""


def cases(group: str) -> Mapping[str, Case]:
    """The cases of a part by name."""
    return {case.name: case for case in GROUPS[group]()}
