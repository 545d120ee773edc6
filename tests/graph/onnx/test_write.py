"""The record of a quantization: written as ONNX, run by onnxruntime, read back exactly."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.core.errors import EdgeqError, FormatError, UnsupportedError, UsageError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.execute import Session
from edgeq.graph.ir import Constant, Graph, Info, Node, QuantWeight
from edgeq.graph.onnx import write as onnx_write
from edgeq.graph.onnx.read import read_onnx
from edgeq.graph.onnx.save import write_onnx
from edgeq.graph.qdq import PALETTES
from tests.graph_zoo import MODELS, canonical, feeds, round_weight, rounded


def assert_equal(one: Graph, other: Graph) -> None:
    """Everything a graph records, bit for bit."""
    assert one.name == other.name
    assert one.inputs == other.inputs
    assert one.outputs == other.outputs
    assert one.nodes == other.nodes
    assert one.values == other.values
    assert one.quants == other.quants
    assert dict(one.meta) == dict(other.meta)
    assert one.constants.keys() == other.constants.keys()
    for name, held in one.constants.items():
        assert_constants_equal(held, other.constants[name])


def assert_constants_equal(held: Constant, found: Constant) -> None:
    assert type(held) is type(found)
    if not isinstance(held, QuantWeight):
        assert isinstance(found, np.ndarray)
        assert held.dtype == found.dtype
        np.testing.assert_array_equal(held, found)
        return
    assert isinstance(found, QuantWeight)
    assert (held.bits, held.axis, held.block) == (found.bits, found.axis, found.block)
    for part in ("levels", "scales", "palette"):
        a, b = getattr(held, part), getattr(found, part)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert a.tobytes() == b.tobytes()


SETTINGS: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "w8": {"activations": False},
    "w4a8": {"bits": 4},
    "w4-blocks": {"bits": 4, "block": 32, "activations": False},
    "w8-blocks-a8": {"block": 16},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back_and_runs(name: str, setting: str, tmp_path: Path) -> None:
    graph = rounded(canonical(name, tmp_path), **SETTINGS[setting])
    path = tmp_path / "q.onnx"
    write_onnx(graph, path)
    assert_equal(read_onnx(path), graph)
    onnx.checker.check_model(path, full_check=True)
    made = Session(graph)(feeds(graph))
    plain = Session(graph, optimize=False)(feeds(graph))
    for key, value in made.items():
        if value.dtype == np.float32:  # integers with float32 rescaling: a level or two apart
            spread = np.abs(plain[key]).max() + 1e-6
            assert np.abs(value - plain[key]).max() <= 0.1 * spread
            assert np.median(np.abs(value - plain[key])) <= 0.01 * spread


def test_float_graphs_too(tmp_path: Path) -> None:
    for name in MODELS:
        graph = canonical(name, tmp_path)
        write_onnx(graph, tmp_path / "f.onnx")
        assert_equal(read_onnx(tmp_path / "f.onnx"), graph)


@pytest.mark.parametrize("name", ["mobilenet_v2", "bert", "detector", "unet", "audio", "vit"])
def test_uint8_activations_mean_the_same(name: str, tmp_path: Path) -> None:
    graph = rounded(canonical(name, tmp_path))
    path = tmp_path / "q.onnx"
    write_onnx(graph, path, activations="uint8")
    assert_equal(read_onnx(path), graph)
    held = {t.data_type for t in onnx.load(path).graph.initializer}
    assert onnx.TensorProto.UINT8 in held
    one = Session(graph, optimize=False)(feeds(graph))
    other = Session(graph, optimize=False, activations="uint8")(feeds(graph))
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


def test_opset_and_version_of_the_file(tmp_path: Path) -> None:
    graph = canonical("resnet", tmp_path)
    for bits, opset in ((8, 20), (4, 21)):
        write_onnx(rounded(graph, bits), tmp_path / "q.onnx")
        model = onnx.load(tmp_path / "q.onnx")
        assert model.ir_version == 10
        assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    levels = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert levels
    assert all(len(t.raw_data) == -(-int(np.prod(t.dims)) // 2) for t in levels)


def test_file_is_as_small_as_its_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 512)).astype(np.float32)
    graph = linear_graph(round_weight(w, 4, 1, 32), rank=2)
    write_onnx(graph, tmp_path / "q.onnx")
    assert w.nbytes / (tmp_path / "q.onnx").stat().st_size > 6


def linear_graph(weight: Constant, rank: int) -> Graph:
    n, k = weight.shape
    lead = (2, 3)[: rank - 1]
    return Graph(
        name="one",
        inputs=("x",),
        outputs=("y",),
        nodes=(Node("Linear", "fc", ("x", "w", "b"), ("y",)),),
        constants={"w": weight, "b": np.arange(n, dtype=np.float32)},
        values={"x": Info((*lead, k)), "y": Info((*lead, n))},
    )


@st.composite
def weights(draw: st.DrawFn) -> QuantWeight:
    """Any matrix there is: odd sizes, short blocks, extreme levels and scales."""
    shape = (draw(st.integers(1, 9)), draw(st.integers(1, 70)))
    bits = draw(st.sampled_from((4, 8)))
    axis = draw(st.sampled_from((None, 0, 1)))
    block = draw(st.sampled_from((None, 16, 32))) if axis is not None else None
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    palette = None
    if draw(st.integers(0, 3)) == 0:
        palette = np.unique(rng.integers(-128, 128, 16)).astype(np.int8)
        levels = rng.choice(palette, shape)
    else:
        levels = rng.integers(low, high, shape).astype(np.int8)
    if axis is None:
        scales_shape: tuple[int, ...] = ()
    elif block is None:
        scales_shape = (shape[axis],)
    else:
        parts = list(shape)
        parts[axis] = -(-shape[axis] // block)
        scales_shape = tuple(parts)
    scales = np.asarray(10.0 ** rng.uniform(-6, 2, scales_shape), np.float32)
    return QuantWeight(levels, scales, bits, axis, block, palette)


@given(weight=weights(), rank=st.integers(1, 3))
@settings(max_examples=60)
def test_any_weight_is_read_back_and_multiplies(
    tmp_path_factory: pytest.TempPathFactory, weight: QuantWeight, rank: int
) -> None:
    path = tmp_path_factory.mktemp("w") / "q.onnx"
    graph = linear_graph(weight, rank)
    write_onnx(graph, path)
    assert_equal(read_onnx(path), graph)
    x = np.random.default_rng(0).standard_normal(graph.values["x"].shape).astype(np.float32)
    want = x @ weight.numpy().T + graph.array("b")
    got = Session(graph, optimize=False)({"x": x})["y"]
    size = np.abs(x) @ np.abs(weight.numpy()).T + np.abs(graph.array("b"))
    assert (np.abs(got - want) <= 1e-5 * size).all()


@given(scale=st.floats(2.0**-40, 2.0**20, width=32), zero=st.integers(-128, 127))
@settings(max_examples=40)
def test_any_grid_is_read_back_and_rounds(
    tmp_path_factory: pytest.TempPathFactory, scale: float, zero: int
) -> None:
    path = tmp_path_factory.mktemp("g") / "q.onnx"
    quant = QuantParams(scale, zero)
    values = {name: Info((2, 40)) for name in "xy"}
    graph = Graph(
        "g", ("x",), ("y",), (Node("Tanh", "t", ("x",), ("y",)),), {}, values, {"x": quant}
    )
    write_onnx(graph, path)
    assert_equal(read_onnx(path), graph)
    x = (np.random.default_rng(0).standard_normal((2, 40)) * 200 * scale).astype(np.float32)
    run = Session(graph, watch=["x"], optimize=False)({"x": x})
    np.testing.assert_array_equal(run["x"], quant.dequantize(quant.quantize(x)))
    np.testing.assert_allclose(run["y"], np.tanh(run["x"]), atol=1e-6)


def test_palettes_are_in_the_metadata(tmp_path: Path) -> None:
    palette = np.array([-128, -60, 0, 3, 127], np.int8)
    levels = np.random.default_rng(0).choice(palette, (4, 8))
    weight = QuantWeight(levels, np.ones(4, np.float32), 4, 0, None, palette)
    write_onnx(linear_graph(weight, 3), tmp_path / "q.onnx")
    meta = {p.key: p.value for p in onnx.load(tmp_path / "q.onnx").metadata_props}
    assert json.loads(meta[PALETTES]) == {"w": {"bits": 4, "levels": palette.tolist()}}


def test_tied_and_shared_weights(tmp_path: Path) -> None:
    """One table as embedding and head, one matrix in products of two ranks."""
    graph = canonical("shared_embedding", tmp_path)
    head = graph.nodes[-1]
    table = graph.array(head.inputs[1])
    for weight in (round_weight(table, 8, 0), round_weight(table, 4, 1, 16)):
        held = replace(graph, constants={**graph.constants, head.inputs[1]: weight})
        write_onnx(held, tmp_path / "q.onnx")
        assert_equal(read_onnx(tmp_path / "q.onnx"), held)
        got = Session(held)(feeds(held))["y"]
        assert np.isfinite(got).all()


def test_quantized_constants_and_outputs(tmp_path: Path) -> None:
    grid = QuantParams(0.0625, 3)
    graph = Graph(
        "sum", ("x",), ("y",),
        (Node("Add", "sum", ("x", "c"), ("y",)),),
        {"c": np.linspace(-1, 1, 6, dtype=np.float32)},
        {"x": Info((2, 6)), "y": Info((2, 6))},
        {"x": grid, "c": QuantParams(0.03125, 0), "y": grid},
        {"edgeq.recipe": '{"a": 1}', "labels": "cat\ndog"},
    )  # fmt: skip
    write_onnx(graph, tmp_path / "q.onnx")
    assert_equal(read_onnx(tmp_path / "q.onnx"), graph)
    made = Session(graph)(feeds(graph))["y"] / 0.0625
    np.testing.assert_array_equal(made, np.rint(made))


def test_names_that_are_taken_are_not_made_twice(tmp_path: Path) -> None:
    graph = rounded(canonical("resnet", tmp_path))
    value = next(name for name in graph.quants if name in graph.producers)
    taken = {f"{value}.float", f"{value}.levels"}
    extra = tuple(Node("Relu", f"{n}.quantize", ("x",), (n,)) for n in sorted(taken))
    graph = replace(
        graph,
        nodes=(*extra, *graph.nodes),
        outputs=(*graph.outputs, *sorted(taken)),
        values={**graph.values, **dict.fromkeys(taken, graph.values["x"])},
    )
    write_onnx(graph, tmp_path / "q.onnx")
    assert_equal(read_onnx(tmp_path / "q.onnx"), graph)


def test_watched_values(tmp_path: Path) -> None:
    graph = canonical("mobilenet_v2", tmp_path)
    names = [*graph.values]
    seen = Session(graph, watch=names)(feeds(graph))
    assert seen.keys() == set(names)
    assert {n: v.shape for n, v in seen.items()} == {n: graph.values[n].shape for n in names}
    np.testing.assert_array_equal(seen["x"], feeds(graph)["x"])
    held = rounded(graph)
    value = next(n for n in held.quants if n in held.producers and n not in held.outputs)
    made = Session(held, watch=[value])(feeds(held))[value] / held.quants[value].scale
    np.testing.assert_allclose(made, np.rint(made), atol=1e-3)


def test_wrong_feeds_and_watches(tmp_path: Path) -> None:
    graph = canonical("resnet", tmp_path)
    session = Session(graph)
    with pytest.raises(UsageError, match=r"takes x; given: image"):
        session({"image": feeds(graph)["x"]})
    with pytest.raises(
        UsageError, match=r"'x' is float32 \[1, 3, 32, 32\]; given: float32 \[1, 32"
    ):
        session({"x": np.zeros((1, 32, 32, 3), np.float32)})
    with pytest.raises(UsageError, match=r"given: float64"):
        session({"x": np.zeros((1, 3, 32, 32))})
    with pytest.raises(UsageError, match="'nothing' is not a value that the graph"):
        Session(graph, watch=["nothing"])


def test_a_graph_onnx_does_not_take() -> None:
    values = {"x": Info((2,)), "y": Info((2,))}
    graph = Graph("odd", ("x",), ("y",), (Node("Nonsense", "n", ("x",), ("y",)),), {}, values)
    with pytest.raises(FormatError, match=r"not valid ONNX.*Nonsense"):
        Session(graph)


def test_more_than_a_protobuf_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_write, "LIMIT", 1000)
    with pytest.raises(UnsupportedError, match="GB of constants; one ONNX file holds 2 GB"):
        write_onnx(canonical("resnet", tmp_path), tmp_path / "big.onnx")
    assert not (tmp_path / "big.onnx").exists()


def test_other_names_and_types_are_refused(tmp_path: Path) -> None:
    graph = canonical("resnet", tmp_path)
    with pytest.raises(
        UsageError, match=r"the output is q\.tflite; the name of an ONNX file must end in \.onnx"
    ):
        write_onnx(graph, tmp_path / "q.tflite")
    with pytest.raises(UsageError, match="is 'int4'; use int8 or uint8"):
        write_onnx(graph, tmp_path / "q.onnx", activations="int4")  # type: ignore[arg-type]


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = canonical("resnet", tmp_path)
    path = tmp_path / "q.onnx"
    write_onnx(graph, path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EdgeqError, match="No space left"):
        write_onnx(rounded(graph), path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.onnx", "resnet.onnx"]
