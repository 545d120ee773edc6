"""Graphs for onnxruntime: the same integers, packed, fused and read back from .onnx and .ort."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.convert import convert
from edgeq.converters.metadata_blob import read_blob
from edgeq.converters.ort.graph import OrtGraphTarget
from edgeq.converters.ort.session import exact_form
from edgeq.converters.validate import validate
from edgeq.converters.validate.graph_inputs import made_up
from edgeq.core.errors import FormatError, UsageError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.execute import Session
from edgeq.graph.files import read
from edgeq.graph.ir import Constant, Graph, Info, Node, QuantWeight
from edgeq.graph.onnx.save import write_onnx

ort_lower = OrtGraphTarget()

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(5)


def weight(
    shape: tuple[int, ...], bits: int, axis: int | None = 0, block: int | None = None
) -> QuantWeight:
    """Random levels of about the size that a network of a few layers keeps in range."""
    top = 7 if bits == 4 else 127
    levels = RNG.integers(-top, top + 1, shape).astype(np.int8)
    scales: Any = ()
    if axis is not None:
        parts = list(shape) if block else [shape[axis]]
        if block:
            parts[axis] = -(-shape[axis] // block)
        scales = tuple(parts)
    fan = float(np.prod(shape[1:]))
    size = RNG.uniform(0.5, 1.5, scales) * 1.7 / np.sqrt(fan) / top
    return QuantWeight(levels, np.asarray(size, np.float32), bits, axis, block)


def narrow(held: QuantWeight) -> QuantWeight:
    """The same with scales that float16 can hold."""
    return replace(held, scales=held.scales.astype(np.float16).astype(np.float32))


def bias(n: int, x: QuantParams, w: QuantWeight) -> QuantWeight:
    """A bias on the grid of the sums."""
    scales = np.float32(x.scale) * w.scales
    levels = RNG.integers(-2000, 2000, n).astype(np.int32)
    return QuantWeight(levels, scales, 32, 0 if w.axis is not None else None)


def cnn(bits: int) -> Graph:
    """Two convolutions, a pool and a matrix, all in integers."""
    rectified = QuantParams(1 / 32, -128)
    grid = {"x": QuantParams(1 / 64, 3), "a": rectified, "p": rectified, "f": rectified,
            "y": QuantParams(1 / 16, 7)}  # fmt: skip
    w1, w2, w3 = weight((8, 3, 3, 3), bits), weight((8, 1, 3, 3), bits), weight((5, 128), bits)
    grid["b"] = QuantParams(1 / 32, -128)
    constants: dict[str, Constant] = {
        "w1": w1, "b1": bias(8, grid["x"], w1), "w2": w2, "b2": bias(8, grid["a"], w2),
        "w3": w3, "b3": bias(5, grid["f"], w3), "flat": np.array([1, 128]),
    }  # fmt: skip
    pads = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [1, 1], "group": 1}
    nodes = (
        Node("Conv", "c1", ("x", "w1", "b1"), ("a0",), pads),
        Node("Relu", "r1", ("a0",), ("a",)),
        Node("Conv", "c2", ("a", "w2", "b2"), ("b0",), {**pads, "group": 8}),
        Node("Relu", "r2", ("b0",), ("b",)),
        Node("MaxPool", "pool", ("b",), ("p",), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        Node("Reshape", "flatten", ("p", "flat"), ("f",)),
        Node("Linear", "fc", ("f", "w3", "b3"), ("y",)),
    )
    values = {name: Info((1, 8, 8, 8)) for name in ("a0", "a", "b0", "b")}
    values |= {"x": Info((1, 3, 8, 8)), "p": Info((1, 8, 4, 4)), "f": Info((1, 128))}
    values["y"] = Info((1, 5))
    meta = {"edgeq.activations": "static"}
    return Graph("cnn", ("x",), ("y",), nodes, constants, values, grid, meta)


def encoder(bits: int, *, block: int | None, dynamic: bool = False) -> Graph:
    """A table and two matrices; only weights are rounded."""
    axis = 1 if block else 0
    constants: dict[str, Constant] = {
        "table": weight((50, 64), bits, axis, block),
        "w1": weight((72, 64), bits, axis, block),
        "w2": weight((10, 72), bits, axis, block),
        "b1": RNG.standard_normal(72).astype(np.float32),
    }
    nodes = (
        Node("Gather", "embed", ("table", "ids"), ("e",), {"axis": 0}),
        Node("Linear", "up", ("e", "w1", "b1"), ("u",)),
        Node("Relu", "act", ("u",), ("a",)),
        Node("Linear", "down", ("a", "w2"), ("y",)),
    )
    values = {"ids": Info((1, 7), "int64"), "e": Info((1, 7, 64)), "u": Info((1, 7, 72)),
              "a": Info((1, 7, 72)), "y": Info((1, 7, 10))}  # fmt: skip
    meta = {"edgeq.activations": "dynamic" if dynamic else "float"}
    return Graph("encoder", ("ids",), ("y",), nodes, constants, values, {}, meta)


def operators(path: Path) -> Counter[str]:
    """Operators of an ONNX file."""
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def packed_bits(graph: Graph, path: Path) -> dict[str, int]:
    """Bits that each packed weight has in the file, once all levels and scales are as they were."""
    found = validate(path, graph, "ort")
    assert found.passed, found.explain()
    assert all(found.graph.quants.values())
    if path.suffix == ".onnx" and "QLinearConv" not in operators(path):
        assert len(found.graph.quants) == len(graph.quants)
    wanted = {n for n, held in graph.constants.items() if isinstance(held, QuantWeight)}
    assert set(found.graph.bits) == wanted
    return dict(found.graph.bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activations", ["int8", "uint8"])
def test_integers_of_a_rounded_network_are_kept(
    tmp_path: Path, bits: int, activations: str
) -> None:
    graph = cnn(bits)
    ort_lower.write(graph, tmp_path / "m.onnx", {"activations": activations})
    found = packed_bits(graph, tmp_path / "m.onnx")
    assert {n: b for n, b in found.items() if n[0] == "w"} == dict.fromkeys(
        ("w1", "w2", "w3"), bits
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_qoperators_compute_in_integers(tmp_path: Path, bits: int) -> None:
    graph = cnn(bits)
    ort_lower.write(graph, tmp_path / "m.onnx", {"form": "qoperator"})
    ops = operators(tmp_path / "m.onnx")
    assert ops["QLinearConv"] == 2
    assert ops["QGemm"] == 1
    assert not ops["Conv"]
    assert set(packed_bits(graph, tmp_path / "m.onnx").values()) == {8, 32}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [None, 16, 32])
@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_matrices_keep_blocks_and_rows(
    tmp_path: Path, bits: int, block: int | None, dynamic: bool
) -> None:
    graph = encoder(bits, block=block, dynamic=dynamic)
    ort_lower.write(graph, tmp_path / "m.onnx", {})
    assert operators(tmp_path / "m.onnx")["MatMulNBits"] == 2
    assert operators(tmp_path / "m.onnx")["GatherBlockQuantized"] == 1
    assert set(packed_bits(graph, tmp_path / "m.onnx").values()) == {bits}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("suffix", "activations"), [(".onnx", "int8"), (".onnx", "uint8"), (".ort", "uint8")]
)
def test_float_results_of_rounded_values_are_products_of_integers(
    tmp_path: Path, bits: int, activations: str, suffix: str
) -> None:
    grid = {"e": QuantParams(1 / 32, -5), "a": QuantParams(1 / 64, -128)}
    plain = encoder(bits, block=None)
    nodes = [replace(n, op="Tanh") if n.op == "Relu" else n for n in plain.nodes]
    graph = replace(plain, nodes=tuple(nodes), quants=grid, meta={"edgeq.activations": "static"})
    path = tmp_path / f"m{suffix}"
    ort_lower.write(graph, path, {"activations": activations})
    if suffix == ".onnx":
        ops = operators(path)
        assert ops["MatMulIntegerToFloat"] == 2
        assert not ops["MatMul"] + ops["Gemm"] + ops["Add"]
    assert set(packed_bits(graph, path)) == {"table", "w1", "w2"}
    assert validate(path, graph, "ort").graph.error["y"] < 1e-5


def test_float_results_of_rounded_rows(tmp_path: Path) -> None:
    """As of a classifier, whose matrix lies the other way around in the record."""
    plain = cnn(8)
    floats = {"b3": np.linspace(-1, 1, 5, dtype=np.float32)}
    quants = {name: quant for name, quant in plain.quants.items() if name != "y"}
    graph = replace(plain, constants={**plain.constants, **floats}, quants=quants)
    ort_lower.write(graph, tmp_path / "m.onnx", {})
    assert operators(tmp_path / "m.onnx")["MatMulIntegerToFloat"] == 1
    assert packed_bits(graph, tmp_path / "m.onnx")["w3"] == 8
    assert validate(tmp_path / "m.onnx", graph, "ort").graph.error["y"] < 0.01


def test_nothing_is_held_twice_or_said_without_need(tmp_path: Path) -> None:
    graph = cnn(8)
    ort_lower.write(graph, tmp_path / "m.onnx", {})
    model = onnx.load(tmp_path / "m.onnx")
    whole = [t for t in model.graph.initializer if t.data_type != onnx.TensorProto.INT8]
    held = [(t.data_type, tuple(t.dims), t.raw_data) for t in whole]
    assert len(held) == len(set(held))
    taken = Counter(name for node in model.graph.node for name in node.input)
    # onnxruntime makes each unsigned for one operator
    assert {taken[t.name] for t in model.graph.initializer if t not in whole} == {1}
    assert all(len(t.name) <= 3 for t in model.graph.initializer)
    assert not model.graph.value_info
    attributes = {n.name: {entry.name for entry in n.attribute} for n in model.graph.node}
    assert attributes["c1"] == {"kernel_shape", "pads"}
    assert attributes["c2"] == {"kernel_shape", "pads", "group"}
    assert attributes["pool"] == {"kernel_shape", "strides"}
    biases = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT32}
    undone = [n for n in model.graph.node if n.input[0] in biases]
    assert [len(n.input) for n in undone] == [2] * len(biases)  # without a zero point
    plain = json.dumps(read_blob(_metadata(model)["edgeq.held"]))
    assert len(_metadata(model)["edgeq.held"]) < len(plain) / 1.5


def _metadata(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def test_scales_of_many_channels_take_two_bytes(tmp_path: Path) -> None:
    graph = encoder(8, block=None)
    constants = {n: narrow(h) if isinstance(h, QuantWeight) else h
                 for n, h in graph.constants.items()}  # fmt: skip
    for name, each in (("wide", graph), ("half", replace(graph, constants=constants))):
        path = tmp_path / f"{name}.onnx"
        write_onnx(each, path)
        scales = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
        assert ("w1.scale.half" in scales) == (name == "half")  # 72 rows
        assert scales["w2.scale"] == onnx.TensorProto.FLOAT  # 10 rows
        again = read(path)
        for constant, held in each.constants.items():
            if isinstance(held, QuantWeight):
                found = again.constants[constant]
                assert isinstance(found, QuantWeight)
                assert found.scales.dtype == np.float32
                np.testing.assert_array_equal(found.scales, held.scales)


def test_scales_that_fit_take_two_bytes(tmp_path: Path) -> None:
    wide = encoder(4, block=16)
    constants = {
        name: narrow(held) if isinstance(held, QuantWeight) else held
        for name, held in wide.constants.items()
    }
    graph = replace(wide, constants=constants)
    sizes = []
    for i, each in enumerate((wide, graph)):
        ort_lower.write(each, tmp_path / f"{i}.onnx", {})
        packed_bits(each, tmp_path / f"{i}.onnx")
        sizes.append((tmp_path / f"{i}.onnx").stat().st_size)
    scales = sum(h.scales.size for h in constants.values() if isinstance(h, QuantWeight))
    assert sizes[0] - sizes[1] > 2 * scales - 400  # the casts and their names


def test_weights_of_float_operators_are_dequantized_at_load_alone(tmp_path: Path) -> None:
    constants: dict[str, Constant] = {
        "w0": narrow(weight((96, 3, 3, 3), 4)),  # so many scales take two bytes each
        "w1": weight((96, 8, 2, 2), 8, axis=1),
        "w2": weight((4, 8, 1, 1), 8, axis=None),
    }
    graph = Graph(
        "plain", ("x",), ("y",),
        (
            Node("Conv", "first", ("x", "w0"), ("a",), {"pads": [1, 1, 1, 1]}),
            Node("ConvTranspose", "up", ("a", "w1"), ("b",), {"strides": [2, 2]}),
            Node("Conv", "last", ("b", "w2"), ("y",)),
        ),
        constants,
        {"x": Info((1, 3, 6, 6)), "a": Info((1, 96, 6, 6)), "b": Info((1, 8, 12, 12)),
         "y": Info((1, 4, 12, 12))},
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    ort_lower.write(graph, path, {})
    assert packed_bits(graph, path) == {"w0": 4, "w1": 8, "w2": 8}
    found = operators(path)
    assert found["Mul"] == 3
    assert not found["DequantizeLinear"]
    onnx.checker.check_model(onnx.load(path), full_check=True)
    # levels without a sign stand for the same weights
    ort_lower.write(graph, tmp_path / "u.onnx", {"weights": "uint8"})
    x = np.random.default_rng(0).standard_normal((1, 3, 6, 6)).astype(np.float32)
    runner = ort_lower.open_runner(tmp_path / "u.onnx")
    np.testing.assert_allclose(runner({"x": x})["y"], _exact(graph, x), rtol=1e-3, atol=1e-3)
    # what is computed while loading would be stored in an .ort file
    ort_lower.write(graph, tmp_path / "m.ort", {})
    assert packed_bits(graph, tmp_path / "m.ort") == {"w0": 8, "w1": 8, "w2": 8}
    assert "DequantizeLinear" in (tmp_path / "m.required_operators.config").read_text()


@pytest.mark.parametrize("scale", [1 / 64, 1 / 2])
def test_the_error_allowed_is_what_rounding_to_the_other_side_makes(
    scale: float, tmp_path: Path
) -> None:
    """Where the inputs are a few steps only, one step is a large part of the result."""
    rng = np.random.default_rng(1)
    levels = rng.integers(-127, 128, (8, 256)).astype(np.int8)
    graph = Graph(
        "product", ("x",), ("y",), (Node("Linear", "fc", ("x", "w"), ("y",)),),
        {"w": QuantWeight(levels, np.array(0.01, np.float32), 8)},
        {"x": Info((1, 256)), "y": Info((1, 8))},
        {"x": QuantParams(scale, 0)}, {"edgeq.activations": "static"},
    )  # fmt: skip
    ort_lower.write(graph, tmp_path / "m.onnx", {})
    x = rng.uniform(-1, 1, (1, 256)).astype(np.float32)
    found = validate(tmp_path / "m.onnx", graph, "ort", samples=[{"x": x}])
    assert found.passed
    assert found.graph.allowed["y"] < 0.2


@pytest.mark.parametrize("make", [lambda: cnn(8), lambda: cnn(4), lambda: encoder(4, block=32)])
def test_an_ort_file_and_its_list_of_operators(tmp_path: Path, make: Any) -> None:
    graph = make()
    options = {"weights": "uint8"} if graph.quants else {}  # an .ort file stays as it is
    made = convert(graph, "ort", tmp_path / "m.ort", options)
    assert made.certificate is not None
    assert made.certificate["passed"]
    weights = sum(isinstance(held, QuantWeight) for held in graph.constants.values())
    assert made.certificate["weights_equal"] == f"{weights} of {weights}"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "m.ort", "m.ort.certificate.json", "m.required_operators.config",
    ]  # fmt: skip
    listed = (tmp_path / "m.required_operators.config").read_text()
    assert "MatMulNBits" in listed or "QLinearConv" in listed


@pytest.mark.parametrize("shape", [(1,), (8, 1, 1), (1, 8, 1, 1)])
def test_constants_beside_images_come_back_in_their_own_rank(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    """In an .ort file onnxruntime gives a factor of an image four axes, and moves its channels."""
    plain = cnn(8)
    levels = RNG.integers(60, 128, shape).astype(np.int8)
    factor = QuantWeight(levels, np.array(1 / 127, np.float32), 8)
    grid = {**plain.quants, "m": QuantParams(1 / 32, -128)}
    w2 = plain.constants["w2"]
    assert isinstance(w2, QuantWeight)
    constants = {**plain.constants, "k": factor, "b2": bias(8, grid["m"], w2)}
    conv, relu, second, *rest = plain.nodes
    nodes = (
        conv, relu, Node("Mul", "scale", ("k", "a"), ("m",)),
        replace(second, inputs=("m", *second.inputs[1:])), *rest,
    )  # fmt: skip
    values = {**plain.values, "m": plain.values["a"]}
    graph = replace(plain, nodes=nodes, constants=constants, quants=grid, values=values)
    ort_lower.write(graph, tmp_path / "m.ort", {"weights": "uint8"})
    assert packed_bits(graph, tmp_path / "m.ort")["k"] == 8


def test_a_file_of_others_holds_no_integers_of_ours(tmp_path: Path) -> None:
    from edgeq.graph.onnx.save import write_onnx

    write_onnx(cnn(8), tmp_path / "m.onnx")
    with pytest.raises(FormatError, match="was not converted by edgeq"):
        list(ort_lower.read_weights(tmp_path / "m.onnx"))


def test_a_changed_integer_is_noticed(tmp_path: Path) -> None:
    graph = cnn(8)
    ort_lower.write(graph, tmp_path / "m.onnx", {})
    held = graph.constants["w2"]
    assert isinstance(held, QuantWeight)
    levels = held.levels.copy()
    levels[3, 0, 1, 2] += 1 if levels[3, 0, 1, 2] < 0 else -1
    other = replace(graph, constants={**graph.constants, "w2": replace(held, levels=levels)})
    found = validate(tmp_path / "m.onnx", other, "ort")
    assert not found.passed
    assert "w2: integers or scales differ" in found.explain()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"kv": 8}, "option of ort"), ({"form": "flat"}, "qdq"), ({"activations": "int4"}, "uint8")],
)
def test_unknown_options_are_refused(tmp_path: Path, options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        convert(cnn(8), "ort", tmp_path / "m.onnx", options)
    assert not list(tmp_path.iterdir())


def test_the_certificate_lies_beside_the_file(tmp_path: Path) -> None:
    made = convert(cnn(8), "ort", tmp_path / "m.onnx")
    text = (tmp_path / "m.onnx.certificate.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(made.certificate))
    assert made.certificate is not None
    assert made.certificate["arena_bytes"] >= 8 * 8 * 8 * 2
    assert made.certificate["top1_agreement"] == 1.0


def test_made_up_masks_keep_what_comes_first() -> None:
    graph = encoder(8, block=None)
    mask = Node("Cast", "m", ("mask",), ("z",), {"to": 1})
    graph = replace(
        graph, inputs=("ids", "mask"), nodes=(*graph.nodes, mask),
        values={**graph.values, "mask": Info((1, 7), "int64"), "z": Info((1, 7))},
    )  # fmt: skip
    for feeds in made_up(graph):
        assert 0 <= feeds["ids"].min() <= feeds["ids"].max() < 50
        assert feeds["mask"][0, 0] == 1
        assert (np.diff(feeds["mask"]) <= 0).all()


def _exact(graph: Graph, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first output, each operator computed in float on rounded values."""
    return Session(graph, optimize=False)({graph.inputs[0]: x})[graph.outputs[0]]


