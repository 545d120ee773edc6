"""The rows: every operator that a canonical graph may hold, by kind. See `Operator` for columns."""

from __future__ import annotations

import numpy as np

from edgeq.formats.qparams import QuantParams
from edgeq.graph.ir import Graph, Node
from edgeq.graph.operators.operator import Integer, Operator, Refusal, Weight


def single(number: float) -> float:
    """A number as an ONNX attribute holds it: a float32."""
    return float(np.float32(number))


def _interpolates(graph: Graph, node: Node) -> bool:
    """Whether a Resize makes no value outside the range of its input; cubic ones do."""
    return node.attrs.get("mode", "nearest") in ("nearest", "linear")


def _pads_within(graph: Graph, node: Node) -> bool:
    """Whether a Pad adds zeros, which every range holds, or elements of its input."""
    if node.attrs.get("mode", "constant") != "constant" or len(node.inputs) < 3:
        return True
    return not node.inputs[2] or not np.any(graph.array(node.inputs[2]))


_PRODUCT = Integer("weights", takes_activation=True)
_MOVES, _SHARES, _RESCALES = Integer("moves"), Integer("shares"), Integer("rescales")
_MEAN = Integer("rescales", near_output=True)
_FUSED = Integer("rescales", near_output=True, is_activation=True)
_UNIT = Integer("rescales", output=QuantParams(1 / 256, -128))
"""From 0 to 255/256: the only parameters that TFLite's Softmax and Sigmoid of integers make."""
_TANH = Integer("rescales", output=QuantParams(1 / 128, 0))

