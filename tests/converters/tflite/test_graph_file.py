"""What the lowering refuses, what its file says of itself, and how much memory it takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.tflite.graph import LiteRTGraphTarget
from edgeq.converters.tflite.graph_run import METADATA, arena_bytes
from edgeq.converters.tflite.lower.axis_order import (
    AxisWindow,
    after_reduction,
    after_transpose,
    channels_last,
    groups,
    moves,
    natural,
    reshaped,
)
from edgeq.converters.tflite.read import read
from edgeq.converters.tflite.read import read as read_file
from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.graph.ir import Graph, Info, Node, QuantWeight
from edgeq.graph.tflite.schema import schema
from tests import graph_zoo
from tests.converters.tflite.test_graph import FLOAT, made
from tests.converters.tflite.test_graph_integers import (
    lowered,
    operators,
    same_integers,
    small_net,
    steps,
)
from tests.lowering import Builder, feeds, quantized, reference, rounded_weight, weights_rounded

lower = LiteRTGraphTarget()

pytest.importorskip("ai_edge_litert")
pytest.importorskip("onnxruntime")

REFUSED = {"unet": "ConvTranspose", "elementwise": "TopK"}
"""Model of the zoo -> the operator it is refused for."""
TWO = {"bert": 8, "bert_modern": 8, "bert_tanh": 8, "vit": 4, "pools": 6, "pixel_shuffle": 2,
       "gemms": 1, "newest": 1}  # fmt: skip
"""Model of the zoo -> transposes that its own attention, flattening or shuffling needs."""


# --- the zoo ---


def arena_of(path: Path) -> int:
    return arena_bytes(read_file(path, entry=METADATA).model)


@pytest.mark.parametrize("name", graph_zoo.MODELS)
def test_zoo_in_float(name: str, tmp_path: Path) -> None:
    graph = graph_zoo.canonical(name, tmp_path)
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=rf"{REFUSED[name]} '.*': "):
            lower.check(graph, {})
        return
    given = graph_zoo.feeds(graph)
    found, want = lowered(graph, tmp_path / "m.tflite", given), reference(graph, given)
    assert found.keys() == want.keys()
    for out, array in want.items():
        np.testing.assert_allclose(found[out], array, atol=1e-5 * max(1, np.abs(array).max()))
    assert operators(tmp_path / "m.tflite").count("TRANSPOSE") <= TWO.get(name, 0)


NETS = ("mobilenet_v2", "mobilenet_v3", "resnet", "efficientnet", "keyword_spotter", "audio",
        "bert", "vit")  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_zoo_in_integers(name: str, tmp_path: Path) -> None:
    graph = graph_zoo.rounded(graph_zoo.canonical(name, tmp_path))
    for seed in range(3):
        given = graph_zoo.feeds(graph, seed)
        found, want = lowered(graph, tmp_path / "m.tflite", given), reference(graph, given)
        same_integers(graph, tmp_path / "m.tflite")
        for out, array in want.items():
            assert np.abs(found[out] - array).max() < 0.02 * np.abs(array).max()
            np.testing.assert_array_equal(found[out].argmax(-1), array.argmax(-1))


# --- refusals ---


def refused(make: object, *words: str) -> None:
    graph = make if isinstance(make, Graph) else made(make)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError) as caught:
        lower.check(graph, {})
    for word in words:
        assert word in str(caught.value)


def test_unknown_operators_are_all_named() -> None:
    graph = made(lambda b: b.op("Relu", b.input(2, 3)))
    nodes = (
        Node("LSTM", "first", ("x",), ("a",)),
        Node("Einsum", "second", ("a",), ("b",)),
        Node("Conv3D", "third", ("b",), ("v0",)),
    )
    values = {**graph.values, "a": Info((2, 3)), "b": Info((2, 3))}
    refused(
        replace(graph, nodes=nodes, values=values),
        "3 of its operators", "LSTM 'first'", "Einsum 'second'", "Conv3D 'third'", "Conv",
    )  # fmt: skip


def test_forms_that_do_not_fit() -> None:
    refused(
        lambda b: b.op("ConvTranspose", b.input(1, 4, 5, 5), b.random(4, 2, 3, 3), group=2,
                       kernel_shape=[3, 3]),
        "ConvTranspose 'convtranspose_0'", "group is 2", "supported is 1",
    )  # fmt: skip
    refused(
        lambda b: b.op("ConvTranspose", b.input(1, 4, 5, 5), b.random(4, 2, 3, 3), group=1,
                       dilations=[2, 2], kernel_shape=[3, 3]),
        "dilations are [2, 2]",
    )  # fmt: skip
    refused(
        lambda b: b.op("MaxPool", b.input(1, 4, 9, 9), kernel_shape=[2, 2], dilations=[2, 2]),
        "MaxPool", "dilations are [2, 2]",
    )  # fmt: skip
    refused(lambda b: b.conv(b.input(1, 2, 4, 4, 4), 2, 3, axes=3), "3 spatial axes", "1 or 2")
    refused(
        lambda b: b.op("Resize", b.input(1, 3, 6, 5), "", "", b.ints(1, 3, 12, 10), mode="cubic"),
        "Resize 'resize_0'", "mode is cubic", "linear",
    )  # fmt: skip
    refused(
        lambda b: b.op("Resize", b.input(1, 3, 6, 5), "", b.constant([1, 1, 1.5, 1.5], "f4"),
                       mode="linear"),
        "scales", "give sizes",
    )  # fmt: skip
    refused(
        lambda b: b.op("Pad", b.input(2, 3), b.ints(0, 1, 0, 1), mode="edge"),
        "mode is edge", "constant and reflect",
    )  # fmt: skip
    refused(lambda b: b.op("Abs", b.input(1, 1, 1, 2, 2, 2)), "6 axes", "supported has 5")
    refused(
        lambda b: b.op("Conv", b.input(1, 3, 8, 8), b.input(4, 3, 3, 3, name="w"),
                       kernel_shape=[3, 3]),
        "'w' is computed", "constant",
    )  # fmt: skip


def test_scales_that_do_not_fit() -> None:
    b = Builder()
    graph = b.graph(b.linear(b.input(3, 64), 64, 16))
    name = graph.nodes[0].inputs[1]

    def with_weight(w: QuantWeight) -> Graph:
        return replace(graph, constants={**graph.constants, name: w})

    good = rounded_weight(graph.array(name), 4, 1, 32)
    refused(with_weight(replace(good, scales=good.scales * np.float32(1.0001))), "float16")
    refused(with_weight(rounded_weight(graph.array(name), 4, 1, 16)), "blocks are 16", "32, 64")
    refused(with_weight(rounded_weight(graph.array(name), 8, 1)), "differ along K")
    graph = made(FLOAT["conv"])
    name = graph.nodes[0].inputs[1]
    refused(
        with_weight(rounded_weight(graph.array(name), 8, 1)), "axis 1", "channels of its output"
    )
    graph = made(FLOAT["embedding"])
    name = graph.nodes[0].inputs[0]
    refused(with_weight(rounded_weight(graph.array(name), 8, 1)), "differ by row")
    b = Builder()
    graph = b.graph(b.op("Add", b.input(4, 64), b.random(4, 64)))
    name = graph.nodes[0].inputs[1]
    refused(with_weight(rounded_weight(graph.array(name), 4, 1, 32)), "only Linear and Gather")


def test_options() -> None:
    graph = made(FLOAT["conv"])
    with pytest.raises(UsageError, match=r"unknown option of the target tflite 'layuot'.*layout"):
        lower.check(graph, {"layuot": "nhwc"})
    with pytest.raises(UsageError, match="io is 'int4'; it can be float32 or int8"):
        lower.check(graph, {"io": "int4"})


def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    graph = made(FLOAT["conv"])
    lower.write(graph, tmp_path / "m.tflite", {})
    run = lower.open_runner(tmp_path / "m.tflite")
    with pytest.raises(UsageError, match=r"'x' is \[1, 4, 9, 8\], got \[1, 9, 8, 4\]"):
        run({"x": np.zeros((1, 9, 8, 4), np.float32)})
    with pytest.raises(UsageError, match=r"inputs are \['x'\], got \['y'\]"):
        run({"y": np.zeros((1, 4, 9, 8), np.float32)})


def test_files_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "m.tflite"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError, match=r"is not a \.tflite file"):
        lower.open_runner(path)
    path.unlink()
    lower.write(made(FLOAT["linear"]), path, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError):
        lower.open_runner(path)


# --- what the file holds ---


def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    graph = replace(made(small_net), meta={"labels": '["a", "b"]'}, name="net")
    graph = replace(quantized(graph, feeds(graph)), meta=graph.meta)
    path = tmp_path / "m.tflite"
    lowered(graph, path, feeds(graph))
    found = read(path, entry="edgeq.graph").settings
    assert found["meta"] == {"labels": '["a", "b"]'}
    assert found["name"] == "net"
    assert found["inputs"]["x"] == {"shape": [1, 3, 16, 16], "dtype": "float32",
                                    "order": [0, 2, 3, 1]}  # fmt: skip
    json.dumps(found)
    run = lower.open_runner(path)
    assert run.runtime.startswith("LiteRT ")
    assert dict(run.outputs) == {name: graph.info(name) for name in graph.outputs}
    run.close()


def test_equal_vectors_lie_in_the_file_once(tmp_path: Path) -> None:
    b = Builder()
    source = b.graph(b.conv(b.conv(b.input(1, 8, 8, 8), 8, 8), 8, 8))
    graph = quantized(source, feeds(source))
    path = tmp_path / "m.tflite"
    lowered(graph, path, feeds(graph))
    model = schema().Model.GetRootAs(np.fromfile(path, np.uint8), 0)
    tensors = [model.Subgraphs(0).Tensors(i) for i in range(model.Subgraphs(0).TensorsLength())]

    def places(vectors: Iterable[NDArray[Any]]) -> int:
        return len({v.__array_interface__["data"][0] for v in vectors})

    zeros = [t.Quantization().ZeroPointAsNumpy() for t in tensors
             if t.Quantization() and t.Quantization().ZeroPointLength() == 8]  # fmt: skip
    assert len(zeros) == 4  # two weights and their biases
    assert places(zeros) == 1
    shapes = {tuple(t.ShapeAsNumpy()) for t in tensors}
    assert places(t.ShapeAsNumpy() for t in tensors) == len(shapes) < len(tensors)
    names = {t.Name().decode() for t in tensors} - set(graph.values)
    assert names
    assert all(re.fullmatch(r"[wct]\d+", name) for name in names)


def test_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    b = Builder()
    source = b.graph(b.conv(b.input(1, 64, 8, 8), 64, 64))
    graph, given = quantized(source, feeds(source), 4), feeds(source)
    sizes = {}
    for how in ("packed", "bytes"):
        path = tmp_path / f"{how}.tflite"
        found = lowered(graph, path, given, int4=how)
        same_integers(graph, path)
        assert steps(graph, found, reference(graph, given)) < 1.01
        sizes[how] = path.stat().st_size
    assert 18432 < sizes["packed"] < 18432 + 6000
    assert abs(sizes["bytes"] - sizes["packed"] - 18432) < 200


def test_levels_of_a_table(tmp_path: Path) -> None:
    b = Builder()
    graph = b.graph(b.linear(b.input(3, 16), 16, 8))
    name = graph.nodes[0].inputs[1]
    palette = np.array([-128, -40, -7, 0, 7, 40, 90, 127], np.int8)
    levels = palette[np.random.default_rng(0).integers(0, 8, (8, 16))]
    held = QuantWeight(levels, np.full(8, 0.01, np.float32), 4, 0, palette=palette)
    held = replace(held, bits=8)
    graph = replace(graph, constants={**graph.constants, name: held})
    found = lowered(graph, tmp_path / "m.tflite", feeds(graph), compute="float")
    back = dict(lower.read_weights(tmp_path / "m.tflite"))[name]
    np.testing.assert_array_equal(back.levels, levels)
    assert back.palette is not None
    np.testing.assert_array_equal(back.palette, palette)
    want = reference(graph, feeds(graph))[graph.outputs[0]]
    np.testing.assert_allclose(found[graph.outputs[0]], want, atol=1e-5)


# --- memory ---


def test_arena(tmp_path: Path) -> None:
    """A chain needs its input and two neighbors; what is rounded needs a quarter."""

    def chain(b: Builder) -> str:
        x = b.input(1, 8, 32, 32)
        for _ in range(4):
            x = b.op("Relu", b.conv(x, 8, 8))
        return x

    source = made(chain)
    lowered(source, tmp_path / "m.tflite", feeds(source))
    one = 8 * 32 * 32 * 4
    assert arena_of(tmp_path / "m.tflite") == lower.arena_bytes(source, {}) == 3 * one
    # the float input and output, and the last rounded value
    graph = quantized(source, feeds(source))
    assert lower.arena_bytes(graph, {}) == 2 * one + one // 4
    lower.write(graph, tmp_path / "i.tflite", {"io": "int8"})
    assert arena_of(tmp_path / "i.tflite") == 3 * one // 4


def test_arena_is_near_the_interpreters(tmp_path: Path) -> None:
    """LiteRT's own operators work in an arena too, whose places can be seen."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    def separable(b: Builder) -> str:
        x = b.input(1, 8, 24, 24)
        for _ in range(3):  # these operators need no room of their own
            y = b.conv(b.op("Relu", b.conv(x, 8, 8, group=8)), 8, 8, 1)
            x = b.op("Add", x, y)
        return str(b.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], pads=[0] * 4))

    graph, path = made(separable), tmp_path / "m.tflite"
    lower.write(graph, path, {})
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    run = Interpreter(model_path=str(path), experimental_op_resolver_type=plain, num_threads=1)
    run.allocate_tensors()
    places = []
    for entry in run.get_tensor_details():
        computed = entry["name"] in graph.values or entry["name"][0] == "t"
        if computed and entry["shape"].size == 4:
            view = run.tensor(entry["index"])()
            start = view.__array_interface__["data"][0]
            places.append((start, start + view.nbytes))
            del view
    span = max(b for _, b in places) - min(a for a, _ in places)
    assert 0.9 < arena_of(path) / span <= 1.0


