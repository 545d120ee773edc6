"""Core ML models that are no ML Programs: layers, whole networks, pipelines, features and trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.converters.coreml import exec as coreml_exec
from edgeq.converters.coreml.decoder import CoreMLDecoderTarget
from edgeq.converters.coreml.exec.neural_network import run_spec
from edgeq.core.errors import UnsupportedError, UsageError
from tests.conftest import need
from tests.coreml_made import (
    Array,
    F,
    T,
    ct,
    depth_to_space,
    mb,
    package,
    quietly,
    rand,
    reordered,
    torch,
)

coreml = CoreMLDecoderTarget()


def _network(
    folder: Path,
    inputs: dict[str, tuple[int, ...]],
    add: Callable[[Any], None],
    *,
    exact: bool = False,
    bits: int = 0,
    table: str = "linear",
) -> Path:
    """A network of coremltools' own builder; its output is called "out"."""
    from coremltools.models import datatypes
    from coremltools.models.neural_network import NeuralNetworkBuilder, quantization_utils

    builder = NeuralNetworkBuilder(
        [(name, datatypes.Array(*shape)) for name, shape in inputs.items()], [("out", None)],
        disable_rank5_shape_mapping=exact,
    )  # fmt: skip
    add(builder)
    path = folder / "net.mlmodel"
    spec = builder.spec
    if bits:
        model = quietly(lambda: ct.models.MLModel(spec, skip_model_load=True))
        spec = quietly(lambda: quantization_utils.quantize_weights(model, bits, table)).get_spec()
    path.write_bytes(spec.SerializeToString())
    return path


def activated(kind: str, parameters: Any) -> Callable[[Any], None]:
    return lambda b: b.add_activation("l", kind, "x", "out", parameters)


