"""Reading operators that keep the order of axes, one function each.

`OPERATORS` is the list of what is read; convolutions and pools are in `edgeq.graph.tflite.image`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgeq.graph.tflite.image import IMAGE
from edgeq.graph.tflite.layout import TO_FIRST, TO_LAST, Layouts, moves_nothing, permuted
from edgeq.graph.tflite.schema import TfliteOperator

Importer = Callable[[Layouts, TfliteOperator], None]
_ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9}


def _plain(kind: str, **attrs: Any) -> Importer:
    """An operator that works on each element, and has the same meaning."""

    def run(r: Layouts, op: TfliteOperator) -> None:
        names, first = r.together(op)
        fused = hasattr(op.options, "fusedActivationFunction")
        r.result(op, kind, names, first=first, fused=fused, **attrs)

    return run


def _clip(low: float, high: float) -> Importer:
    def run(r: Layouts, op: TfliteOperator) -> None:
        names, first = r.together(op)
        r.result(op, "Clip", [*names, r.number(low), r.number(high)], first=first)

    return run


def _leaky(r: Layouts, op: TfliteOperator) -> None:
    names, first = r.together(op)
    r.result(op, "LeakyRelu", names, first=first, alpha=float(op.options.alpha))


def _gelu(r: Layouts, op: TfliteOperator) -> None:
    names, first = r.together(op)
    kind = "tanh" if op.options is not None and op.options.approximate else "none"
    r.result(op, "Gelu", names, first=first, approximate=kind)


def _rsqrt(r: Layouts, op: TfliteOperator) -> None:
    (name,), first = r.together(op)
    root = r.step("Sqrt", [name], r.values[name].shape, r.base(op.outputs[0]))
    r.result(op, "Div", [r.number(1.0), root], first=first)


def _square(r: Layouts, op: TfliteOperator) -> None:
    (name,), first = r.together(op)
    r.result(op, "Mul", [name, name], first=first)


def _squared_difference(r: Layouts, op: TfliteOperator) -> None:
    names, first = r.together(op)
    less = r.step("Sub", names, r.out_shape(op, first), r.base(op.outputs[0]))
    r.result(op, "Mul", [less, less], first=first)


def _not_equal(r: Layouts, op: TfliteOperator) -> None:
    names, first = r.together(op)
    equal = r.step("Equal", names, r.out_shape(op, first), r.base(op.outputs[0]), "bool")
    r.result(op, "Not", [equal], first=first)


def _cast(r: Layouts, op: TfliteOperator) -> None:
    (name,), first = r.together(op)
    dtype = r.model.tensors[op.outputs[0]].dtype
    r.result(op, "Cast", [name], first=first, to=_ONNX_TYPES[dtype])


def _softmax(kind: str) -> Importer:
    def run(r: Layouts, op: TfliteOperator) -> None:
        x = op.inputs[0]
        first = r.is_first(x)
        name, beta = r.get(x, first), getattr(op.options, "beta", 1.0)
        if beta != 1.0:
            name = r.step("Mul", [name, r.number(beta)], r.values[name].shape, name)
        r.result(op, kind, [name], first=first, axis=r.axis(x, -1))

    return run


def _l2_normalize(r: Layouts, op: TfliteOperator) -> None:
    x = op.inputs[0]
    first = r.is_first(x)
    name, axis, base = r.get(x, first), r.axis(x, -1), r.base(op.outputs[0])
    shape = list(r.values[name].shape)
    square = r.step("Mul", [name, name], shape, base)
    shape[axis] = 1
    total = r.step("ReduceSum", [square, r.numbers([axis])], shape, base, keepdims=1)
    norm = r.step("Sqrt", [total], shape, base)
    norm = r.step("Max", [norm, r.number(1e-6)], shape, base)  # the runtime's own bound
    r.result(op, "Div", [name, norm], first=first, fused=True)


def _reduce(kind: str) -> Importer:
    def run(r: Layouts, op: TfliteOperator) -> None:
        x, keep = op.inputs[0], bool(op.options.keepDims)
        rank = len(r.shape(x))
        axes = sorted({axis % rank for axis in r.ints(op, 1)})
        left = [axis for axis in TO_FIRST if axis not in axes]
        first = r.is_first(x) and (keep or moves_nothing(r.shape(x), left))
        name = r.get(x, first)
        places = sorted(TO_LAST[axis] for axis in axes) if first else axes
        inputs = [name, r.numbers(places)]
        r.result(op, kind, inputs, first=first and keep, keepdims=int(keep))

    return run


def _argmax(kind: str) -> Importer:
    def run(r: Layouts, op: TfliteOperator) -> None:
        x, axis = op.inputs[0], r.ints(op, 1)[0] % len(r.shape(op.inputs[0]))
        name = r.get(x, False)
        out = op.outputs[0]
        if r.model.tensors[out].dtype == "int64":
            r.result(op, kind, [name], axis=axis, keepdims=0)
            return
        place = r.step(kind, [name], r.shape(out), r.base(out), "int64", axis=axis, keepdims=0)
        r.result(op, "Cast", [place], to=_ONNX_TYPES[r.model.tensors[out].dtype])

    return run


def _reshape(r: Layouts, op: TfliteOperator) -> None:
    x, out = op.inputs[0], op.outputs[0]
    shape = r.shape(out)
    if r.size(x) != r.size(out):
        raise r.refusal(op, f"its shape {list(shape)} does not hold {list(r.shape(x))}")
    first = r.is_first(x) and moves_nothing(r.shape(x), TO_FIRST)
    if r.is_first(x) and not first and _only_weighs(r, out, math.prod(r.shape(x)[1:])):
        r.flat[out], first = r.shape(x), True
    name = r.get(x, first)
    r.result(op, "Reshape", [name, r.numbers(shape)])


def _only_weighs(r: Layouts, i: int, k: int) -> bool:
    """Whether only products of a tensor's rows with constants read it; their columns can move."""
    takers = [op for op in r.model.operators if i in op.inputs]
    return i not in r.model.outputs and all(
        op.op == "FULLY_CONNECTED"
        and op.inputs[0] == i
        and r.constant(op.inputs[1]) is not None
        and r.shape(op.inputs[1])[1] == k
        for op in takers
    )


