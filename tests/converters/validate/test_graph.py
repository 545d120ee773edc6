"""Validation of converted graphs: right files pass, and small faults are found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.converters import graph_target
from edgeq.converters.convert import convert
from edgeq.converters.validate import validate
from edgeq.converters.validate.graph import META_OPTIONS, compare_graph
from edgeq.converters.validate.graph_inputs import GIVEN, KEPT, RANDOM
from edgeq.core.errors import EdgeqError, FormatError
from edgeq.formats.qparams import QuantParams
from edgeq.graph.files import read
from edgeq.graph.ir import Graph, Info, Node, QuantWeight
from edgeq.graph.onnx.save import write_onnx
from edgeq.quant.graph.quantize import quantize_graph
from edgeq.quant.graph.samples import samples_of
from edgeq.quant.graph.stored_samples import META_SAMPLES, stored_samples
from edgeq.quant.recipe import Recipe
from tests.conftest import need
from tests.graph_made import Made, cnn, encoder, samples
from tests.real_models import (
    BASIC_PITCH_TFLITE,
    MAGIKA,
    OCR_DIRECTION,
    real_model,
)

pytest.importorskip("onnxruntime")
SUFFIX = {"tflite": ".tflite", "ort": ".onnx", "coreml": ".mlpackage"}
PACKAGE = {"tflite": "ai_edge_litert", "ort": "onnxruntime", "coreml": "coremltools"}
Feeds = dict[str, NDArray[Any]]


def quantized(graph: Graph, preset: str = "w8a8-static") -> Graph:
    given = None if preset == "w8-dynamic" else samples(graph, 24)
    return quantize_graph(graph, Recipe.named(preset, "graph"), given).graph


def put(graph: Graph, name: str, constant: Any) -> Graph:
    return replace(graph, constants={**graph.constants, name: constant})


def changed(graph: Graph, node: Node, **attrs: Any) -> Graph:
    nodes = tuple(replace(n, attrs={**n.attrs, **attrs}) if n is node else n for n in graph.nodes)
    return replace(graph, nodes=nodes)


def faults(graph: Graph) -> Iterator[tuple[str, Graph]]:
    """Graphs with one small fault each: what a lowering might get wrong."""
    layers = [n for n in graph.nodes if n.op in ("Conv", "Linear")]
    for node in layers:
        name = node.inputs[1]
        w = graph.constants[name]
        middle = w.shape[0] // 2
        if isinstance(w, QuantWeight):
            scales = w.scales.copy()
            scales[middle] *= 2
            yield f"scale of {node.name}", put(graph, name, replace(w, scales=scales))
            turned = np.ascontiguousarray(np.roll(w.levels, 1, axis=1) if w.shape[1] > 1
                                          else w.levels[..., ::-1])  # fmt: skip
            yield f"levels of {node.name}", put(graph, name, replace(w, levels=turned))
        else:
            doubled = w.copy()
            doubled[middle] *= 2
            yield f"scale of {node.name}", put(graph, name, doubled)
        bias = graph.constants[node.inputs[2]]
        none = (
            replace(bias, levels=np.zeros_like(bias.levels))
            if isinstance(bias, QuantWeight) else np.full_like(bias, 1e-6)
        )  # fmt: skip
        yield f"bias of {node.name}", put(graph, node.inputs[2], none)
        if node.op == "Conv" and any(node.attrs["pads"]):
            top, left, bottom, right = node.attrs["pads"]
            moved = [top + 1, left, bottom - 1, right]
            yield f"pads of {node.name}", changed(graph, node, pads=moved)
    for value, quant in graph.quants.items():
        other = QuantParams(quant.scale, quant.zero_point + (7 if quant.zero_point < 0 else -7))
        grids = {n: other if q == quant else q for n, q in graph.quants.items()}
        yield f"zero point of {value}", replace(graph, quants=grids)


NETS = {
    "cnn in float": lambda: cnn(),
    "cnn in integers": lambda: quantized(cnn()),
    "encoder in float": lambda: encoder(),
    "encoder in integers": lambda: quantized(encoder()),
    "encoder, dynamic": lambda: quantized(encoder(), "w8-dynamic"),
}


@pytest.mark.parametrize("target", list(SUFFIX))
@pytest.mark.parametrize("net", list(NETS))
def test_small_faults_are_found_and_right_files_pass(net: str, target: str, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGE[target])
    graph, module = NETS[net](), graph_target(target)
    feeds = list(samples(graph, 8, seed=5))

    def found(made: Graph, name: str) -> Any:
        path = tmp_path / f"{name}{SUFFIX[target]}"
        module.write(made, path, {}, None)
        return compare_graph(graph, path, target, samples=feeds)

    assert found(graph, "right").passed, found(graph, "again").explain()
    missed = []
    tried = 0
    for i, (what, made) in enumerate(faults(graph)):
        try:
            seen = found(made, f"m{i}")
        except EdgeqError:
            continue  # the target cannot hold it
        tried += 1
        if seen.passed:
            missed.append(what)
    assert tried > 5
    # a bias of the keys moves all scores of a row alike, which a softmax takes away
    assert set(missed) <= {"bias of linear3"}, missed


@pytest.mark.parametrize("target", list(SUFFIX))
@pytest.mark.parametrize("net", ["cnn in float", "cnn in integers", "encoder in integers"])
def test_every_constant_of_a_file_is_compared(net: str, target: str, tmp_path: Path) -> None:
    """Also where the outputs do not show it: a thousandth more in one number of one bias."""
    pytest.importorskip(PACKAGE[target])
    graph, path = NETS[net](), tmp_path / f"m{SUFFIX[target]}"
    made = convert(graph, target, path)
    assert made.certificate is not None
    assert validate(path, graph, target).passed
    head = next(n for n in graph.nodes if n.op == "Linear")
    bias = next(
        name for name, held in graph.constants.items()
        if isinstance(held, np.ndarray) and held.dtype == np.float32 and held.size > 1
    )  # fmt: skip
    assert head
    array = np.array(graph.constants[bias])
    array.reshape(-1)[0] *= np.float32(1.001) if target != "coreml" else np.float32(1.01)
    options = json.dumps({"edgeq": made.certificate["edgeq"], "options": {}})
    other = put(graph, bias, array)
    other = replace(other, meta={**graph.meta, META_OPTIONS: options})
    certificate = path.parent / f"{path.name}.certificate.json"
    kept_certificate = certificate.read_text()
    certificate.unlink()
    if path.is_dir():
        import shutil

        shutil.rmtree(path)
    else:
        path.unlink()
    graph_target(target).write(other, path, {}, None)
    found = validate(path, graph, target)
    assert not found.passed
    assert found.graph.different
    assert "is not what a conversion of the source makes" in found.explain()
    certificate.write_text(kept_certificate)
    with pytest.raises(FormatError, match="is not the file that"):
        validate(path, graph, target)


def test_a_record_keeps_samples_which_conversions_are_judged_by(tmp_path: Path) -> None:
    graph = cnn()
    made = quantized(graph)
    write_onnx(made, tmp_path / "q.onnx")
    again = read(tmp_path / "q.onnx")
    rows = stored_samples(again)
    assert len(rows) == 8
    (quant,) = (made.quants[name] for name in made.inputs)
    first = next(iter(samples(graph, 24)))["x"]
    np.testing.assert_allclose(rows[0]["x"], quant.dequantize(quant.quantize(first)))
    done = convert(again, "ort", tmp_path / "m.onnx")
    assert done.certificate is not None
    assert done.certificate["inputs"] == KEPT
    runner = graph_target("ort").open_runner(tmp_path / "m.onnx")
    assert META_SAMPLES not in runner.metadata
    runner.close()
    done = convert(graph, "ort", tmp_path / "f.onnx")
    assert done.certificate is not None
    assert done.certificate["inputs"] == RANDOM
    done = convert(graph, "ort", tmp_path / "f.onnx", samples=rows, force=True)
    assert done.certificate is not None
    assert done.certificate["inputs"] == GIVEN
    broken = replace(again, meta={**again.meta, META_SAMPLES: "no samples"})
    with pytest.raises(FormatError, match="cannot be read"):
        convert(broken, "ort", tmp_path / "b.onnx")


@pytest.mark.parametrize("target", list(SUFFIX))
def test_near_ties_and_zeros_are_judged_by_what_errors_change(target: str, tmp_path: Path) -> None:
    """Scores of 1e-5, and an argmax among scores that are nearly ties."""
    pytest.importorskip(PACKAGE[target])
    m = Made(0, x=Info((1, 16)))
    scores = m.linear("x", 12)
    low = m.same("Sub", scores, m.constant(np.float32(10)))
    tiny = m.same("Sigmoid", low)
    near = m.same("Mul", scores, m.constant(np.float32(1e-2)))
    near = m.same("Add", near, m.constant(np.float32(1)))
    best = m.node("ArgMax", [near], (1, 1), axis=1, keepdims=1)
    m.values[best] = Info((1, 1), "int64")
    graph = m.graph(tiny, best)
    path = tmp_path / f"m{SUFFIX[target]}"
    made = convert(graph, target, path)
    assert made.certificate is not None
    assert made.certificate["passed"]
    # another bias for one class changes the largest
    linear = graph.nodes[0]
    bias = graph.array(linear.inputs[2]).copy()
    bias[3] += 4
    module = graph_target(target)
    module.write(put(graph, linear.inputs[2], bias), tmp_path / f"b{SUFFIX[target]}", {}, None)
    found = compare_graph(graph, tmp_path / f"b{SUFFIX[target]}", target)
    assert found.graph.error[best] > found.graph.allowed[best]
    if target != "coreml":  # float16 has an absolute error of its own there
        assert found.graph.error[tiny] > found.graph.allowed[tiny]


@pytest.mark.parametrize("target", list(SUFFIX))
def test_scores_that_are_nothing_anywhere_pass(target: str, tmp_path: Path) -> None:
    """A detector's where there is no object: runtimes' errors do not shrink with them."""
    pytest.importorskip(PACKAGE[target])
    m = Made(0, x=Info((1, 3, 32, 33)))
    low = m.same("Sub", m.conv("x", 1), m.constant(np.float32(18)))
    graph = m.graph(m.same("Sigmoid", low))
    made = convert(graph, target, tmp_path / f"m{SUFFIX[target]}")
    assert made.certificate is not None
    assert made.certificate["passed"]


@pytest.mark.parametrize("target", ["ort", "tflite"])
def test_parts_of_an_output_are_compared_one_by_one(target: str, tmp_path: Path) -> None:
    """Boxes in pixels and scores beside them: a fault in the scores is not lost in the boxes."""
    pytest.importorskip(PACKAGE[target])
    m = Made(0, x=Info((1, 16)))
    boxes = m.same("Mul", m.linear("x", 4), m.constant(np.float32(1000)))
    scores = m.same("Sigmoid", m.linear("x", 6))
    graph = m.graph(m.node("Concat", [boxes, scores], (1, 10), axis=1))
    made = convert(graph, target, tmp_path / f"m{SUFFIX[target]}")
    assert made.certificate is not None
    assert made.certificate["passed"]
    linear = [node for node in graph.nodes if node.op == "Linear"][1]
    bias = graph.array(linear.inputs[2]) + np.float32(0.01)
    path = tmp_path / f"b{SUFFIX[target]}"
    graph_target(target).write(put(graph, linear.inputs[2], bias), path, {}, None)
    found = compare_graph(graph, path, target).graph
    assert found is not None
    (name,) = graph.outputs
    assert found.error[name] > found.allowed[name]


@pytest.mark.parametrize("step", [np.float32(1e4), np.float32(1e-10)])
def test_what_float16_does_not_hold_is_reported_once(step: np.float32, tmp_path: Path) -> None:
    """Values past its largest number, and a small one that keeps a logarithm finite."""
    pytest.importorskip("coremltools")
    m = Made(0, x=Info((1, 8)))
    inside = m.same("Relu", m.linear("x", 8))
    if step > 1:
        for by in (step, step, 1 / step, 1 / step):
            inside = m.same("Mul", inside, m.constant(np.float32(by)))
    else:
        inside = m.same("Log", m.same("Add", inside, m.constant(step)))
    graph = m.graph(inside, m.same("Neg", inside))
    try:
        made = convert(graph, "coreml", tmp_path / "m.mlpackage")
        assert made.certificate is not None
        text = " ".join(made.certificate["notes"])
    except EdgeqError as err:
        text = str(err)
    assert text.count("values that float16 does not hold") == 1
    assert text.count("convert with --set precision=float32") == 1
    exact = convert(graph, "coreml", tmp_path / "e.mlpackage", {"precision": "float32"})
    assert exact.certificate is not None
    assert not any("float16" in note for note in exact.certificate["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("target", list(SUFFIX))
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (MAGIKA, {}),
        (OCR_DIRECTION, {"x": (1, 3, 48, 192)}),
        (BASIC_PITCH_TFLITE, None),
    ],
)
def test_published_models_pass(name: str, shapes: Any, target: str, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGE[target])
    source = real_model(name)
    graph = read(source, shapes=shapes) if shapes else read(source)
    made = convert(graph, target, tmp_path / f"m{SUFFIX[target]}")
    assert made.certificate is not None
    assert made.certificate["passed"]


def test_the_keyword_spotter_passes_in_integers(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    source = need("data/mlperf_tiny_ic_kws/kws_ref_model_float32.tflite")
    graph = read(source, dequantize=True)
    (name,) = graph.inputs
    rng = np.random.default_rng(0)
    feeds = [
        {name: (30 * rng.standard_normal(graph.info(name).shape) - 20).astype(np.float32)}
        for _ in range(16)
    ]
    made = quantize_graph(
        graph, Recipe.named("w8a8-static", "graph"), samples_of(graph, feeds)
    ).graph
    for target, suffix in SUFFIX.items():
        done = convert(made, target, tmp_path / f"m{suffix}")
        assert done.certificate is not None
        assert done.certificate["inputs"] == KEPT
        assert validate(tmp_path / f"m{suffix}", made, target).passed