C, H, W = 4, 6, 8
NET = rand(C, H, W)
LEGACY: list[tuple[str, Callable[[Any], None], Callable[[Array], Any]]] = [
    ("convolution", lambda b: b.add_convolution(
        "l", C, 5, 3, 3, 2, 1, "valid", 1, rand(3, 3, C, 5), rand(5), True, input_name="x",
        output_name="out", padding_top=1, padding_bottom=1, padding_left=0, padding_right=0),
     lambda x: F.conv2d(T(x)[None], T(rand(3, 3, C, 5).transpose(3, 2, 0, 1)), T(rand(5)), (2, 1),
                        (1, 0))[0]),
    ("convolution same", lambda b: b.add_convolution(
        "l", C // 2, 6, 3, 3, 1, 1, "same", 2, rand(3, 3, C // 2, 6), None, False, input_name="x",
        output_name="out"),
     lambda x: F.conv2d(T(x)[None], T(rand(3, 3, C // 2, 6).transpose(3, 2, 0, 1)), None, 1, 1, 1,
                        2)[0]),
    ("deconvolution", lambda b: b.add_convolution(
        "l", C, 5, 2, 3, 2, 2, "valid", 1, rand(2, 3, C, 5), rand(5), True, is_deconv=True,
        input_name="x", output_name="out"),
     lambda x: F.conv_transpose2d(T(x)[None], T(rand(2, 3, C, 5).transpose(2, 3, 0, 1)),
                                  T(rand(5)), 2)[0]),
    ("max pooling", lambda b: b.add_pooling("l", 2, 3, 2, 2, "MAX", "VALID", "x", "out"),
     lambda x: F.max_pool2d(T(x)[None], (2, 3), 2)[0]),
    ("average pooling", lambda b: b.add_pooling(
        "l", 3, 3, 1, 1, "AVERAGE", "SAME", "x", "out", exclude_pad_area=True),
     lambda x: F.avg_pool2d(T(x)[None], 3, 1, 1, count_include_pad=False)[0]),
    ("pooling, last pixel", lambda b: b.add_pooling(
        "l", 3, 3, 2, 2, "MAX", "INCLUDE_LAST_PIXEL", "x", "out"),
     lambda x: F.max_pool2d(T(x)[None], 3, 2, ceil_mode=True)[0]),
    ("global pooling", lambda b: b.add_pooling(
        "l", 1, 1, 1, 1, "AVERAGE", "VALID", "x", "out", is_global=True),
     lambda x: x.mean((1, 2))),
    ("flatten and product", lambda b: (
        b.add_flatten("f", 0, "x", "flat"),
        b.add_inner_product("l", rand(7, C * H * W), rand(7), C * H * W, 7, True, "flat", "out")),
     lambda x: F.linear(T(x.reshape(-1)), T(rand(7, C * H * W)), T(rand(7)))),
    ("flatten, channels last", lambda b: b.add_flatten("f", 1, "x", "out"),
     lambda x: x.transpose(1, 2, 0).reshape(-1)),
    ("batchnorm", lambda b: b.add_batchnorm(
        "l", C, rand(C), rand(C, seed=1), rand(C, seed=2), rand(C, low=0.5), "x", "out"),
     lambda x: F.batch_norm(T(x)[None], T(rand(C, seed=2)), T(rand(C, low=0.5)), T(rand(C)),
                            T(rand(C, seed=1)))[0]),
    ("instance norm", lambda b: b.add_batchnorm(
        "l", C, rand(C), rand(C, seed=1), None, None, "x", "out", compute_mean_var=True,
        instance_normalization=True),
     lambda x: F.instance_norm(T(x)[None], weight=T(rand(C)), bias=T(rand(C, seed=1)))[0]),
    ("mvn", lambda b: b.add_mvn("l", "x", "out", across_channels=False),
     lambda x: (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)),
    ("l2 normalize", lambda b: b.add_l2_normalize("l", "x", "out"),
     lambda x: x / np.sqrt((x * x).sum())),
    ("lrn", lambda b: b.add_lrn("l", "x", "out", 0.3, 0.7, 3, 1.2),
     lambda x: F.local_response_norm(T(x)[None], 3, 0.3, 0.7, 1.2)[0]),
    ("softmax", lambda b: b.add_softmax("l", "x", "out"), lambda x: F.softmax(T(x), 0)),
    ("permute", lambda b: b.add_permute("l", [0, 3, 1, 2], "x", "out"),
     lambda x: x.transpose(2, 0, 1)),
    ("reshape", lambda b: b.add_reshape("l", "x", "out", (C, W, H), 0),
     lambda x: x.reshape(C, W, H)),
    ("padding", lambda b: b.add_padding("l", 1, 2, 0, 1, 0.5, "x", "out"),
     lambda x: np.pad(x, [(0, 0), (0, 1), (1, 2)], constant_values=0.5)),
    ("crop", lambda b: b.add_crop("l", 1, 2, 0, 1, [0, 0], ["x"], "out"),
     lambda x: x[:, 0:5, 1:6]),
    ("upsample nearest", lambda b: b.add_upsample("l", 2, 3, "x", "out", "NN"),
     lambda x: F.interpolate(T(x)[None], scale_factor=(2.0, 3.0))[0]),
    ("upsample aligned", lambda b: b.add_upsample(
        "l", 2, 3, "x", "out", "BILINEAR", linear_upsample_mode="ALIGN_CORNERS_TRUE"),
     lambda x: F.interpolate(T(x)[None], scale_factor=(2, 3), mode="bilinear",
                             align_corners=True)[0]),
    ("resize", lambda b: b.add_resize_bilinear(
        "l", "x", "out", 9, 5, mode="STRICT_ALIGN_ENDPOINTS_MODE"),
     lambda x: F.interpolate(T(x)[None], (9, 5), mode="bilinear", align_corners=True)[0]),
    ("slice", lambda b: b.add_slice("l", "x", "out", "height", 1, -1, 2), lambda x: x[:, 1:6:2]),
    ("reorganize", lambda b: b.add_reorganize_data("l", "x", "out", "DEPTH_TO_SPACE", 2),
     lambda x: depth_to_space(x[None], 2)[0]),
    ("concat", lambda b: b.add_elementwise("l", ["x", "x"], "out", "CONCAT"),
     lambda x: np.concatenate([x, x])),
    ("add a number", lambda b: b.add_elementwise("l", ["x"], "out", "ADD", 0.5), lambda x: x + 0.5),
    ("average", lambda b: b.add_elementwise("l", ["x", "x"], "out", "AVE"), lambda x: x),
    ("scale", lambda b: b.add_scale("l", rand(C, 1, 1), rand(C, 1, 1), True, "x", "out", (C, 1, 1),
                                    (C, 1, 1)),
     lambda x: x * rand(C, 1, 1) + rand(C, 1, 1)),
    ("bias", lambda b: b.add_bias("l", rand(C, 1, 1), "x", "out", (C, 1, 1)),
     lambda x: x + rand(C, 1, 1)),
    ("unary", lambda b: b.add_unary("l", "x", "out", "exp", shift=0.5, scale=2.0),
     lambda x: np.exp(2 * x + 0.5)),
    ("reduce", lambda b: b.add_reduce("l", "x", "out", "HW", "sumsquare"),
     lambda x: (x * x).sum((1, 2))),
    ("split", lambda b: (b.add_split("l", "x", ["a", "b"]),
                         b.add_elementwise("m", ["a", "b"], "out", "MULTIPLY")),
     lambda x: x[:2] * x[2:]),
    ("constant", lambda b: (b.add_load_constant("l", "c", rand(C * H * W), (C, H, W)),
                            b.add_elementwise("m", ["c", "x"], "out", "MAX")),
     lambda x: np.maximum(x, rand(C * H * W).reshape(C, H, W))),
    *[(f"activation {kind}", activated(kind, p), f)
      for kind, p, f in (
          ("RELU", None, lambda x: F.relu(T(x))),
          ("LEAKYRELU", [0.2], lambda x: F.leaky_relu(T(x), 0.2)),
          ("ELU", 0.5, lambda x: F.elu(T(x), 0.5)),
          ("PRELU", rand(C), lambda x: F.prelu(T(x)[None], T(rand(C)))[0]),
          ("SIGMOID_HARD", [0.3, 0.4], lambda x: np.clip(0.3 * x + 0.4, 0, 1)),
          ("SCALED_TANH", [1.5, 0.6], lambda x: 1.5 * np.tanh(0.6 * x)),
          ("SOFTPLUS", None, lambda x: F.softplus(T(x))),
          ("LINEAR", [2.0, 1.0], lambda x: 2 * x + 1),
          ("PARAMETRICSOFTPLUS", [rand(C, low=1), rand(C, low=2)],
           lambda x: rand(C, low=1)[:, None, None] * np.log1p(
               np.exp(rand(C, low=2)[:, None, None] * x))),
      )],
]  # fmt: skip


@pytest.mark.parametrize(("name", "add", "oracle"), LEGACY, ids=[c[0] for c in LEGACY])
def test_a_layer(
    name: str, add: Callable[[Any], None], oracle: Callable[[Array], Any], tmp_path: Path
) -> None:
    path = _network(tmp_path, {"x": (C, H, W)}, add)
    found = coreml_exec.execute(path, {"x": NET})["out"]
    np.testing.assert_allclose(found, np.asarray(oracle(NET)), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("bits", "table"), [(8, "linear"), (4, "linear"), (16, "linear")])
def test_a_network_with_quantized_weights(bits: int, table: str, tmp_path: Path) -> None:
    weights = rand(9, 32)

    def add(b: Any) -> None:
        b.add_inner_product("l", weights, None, 32, 9, False, "x", "out")

    path = _network(tmp_path, {"x": (32,)}, add, bits=bits, table=table)
    x = rand(32)
    found = coreml_exec.execute(path, {"x": x})["out"]
    if bits == 16:
        right = weights.astype(np.float16).astype(np.float32) @ x
    else:  # coremltools rounds each row to levels between its ends
        low, high = weights.min(1, keepdims=True), weights.max(1, keepdims=True)
        scale = (high - low) / ((1 << bits) - 1)
        right = (np.rint((weights - low) / scale) * scale + low) @ x
    np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-4)


def test_an_lstm_of_the_older_format_is_torchs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.LSTM(5, 4)
    order = (0, 1, 3, 2)  # coremltools: input, forget, output, block

    def rows(weights: Any) -> list[Array]:
        return np.split(reordered(weights, order), 4)

    def add(b: Any) -> None:
        b.add_unilstm(
            "l", rows(net.weight_hh_l0), rows(net.weight_ih_l0),
            rows(net.bias_ih_l0 + net.bias_hh_l0), 4, 5, ["x", "h", "c"],
            ["out", "h2", "c2"], output_all=True,
        )  # fmt: skip

    path = _network(tmp_path, {"x": (5,), "h": (4,), "c": (4,)}, add)
    x, h, c = rand(5), rand(4), rand(4, seed=1)
    found = coreml_exec.execute(path, {"x": x, "h": h, "c": c})["out"]
    right = net(T(x[None, None]), (T(h[None, None]), T(c[None, None])))[0]
    np.testing.assert_allclose(found, right.detach().reshape(-1), atol=1e-5)


def _wide_network(x: Any, y: Any) -> list[Any]:
    """Many layers of newer networks, of arrays of any rank."""
    parts = mb.split(x=mb.transpose(x=x, perm=[0, 2, 1]), split_sizes=[1, 3], axis=1)
    z = mb.concat(values=[parts[1], parts[0]], axis=1)
    z = mb.add(x=z, y=mb.reduce_mean(x=z, axes=[-1], keep_dims=True))
    z = mb.layer_norm(x=z, axes=[2], gamma=rand(3), beta=rand(3, seed=1))
    z = mb.gelu(x=z, mode="TANH_APPROXIMATION")
    a = mb.matmul(x=z, y=mb.transpose(x=z, perm=[0, 2, 1]))
    a = mb.softmax(x=mb.real_div(x=a, y=np.float32(2)), axis=-1)
    a = mb.select(cond=mb.greater(x=a, y=np.float32(0.2)), a=a, b=mb.mul(x=a, y=np.float32(-1)))
    values, _ = mb.topk(x=a, k=2, axis=-1)
    b = mb.slice_by_index(x=z, begin=[0, 1, 0], end=[2, 3, 3], stride=[1, 1, 2])
    b = mb.reshape(x=b, shape=[2, 1, -1])
    b = mb.tile(x=b, reps=[1, 3, 1])
    c = mb.stack(
        values=[mb.sin(x=y), mb.erf(x=y), mb.pow(x=mb.abs(x=y), y=np.float32(1.5))], axis=0
    )
    c = mb.reduce_l2_norm(x=mb.expand_dims(x=c, axes=[1]), axes=[0], keep_dims=False)
    d = mb.linear(x=y, weight=rand(6, 5), bias=rand(6))
    e = mb.cumsum(x=mb.reverse(x=y, axes=[1]), axis=1)
    e = mb.band_part(x=mb.pad(x=e, pad=[0, 1, 2, 0], constant_val=0.5), lower=2, upper=1)
    order = mb.argsort(x=y, axis=1)
    f = mb.gather_along_axis(x=y, indices=order, axis=1)
    big, small = mb.greater(x=y, y=np.float32(0.5)), mb.less(x=y, y=np.float32(-0.5))
    far = mb.logical_or(x=big, y=mb.logical_not(x=mb.logical_and(x=small, y=small)))
    g = mb.select(cond=far, a=y, b=mb.mul(x=y, y=np.float32(2)))
    return [a, values, b, c, d, e, f, g]


def test_newer_networks_give_what_their_program_gives(tmp_path: Path) -> None:
    shapes = {"x": (2, 3, 4), "y": (4, 5)}
    inputs = {name: rand(*shape) for name, shape in shapes.items()}
    program_path = package(tmp_path, _wide_network, inputs, target="ios16")
    right = coreml_exec.execute(program_path, inputs)

    @mb.program(input_specs=[mb.TensorSpec(s) for s in shapes.values()])
    def program(x: Any, y: Any) -> Any:
        outputs = _wide_network(x, y)
        return [mb.identity(x=v, name=f"out{i}") for i, v in enumerate(outputs)]

    net = quietly(lambda: ct.convert(program, convert_to="neuralnetwork"))
    path = tmp_path / "net.mlmodel"
    path.write_bytes(net.get_spec().SerializeToString())
    found = coreml_exec.execute(path, inputs)
    assert set(found) == set(right)
    for name, value in right.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5)