def _transpose(r: Layouts, op: TfliteOperator) -> None:
    x, order = op.inputs[0], r.ints(op, 1)
    name = r.get(x, r.is_first(x))
    rank = len(order)
    if r.is_first(x):
        order = [TO_LAST[axis] for axis in order]
    if order == list(range(rank)) and r.alias(op, name, False):
        return  # the file itself goes to channels first
    if rank == 4 and permuted(order, TO_FIRST) == (0, 1, 2, 3) and r.alias(op, name, True):
        return  # and back
    r.result(op, "Transpose", [name], perm=order)


def _concat(r: Layouts, op: TfliteOperator) -> None:
    names, first = r.together(op)
    rank = len(r.shape(op.outputs[0]))
    axis = op.options.axis % rank
    attrs = {"axis": TO_LAST[axis] if first else axis}
    r.result(op, "Concat", names, first=first, fused=True, **attrs)


def _pack(r: Layouts, op: TfliteOperator) -> None:
    out, rank = op.outputs[0], len(r.shape(op.outputs[0]))
    axis = op.options.axis % rank
    shape = list(r.shape(out))
    shape[axis] = 1
    names = [r.reshape(r.get(i, False), shape) for i in op.inputs]
    r.result(op, "Concat", names, axis=axis)


def _split(position: int) -> Importer:
    def run(r: Layouts, op: TfliteOperator) -> None:
        x = op.inputs[position]
        axis = int(r.fixed(op, 0 if position else 2).reshape(-1)[0])
        place = axis % len(r.shape(x))
        sizes = [r.shape(out)[place] for out in op.outputs]
        first = r.is_first(x)
        inputs = [r.get(x, first), r.numbers(sizes)]
        r.result(op, "Split", inputs, first=first, axis=r.axis(x, axis))

    return run


def _unpack(r: Layouts, op: TfliteOperator) -> None:
    x = op.inputs[0]
    axis = op.options.axis % len(r.shape(x))
    for n, out in enumerate(op.outputs):
        one = TfliteOperator(op.index, op.op, op.inputs, (out,), None)
        number = r.add_constant(f"index_{n}", np.array(n, np.int64))
        r.result(one, "Gather", [r.get(x, False), number], axis=axis)


def _slice(r: Layouts, op: TfliteOperator) -> None:
    x, begin = op.inputs[0], r.ints(op, 1)
    sizes = [n - at if size == -1 else size
             for n, at, size in zip(r.shape(x), begin, r.ints(op, 2), strict=True)]  # fmt: skip
    end = [at + size for at, size in zip(begin, sizes, strict=True)]
    _cut(r, op, r.is_first(x), begin, end, [1] * len(begin))


