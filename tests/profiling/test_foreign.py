"""Models in another runtime: what its own profiler says, and nothing that it does not say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgeq.converters import Options, target_named
from edgeq.converters.coreml.profile import NOT_TIMED
from edgeq.converters.ort.profile import NodeTime, summed
from edgeq.core.errors import FormatError
from edgeq.profiling.foreign import Named, operations
from edgeq.profiling.profile import profile
from edgeq.profiling.session import Workload
from edgeq.profiling.summary import summary
from tests.families import quantized, random_model, tiny_config

WORK = Workload(5, 3, warmup=0, repeats=2)


def converted(target: str, out: Path) -> Path:
    model = quantized(random_model(tiny_config("llama", context=64)), "w8-channel", "w8-channel")
    module = target_named(target).decoder_target()
    options = Options(context=64)
    module.check(model, options)
    module.write(model, out, options)
    return out


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("a.onnx", "ort"),
        ("a.tflite", "tflite"),
        ("a.mlpackage", "coreml"),
        ("a.gguf", None),
        ("gguf:a.gguf", "gguf"),
        ("a.edgeq", None),
        (".", None),
    ],
)
def test_which_runtime(text: str, target: str | None, tmp_path: Path) -> None:
    kind, _, name = text.rpartition(":")
    path = tmp_path / name
    if name != ".":
        path.write_bytes(b"")
    assert Named.parse(f"{kind}:{path}" if kind else str(path)) == Named(path, target)


def test_a_profile_of_onnxruntime_is_summed_by_node() -> None:
    def event(cat: str, name: str, dur: int, op: str = "") -> dict[str, object]:
        return {"cat": cat, "name": name, "dur": dur, "args": {"op_name": op} if op else {}}

    one = [
        event("Node", "a_kernel_time", 10, "MatMul"),
        event("Node", "a_fence_before", 99, "MatMul"),
        event("Node", "b_kernel_time", 5, "Add"),
        event("Session", "SequentialExecutor::Execute", 17),
        event("Session", "model_run", 20),
    ]
    text = json.dumps([event("Session", "session_initialization", 500), *one, *one, *one])
    nodes, runs, ns = summed(text, 1)
    assert nodes == [NodeTime("MatMul", "a", 2, 20_000), NodeTime("Add", "b", 2, 10_000)]
    assert (runs, ns) == (2, 40_000)
    assert summed(text, 3) == ([], 0, 0)
    for bad in ("[", "[1]", '[{"cat": "Node"}]'):
        with pytest.raises(FormatError, match="cannot be read"):
            summed(bad, 0)


def test_a_decoder_in_onnxruntime(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = converted("ort", tmp_path / "m")
    made = profile([Named.parse(str(path))], WORK, threads=1, meters=[])
    (run,) = made.runs
    assert run.subject["runtime"].startswith("onnxruntime")
    assert [len(s.step_ns) for s in run.timed] == [3, 3]
    assert run.operations is not None
    assert [p.name for p in run.operations.phases] == ["prefill", "decode"]
    held = Counter(n.op_type for n in onnx.load_model(path / "model.onnx").graph.node)
    for phase, runs in zip(run.operations.phases, (1, 3), strict=True):
        calls = Counter[str]()
        for row in phase.rows:
            assert row.calls == runs
            calls[row.op] += row.calls
        assert calls["MatMulNBits"] == runs * held["MatMulNBits"]
        (wall,) = phase.wall_ns
        assert 0 < sum(row.ns[0] for row in phase.rows if row.ns) <= wall
    assert {row.layer for row in run.operations.phases[1].rows} >= {0, 1}
    told = summary(made, run)
    assert told["decode_tokens_per_s"]["n"] == 2
    assert told["gb_per_s"] is None


def test_any_onnx_graph(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    h, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.ones((8, 4), np.float32), "w")
    graph = h.make_graph(
        [h.make_node("MatMul", ["x", "w"], ["y"], name="one"), h.make_node("Abs", ["y"], ["z"])],
        "g",
        [h.make_tensor_value_info("x", kind, ["n", 8])],
        [h.make_tensor_value_info("z", kind, ["n", 4])],
        [weight],
    )
    path = tmp_path / "g.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9), path)
    made = profile([Named.parse(str(path))], Workload(0, 4, repeats=3), threads=1, meters=[])
    (run,) = made.runs
    assert run.operations is not None
    (phase,) = run.operations.phases
    assert (phase.name, phase.units) == ("run", 4)
    assert [(r.op, r.calls) for r in phase.rows] == [("MatMul", 4), ("Abs", 4)]
    told = summary(made, run)
    assert told["run_ms"]["n"] == 12
    assert (told["tpot_ms"], told["decode_tokens_per_s"]) == (None, None)
    assert told["runs_per_s"]["mean"] > 0


def test_litert_times_whole_runs_only(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    path = converted("tflite", tmp_path / "m.tflite")
    made = profile([Named.parse(str(path))], WORK, threads=1, meters=[])
    (run,) = made.runs
    assert len(run.timed) == 2
    assert run.operations is not None
    assert run.operations.reason is not None
    assert "no profiler" in run.operations.reason
    (phase,) = run.operations.phases
    assert {row.ns for row in phase.rows} == {None}
    from ai_edge_litert import schema_py_generated as schema

    held = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    codes = [code.builtinCode for code in held.operatorCodes]
    linear = schema.BuiltinOperator.FULLY_CONNECTED
    expected = sum(codes[op.opcodeIndex] == linear for g in held.subgraphs for op in g.operators)
    assert {r.op: r.calls for r in phase.rows}["FULLY_CONNECTED"] == expected > 0
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(path.read_bytes()[:64])
    with pytest.raises(FormatError):
        profile([Named.parse(str(broken))], WORK, threads=1, meters=[])


def test_core_ml_is_counted(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    from edgeq.converters.coreml.exec import describe

    path = converted("coreml", tmp_path / "m.mlpackage")
    made = profile([Named.parse(str(path))], WORK, meters=[])
    (run,) = made.runs
    assert run.samples == ()
    assert run.peak_rss_bytes is None
    assert run.operations is not None
    assert run.operations.reason == NOT_TIMED
    function = next(iter(describe(path).functions.values()))
    assert {r.op: r.calls for r in run.operations.phases[0].rows} == dict(function.ops)
    assert summary(made, run)["ttft_ms"] is None


def test_a_runtime_without_a_profiler_says_so(tmp_path: Path) -> None:
    told = operations(Named(tmp_path, "genai"), None, WORK, 1)
    assert told.phases == ()
    assert told.reason is not None
    assert "genai" in told.reason