# --- orders of axes ---


def test_orders_of_axes() -> None:
    x = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    for order in permutations(range(4)):
        tensor = x.transpose(order)
        for perm in permutations(range(4)):
            turned = x.transpose(perm)
            again = after_transpose(order, perm)
            np.testing.assert_array_equal(turned.transpose(again), tensor)
            np.testing.assert_array_equal(tensor.transpose(moves(order, perm)), x.transpose(perm))
        left = after_reduction(order, [1])
        places = order.index(1)
        np.testing.assert_array_equal(tensor.sum(places), x.sum(1).transpose(left))


@pytest.mark.parametrize(
    ("source", "into"),
    [
        ((1, 6, 4, 5), (1, 6, 20)), ((1, 6, 4, 5), (1, 120)), ((1, 6, 4, 5), (1, 2, 3, 4, 5)),
        ((2, 6, 1, 1), (2, 6)), ((1, 2, 3, 4, 5), (1, 6, 4, 5)), ((4, 6), (2, 2, 3, 2)),
        ((1, 1, 1), ()), ((6, 4), (4, 6)),
    ],
)  # fmt: skip
def test_reshaping_in_any_order(source: tuple[int, ...], into: tuple[int, ...]) -> None:
    x = np.arange(int(np.prod(source))).reshape(source)
    for order in permutations(range(len(source))):
        for image in (True, False):
            need, gives = reshaped(source, order, into, image)
            shape = [into[i] for i in gives]
            made_ = x.transpose(need).reshape(shape)
            np.testing.assert_array_equal(made_, x.reshape(into).transpose(gives))