def _strided_slice(r: Layouts, op: TfliteOperator) -> None:
    x, o = op.inputs[0], op.options
    if o.ellipsisMask or o.newAxisMask:
        raise r.refusal(op, "new axes and ellipses are not read")
    shape, cuts = r.shape(x), []
    begin, end, steps = r.ints(op, 1), r.ints(op, 2), r.ints(op, 3)
    shrunk = [axis for axis in range(len(begin)) if o.shrinkAxisMask >> axis & 1]
    for axis, n in enumerate(shape[: len(begin)]):
        if axis in shrunk:
            at = begin[axis] % n
            cuts.append((at, at + 1, 1))
            continue
        a = None if o.beginMask >> axis & 1 else begin[axis]
        b = None if o.endMask >> axis & 1 else end[axis]
        first, stop, step = slice(a, b, steps[axis]).indices(n)
        cuts.append((first, stop if stop >= 0 else -n - 1, step))
    cuts += [(0, n, 1) for n in shape[len(begin) :]]
    begin, end, steps = ([cut[part] for cut in cuts] for part in range(3))
    _cut(r, op, r.is_first(x) and not shrunk, begin, end, steps, shrunk=bool(shrunk))


def _cut(
    r: Layouts,
    op: TfliteOperator,
    first: bool,
    begin: list[int],
    end: list[int],
    steps: list[int],
    shrunk: bool = False,
) -> None:
    x = op.inputs[0]
    name, rank = r.get(x, first), len(begin)
    order = TO_FIRST if first else tuple(range(rank))
    ends = [r.numbers(permuted(part, order)) for part in (begin, end)]
    inputs = [name, *ends, r.numbers(range(rank)), r.numbers(permuted(steps, order))]
    if not shrunk:
        r.result(op, "Slice", inputs, first=first)
        return
    left = [len(range(*cut)) for cut in zip(begin, end, steps, strict=True)]
    cut = r.step("Slice", inputs, left, r.base(op.outputs[0]), r.model.tensors[x].dtype)
    r.result(op, "Reshape", [cut, r.numbers(r.shape(op.outputs[0]))])


def _pad(r: Layouts, op: TfliteOperator) -> None:
    x = op.inputs[0]
    first, pads = r.is_first(x), r.fixed(op, 1).astype(np.int64)
    mode = "constant"
    if op.op == "MIRROR_PAD":
        mode = "edge" if op.options.mode else "reflect"
        if mode == "edge" and pads.max(initial=0) > 1:
            raise r.refusal(op, "symmetric padding is read up to one element, where it is an edge")
    if first:
        pads = pads[list(TO_FIRST)]
    inputs = [r.get(x, first), r.numbers([int(n) for n in pads.T.reshape(-1)])]
    if op.op == "PADV2":
        inputs.append(r.number(float(r.fixed(op, 2).reshape(-1)[0])))
    r.result(op, "Pad", inputs, first=first, mode=mode)


def _gather(r: Layouts, op: TfliteOperator) -> None:
    table, indices, axis = op.inputs[0], op.inputs[1], op.options.axis
    if op.options.batchDims:
        raise r.refusal(op, f"batch_dims is {op.options.batchDims}; 0 is read")
    _look_up(r, op, table, indices, axis % len(r.shape(table)))


def _embedding(r: Layouts, op: TfliteOperator) -> None:
    _look_up(r, op, op.inputs[1], op.inputs[0], 0)


def _look_up(r: Layouts, op: TfliteOperator, table: int, indices: int, axis: int) -> None:
    r.result(op, "Gather", [r.get(table, False), r.get(indices, False)], axis=axis)


def _to_shape(kind: str) -> Importer:
    def run(r: Layouts, op: TfliteOperator) -> None:
        sizes = r.ints(op, 1) if kind == "Tile" else r.shape(op.outputs[0])
        r.result(op, kind, [r.get(op.inputs[0], False), r.numbers(sizes)])

    return run


def _fully_connected(r: Layouts, op: TfliteOperator) -> None:
    x, w = op.inputs[:2]
    b = op.inputs[2] if len(op.inputs) > 2 else -1
    if op.options.weightsFormat:
        raise r.refusal(op, "shuffled weights are not read")
    n, k = r.shape(w)
    shape = (*r.shape(op.outputs[0])[:-1], k)
    weights = r.constant(w)
    image = r.flat.get(x) or (r.shape(x) if r.is_first(x) and r.shape(x)[-1] != k else None)
    if weights is None:
        name = r.reshape(r.get(x, False), shape)
        across = r.transpose(r.get(w, False), (1, 0))
        if b >= 0:
            name = r.step("MatMul", [name, across], (*shape[:-1], n), r.base(op.outputs[0]))
            r.result(op, "Add", [name, r.get(b, False)], fused=True)
        else:
            r.result(op, "MatMul", [name, across], fused=True)
        return
    if b >= 0:
        r.fixed(op, 2)
    if image is not None and k == math.prod(image[1:]):
        weights = weights.reshape(n, *image[1:]).transpose(TO_FIRST).reshape(n, k)
        name = r.get(x, x not in r.flat)
        weight = r.add_constant(r.base(w), weights)
    else:
        name, weight = r.get(x, False), r.get(w, False)
    inputs = [r.reshape(name, shape), weight, *([r.get(b, False)] if b >= 0 else [])]
    r.result(op, "Linear", inputs, fused=True)


