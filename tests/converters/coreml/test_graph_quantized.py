"""Quantized graphs as Core ML packages: the same integers, packed, rounded as in the record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters.convert import convert
from edgeq.converters.coreml.exec import describe
from edgeq.converters.coreml.exec.blob import Reader
from edgeq.converters.coreml.exec.load import MilTensor, functions, open_file
from edgeq.converters.coreml.graph import CoreMLGraphTarget
from edgeq.converters.coreml.graph_run import GraphPackage
from edgeq.core.errors import FormatError, UnsupportedError, UsageError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.execute import Session
from edgeq.graph.ir import LEVELS, Graph, Info, Node, QuantWeight
from edgeq.graph.onnx.infer import inferred
from tests import graph_zoo

coreml_lower = CoreMLGraphTarget()

pytest.importorskip("coremltools")
pytest.importorskip("onnxruntime")

FLOAT32 = {"precision": "float32"}


def rounded(
    shape: tuple[int, ...], bits: int, axis: int | None = None, block: int | None = None,
    palette: int | None = None, half: bool = False,
) -> QuantWeight:  # fmt: skip
    """A random quantized constant; ``palette`` is how many levels it may have."""
    rng = np.random.default_rng(5)
    low, high = LEVELS[bits]
    table = None
    if palette is None:
        levels = rng.integers(low, high, shape, endpoint=True).astype(np.int8)
    else:
        table = rng.choice(np.arange(-128, 128), palette, replace=False).astype(np.int8)
        levels = rng.choice(table, shape)
    scales: list[int] = []
    if axis is not None:
        scales = [shape[axis]]
        if block is not None:
            scales = list(shape)
            scales[axis] = -(-shape[axis] // block)
    steps = np.asarray(rng.random(scales) * 0.01 + 0.001, np.float32)
    if half:
        steps = steps.astype(np.float16).astype(np.float32)
    return QuantWeight(levels, steps, bits, axis, block, table)


def product(op: str, x: tuple[int, ...], weight: QuantWeight, bias: int = 0, **attrs: Any) -> Graph:
    """One product with a quantized weight; for Gather x is the shape of the indices."""
    constants: dict[str, Any] = {"the.weight": weight}
    names = ["the.weight", "x"] if op == "Gather" else ["x", "the.weight"]
    if bias:
        constants["bias"] = np.linspace(-1, 1, bias, dtype=np.float32)
        names.append("bias")
    graph = Graph(
        op,
        ("x",),
        ("y",),
        (Node(op, "node", tuple(names), ("y",), attrs),),
        constants,
        {"x": Info(x, "int64" if op == "Gather" else "float32")},
    )
    return inferred(graph)


def fed(graph: Graph, seed: int = 3) -> dict[str, NDArray[Any]]:
    """Random inputs."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 3, info.shape) if info.dtype == "int64"
        else rng.standard_normal(info.shape).astype(np.float32)
        for name, info in ((n, graph.info(n)) for n in graph.inputs)
    }  # fmt: skip


def written(graph: Graph, folder: Path, **options: Any) -> Path:
    path = folder / "model.mlpackage"
    coreml_lower.write(graph, path, options)
    return path