def saturating() -> Graph:
    """A matrix whose sums of two products are far beyond 16 bits."""
    w = QuantWeight(np.full((4, 32), 127, np.int8), np.full(4, 0.01, np.float32), 8, 0)
    bound = QuantParams.from_range(0, 1)
    return Graph(
        "saturating", ("x",), ("y",), (Node("Linear", "l", ("x", "w"), ("y",)),), {"w": w},
        {"x": Info((1, 32)), "y": Info((1, 4))},
        {"x": bound, "y": QuantParams(0.25, -128)}, {"edgeq.activations": "static"},
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"weights": "uint8"}, {"activations": "int8"}])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_sums_do_not_saturate_on_any_processor(
    form: str, options: dict[str, str], tmp_path: Path
) -> None:
    graph, x = saturating(), np.ones((1, 32), np.float32)
    assert _exact(graph, x)[0, 0] == pytest.approx(32 * 1.27, rel=0.01)
    ort_lower.write(graph, tmp_path / "m.onnx", {"form": form, **options})
    runner = ort_lower.open_runner(tmp_path / "m.onnx")
    np.testing.assert_allclose(runner({"x": x})["y"], _exact(graph, x), atol=0.26)
    np.testing.assert_allclose(Session(graph)({"x": x})["y"], _exact(graph, x), atol=0.26)
    weights = dict(ort_lower.read_weights(tmp_path / "m.onnx"))
    np.testing.assert_array_equal(weights["w"].levels, 127)