def _batch_matmul(r: Layouts, op: TfliteOperator) -> None:
    x, y = op.inputs
    left = r.get(x, False)
    if op.options.adjX:
        left = r.transpose(left, _last_two(len(r.shape(x))))
    weights = r.constant(y)
    if weights is not None and math.prod(weights.shape[:-2]) == 1:
        w = weights.reshape(weights.shape[-2:])
        weight = r.add_constant(r.base(y), w if op.options.adjY else w.T)
        r.result(op, "Linear", [left, weight])
        return
    if weights is not None:
        stack = weights.transpose(_last_two(weights.ndim)) if op.options.adjY else weights
        r.result(op, "MatMul", [left, r.add_constant(r.base(y), stack)])
        return
    right = r.get(y, False)
    if op.options.adjY:
        right = r.transpose(right, _last_two(len(r.shape(y))))
    r.result(op, "MatMul", [left, right])


def _last_two(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)


ELEMENTWISE: Mapping[str, Importer] = {
    "ABS": _plain("Abs"), "ADD": _plain("Add"), "CAST": _cast, "CEIL": _plain("Ceil"),
    "COS": _plain("Cos"), "DIV": _plain("Div"), "ELU": _plain("Elu"), "EQUAL": _plain("Equal"),
    "EXP": _plain("Exp"), "FLOOR": _plain("Floor"), "GELU": _gelu, "GREATER": _plain("Greater"),
    "GREATER_EQUAL": _plain("GreaterOrEqual"), "HARD_SWISH": _plain("HardSwish"),
    "LEAKY_RELU": _leaky, "LESS": _plain("Less"), "LESS_EQUAL": _plain("LessOrEqual"),
    "LOG": _plain("Log"), "LOGICAL_AND": _plain("And"), "LOGICAL_NOT": _plain("Not"),
    "LOGICAL_OR": _plain("Or"), "LOGISTIC": _plain("Sigmoid"), "MAXIMUM": _plain("Max"),
    "MINIMUM": _plain("Min"), "MUL": _plain("Mul"), "NEG": _plain("Neg"),
    "NOT_EQUAL": _not_equal, "POW": _plain("Pow"), "PRELU": _plain("PRelu"),
    "RELU": _plain("Relu"), "RELU6": _clip(0.0, 6.0), "RELU_0_TO_1": _clip(0.0, 1.0),
    "RELU_N1_TO_1": _clip(-1.0, 1.0), "ROUND": _plain("Round"), "RSQRT": _rsqrt,
    "SELECT": _plain("Where"), "SELECT_V2": _plain("Where"), "SIN": _plain("Sin"),
    "SQRT": _plain("Sqrt"), "SQUARE": _square, "SQUARED_DIFFERENCE": _squared_difference,
    "SUB": _plain("Sub"), "TANH": _plain("Tanh"),
}  # fmt: skip
"""Operators that work on each element."""
PASSED_ON: Mapping[str, Importer] = {
    **ELEMENTWISE,
    "CONCATENATION": _concat, "MIRROR_PAD": _pad, "PAD": _pad, "PADV2": _pad, "SLICE": _slice,
    "SPLIT": _split(1), "SPLIT_V": _split(0), "STRIDED_SLICE": _strided_slice,
}  # fmt: skip
"""Operators that leave axes where they are: channels first behind channels first."""
OPERATORS: Mapping[str, Importer] = {
    **IMAGE, **PASSED_ON,
    "ARG_MAX": _argmax("ArgMax"), "ARG_MIN": _argmax("ArgMin"), "BATCH_MATMUL": _batch_matmul,
    "BROADCAST_TO": _to_shape("Expand"),
    "EMBEDDING_LOOKUP": _embedding, "EXPAND_DIMS": _reshape, "FULLY_CONNECTED": _fully_connected,
    "GATHER": _gather, "L2_NORMALIZATION": _l2_normalize, "LOG_SOFTMAX": _softmax("LogSoftmax"),
    "MEAN": _reduce("ReduceMean"), "PACK": _pack, "REDUCE_MAX": _reduce("ReduceMax"),
    "REDUCE_MIN": _reduce("ReduceMin"), "REDUCE_PROD": _reduce("ReduceProd"),
    "RESHAPE": _reshape, "SOFTMAX": _softmax("Softmax"), "SQUEEZE": _reshape,
    "SUM": _reduce("ReduceSum"), "TILE": _to_shape("Tile"), "TRANSPOSE": _transpose,
    "UNPACK": _unpack,
}  # fmt: skip
"""Every operator that is read."""