def blobs(path: Path) -> list[tuple[str, int]]:
    """(type, bytes) of what weight.bin holds."""
    reader = Reader(path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin")
    return [(kind, nbytes) for _, kind, nbytes in reader.blobs()]


def constant_kinds(path: Path) -> set[str]:
    """Types of the levels and floats that a program holds, in weight.bin or in itself."""
    ops = functions(open_file(path))["main"].block.ops
    given = (entry for op in ops for entries in op.inputs.values() for entry in entries)
    kinds = {
        entry.type.kind for entry in given if isinstance(entry, MilTensor) and entry.type.shape
    }
    return kinds & {"fp16", "fp32", "int4", "int8"}


def assert_same(found: QuantWeight, held: QuantWeight) -> None:
    assert (found.bits, found.axis, found.block) == (held.bits, held.axis, held.block)
    np.testing.assert_array_equal(found.levels, held.levels)
    assert found.scales.tobytes() == held.scales.tobytes()
    if held.palette is None:
        assert found.palette is None
    else:
        np.testing.assert_array_equal(found.palette, held.palette)


CONV, DEPTHWISE, LINEAR, TABLE = (6, 4, 3, 3), (4, 1, 3, 3), (10, 64), (7, 32)
PRODUCTS = {
    "conv 8 bits": (product("Conv", (1, 4, 6, 6), rounded(CONV, 8, 0), 6), "ios16"),
    "conv 8 bits, one scale": (product("Conv", (1, 4, 6, 6), rounded(CONV, 8)), "ios16"),
    "conv 8 bits, channels in": (product("Conv", (1, 4, 6, 6), rounded(CONV, 8, 1)), "ios16"),
    "conv 4 bits": (product("Conv", (1, 4, 6, 6), rounded(CONV, 4, 0), 6), "ios16"),
    "conv 4 bits, one scale": (product("Conv", (1, 4, 6, 6), rounded(CONV, 4), 6), "ios16"),
    "conv palette": (product("Conv", (1, 4, 6, 6), rounded(CONV, 8, 0, palette=13)), "ios16"),
    "conv palette of 3": (product("Conv", (1, 4, 6, 6), rounded(CONV, 4, 0, palette=3)), "ios16"),
    "conv palette of 7": (product("Conv", (1, 4, 6, 6), rounded(CONV, 4, 0, palette=7)), "ios16"),
    "conv palette of 200": (product("Conv", (1, 4, 6, 6), rounded(CONV, 8, 0, palette=200)),
                            "ios16"),
    "conv palette, one scale": (product("Conv", (1, 4, 6, 6), rounded(CONV, 8, palette=9)),
                                "ios16"),
    "conv blocks": (product("Conv", (1, 32, 4, 4), rounded((6, 32, 3, 3), 4, 1, 16)), "ios18"),
    "depthwise 4 bits": (product("Conv", (1, 4, 6, 6), rounded(DEPTHWISE, 4, 0), 4, group=4),
                         "ios16"),
    "transposed 8 bits": (product("ConvTranspose", (1, 4, 5, 5), rounded((4, 6, 3, 3), 8, 1), 6),
                          "ios16"),
    "transposed 4 bits, groups": (
        product("ConvTranspose", (1, 4, 5, 5), rounded((4, 3, 3, 3), 4, 1), 6, group=2), "ios16",
    ),
    "linear 8 bits": (product("Linear", (2, 64), rounded(LINEAR, 8, 0), 10), "ios16"),
    "linear 4 bits": (product("Linear", (2, 3, 64), rounded(LINEAR, 4, 0), 10), "ios16"),
    "linear blocks": (product("Linear", (2, 64), rounded(LINEAR, 4, 1, 32), 10), "ios18"),
    "linear blocks of rows": (product("Linear", (2, 64), rounded((32, 64), 8, 0, 16)), "ios18"),
    "linear ragged blocks": (product("Linear", (2, 40), rounded((10, 40), 4, 1, 32)), "ios18"),
    "linear one block": (product("Linear", (2, 20), rounded((10, 20), 4, 1, 32)), "ios18"),
    "linear blocks, palette": (
        product("Linear", (2, 64), rounded(LINEAR, 4, 1, 32, palette=5)), "ios18",
    ),
    "table 8 bits": (product("Gather", (2, 3), rounded(TABLE, 8, 0)), "ios16"),
    "table 4 bits": (product("Gather", (2, 3), rounded(TABLE, 4, 0)), "ios16"),
    "table 4 bits, one scale": (product("Gather", (2, 3), rounded(TABLE, 4)), "ios16"),
    "table blocks": (product("Gather", (2, 3), rounded(TABLE, 4, 1, 16)), "ios18"),
    "added number": (product("Add", (2, 4), rounded((), 8)), "ios16"),
    "added constant": (product("Add", (2, 64), rounded((2, 64), 4, 0)), "ios18"),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("target", ["ios16", "ios17", "ios18"])
def test_a_weight_is_held_as_it_is_recorded(name: str, target: str, tmp_path: Path) -> None:
    graph, least = PRODUCTS[name]
    held = graph.constants["the.weight"]
    assert isinstance(held, QuantWeight)
    if target < least:
        with pytest.raises(UnsupportedError, match=r"'node': .*'the.weight'.*nearest"):
            coreml_lower.check(graph, {"target_os": target})
        return
    path = written(graph, tmp_path, target_os=target, **FLOAT32)
    ((stored_name, found),) = coreml_lower.read_weights(path)
    assert stored_name == "the.weight"
    assert_same(found, held)
    feeds = fed(graph)
    want = Session(graph, optimize=False)(feeds)["y"]
    np.testing.assert_allclose(
        coreml_lower.open_runner(path)(feeds)["y"], want, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("target", ["ios16", "ios17", "ios18"])
@pytest.mark.parametrize(
    ("bits", "palette", "index"), [(8, None, 8), (4, None, 4), (8, 4, 2), (4, 11, 4)]
)
def test_weights_are_packed(
    target: str, bits: int, palette: int | None, index: int, tmp_path: Path
) -> None:
    held = rounded((64, 128), bits, 0, palette=palette)
    path = written(product("Linear", (1, 128), held), tmp_path, target_os=target)
    sizes = [nbytes for _, nbytes in blobs(path)]
    assert max(sizes) == 64 * 128 * index // 8
    assert sum(sizes) <= 64 * 128 * index // 8 + 64 * 4 + 4 * (1 << index) + 64 * 4


def test_float_constants_take_two_bytes_where_the_graph_says_so(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 40, dtype=np.float16).reshape(4, 10)
    graph = product("Linear", (2, 10), rounded((4, 10), 8))
    graph = replace(graph, constants={"the.weight": values})
    path = written(graph, tmp_path, **FLOAT32)
    assert "fp16" in constant_kinds(path)
    feeds = fed(graph)
    want = feeds["x"] @ values.astype(np.float32).T
    np.testing.assert_allclose(coreml_lower.open_runner(path)(feeds)["y"], want, atol=1e-5)


# --- rounded activations ----------------------------------------------------------------------


def bias_of(scale: float, weight: QuantWeight, n: int) -> QuantWeight:
    """A bias as a product of integers has it."""
    steps = np.broadcast_to(np.float32(scale) * weight.scales, n).astype(np.float32)
    levels = np.linspace(-20000, 20000, n).astype(np.int32)
    return QuantWeight(levels, steps, 32, axis=0)


def static(graph: Graph, grids: dict[str, QuantParams]) -> Graph:
    """The graph with rounded values, and the bias in integers if there is one."""
    constants = dict(graph.constants)
    weight = constants.get("the.weight")
    if "bias" in constants and isinstance(weight, QuantWeight):
        constants["bias"] = bias_of(grids["x"].scale, weight, constants["bias"].shape[0])
    return replace(graph, quants=grids, constants=constants)


def op(name: str, *shapes: tuple[int, ...], **attrs: Any) -> Graph:
    """A graph of a node without weights."""
    names = tuple("xab"[i] for i in range(len(shapes)))
    node = Node(name, "node", names, ("y",), attrs)
    values = {n: Info(s) for n, s in zip(names, shapes, strict=True)}
    return inferred(Graph(name, names, ("y",), (node,), {}, values))


def grid(scale: float, zero: int = 0) -> QuantParams:
    return QuantParams(float(np.float32(scale)), zero)


STATIC = {
    "conv": static(PRODUCTS["conv 8 bits"][0], {"x": grid(0.03, 5), "y": grid(0.05, -9)}),
    "depthwise": static(
        product("Conv", (1, 4, 6, 6), rounded(DEPTHWISE, 8, 0), 4, group=4),
        {"x": grid(0.03, -128), "y": grid(0.04, 1)},
    ),
    "conv of 4 bits": static(PRODUCTS["conv 4 bits"][0], {"x": grid(0.03, 5), "y": grid(0.05, -9)}),
    "linear exact": static(
        product("Linear", (2, 64), rounded(LINEAR, 8, 0, half=True), 10),
        {"x": grid(0.03125, 5), "y": grid(0.125, -9)},
    ),
    "linear": static(PRODUCTS["linear 8 bits"][0], {"x": grid(0.03), "y": grid(0.1, 3)}),
    "matmul": static(
        op("MatMul", (2, 4, 5), (2, 5, 3)),
        {"x": grid(0.02, 1), "a": grid(0.03, 2), "y": grid(0.05)},
    ),
    "add": static(
        op("Add", (2, 8), (2, 8)), {"x": grid(0.02, 1), "a": grid(0.03, 2), "y": grid(0.05, 3)}
    ),
    "mul": static(
        op("Mul", (2, 8), (8,)), {"x": grid(0.02, 1), "a": grid(0.03, 2), "y": grid(0.05, 3)}
    ),
    "average": static(
        op("AveragePool", (1, 3, 6, 6), kernel_shape=[2, 2], strides=[2, 2]),
        {"x": grid(1 / 32, 7), "y": grid(1 / 32, 7)},
    ),
    "softmax": static(op("Softmax", (3, 9), axis=-1), {"x": grid(0.03), "y": grid(1 / 256, -128)}),
    "sigmoid": static(op("Sigmoid", (3, 9)), {"x": grid(0.03), "y": grid(1 / 256, -128)}),
    "concat": static(
        op("Concat", (1, 2, 3), (1, 4, 3), axis=1),
        {"x": grid(0.02, 1), "a": grid(0.02, 1), "y": grid(0.02, 1)},
    ),
}


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_rounded_values_agree_with_the_record(name: str, precision: str, tmp_path: Path) -> None:
    graph = STATIC[name]
    path = written(graph, tmp_path, target_os="ios17", precision=precision)
    assert coreml_lower.read_quants(path) == graph.quants
    feeds = fed(graph)
    want = Session(graph, optimize=False)(feeds)["y"]
    found = coreml_lower.open_runner(path)(feeds)["y"]
    step = graph.quants["y"].scale
    levels = np.rint((found - want) / step)
    assert np.abs(levels).max() <= 1
    assert np.mean(levels != 0) < 0.05
    # what comes out lies on the grid
    np.testing.assert_array_equal(graph.quants["y"].dequantize(graph.quants["y"].quantize(found)),
                                  found)  # fmt: skip


@pytest.mark.parametrize("name", ["conv", "depthwise", "conv of 4 bits", "linear"])
@pytest.mark.parametrize("target", ["ios17", "ios18"])
def test_a_bias_keeps_its_integers(name: str, target: str, tmp_path: Path) -> None:
    graph = STATIC[name]
    path = written(graph, tmp_path, target_os=target, **FLOAT32)
    found = dict(coreml_lower.read_weights(path))
    assert set(found) == {"the.weight", "bias"}
    for key, held in found.items():
        want = graph.constants[key]
        assert isinstance(want, QuantWeight)
        assert_same(held, want)


def test_scales_that_float16_holds_make_a_program_of_float16(tmp_path: Path) -> None:
    for name, kinds in (("linear", {"int8", "fp32"}), ("linear exact", {"int8", "fp16"})):
        (tmp_path / name).mkdir()
        path = written(STATIC[name], tmp_path / name)
        held, want = dict(coreml_lower.read_weights(path))["the.weight"], STATIC[name]
        assert_same(held, want.constants["the.weight"])  # type: ignore[arg-type]
        assert constant_kinds(path) == kinds


def test_an_activation_is_rounded_once_behind_its_product(tmp_path: Path) -> None:
    graph = PRODUCTS["conv 8 bits"][0]
    nodes = (
        replace(graph.nodes[0], outputs=("z",)),
        Node("Relu", "relu", ("z",), ("y",)),
    )
    graph = replace(graph, nodes=nodes, values={**graph.values, "z": graph.values["y"]})
    graph = static(graph, {"x": grid(0.03, 5), "y": grid(0.02, -128)})
    path = written(graph, tmp_path)
    counts = describe(path).functions["main"].ops
    assert counts["quantize"] == counts["dequantize"] == 2
    feeds = fed(graph)
    want = Session(graph)(feeds)["y"]
    found = coreml_lower.open_runner(path)(feeds)["y"]
    assert np.abs(found - want).max() <= graph.quants["y"].scale * 1.01


def test_equal_constants_are_held_once_and_values_have_short_names(tmp_path: Path) -> None:
    graph = small_net()
    path = written(graph, tmp_path)
    ops = functions(open_file(path))["main"].block.ops
    constants = [(op.outputs[0][1], op.key) for op in ops if op.type == "const"]
    assert len(constants) == len(set(constants))
    assert {op.outputs[0][0] for op in ops if len(op.outputs[0][0]) > 3} == {"logits"}
    assert {"a", "r", "d", "s", "p", "f"} <= {op.name for op in ops}
    reader = Reader(path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin")
    assert {kind for _, kind, _ in reader.blobs()} == {"int8"}  # scales are in the program
    assert coreml_lower.read_quants(path) == graph.quants


def test_a_net_chooses_the_same_classes(tmp_path: Path) -> None:
    graph = small_net()
    path = written(graph, tmp_path, **FLOAT32)
    record, runner = Session(graph), coreml_lower.open_runner(path)
    same = 0
    for seed in range(40):
        feeds = fed(graph, seed)
        want, chosen = record(feeds)["logits"][0], int(runner(feeds)["logits"].argmax())
        same += int(want.argmax() == chosen)
        # the order of sums differs between processors, and may settle a near tie
        assert want.max() - want[chosen] < 0.01 * np.ptp(want)
    assert same >= 38


@pytest.mark.parametrize("name", sorted(graph_zoo.MODELS))
def test_rounded_models_agree_with_the_record(name: str, tmp_path: Path) -> None:
    graph = graph_zoo.rounded(graph_zoo.canonical(name, tmp_path))
    path = written(graph, tmp_path, **FLOAT32)
    held = {k: v for k, v in graph.constants.items() if isinstance(v, QuantWeight)}
    found = dict(coreml_lower.read_weights(path))
    assert set(found) == set(held)
    for key, want in held.items():
        assert_same(found[key], want)
    assert coreml_lower.read_quants(path) == graph.quants
    feeds = graph_zoo.feeds(graph)
    got = coreml_lower.open_runner(path)(feeds)
    for output, right in Session(graph, optimize=False)(feeds).items():
        error = np.sqrt(np.mean((got[output] - right) ** 2) / np.mean(right**2))
        assert error < 0.02


@pytest.mark.parametrize(
    "name", ["bert", "keyword_spotter", "mobilenet_v2", "shared_embedding", "vit"]
)
@pytest.mark.parametrize(("target", "block"), [("ios18", 32), ("ios16", None)])
def test_models_of_4_bits_agree_with_the_record(
    name: str, target: str, block: int | None, tmp_path: Path
) -> None:
    graph = graph_zoo.canonical(name, tmp_path)
    graph = graph_zoo.rounded(graph, 4, block=block, activations=False)
    path = written(graph, tmp_path, target_os=target, **FLOAT32)
    for key, found in coreml_lower.read_weights(path):
        assert_same(found, graph.constants[key])  # type: ignore[arg-type]
    feeds = graph_zoo.feeds(graph)
    got = coreml_lower.open_runner(path)(feeds)
    for output, want in Session(graph, optimize=False)(feeds).items():
        scale = float(np.abs(want).max(initial=1))
        np.testing.assert_allclose(got[output] / scale, want / scale, atol=2e-5)


def small_net() -> Graph:
    """Convolution, depthwise, residual, pool and Linear, all of integers."""
    rng = np.random.default_rng(1)
    conv, deep = rounded((8, 3, 3, 3), 8, 0), rounded((8, 1, 3, 3), 8, 0)
    head = rounded((10, 8), 8, 0)
    nodes = (
        Node("Conv", "conv", ("x", "w1", "b1"), ("a",), {"pads": [1, 1, 1, 1]}),
        Node("Relu", "relu", ("a",), ("r",)),
        Node("Conv", "deep", ("r", "w2"), ("d",), {"group": 8, "pads": [1, 1, 1, 1]}),
        Node("Add", "residual", ("r", "d"), ("s",)),
        Node("GlobalAveragePool", "pool", ("s",), ("p",)),
        Node("Flatten", "flat", ("p",), ("f",)),
        Node("Linear", "head", ("f", "w3", "b3"), ("logits",)),
    )
    grids = {"x": grid(0.025), "r": grid(0.03, -128), "d": grid(0.06), "s": grid(0.08, -20),
             "p": grid(0.02, -40), "f": grid(0.02, -40), "logits": grid(0.01, 4)}  # fmt: skip
    constants = {
        "w1": conv, "b1": bias_of(grids["x"].scale, conv, 8), "w2": deep, "w3": head,
        "b3": QuantWeight(rng.integers(-300, 300, 10).astype(np.int32),
                          np.float32(grids["f"].scale) * head.scales, 32, axis=0),
    }  # fmt: skip
    image = dict.fromkeys("ards", Info((1, 8, 8, 8)))
    values = {"x": Info((1, 3, 8, 8)), **image, "p": Info((1, 8, 1, 1)), "f": Info((1, 8)),
              "logits": Info((1, 10))}  # fmt: skip
    return Graph("net", ("x",), ("logits",), nodes, constants, values, grids)


# --- memory, refusals, damage -----------------------------------------------------------------


def test_the_arena_counts_what_is_alive_in_the_type_it_has(tmp_path: Path) -> None:
    graph = small_net()
    image = 8 * 8 * 8
    # the input and r; then r, d and s; as bytes
    assert coreml_lower.arena_bytes(graph, {}) == 3 * image
    floats = replace(graph, quants={})
    assert coreml_lower.arena_bytes(floats, {"precision": "float32"}) == 3 * 4 * image
    assert coreml_lower.arena_bytes(floats, {"precision": "float16"}) == 3 * 2 * image
    assert GraphPackage(written(graph, tmp_path)).about["arena"] == 3 * image
    for precision, size in (("float32", 4), ("float16", 2)):
        options = {"precision": precision}
        made = convert(floats, "coreml", tmp_path / f"{precision}.mlpackage", options)
        assert made.certificate is not None
        assert made.certificate["arena_bytes"] == 3 * size * image


def test_rounded_values_need_ios17() -> None:
    with pytest.raises(UnsupportedError, match=r"7 values rounded to 8 bits.*ios17"):
        coreml_lower.check(small_net(), {"target_os": "ios16"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "ios18"}, "target_os"),
        ({"target_os": "ios15"}, "ios16"),
        ({"precision": "mixed"}, "float32"),
    ],
)
def test_options_are_checked(options: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        coreml_lower.check(small_net(), options)


def test_a_package_of_others_is_not_read(tmp_path: Path) -> None:
    path = written(small_net(), tmp_path)
    model = path / "Data" / "com.apple.CoreML" / "model.mlmodel"
    content = model.read_bytes()
    model.write_bytes(content.replace(b"edgeq.graph", b"other.graph"))
    with pytest.raises(FormatError, match="not a graph that edgeq wrote"):
        coreml_lower.open_runner(path)
    for mark in (b"zlib85:00", b"zlib85:c~"):
        assert b"zlib85:c-" in content
        model.write_bytes(content.replace(b"zlib85:c-", mark))
        with pytest.raises(FormatError, match="damaged"):
            list(coreml_lower.read_weights(path))


def test_the_same_graph_makes_the_same_package(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = written(small_net(), tmp_path / name)
        files.append({p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()})
    assert files[0] == files[1]