# --- real files -------------------------------------------------------------------------------


def _torch_layers(path: Path, image: Array) -> Array:
    """A plain network of convolutions, run by torch from the file's own message."""
    from coremltools.models.utils import load_spec

    spec = load_spec(str(path))
    net = getattr(spec, spec.WhichOneof("Type"))
    x = T(image[None, None].astype(np.float32))
    if net.preprocessing:
        x = x * net.preprocessing[0].scaler.channelScale
    for layer in net.layers:
        kind = layer.WhichOneof("layer")
        p = getattr(layer, kind)
        if kind == "convolution":
            size = (p.outputChannels, p.kernelChannels, *p.kernelSize)
            w = torch.tensor(list(p.weights.floatValue)).reshape(size)
            same = p.WhichOneof("ConvolutionPaddingType") == "same"
            x = F.conv2d(x, w, torch.tensor(list(p.bias.floatValue)), padding=1 if same else 0)
        elif kind == "pooling":
            x = F.max_pool2d(x, 2)
        elif kind == "activation":
            x = F.relu(x)
        elif kind == "flatten":
            x = x.permute(0, 2, 3, 1).reshape(1, -1)
        elif kind == "innerProduct":
            w = torch.tensor(list(p.weights.floatValue)).reshape(p.outputChannels, -1)
            x = F.linear(x, w, torch.tensor(list(p.bias.floatValue)))
        else:
            assert kind == "softmax"
            x = F.softmax(x, -1)
    return x[0].numpy()