def test_unsigned_weights_are_exact_without_a_setting(tmp_path: Path) -> None:
    graph, x = saturating(), np.ones((1, 32), np.float32)
    for name in ("m.onnx", "m.ort"):
        ort_lower.write(graph, tmp_path / name, {"weights": "uint8"})
        plain = onnxruntime.InferenceSession(
            str(tmp_path / name), providers=["CPUExecutionProvider"]
        )
        np.testing.assert_allclose(plain.run(None, {"x": x})[0], _exact(graph, x), atol=0.26)


def test_an_ort_file_has_an_exact_form_with_unsigned_weights(tmp_path: Path) -> None:
    graph, x = saturating(), np.ones((1, 32), np.float32)
    ort_lower.write(graph, tmp_path / "m.ort", {})
    exact = exact_form(tmp_path / "m.ort")
    assert exact is not None
    graph_form = onnx.load_from_string(exact).graph
    types = {tensor.name: tensor.data_type for tensor in graph_form.initializer}
    unsigned = [name for node in graph_form.node for name in node.input if "unsigned" in name]
    assert [types[name] for name in unsigned] == [onnx.TensorProto.UINT8] * 2
    session = onnxruntime.InferenceSession(exact, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], _exact(graph, x), atol=0.26)


def test_unsigned_weights_are_read_back(tmp_path: Path) -> None:
    made = convert(cnn(8), "ort", tmp_path / "m.onnx", {"weights": "uint8"})
    assert made.certificate is not None
    assert made.certificate["weights_equal"] == "6 of 6"
    kinds = {t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert onnx.TensorProto.UINT8 in kinds
    assert onnx.TensorProto.INT8 not in kinds


def test_unsigned_weights_take_unsigned_activations(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights=uint8 takes activations=uint8"):
        convert(cnn(8), "ort", tmp_path / "m.onnx", {"weights": "uint8", "activations": "int8"})


def test_what_a_file_needs_where_it_runs_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    convert(cnn(8), "ort", tmp_path / "m.onnx", announce=said.append)
    assert len(said) == 1
    assert "session.x64quantprecision" in said[0]
    said.clear()
    for graph, options in ((cnn(8), {"weights": "uint8"}), (encoder(4, block=32), {})):
        convert(graph, "ort", tmp_path / "n.onnx", options, announce=said.append, force=True)
        assert not said


@pytest.mark.parametrize("target", ["ort", "tflite", "coreml"])
def test_a_single_rounded_number_stays_one(target: str, tmp_path: Path) -> None:
    pytest.importorskip(
        {"ort": "onnx", "tflite": "ai_edge_litert", "coreml": "coremltools"}[target]
    )
    graph = cnn(8)
    (head,) = (node for node in graph.nodes if node.outputs == ("y",))
    shifted = Node("Add", "shift", ("y", "one"), ("z",))
    one = QuantWeight(np.array(127, np.int8), np.array(0.5 / 127, np.float32), 8)
    assert head.op == "Linear"
    graph = replace(
        graph, nodes=(*graph.nodes, shifted), outputs=("z",),
        constants={**graph.constants, "one": one},
        values={**graph.values, "z": graph.info("y")},
        quants={**graph.quants, "z": QuantParams(1 / 16, 0)},
    )  # fmt: skip
    suffix = {"ort": "onnx", "tflite": "tflite", "coreml": "mlpackage"}[target]
    made = convert(graph, target, tmp_path / f"m.{suffix}")
    assert made.certificate is not None
    assert made.certificate["weights_equal"] == "7 of 7"