# fmt: off
LAYERS = (
    Operator("Conv", "layer", "CONV_2D DEPTHWISE_CONV_2D", "conv", 1, {1: "weight", 2: "bias"},
             allowed={"auto_pad": ("NOTSET",)}, weight=Weight(1, 0, 1), integer=_PRODUCT,
             spatial=True, window=True),
    Operator("ConvTranspose", "layer", "TRANSPOSE_CONV", "conv_transpose", 1,
             {1: "weight", 2: "bias"}, allowed={"auto_pad": ("NOTSET",)},
             weight=Weight(1, 1, 1), integer=_PRODUCT, spatial=True, window=True),
    Operator("Linear", "layer", "FULLY_CONNECTED", "linear", 1, {1: "weight", 2: "bias"},
             weight=Weight(1, 0, -1), integer=_PRODUCT),
    Operator("MatMul", "product", "BATCH_MATMUL", "matmul", integer=Integer("product")),
)
LOOKUPS = (
    Operator("Gather", "lookup", "GATHER EMBEDDING_LOOKUP", "gather", 1, defaults={"axis": 0},
             weight=Weight(0, 0), integer=_SHARES),
    Operator("GatherElements", "lookup",
             Refusal("LiteRT has no operator for it; the nearest supported is Gather"),
             "gather_along_axis", 1, defaults={"axis": 0}),
)
POOLS = (
    Operator("MaxPool", "pool", "MAX_POOL_2D", "max_pool",
             allowed={"auto_pad": ("NOTSET",), "ceil_mode": (0,), "storage_order": (0,)},
             integer=_SHARES, homogeneous=True, spatial=True, window=True),
    Operator("AveragePool", "pool", "AVERAGE_POOL_2D", "avg_pool",
             allowed={"auto_pad": ("NOTSET",), "ceil_mode": (0,)},
             integer=_SHARES, homogeneous=True, spatial=True, window=True),
    Operator("GlobalAveragePool", "pool", "MEAN", "reduce_mean",
             integer=_MEAN, homogeneous=True, spatial=True),
    Operator("GlobalMaxPool", "pool", "REDUCE_MAX", "reduce_max",
             integer=_SHARES, homogeneous=True, spatial=True),
)
REDUCTIONS = (
    Operator("ReduceMean", "reduction", "MEAN", "reduce_mean", 1, {1: "axes"}, {"keepdims": 1},
             integer=_MEAN),
    *(Operator(name, "reduction", tflite, coreml, 1, {1: "axes"}, {"keepdims": 1})
      for name, tflite, coreml in (
          ("ReduceSum", "SUM", "reduce_sum"), ("ReduceMax", "REDUCE_MAX", "reduce_max"),
          ("ReduceMin", "REDUCE_MIN", "reduce_min"), ("ReduceProd", "REDUCE_PROD", "reduce_prod"),
          ("ReduceL1", "SUM ABS", "reduce_l1_norm"),
          ("ReduceL2", "SUM MUL SQRT", "reduce_l2_norm"))),
)
SCANS = (
    *(Operator(name, "scan", tflite, coreml,
               defaults={"axis": 0, "keepdims": 1, "select_last_index": 0},
               allowed={"select_last_index": (0,)})
      for name, tflite, coreml in (
          ("ArgMax", "ARG_MAX", "reduce_argmax"), ("ArgMin", "ARG_MIN", "reduce_argmin"))),
    Operator("TopK", "scan",
             Refusal("edgeq does not write LiteRT's TOPK_V2; the nearest supported is ArgMax"),
             "topk", 1, {1: "k"}, {"axis": -1, "largest": 1, "sorted": 1}, outputs=2),
    Operator("CumSum", "scan", "CUMSUM", "cumsum", 1, {1: "axis"}, {"exclusive": 0, "reverse": 0}),
)
ARITHMETIC = (
    Operator("Add", "arithmetic", "ADD", "add",
             integer=Integer("rescales", "term", near_output=True, takes_activation=True)),
    Operator("Sub", "arithmetic", "SUB", "sub",
             integer=Integer("rescales", "term", takes_activation=True)),
    Operator("Mul", "arithmetic", "MUL", "mul",
             integer=Integer("rescales", "factor", takes_activation=True)),
    Operator("Div", "arithmetic", "DIV", "real_div", exact_input=1),
    Operator("Max", "arithmetic", "MAXIMUM", "maximum"),
    Operator("Min", "arithmetic", "MINIMUM", "minimum"),
    Operator("Pow", "arithmetic", "POW MUL SQRT", "pow mul sqrt", exact_input=0),
    Operator("Mod", "arithmetic",
             Refusal("edgeq does not write LiteRT's FLOOR_MOD; the nearest supported is Div"),
             "mod", defaults={"fmod": 0}),
)
FUNCTIONS = (
    *(Operator(name, "function", tflite, coreml) for name, tflite, coreml in (
          ("Exp", "EXP", "exp"), ("Neg", "NEG", "mul"), ("Abs", "ABS", "abs"),
          ("Erf", "EXP ABS DIV MUL ADD SUB NEG SIGN", "erf"), ("Sin", "SIN", "sin"),
          ("Cos", "COS", "cos"), ("Floor", "FLOOR", "floor"), ("Ceil", "CEIL", "ceil"),
          ("Round", "ROUND", "round"), ("Sign", "SIGN", "sign"), ("Where", "SELECT_V2", "select"))),
    Operator("Sqrt", "function", "SQRT", "sqrt", exact_input=0),
    Operator("Log", "function", "LOG", "log", exact_input=0),
    Operator("Cast", "function", "CAST NOT_EQUAL", "cast", ignored=("saturate",)),
)
LOGIC = tuple(
    Operator(name, "logic", tflite, coreml) for name, tflite, coreml in (
        ("Equal", "EQUAL", "equal"), ("Greater", "GREATER", "greater"), ("Less", "LESS", "less"),
        ("GreaterOrEqual", "GREATER_EQUAL", "greater_equal"),
        ("LessOrEqual", "LESS_EQUAL", "less_equal"), ("Not", "LOGICAL_NOT", "logical_not"),
        ("And", "LOGICAL_AND", "logical_and"), ("Or", "LOGICAL_OR", "logical_or"))
)
ACTIVATIONS = (
    Operator("Relu", "activation", "RELU", "relu", integer=_FUSED, homogeneous=True),
    Operator("Clip", "activation", "RELU6 RELU RELU_N1_TO_1 MAXIMUM MINIMUM",
             "clip relu relu6 maximum minimum", 1, {1: "min", 2: "max"}, integer=_FUSED),
    Operator("LeakyRelu", "activation", "LEAKY_RELU", "leaky_relu",
             defaults={"alpha": single(0.01)}, integer=_MEAN, homogeneous=True),
    Operator("PRelu", "activation", "PRELU", "prelu", constants={1: "slope"},
             integer=Integer("rescales", "factor"), homogeneous=True),
    Operator("Elu", "activation", "ELU", "elu", defaults={"alpha": 1.0}),
    Operator("Sigmoid", "activation", "LOGISTIC", "sigmoid", integer=_UNIT, bounded=True,
             probabilities=True),
    Operator("Tanh", "activation", "TANH", "tanh", integer=_TANH, bounded=True),
    Operator("HardSwish", "activation", "HARD_SWISH", "sigmoid_hard mul", integer=_RESCALES),
    Operator("HardSigmoid", "activation", "MUL ADD MAXIMUM MINIMUM", "sigmoid_hard",
             defaults={"alpha": single(0.2), "beta": 0.5}, bounded=True),
    Operator("Softplus", "activation", "LOG EXP RELU", "softplus"),
    Operator("Gelu", "activation", "GELU", "gelu", defaults={"approximate": "none"},
             allowed={"approximate": ("none", "tanh")}, integer=_RESCALES),
    Operator("Softmax", "softmax", "SOFTMAX", "softmax", defaults={"axis": -1}, integer=_UNIT,
             bounded=True, probabilities=True),
    Operator("LogSoftmax", "softmax", "LOG_SOFTMAX", "sub reduce_log_sum_exp",
             defaults={"axis": -1}, probabilities=True),
    Operator("LayerNormalization", "normalization", "MEAN SUB MUL ADD RSQRT", "layer_norm",
             constants={1: "scale", 2: "bias"}, defaults={"axis": -1, "epsilon": single(1e-5)},
             ignored=("stash_type",)),
)
SHAPES = (
    Operator("Reshape", "view", "RESHAPE", "reshape", 1, {1: "shape"}, ignored=("allowzero",),
             integer=_MOVES),
    Operator("Flatten", "view", "RESHAPE", "reshape", defaults={"axis": 1}, integer=_MOVES),
    Operator("Squeeze", "view", "RESHAPE", "reshape", 1, {1: "axes"}, integer=_MOVES),
    Operator("Unsqueeze", "view", "RESHAPE", "reshape", 1, {1: "axes"}, integer=_MOVES),
    Operator("Transpose", "move", "TRANSPOSE", "transpose", integer=_MOVES),
    Operator("Identity", "move", "RESHAPE", "identity", integer=_MOVES),
    Operator("Slice", "move", "SLICE STRIDED_SLICE GATHER", "slice_by_index", 1,
             {1: "starts", 2: "ends", 3: "axes", 4: "steps"}, integer=_MOVES),
    Operator("Split", "move", "SLICE", "split", 1, {1: "sizes"}, {"axis": 0}, outputs=1 << 30,
             integer=_MOVES),
    Operator("DepthToSpace", "move", "DEPTH_TO_SPACE", "depth_to_space pixel_shuffle",
             defaults={"mode": "DCR"}, integer=_MOVES, spatial=True),
    Operator("SpaceToDepth", "move", "SPACE_TO_DEPTH", "space_to_depth",
             allowed={"mode": ("DCR",)}, integer=_MOVES, spatial=True),
    Operator("Concat", "move", "CONCATENATION", "concat", integer=_SHARES),
    Operator("Pad", "move", "PAD PADV2 MIRROR_PAD", "pad", 1, {1: "pads", 2: "value"},
             allowed={"mode": ("constant", "reflect", "edge")},
             integer=Integer("shares", keeps_range=_pads_within)),
    Operator("Expand", "repeat", "BROADCAST_TO", "tile", 1, {1: "shape"}),
    Operator("Tile", "repeat", "TILE", "tile", 1, {1: "repeats"}, since=7),
    Operator("Resize", "resize", "RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR GATHER",
             "resize_bilinear resize_nearest_neighbor gather", 1, {2: "scales", 3: "sizes"},
             defaults={"mode": "nearest", "coordinate_transformation_mode": "half_pixel",
                       "nearest_mode": "round_prefer_floor", "cubic_coeff_a": -0.75,
                       "antialias": 0, "exclude_outside": 0,
                       "keep_aspect_ratio_policy": "stretch"},
             allowed={"mode": ("nearest", "linear", "cubic"), "antialias": (0,),
                      "exclude_outside": (0,), "keep_aspect_ratio_policy": ("stretch",),
                      "coordinate_transformation_mode": (
                          "half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")},
             ignored=("extrapolation_value",),
             integer=Integer("shares", keeps_range=_interpolates), spatial=True),
)
ROWS: tuple[Operator, ...] = (
    *LAYERS, *LOOKUPS, *POOLS, *REDUCTIONS, *SCANS, *ARITHMETIC, *FUNCTIONS, *LOGIC, *ACTIVATIONS,
    *SHAPES,
)
# fmt: on
