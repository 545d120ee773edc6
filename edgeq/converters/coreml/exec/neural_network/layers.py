"""Layers of Core ML's older NeuralNetwork format in NumPy, each by the operators of MIL.

A layer takes its parameters (a protobuf message) and its inputs, and gives one result or several.
In networks of the oldest kind every array is [S, B, C, H, W] (sequence, batch, channels, height,
width) and layers work on C, H, W; newer networks say ranks as they are. Here both work on the last
three dimensions, with all before them taken as a batch.

Source: mlmodel/format/NeuralNetwork.proto in github.com/apple/coremltools.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.coreml.exec import ops_math, ops_nn, ops_recurrent, ops_shape
from edgeq.converters.coreml.exec.neural_network import layers_shape
from edgeq.core.errors import FormatError, UnsupportedError

Array = NDArray[Any]
Layer = Callable[[Any, Sequence[Array]], Any]


def weight_values(params: Any, shape: Sequence[int]) -> Array:
    """Weights as float32: floats, float16, or integers with scales or a table.

    Args:
        params: a WeightParams message.
        shape: of the result; of quantized weights, scales run along its first dimension.
    """
    count = math.prod(shape)
    if params.quantization.numberOfBits:
        return _quantized(params, count).reshape(shape[0], -1).reshape(shape)
    if len(params.float16Value):
        values = np.frombuffer(params.float16Value, np.float16).astype(np.float32)
    elif len(params.int8RawValue) or len(params.rawValue):
        raise UnsupportedError("weights in a custom form cannot be executed")
    else:
        values = np.array(params.floatValue, np.float32)
    if values.size != count:
        raise FormatError(f"{values.size} weights where {list(shape)} are needed")
    return values.reshape(shape)


def _quantized(params: Any, count: int) -> Array:
    """Codes of 1 to 8 bits, the first in the highest bits, with their scales or table."""
    bits = params.quantization.numberOfBits
    raw = np.frombuffer(params.rawValue, np.uint8)
    stream = np.unpackbits(raw)[: count * bits]
    if stream.size != count * bits:
        raise FormatError(f"{raw.size} bytes for {count} weights of {bits} bits")
    codes = stream.reshape(count, bits) @ (1 << np.arange(bits)[::-1])
    if params.quantization.WhichOneof("QuantizationType") == "lookupTableQuantization":
        table = np.array(params.quantization.lookupTableQuantization.floatValue, np.float32)
        return table[codes]
    linear = params.quantization.linearQuantization
    scale = np.array(linear.scale, np.float32).reshape(-1, 1)
    bias = np.array(linear.bias, np.float32).reshape(-1, 1) if len(linear.bias) else 0
    return codes.reshape(len(scale), -1).astype(np.float32) * scale + bias


def _images(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function of [N, C, H, W] for any number of dimensions before C, H, W."""

    def apply(x: Array) -> Array:
        if x.ndim < 3:
            raise UnsupportedError(f"needs an array [C, H, W], got {list(x.shape)}")
        y = f(x.reshape(-1, *x.shape[-3:]))
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    return apply


# --- products ---------------------------------------------------------------------------------


