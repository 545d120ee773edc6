"""Reading float .tflite files: equal to LiteRT, channels first, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ai_edge_litert", reason="needs the extra tflite")
pytest.importorskip("onnxruntime", reason="needs the extra ort")

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError, UsageError
from edgeq.graph.execute import Session
from edgeq.graph.ir import Graph
from edgeq.graph.tflite.image import same_pads
from edgeq.graph.tflite.read import read_tflite
from tests.conftest import need
from tests.tflite_nets import Net, run_litert

RELU, RELU6 = 1, 3


def equal(path: Path, *, positive: bool = False) -> Graph:
    """Read a file and check that it computes what LiteRT does, to 1e-5."""
    graph = read_tflite(path)
    last = set(json.loads(graph.meta["edgeq.channels_last"]))
    rng = np.random.default_rng(1)
    feeds, given = {}, []
    for name in graph.inputs:
        info = graph.info(name)
        x: Any = rng.standard_normal(info.shape)
        if info.dtype != "float32":
            x = rng.integers(0, 2, info.shape)
        x = (np.abs(x) + 0.1 if positive else x).astype(info.dtype)
        feeds[name] = x
        given.append(np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if name in last else x)
    session = Session(graph)
    got = session(feeds)
    for name, want in zip(graph.outputs, run_litert(path, given), strict=True):
        want = want.transpose(0, 3, 1, 2) if name in last else want
        assert got[name].shape == want.shape == graph.info(name).shape
        assert got[name].dtype == graph.info(name).dtype
        size = max(float(np.abs(want.astype(np.float64)).max()), 1e-9)
        assert np.abs(got[name].astype(np.float64) - want).max() <= 1e-5 * size
    return graph


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def classifier(net: Net) -> int:
    """Strided and dilated convolutions, depthwise ones, pools, a residual sum and a flatten."""
    x = net.conv(net.input(1, 15, 12, 3), (3, 8), stride=2, act=RELU6)
    weights, bias = net.random(1, 3, 3, 16), net.random(16)
    y = net.op("DEPTHWISE_CONV_2D", [x, weights, bias], "DepthwiseConv2DOptions", padding=0,
               strideH=1, strideW=1, depthMultiplier=2, fusedActivationFunction=RELU,
               dilationHFactor=2, dilationWFactor=2)  # fmt: skip
    y = net.conv(y, (16, 8), kernel=1)
    x = net.op("ADD", [x, y], "AddOptions", fusedActivationFunction=RELU)
    pool: dict[str, Any] = {"padding": 0, "strideH": 2, "strideW": 2, "filterHeight": 3,
                            "filterWidth": 3}  # fmt: skip
    x = net.op("MAX_POOL_2D", [x], "Pool2DOptions", **pool)
    x = net.op("AVERAGE_POOL_2D", [x], "Pool2DOptions", **pool)
    x = net.op("RESHAPE", [x, net.const([1, 32])], "ReshapeOptions")
    x = net.dense(x, 32, 10, act=RELU)
    return int(net.op("SOFTMAX", [net.dense(x, 10, 5)], "SoftmaxOptions", beta=1.0))


def test_a_classifier_has_no_transpose(tmp_path: Path) -> None:
    net = Net()
    graph = equal(net.save(tmp_path / "net.tflite", classifier(net)))
    assert ops(graph) == [
        "Conv", "Clip", "Conv", "Relu", "Conv", "Add", "Relu", "MaxPool", "AveragePool",
        "Reshape", "Linear", "Relu", "Linear", "Softmax",
    ]  # fmt: skip
    assert graph.info(graph.inputs[0]).shape == (1, 3, 15, 12)
    assert len({node.name for node in graph.nodes}) == len(graph.nodes)
    assert graph.name == "net"


def squeeze_excite(net: Net) -> int:
    """The mean of each channel without its axes, two layers, and back to a factor of a channel."""
    x = net.conv(net.input(1, 6, 5, 3), (3, 8))
    mean = net.op("MEAN", [x, net.const([1, 2])], "ReducerOptions", keepDims=False)
    gate = net.op("LOGISTIC", [net.dense(net.dense(mean, 8, 4, act=RELU), 4, 8)])
    gate = net.op("RESHAPE", [gate, net.const([1, 1, 1, 8])], "ReshapeOptions")
    return net.conv(net.op("MUL", [x, gate], "MulOptions"), (8, 4), same=False)


def channels(net: Net) -> int:
    """Operators that name the last axis, between convolutions."""
    x = net.conv(net.input(2, 6, 5, 3), (3, 8))
    a, b = net.op("SPLIT", [net.const(3), x], "SplitOptions", outs=2, numSplits=2)
    x = net.op("CONCATENATION", [b, a, b], "ConcatenationOptions", axis=-1)
    x = net.op("PAD", [x, net.const([[0, 0], [1, 0], [0, 2], [2, 1]])], "PadOptions")
    x = net.op("STRIDED_SLICE",
               [x, net.const([0, 0, 1, 1]), net.const([0, 0, 0, 0]), net.const([1, 2, 1, 3])],
               "StridedSliceOptions", endMask=15)  # fmt: skip
    x = net.op("PRELU", [x, net.random(1, 1, 5)])
    x = net.op("SOFTMAX", [x], "SoftmaxOptions", beta=2.0)
    x = net.op("L2_NORMALIZATION", [x], "L2NormOptions")
    x = net.op("MUL", [x, net.random(5)], "MulOptions")
    return net.conv(x, (5, 4))


def transposes(net: Net) -> int:
    """A converter's own way to channels first, some work there, and back."""
    x = net.conv(net.input(1, 4, 5, 3), (3, 6))
    x = net.op("TRANSPOSE", [x, net.const([0, 3, 1, 2])], "TransposeOptions")
    x = net.op("TANH", [x])
    x = net.op("TRANSPOSE", [x, net.const([0, 2, 3, 1])], "TransposeOptions")
    return net.conv(x, (6, 2))