def test_reshaping_moves_nothing_that_can_stay() -> None:
    last = channels_last(4)
    assert reshaped((1, 6, 4, 5), last, (1, 6, 20), False) == (last, (0, 2, 1))
    assert reshaped((2, 6, 1, 1), last, (2, 6), False)[1] == natural(2)
    assert groups((2, 3, 4), (6, 4)) == [([0, 1], [0]), ([2], [1])]


@pytest.mark.parametrize(
    ("window", "valid", "alike", "pads"),
    [
        (AxisWindow(8, 3, 1, 1, 8), False, True, (1, 1)),
        (AxisWindow(8, 3, 2, 1, 4), False, False, (1, 0)),  # SAME would put its one zero behind
        (AxisWindow(9, 3, 2, 1, 5), False, True, (1, 1)),
        (AxisWindow(8, 3, 2, 0, 4), False, True, (0, 1)),
        (AxisWindow(8, 2, 2, 0, 4), True, True, (0, 0)),
        (AxisWindow(9, 3, 1, 0, 7), True, False, (0, 0)),
        (AxisWindow(9, 3, 1, 2, 9, dilation=2), False, True, (2, 2)),
    ],
)
def test_padding(window: AxisWindow, valid: bool, alike: bool, pads: tuple[int, int]) -> None:
    assert (window.valid, window.alike, window.pads) == (valid, alike, pads)


def test_hybrid_weights_are_packed(tmp_path: Path) -> None:
    b = Builder()
    source = b.graph(b.linear(b.input(1, 256), 256, 128))
    graph = weights_rounded(source, 4, block=32)
    lowered(graph, tmp_path / "m.tflite", feeds(source))
    assert (tmp_path / "m.tflite").stat().st_size < 128 * 256 // 2 + 128 * 8 * 2 + 4000