def _convolution(p: Any, inputs: Sequence[Array]) -> Array:
    kernel = list(p.kernelSize) or [3, 3]
    steps, spread = list(p.stride) or [1, 1], list(p.dilationFactor) or [1, 1]
    groups, out = max(1, p.nGroups), p.outputChannels
    if len(inputs) > 1:
        raise UnsupportedError("a convolution with weights as its input cannot be executed")
    first = (p.kernelChannels, out // groups) if p.isDeconvolution else (out, p.kernelChannels)
    weight = weight_values(p.weights, (*first, *kernel))
    bias = weight_values(p.bias, (out,)) if p.hasBias else None
    kind, pad = _padding(p)
    around: dict[str, Any] = {"pad_type": kind, "pad": pad, "strides": steps, "dilations": spread}

    def apply(x: Array) -> Array:
        if not p.isDeconvolution:
            return ops_nn.conv(x, weight, bias, groups=groups, **around)
        shape = [*x.shape[:1], out, *p.outputShape] if len(p.outputShape) else None
        return ops_nn.conv_transpose(x, weight, bias, output_shape=shape, groups=groups, **around)

    return _images(apply)(inputs[0])


def _padding(p: Any) -> tuple[str, list[int] | None]:
    which = p.WhichOneof(p.DESCRIPTOR.oneofs[0].name)
    if which == "same":
        return ("same_lower" if p.same.asymmetryMode else "same"), None
    amounts = p.valid.paddingAmounts.borderAmounts
    if which != "valid" or not len(amounts):
        return "valid", None
    return "custom", [n for a in amounts for n in (a.startEdgeSize, a.endEdgeSize)]


def _pooling(p: Any, inputs: Sequence[Array]) -> Array:
    kind = ("max", "avg", "l2")[p.type]
    kernel, steps = list(p.kernelSize) or [3, 3], list(p.stride) or [1, 1]
    if p.globalPooling:
        over: dict[str, Any] = {"strides": [1, 1], "pad_type": "valid"}
    elif p.WhichOneof("PoolingPaddingType") == "includeLastPixel":
        h, w = list(p.includeLastPixel.paddingAmounts) or [0, 0]
        over = {"pad_type": "custom", "pad": [h, h, w, w], "ceil_mode": True}
    else:
        pad_type, pad = _padding(p)
        over = {"pad_type": pad_type, "pad": pad}
    over = {"strides": steps, **over, "exclude_padding_from_average": p.avgPoolExcludePadding}

    def apply(x: Array) -> Array:
        size = list(x.shape[2:]) if p.globalPooling else kernel
        return ops_nn.pool(kind, x, size, **over)

    return _images(apply)(inputs[0])


def _inner_product(p: Any, inputs: Sequence[Array]) -> Array:
    weight = weight_values(p.weights, (p.outputChannels, p.inputChannels))
    bias = weight_values(p.bias, (p.outputChannels,)) if p.hasBias else None
    x = inputs[0]
    tail = x.ndim > 3 and x.shape[-2:] == (1, 1)
    y = ops_nn.linear(x[..., 0, 0] if tail else x, weight, bias)
    return y[..., None, None] if tail else y


def _embedding(p: Any, inputs: Sequence[Array]) -> Array:
    table = weight_values(p.weights, (p.outputChannels, p.inputDim)).T
    if p.hasBias:
        table = table + weight_values(p.bias, (p.outputChannels,))
    x = inputs[0]
    rows = table[x[..., 0, 0, 0].astype(np.intp)] if x.ndim >= 4 else table[x.astype(np.intp)]
    return rows[..., None, None] if x.ndim >= 4 else rows


def _embedding_nd(p: Any, inputs: Sequence[Array]) -> Array:
    table = weight_values(p.weights, (p.embeddingSize, p.vocabSize)).T
    if p.hasBias:
        table = table + weight_values(p.bias, (p.embeddingSize,))
    return np.asarray(table[inputs[0][..., 0].astype(np.intp)])


def _matmul(p: Any, inputs: Sequence[Array]) -> Array:
    if len(inputs) == 2:
        return ops_nn.matmul(inputs[0], inputs[1], p.transposeA, p.transposeB)
    # the weights are laid out [columns, rows]
    shape = (p.weightMatrixSecondDimension, p.weightMatrixFirstDimension)
    y = inputs[0] @ weight_values(p.weights, shape).T
    return y + weight_values(p.bias, shape[:1]) if p.hasBias else y


def _lstm(p: Any, inputs: Sequence[Array], both: bool) -> tuple[Array, ...]:
    options, size, width = p.params, p.outputVectorSize, p.inputVectorSize
    if options.coupledInputAndForgetGate:
        raise UnsupportedError("an LSTM with coupled gates cannot be executed")
    ways = list(p.weightParams) if both else [p.weightParams]
    names = list(p.activationsForwardLSTM) if both else list(p.activations)
    kinds = [_RECURRENT.get(str(a.WhichOneof("NonlinearityType")), "") for a in names]
    parameters: dict[str, Any] = {}
    for way, tail in zip(ways, ("", "_back"), strict=False):
        gates = ("input", "forget", "output", "block")
        parameters["weight_ih" + tail] = _gates(way, gates, "WeightMatrix", (size, width))
        parameters["weight_hh" + tail] = _gates(way, gates, "RecursionMatrix", (size, size))
        if options.hasBiasVectors:
            parameters["bias" + tail] = _gates(way, gates, "BiasVector", (size,))
        if options.hasPeepholeVectors:
            parameters["peephole" + tail] = _gates(way, gates[:3], "PeepholeVector", (size,))
        if options.forgetBias:
            bias = parameters.get("bias" + tail, np.zeros(4 * size, np.float32)).copy()
            bias[size : 2 * size] += 1
            parameters["bias" + tail] = bias
    x = inputs[0]
    sequence = x.reshape(*x.shape[:2], -1)
    zeros = np.zeros((sequence.shape[1], size * len(ways)), np.float32)
    states = [s.reshape(zeros.shape[0], -1) for s in inputs[1:]]
    if both and len(states) == 4:
        states = [np.concatenate(states[0::2], -1), np.concatenate(states[1::2], -1)]
    h, c = states if states else (zeros, zeros)
    forward = "reverse" if not both and p.reverseInput else "forward"
    clip = options.cellClipThreshold or None
    y, h, c = ops_recurrent.lstm(
        sequence, h, c, direction="bidirectional" if both else forward,
        output_sequence=options.sequenceOutput, recurrent_activation=kinds[0],
        cell_activation=kinds[1], activation=kinds[2], clip=clip, **parameters,
    )  # fmt: skip
    ends = [h, c] if not both else [h[:, :size], c[:, :size], h[:, size:], c[:, size:]]
    return tuple(a.reshape(*a.shape, 1, 1) for a in (y, *(e[None] for e in ends)))


_RECURRENT = {
    "sigmoid": "sigmoid", "tanh": "tanh", "ReLU": "relu", "linear": "linear",
    "sigmoidHard": "hard_sigmoid", "scaledTanh": "scaled_tanh",
}  # fmt: skip


def _gates(way: Any, gates: Sequence[str], part: str, shape: tuple[int, ...]) -> Array:
    return np.concatenate([weight_values(getattr(way, f"{g}Gate{part}" if g != "block"
                                                 else f"blockInput{part}"), shape)
                           for g in gates])  # fmt: skip


# --- elementwise ------------------------------------------------------------------------------


def _per_channel(params: Any, x: Array) -> Array:
    """Weights for each channel, or one for all, shaped to be applied to [..., C, H, W]."""
    values = np.array(params.floatValue, np.float32)
    return values.reshape(-1, 1, 1) if values.size > 1 and x.ndim >= 3 else values


def _activation(p: Any, inputs: Sequence[Array]) -> Array:
    x, kind = inputs[0], str(p.WhichOneof("NonlinearityType"))
    a = getattr(p, kind)
    simple = {"ReLU": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "softsign": "softsign",
              "softplus": "softplus"}  # fmt: skip
    if kind in simple:
        return np.asarray(ops_math.OPS[simple[kind]](x=x))
    if kind == "PReLU":
        return np.where(x < 0, _per_channel(a.alpha, x) * x, x)
    if kind == "parametricSoftplus":
        return _per_channel(a.alpha, x) * ops_math.softplus(_per_channel(a.beta, x) * x)
    named = {"linear": "linear_activation", "leakyReLU": "leaky_relu", "ELU": "elu",
             "thresholdedReLU": "thresholded_relu", "scaledTanh": "scaled_tanh",
             "sigmoidHard": "sigmoid_hard"}[kind]  # fmt: skip
    numbers = {f.name: np.float32(getattr(a, f.name)) for f in a.DESCRIPTOR.fields}
    return np.asarray(ops_math.OPS[named](x=x, **numbers))


def _unary(p: Any, inputs: Sequence[Array]) -> Array:
    x = inputs[0] * np.float32(p.scale) + np.float32(p.shift)
    kind = p.Operation.Name(p.type)
    eps, alpha = np.float32(p.epsilon), np.float32(p.alpha)
    functions: dict[str, Callable[[], Array]] = {
        "SQRT": lambda: np.sqrt(x),
        "RSQRT": lambda: 1 / np.sqrt(x + eps),
        "INVERSE": lambda: 1 / (x + eps),
        "POWER": lambda: x**alpha,
        "EXP": lambda: np.exp(x),
        "LOG": lambda: np.log(x + eps),
        "ABS": lambda: np.abs(x),
        "THRESHOLD": lambda: np.maximum(x, alpha),
    }
    return np.asarray(functions[kind]())


def _folded(f: Callable[[Array, Array], Array], alpha: str = "") -> Layer:
    """A function of all inputs, or of one and the layer's number."""

    def apply(p: Any, inputs: Sequence[Array]) -> Array:
        total = inputs[0]
        for x in inputs[1:]:
            total = f(total, x)
        return (
            f(total, np.asarray(getattr(p, alpha), np.float32))
            if alpha and len(inputs) == 1
            else total
        )

    return apply


def _scale(p: Any, inputs: Sequence[Array]) -> Array:
    y = inputs[0] * weight_values(p.scale, list(p.shapeScale))
    return y + weight_values(p.bias, list(p.shapeBias)) if p.hasBias else y


def _clip_relu(p: Any, inputs: Sequence[Array]) -> Array:
    return np.asarray(ops_math.OPS["clamped_relu"](x=inputs[0], alpha=p.alpha, beta=p.beta))


def _compare(name: str) -> Layer:
    def apply(p: Any, inputs: Sequence[Array]) -> Array:
        y = inputs[1] if len(inputs) > 1 else np.float32(p.alpha)
        return np.asarray(ops_math.OPS[name](x=inputs[0], y=y)).astype(np.float32)

    return apply


# --- norms ------------------------------------------------------------------------------------


def _batchnorm(p: Any, inputs: Sequence[Array]) -> Array:
    n = (p.channels,)
    gamma, beta = weight_values(p.gamma, n), weight_values(p.beta, n)
    if p.instanceNormalization:
        return _images(lambda x: ops_nn.instance_norm(x, gamma, beta, p.epsilon))(inputs[0])
    if p.computeMeanVar:
        raise UnsupportedError("a batch norm over the batch it is given cannot be executed")
    mean, variance = weight_values(p.mean, n), weight_values(p.variance, n)
    return _images(lambda x: ops_nn.batch_norm(x, mean, variance, gamma, beta, p.epsilon))(
        inputs[0]
    )


def _mvn(p: Any, inputs: Sequence[Array]) -> Array:
    x = inputs[0]
    over = (-3, -2, -1) if p.acrossChannels else (-2, -1)
    y = x - x.mean(axis=over, keepdims=True)
    if p.normalizeVariance:
        y = y / (np.sqrt(np.square(y).mean(axis=over, keepdims=True)) + np.float32(p.epsilon))
    return np.asarray(y)


def _layer_norm(p: Any, inputs: Sequence[Array]) -> Array:
    shape = list(p.normalizedShape)
    axes = range(-len(shape), 0)
    gamma, beta = weight_values(p.gamma, shape), weight_values(p.beta, shape)
    return ops_nn.layer_norm(inputs[0], list(axes), gamma, beta, p.eps)


def _reorganize(p: Any, inputs: Sequence[Array]) -> Array:
    functions = (ops_shape.space_to_depth, ops_shape.depth_to_space, ops_shape.pixel_shuffle)
    return _images(lambda x: functions[p.mode](x, p.blockSize))(inputs[0])


def _reduce(p: Any, inputs: Sequence[Array]) -> Array:
    kind = p.ReduceOperation.Name(p.mode)
    names = {"SUM": "reduce_sum", "AVG": "reduce_mean", "PROD": "reduce_prod",
             "LOGSUM": "reduce_log_sum", "SUMSQUARE": "reduce_sum_square",
             "L1": "reduce_l1_norm", "L2": "reduce_l2_norm", "MAX": "reduce_max",
             "MIN": "reduce_min", "ARGMAX": "reduce_argmax"}  # fmt: skip
    axes = {"CHW": (-3, -2, -1), "HW": (-2, -1), "C": (-3,), "H": (-2,), "W": (-1,)}[
        p.ReduceAxis.Name(p.axis)
    ]
    x = inputs[0]
    if kind == "ARGMAX":
        return np.asarray(x.argmax(axis=axes[0], keepdims=True)).astype(np.float32)
    if kind == "LOGSUM":
        x = x + np.float32(p.epsilon)
    return np.asarray(ops_math.OPS[names[kind]](x=x, axes=axes, keep_dims=True))


def _reduce_nd(name: str) -> Layer:
    def apply(p: Any, inputs: Sequence[Array]) -> Array:
        axes = None if p.reduceAll else list(p.axes)
        return np.asarray(ops_math.OPS[name](x=inputs[0], axes=axes, keep_dims=p.keepDims))

    return apply


def _arg(f: Callable[..., Array]) -> Layer:
    return lambda p, i: np.asarray(f(i[0], axis=p.axis, keepdims=not p.removeDim)).astype(
        np.float32
    )


def _constant(p: Any, inputs: Sequence[Array]) -> Array:
    del inputs
    return weight_values(p.data, list(p.shape))


def _topk(p: Any, inputs: Sequence[Array]) -> tuple[Array, Array]:
    k = int(inputs[1].item()) if len(inputs) > 1 else p.K
    values, where = ops_shape.topk(inputs[0], k, p.axis, p.useBottomK)
    return values, where.astype(np.float32)


def _whole(f: Callable[..., Any]) -> Layer:
    """A function of the inputs alone."""
    return lambda p, inputs: f(*inputs)


LAYERS: dict[str, Layer] = {
    "activation": _activation,
    "add": _folded(np.add, "alpha"),
    "argSort": lambda p, i: ops_shape.argsort(i[0], p.axis, not p.descending),
    "argMax": _arg(np.argmax),
    "argMin": _arg(np.argmin),
    "average": lambda p, i: np.asarray(sum(i[1:], i[0]) / np.float32(len(i))),
    "batchedMatmul": _matmul,
    "batchnorm": _batchnorm,
    "biDirectionalLSTM": lambda p, i: _lstm(p, i, both=True),
    "bias": lambda p, i: i[0] + weight_values(p.bias, list(p.shape)),
    "clampedReLU": _clip_relu,
    "clip": lambda p, i: np.clip(i[0], np.float32(p.minVal), np.float32(p.maxVal)),
    "concat": lambda p, i: np.concatenate(i, 0 if p.sequenceConcat else -3),
    "concatND": lambda p, i: ops_shape.concat(i, p.axis, p.interleave),
    "convolution": _convolution,
    "constantPad": layers_shape.constant_pad,
    "copy": lambda p, i: i[0],
    "crop": layers_shape.crop,
    "cumSum": lambda p, i: ops_shape.cumsum(i[0], p.axis, p.excludeFinalSum, p.reverse),
    "embedding": _embedding,
    "embeddingND": _embedding_nd,
    "expandDims": lambda p, i: ops_shape.expand_dims(i[0], list(p.axes)),
    "flatten": layers_shape.flatten,
    "flattenTo2D": lambda p, i: ops_shape.flatten2d(i[0], p.axis),
    "gather": lambda p, i: ops_shape.gather(i[0], i[1].astype(np.intp), p.axis),
    "gatherAlongAxis": lambda p, i: np.take_along_axis(i[0], i[1].astype(np.intp), p.axis),
    "gelu": lambda p, i: ops_math.gelu(
        i[0], ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")[p.mode]
    ),
    "innerProduct": _inner_product,
    "l2normalize": lambda p, i: ops_nn.l2_norm(i[0], p.epsilon),
    "layerNormalization": _layer_norm,
    "loadConstant": _constant,
    "loadConstantND": _constant,
    "lrn": lambda p, i: _images(
        lambda x: ops_nn.local_response_norm(x, p.localSize, p.alpha, p.beta, p.k)
    )(i[0]),
    "logicalAnd": _whole(np.logical_and),
    "logicalNot": _whole(np.logical_not),
    "logicalOr": _whole(np.logical_or),
    "logicalXor": _whole(np.logical_xor),
    "matrixBandPart": lambda p, i: ops_shape.band_part(i[0], p.numLower, p.numUpper),
    "max": _folded(np.maximum),
    "min": _folded(np.minimum),
    "multiply": _folded(np.multiply, "alpha"),
    "mvn": _mvn,
    "padding": layers_shape.border,
    "permute": layers_shape.permute,
    "pooling": _pooling,
    "rankPreservingReshape": lambda p, i: ops_shape.reshape(i[0], list(p.targetShape)),
    "reduce": _reduce,
    "reorganizeData": _reorganize,
    "reshape": layers_shape.reshape,
    "reverse": lambda p, i: ops_shape.reverse(i[0], np.flatnonzero(list(p.reverseDim))),
    "reshapeStatic": lambda p, i: ops_shape.reshape(i[0], list(p.targetShape)),
    "resizeBilinear": layers_shape.resize,
    "scale": _scale,
    "sequenceRepeat": lambda p, i: np.tile(i[0], (p.nRepetitions, *[1] * (i[0].ndim - 1))),
    "slice": layers_shape.slice_axis,
    "sliceStatic": layers_shape.slice_static,
    "softmax": lambda p, i: ops_math.softmax(i[0], -3 if i[0].ndim >= 3 else -1),
    "softmaxND": lambda p, i: ops_math.softmax(i[0], p.axis),
    "split": layers_shape.split,
    "splitND": layers_shape.split_nd,
    "squeeze": lambda p, i: ops_shape.squeeze(i[0], None if p.squeezeAll else list(p.axes)),
    "stack": lambda p, i: np.stack(i, p.axis),
    "tile": lambda p, i: np.tile(i[0], list(p.reps)),
    "topK": _topk,
    "transpose": lambda p, i: np.transpose(i[0], list(p.axes)),
    "unary": _unary,
    "uniDirectionalLSTM": lambda p, i: _lstm(p, i, both=False),
    "upsample": layers_shape.upsample,
    "whereBroadcastable": _whole(ops_math.select),
    **{name: _whole(getattr(np, f)) for name, f in {
        "addBroadcastable": "add", "subtractBroadcastable": "subtract",
        "multiplyBroadcastable": "multiply", "divideBroadcastable": "divide",
        "maxBroadcastable": "maximum", "minBroadcastable": "minimum",
        "powBroadcastable": "power", "modBroadcastable": "mod",
        "floorDivBroadcastable": "floor_divide", "ceil": "ceil", "floor": "floor",
        "sign": "sign", "round": "rint", "exp2": "exp2", "sin": "sin", "cos": "cos",
        "tan": "tan", "asin": "arcsin", "acos": "arccos", "atan": "arctan", "sinh": "sinh",
        "cosh": "cosh", "tanh": "tanh", "asinh": "arcsinh", "acosh": "arccosh",
        "atanh": "arctanh",
    }.items()},
    "erf": lambda p, i: ops_math.erf(i[0]),
    **{name: _compare(f) for name, f in {
        "equal": "equal", "notEqual": "not_equal", "lessThan": "less", "lessEqual": "less_equal",
        "greaterThan": "greater", "greaterEqual": "greater_equal",
    }.items()},
    **{name: _reduce_nd(f) for name, f in {
        "reduceL1": "reduce_l1_norm", "reduceL2": "reduce_l2_norm", "reduceMax": "reduce_max",
        "reduceMin": "reduce_min", "reduceSum": "reduce_sum", "reduceProd": "reduce_prod",
        "reduceMean": "reduce_mean", "reduceLogSum": "reduce_log_sum",
        "reduceSumSquare": "reduce_sum_square", "reduceLogSumExp": "reduce_log_sum_exp",
    }.items()},
}  # fmt: skip
"""Layer type -> what it does."""