def flattened(net: Net) -> int:
    """A dense layer that flattens an image by itself."""
    return net.dense(net.conv(net.input(1, 4, 5, 3), (3, 6)), 120, 7)


def spectrogram(net: Net) -> int:
    """A flat input that becomes an image of one channel."""
    x = net.op("RESHAPE", [net.input(1, 40), net.const([1, 8, 5, 1])], "ReshapeOptions")
    return net.conv(x, (1, 4), stride=2)


def unflattened(net: Net) -> int:
    """A flattened image that is used otherwise than by a dense layer: its order must be kept."""
    x = net.conv(net.input(1, 3, 2, 3), (3, 4))
    x = net.op("RESHAPE", [x, net.const([1, 24])], "ReshapeOptions")
    return int(net.op("MUL", [x, net.random(24)], "MulOptions"))


def partial_means(net: Net) -> tuple[int, int]:
    """Means that leave an image's axes in another order than channels first has them."""
    x = net.conv(net.input(1, 4, 5, 3), (3, 6))
    reduce = ("ReducerOptions",)
    a = net.op("MEAN", [x, net.const([2])], *reduce, keepDims=False)
    b = net.op("REDUCE_MAX", [x, net.const([-1])], *reduce, keepDims=True)
    return a, b


def decoder(net: Net) -> tuple[int, ...]:
    """Ways up: resizes, transposed convolutions, blocks."""
    x = net.conv(net.input(1, 4, 3, 3), (3, 8))
    found = []
    for op, options in (("RESIZE_BILINEAR", "ResizeBilinearOptions"),
                        ("RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions")):  # fmt: skip
        for size in ((9, 5), (2, 2)):
            for align, half in ((False, True), (True, False), (False, False)):
                found.append(net.op(op, [x, net.const(size)], options, alignCorners=align,
                                    halfPixelCenters=half))  # fmt: skip
    for kernel, stride, padding, size in ((3, 2, 0, (8, 6)), (2, 3, 0, (12, 9)), (3, 2, 1, (9, 7))):
        inputs = [net.const([1, *size, 5]), net.random(5, kernel, kernel, 8), x]
        found.append(net.op("TRANSPOSE_CONV", inputs, "TransposeConvOptions", padding=padding,
                            strideH=stride, strideW=stride))  # fmt: skip
    found.append(net.op("DEPTH_TO_SPACE", [x], "DepthToSpaceOptions", blockSize=2))
    y = net.op("SPACE_TO_DEPTH", [found[-1]], "SpaceToDepthOptions", blockSize=2)
    return (*found, y)


def elementwise(net: Net) -> tuple[int, ...]:
    """Activations and arithmetic."""
    x, y = net.input(1, 3, 4, 5), net.input(4, 5)
    plain = [net.op(name, [x]) for name in
             ("ABS", "NEG", "EXP", "SIN", "COS", "TANH", "FLOOR", "ROUND", "SQUARE", "RELU6",
              "RELU_N1_TO_1", "HARD_SWISH", "ELU", "LOGISTIC", "CEIL")]  # fmt: skip
    plain.append(net.op("LEAKY_RELU", [x], "LeakyReluOptions", alpha=0.3))
    plain.append(net.op("GELU", [x], "GeluOptions", approximate=True))
    pairs = [net.op(name, [x, y]) for name in ("MAXIMUM", "MINIMUM", "SQUARED_DIFFERENCE")]
    pairs += [net.op("SUB", [y, x], "SubOptions"), net.op("DIV", [x, net.const(1.7)], "DivOptions")]
    root = net.op("RSQRT", [net.op("ADD", [plain[0], net.const(0.5)], "AddOptions")])
    return (*plain, *pairs, root, net.op("LOG_SOFTMAX", [x]))