def test_a_digit_classifier_and_a_sketch_embedding() -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28)).astype(np.uint8)
    path = need("data/coreml_models/mnistCNN_379k.mlmodel")
    found = coreml_exec.execute(path, {"image": image})
    right = _torch_layers(path, image)
    np.testing.assert_allclose(list(found["output"].values()), right, atol=1e-5)
    assert found["classLabel"] == list(found["output"])[int(right.argmax())]
    path = need("data/coreml_models/TinyDrawingEmbedding.mlmodel")
    found = coreml_exec.execute(path, {"drawing": image})
    np.testing.assert_allclose(found["embedding"], _torch_layers(path, image), rtol=1e-4, atol=1e-3)
    with pytest.raises(UsageError, match="28 x 28, got 27 x 28; resize it first"):
        coreml_exec.execute(path, {"drawing": image[1:]})


def test_a_pipeline_of_words() -> None:
    path = need("data/coreml_models/SentimentPolarity.mlmodel")
    described = coreml_exec.describe(path)
    assert described.kind == "pipelineClassifier"
    assert set(described.functions["main"].ops) == {
        "dictVectorizer", "featureVectorizer", "glmClassifier",
    }  # fmt: skip
    good = coreml_exec.execute(path, {"input": {"wonderful": 2, "love": 1, "not-a-word": 3}})
    bad = coreml_exec.execute(path, {"input": {"terrible": 1, "boring": 2, "bad": 1}})
    assert (good["classLabel"], bad["classLabel"]) == ("Pos", "Neg")
    assert sum(good["classProbability"].values()) == pytest.approx(1)
    done = coreml.execute(path)
    assert done.outputs["classProbability"].shape == (2,)