def products(net: Net) -> tuple[int, ...]:
    """Matrix products with constants and without."""
    x, y = net.input(2, 3, 4), net.input(2, 4, 5)
    a = net.op("BATCH_MATMUL", [x, y], "BatchMatMulOptions")
    b = net.op("BATCH_MATMUL", [y, x], "BatchMatMulOptions", adjX=True, adjY=True)
    c = net.op("BATCH_MATMUL", [x, net.random(4, 6)], "BatchMatMulOptions")
    d = net.op("BATCH_MATMUL", [x, net.random(2, 6, 4)], "BatchMatMulOptions", adjY=True)
    e = net.dense(x, 4, 3, act=RELU)
    f = net.op("FULLY_CONNECTED", [net.input(2, 4), net.input(6, 4), -1], "FullyConnectedOptions")
    return a, b, c, d, e, f


def indexing(net: Net) -> tuple[int, ...]:
    """Rows of tables, parts of arrays, places of the largest."""
    x, i = net.input(2, 3, 4), net.input(5, dtype="int32")
    begin = [x, net.const([1, 0, -2]), net.const([2, 3, 4]), net.const([1, 2, 1])]
    return (
        net.op("GATHER", [x, i], "GatherOptions", axis=1),
        net.op("EMBEDDING_LOOKUP", [i, net.random(3, 6)]),
        net.op("STRIDED_SLICE", begin, "StridedSliceOptions", shrinkAxisMask=1),
        net.op(
            "SLICE",
            [x, net.const([0, 1, 0]), net.const([-1, 2, 3])],
            "SliceOptions",
            shape=(2, 2, 3),
        ),
        net.op("ARG_MAX", [x, net.const(-1)], "ArgMaxOptions", dtype="int32", outputType=2),
        *net.op("UNPACK", [x], "UnpackOptions", outs=3, axis=1, num=3),
        net.op("PACK", [x, x], "PackOptions", axis=1, valuesCount=2),
        net.op("TILE", [x, net.const([1, 2, 3])], "TileOptions"),
        net.op("MIRROR_PAD", [x, net.const([[0, 0], [1, 1], [2, 1]])], "MirrorPadOptions", mode=0),
        net.op("EXPAND_DIMS", [x, net.const(1)], "ExpandDimsOptions"),
        net.op("CAST", [x], "CastOptions", dtype="int32"),
    )


def half(net: Net) -> int:
    """Weights held in 16 bits."""
    weights = net.const(net.rng.standard_normal((6, 4)).astype(np.float16))
    wide = net.op("DEQUANTIZE", [weights], "DequantizeOptions")
    return int(net.op("FULLY_CONNECTED", [net.input(1, 4), wide, -1], "FullyConnectedOptions"))


@pytest.mark.parametrize(
    "build",
    [squeeze_excite, channels, transposes, flattened, spectrogram, unflattened, partial_means,
     decoder, elementwise, products, indexing, half],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_is_read_computes_the_same(build: Callable[[Net], Any], tmp_path: Path) -> None:
    net = Net()
    made = build(net)
    path = net.save(tmp_path / "net.tflite", *(made if isinstance(made, tuple) else (made,)))
    graph = equal(path)
    if build not in (unflattened, partial_means, products):
        assert "Transpose" not in ops(graph)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "dilation", "pads"),
    [(5, 3, 1, 1, (1, 1)), (4, 3, 2, 1, (0, 1)), (5, 3, 2, 1, (1, 1)), (7, 1, 2, 1, (0, 0)),
     (6, 2, 2, 1, (0, 0)), (6, 3, 1, 2, (2, 2)), (10, 10, 2, 1, (4, 4)), (49, 10, 2, 1, (4, 5))],
)  # fmt: skip
def test_same_pads_are_tensorflows(
    size: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int]
) -> None:
    assert same_pads(size, kernel, stride, dilation) == pads


def test_integer_weights_are_refused_unless_taken_back(tmp_path: Path) -> None:
    net = Net()
    levels = net.rng.integers(-127, 128, (6, 4)).astype(np.int8)
    x, weights = net.input(1, 4), net.const(levels, scale=0.02)
    out = net.op("FULLY_CONNECTED", [x, weights, -1], "FullyConnectedOptions")
    path = net.save(tmp_path / "q.tflite", out)
    with pytest.raises(UnsupportedError, match=r"already quantized.*'c1' is INT8.*--dequantize"):
        read_tflite(path)
    graph = read_tflite(path, dequantize=True)
    assert graph.nodes[0].op == "Linear"
    np.testing.assert_array_equal(
        graph.array(graph.nodes[0].inputs[1]), levels.astype(np.float32) * np.float32(0.02)
    )
    assert graph.meta["edgeq.dequantized"] == "1 weights were integers in the file"


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    net = Net()
    x = net.op("CUMSUM", [net.op("ABS", [net.input(2, 3)]), net.const(0)], "CumsumOptions")
    path = net.save(tmp_path / "net.tflite", x)
    with pytest.raises(UnsupportedError, match=r"CUMSUM 'cumsum_\d', operator 1.*it reads ABS, "):
        read_tflite(path)


def test_a_computed_operand_is_named(tmp_path: Path) -> None:
    net = Net()
    x, weights = net.input(1, 4, 4, 2), net.input(3, 1, 1, 2)
    bias = net.random(3)
    out = net.op("CONV_2D", [x, weights, bias], "Conv2DOptions", padding=0, strideH=1, strideW=1,
                 dilationHFactor=1, dilationWFactor=1)  # fmt: skip
    path = net.save(tmp_path / "net.tflite", out)
    with pytest.raises(UnsupportedError, match=r"CONV_2D 'conv_2d_3' \(operator 0\).*computed"):
        read_tflite(path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    net = Net()
    path = net.save(tmp_path / "net.tflite", classifier(net))
    raw, bad = path.read_bytes(), tmp_path / "bad.tflite"
    for cut in (0, 7, 8, 100, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:cut])
        with pytest.raises(FormatError, match=r"bad\.tflite (is|cannot)"):
            read_tflite(bad)
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = np.frombuffer(raw, np.uint8).copy()
        places = rng.integers(8, broken.size, 8)
        broken[places] = rng.integers(0, 256, 8)
        bad.write_bytes(broken.tobytes())
        try:
            read_tflite(bad)  # some damage only changes a weight
        except EdgeqError as err:
            assert str(err)  # noqa: PT017 - only that nothing else is raised
    with pytest.raises(FormatError, match="cannot be read"):
        read_tflite(tmp_path / "absent.tflite")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tflm_models/person_detect.tflite", "already quantized: .* give the float model$"),
        ("tflm_models/hello_world_int8.tflite", "already quantized"),
        ("mlperf_tiny_ic_kws/kws_ref_model.tflite", "already quantized"),
        ("mlperf_tiny_ic_kws/pretrainedResnet_quant.tflite", "already quantized"),
        ("tflm_models/trained_lstm.tflite", "UNIDIRECTIONAL_SEQUENCE_LSTM"),
        ("tflite_quantizer_tests/two_signatures.tflite", r"2 graphs \(signatures: add, multiply\)"),
        ("tflite_quantizer_tests/simple_composite.tflite", "2 graphs"),
        ("tflite_quantizer_tests/dynamic_update_slice.tflite", "DYNAMIC_UPDATE_SLICE"),
    ],
)
def test_others_files_that_are_refused(name: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        read_tflite(need(f"data/{name}"))


def test_others_files_compute_the_same() -> None:
    read = 0
    for path in sorted(need("data/tflite_quantizer_tests").rglob("*.tflite")):
        try:
            read_tflite(path)
        except (UnsupportedError, UsageError):  # others', or of an axis that is left open
            continue
        equal(path, positive="sqrt" in path.name)
        read += 1
    assert read >= 50


@pytest.mark.parametrize(
    "name", ["tflm_models/hello_world_float.tflite", "mlperf_tiny_ic_kws/pretrainedResnet.tflite"]
)
def test_published_models_compute_the_same(name: str) -> None:
    equal(need(f"data/{name}"))


def test_a_model_with_integer_weights_is_taken_back() -> None:
    path = need("data/mlperf_tiny_ic_kws/kws_ref_model_float32.tflite")
    with pytest.raises(UnsupportedError, match="already quantized"):
        read_tflite(path)
    graph = read_tflite(path, dequantize=True)
    assert graph.info("input_1").shape == (1, 1, 49, 10)
    assert "Transpose" not in ops(graph)
    x = np.random.default_rng(0).standard_normal((1, 1, 49, 10)).astype(np.float32)
    (want,) = run_litert(path, [np.ascontiguousarray(x.transpose(0, 2, 3, 1))])
    # LiteRT rounds what such a convolution is fed to 8 bits
    np.testing.assert_allclose(Session(graph)({"input_1": x})[graph.outputs[0]], want, atol=0.02)