# --- features and trees -----------------------------------------------------------------------


def _spec(kind: str, inputs: Sequence[str], outputs: Sequence[str], **parameters: Any) -> Any:
    from coremltools.proto import Model_pb2

    spec = Model_pb2.Model(specificationVersion=1)
    for names, items in ((inputs, spec.description.input), (outputs, spec.description.output)):
        for name in names:
            items.add(name=name).type.doubleType.SetInParent()
    model = getattr(spec, kind)
    model.SetInParent()
    for name, value in parameters.items():
        target = model
        *path, last = name.split("__")
        for step in path:
            target = getattr(target, step)
        if isinstance(value, (list, tuple)):
            getattr(target, last).extend(value)
        else:
            setattr(target, last, value)
    return spec


def _runs(spec: Any, **inputs: Any) -> Any:
    found = run_spec(spec, inputs)
    return found["y"] if set(found) == {"y"} else found


def test_models_that_prepare_features() -> None:
    one = (["x"], ["y"])
    scaler = _spec("scaler", *one, shiftValue=[1.0, 2.0], scaleValue=[2.0, 0.5])
    np.testing.assert_allclose(_runs(scaler, x=[1.0, 2.0]), [4, 2])
    for kind, size in ((0, 4.0), (1, 7.0), (2, 5.0)):
        normalizer = _spec("normalizer", *one, normType=kind)
        np.testing.assert_allclose(_runs(normalizer, x=[3.0, -4.0]), np.array([3, -4]) / size)
    imputer = _spec("imputer", *one, imputedDoubleValue=9.0, replaceDoubleValue=float("nan"))
    assert _runs(imputer, x=float("nan")) == 9
    assert _runs(imputer, x=2.0) == 2
    one_hot = _spec("oneHotEncoder", *one, stringCategories__vector=["a", "b", "c"])
    np.testing.assert_array_equal(_runs(one_hot, x="b"), [0, 1, 0])
    with pytest.raises(UnsupportedError, match="no category 'd'"):
        _runs(one_hot, x="d")
    extractor = _spec("arrayFeatureExtractor", *one, extractIndex=[2, 0])
    np.testing.assert_array_equal(_runs(extractor, x=[5, 6, 7]), [7, 5])
    mapping = _spec("categoricalMapping", *one, int64Value=-1)
    mapping.categoricalMapping.stringToInt64Map.map["cat"] = 4
    assert (_runs(mapping, x="cat"), _runs(mapping, x="dog")) == (4, -1)
    assert _runs(_spec("identity", *one), x=3) == 3
    vectorizer = _spec("featureVectorizer", ["x", "z"], ["y"])
    for name, size in (("x", 2), ("z", 3)):
        vectorizer.featureVectorizer.inputList.add(inputColumn=name, inputDimensions=size)
    np.testing.assert_array_equal(_runs(vectorizer, x=[1, 2], z={1: 5.0}), [1, 2, 0, 5, 0])


def test_linear_models() -> None:
    glm = _spec("glmRegressor", ["x", "z"], ["y"], offset=[0.5])
    glm.glmRegressor.weights.add(value=[2.0, 3.0])
    assert _runs(glm, x=1.0, z=-1.0) == -0.5
    glm.glmRegressor.postEvaluationTransform = 1
    assert _runs(glm, x=1.0, z=-1.0) == pytest.approx(1 / (1 + np.exp(0.5)))
    many = _spec("glmClassifier", ["x"], ["label", "p"], offset=[0.0, 1.0],
                 stringClassLabels__vector=["a", "b", "c"])  # fmt: skip
    for weight in (1.0, -1.0):
        many.glmClassifier.weights.add(value=[weight])
    many.description.predictedFeatureName = "label"
    many.description.predictedProbabilitiesName = "p"
    found = _runs(many, x=2.0)
    odds = np.exp([0.0, 2.0, -1.0])
    assert found["label"] == "b"
    np.testing.assert_allclose(list(found["p"].values()), odds / odds.sum())


def test_trees_are_summed() -> None:
    trees = _spec("treeEnsembleRegressor", ["x"], ["y"], treeEnsemble__numPredictionDimensions=1,
                  treeEnsemble__basePredictionValue=[10.0])  # fmt: skip
    nodes = trees.treeEnsembleRegressor.treeEnsemble.nodes
    for tree, (feature, limit, low, high) in enumerate([(0, 1.5, 1.0, 2.0), (1, 0.0, 4.0, 8.0)]):
        root = nodes.add(treeId=tree, branchFeatureIndex=feature, branchFeatureValue=limit)
        root.trueChildNodeId, root.falseChildNodeId = 1, 2
        root.missingValueTracksTrueChild = tree == 0
        for node, value in ((1, low), (2, high)):
            leaf = nodes.add(treeId=tree, nodeId=node, nodeBehavior=6)
            leaf.evaluationInfo.add(evaluationIndex=0, evaluationValue=value)
    assert _runs(trees, x=[1.5, 0.0]) == 10 + 1 + 4
    assert _runs(trees, x=[1.6, 0.1]) == 10 + 2 + 8
    assert _runs(trees, x=[float("nan"), float("nan")]) == 10 + 1 + 8
    kinds = _spec("treeEnsembleClassifier", ["x"], ["label"], int64ClassLabels__vector=[3, 7])
    kinds.treeEnsembleClassifier.treeEnsemble.CopyFrom(trees.treeEnsembleRegressor.treeEnsemble)
    kinds.treeEnsembleClassifier.treeEnsemble.basePredictionValue[:] = [-12.0]
    kinds.treeEnsembleClassifier.postEvaluationTransform = 2
    kinds.description.predictedFeatureName = "label"
    assert _runs(kinds, x=[1.5, 0.0]) == {"label": 3}
    assert _runs(kinds, x=[1.6, 0.1]) == {"label": 3}
    assert _runs(kinds, x=[1.5, 0.1]) == {"label": 3}
    kinds.treeEnsembleClassifier.treeEnsemble.basePredictionValue[:] = [-8.5]
    assert _runs(kinds, x=[1.5, 0.1]) == {"label": 7}


# --- refusals ---------------------------------------------------------------------------------


def test_layers_and_models_that_cannot_be_executed_are_named(tmp_path: Path) -> None:
    net = _network(
        tmp_path,
        {"x": (4,)},
        lambda b: b.add_custom("own", ["x"], ["out"], _custom()),
    )
    assert coreml_exec.describe(net).unsupported == ("custom",)
    with pytest.raises(UnsupportedError, match="layer 'own' of type custom"):
        coreml_exec.execute(net, {"x": rand(4)})
    spec = coreml_exec.open_model(net).file.spec
    spec.visionFeaturePrint.scene.version = 1
    net.write_bytes(spec.SerializeToString())
    assert coreml_exec.describe(net).unsupported == ("visionFeaturePrint",)
    with pytest.raises(UnsupportedError, match="type visionFeaturePrint"):
        coreml_exec.execute(net, {"x": rand(4)})


def _custom() -> Any:
    from coremltools.proto import NeuralNetwork_pb2

    return NeuralNetwork_pb2.CustomLayerParams(className="Own")
