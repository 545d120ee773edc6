"""Graphs through the command line: from a float model to every target's file, and what is refused.

Every file is made by the commands and read back by the library; nothing is replaced by a stand-in
but where a target is given a fault of its own.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the extra ort")
pytest.importorskip("onnx", reason="needs the extra ort")
pytest.importorskip("ai_edge_litert", reason="needs the extra tflite")
pytest.importorskip("coremltools", reason="needs the extra coreml")

from edgeq.cli import main
from edgeq.converters.targets import graph_target, graph_target_of
from edgeq.converters.tflite.graph import LiteRTGraphTarget
from edgeq.formats.qparams import QuantParams
from edgeq.graph.files import read
from edgeq.graph.ir import Graph, QuantWeight
from edgeq.graph.onnx.save import write_onnx
from tests.conftest import clear_settings, need
from tests.graph_made import cnn
from tests.graph_zoo import canonical, feeds, save

TARGETS: Mapping[str, tuple[str, ...]] = {
    "m.ort": ("--to", "ort"),
    "m.onnx": ("--to", "ort"),
    "int8.onnx": ("--to", "ort", "--set", "activations=int8"),
    "fused.onnx": ("--to", "ort", "--set", "form=qoperator"),
    "m.tflite": ("--to", "tflite"),
    "m.mlpackage": ("--to", "coreml"),
}
"""File -> the options that make it."""
Call = Callable[..., tuple[str, str]]


def stored(path: Path) -> tuple[dict[str, QuantWeight], dict[str, QuantParams]]:
    """What edgeq packed into a target's file, read back from it."""
    target = graph_target(graph_target_of(path))
    return dict(target.read_weights(path)), target.read_quants(path)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command; its output and its errors."""

    def run(*args: object, code: int = 0) -> tuple[str, str]:
        found = main([*map(str, args)])
        out, err = capsys.readouterr()
        assert found == code, err
        assert "Traceback" not in err
        assert "error in edgeq" not in err
        return out, err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, samples, the model quantized, and in made/ what the targets make of that."""
    at = tmp_path_factory.mktemp("graphs")
    rng = np.random.default_rng(4)
    write_onnx(cnn(), at / "float.onnx")
    x = rng.standard_normal((24, 3, 8, 8)).astype(np.float32)
    np.savez(at / "calib.npz", x=x)
    np.savez(at / "test.npz", x=x[::-1].copy(), labels=rng.integers(0, 5, 24))
    made = at / "made"
    made.mkdir()
    commands = [
        ("quantize", at / "float.onnx", "-o", at / "q.onnx", "--calib", at / "calib.npz"),
        ("quantize", at / "float.onnx", "-o", at / "q4.onnx", "--preset", "w4a8-static", "--calib",
         at / "calib.npz"),
        ("quantize", at / "float.onnx", "-o", at / "w8.onnx", "--preset", "w8-dynamic"),
        *(("convert", at / "q.onnx", *options, "-o", made / name)
          for name, options in TARGETS.items()),
    ]  # fmt: skip
    for command in commands:
        assert main([*map(str, command), "-t", "1"]) == 0
    return at


def packed(graph: Graph) -> dict[str, QuantWeight]:
    return {n: w for n, w in graph.constants.items() if isinstance(w, QuantWeight)}


# from the float model to every file


@pytest.mark.parametrize("name", TARGETS)
def test_every_file_holds_the_integers_of_the_record(name: str, folder: Path) -> None:
    source = read(folder / "q.onnx")
    weights, quants = stored(folder / "made" / name)
    mine = packed(source)
    assert {n for n, w in mine.items() if w.bits == 8} <= set(weights)
    for constant, held in weights.items():
        np.testing.assert_array_equal(held.levels, mine[constant].levels)
        np.testing.assert_array_equal(
            np.broadcast_to(held.wide_scales(), held.shape),
            np.broadcast_to(mine[constant].wide_scales(), held.shape),
        )
    assert quants
    assert all(source.quants[value] == quant for value, quant in quants.items())


@pytest.mark.parametrize("name", TARGETS)
def test_the_certificate_says_what_is_in_the_file(name: str, folder: Path) -> None:
    path = folder / "made" / name
    found = json.loads(path.with_name(f"{name}.certificate.json").read_text())
    assert found["passed"] is True
    assert found["source"]["source"] == "q.onnx"
    assert json.loads(found["source"]["recipe"])["activations"] == "static"
    assert {w["equal"] for w in found["weights"].values()} == {True}
    kinds = {(w["asked"], w["bits"]) for w in found["weights"].values()}
    assert kinds - {(32, 32)} == {(8, 8)}  # Core ML may hold a bias as floats
    equal, known = found["quants_equal"].split(" of ")
    assert equal == known
    assert int(known) + found["quants_not_in_file"] == len(read(folder / "q.onnx").quants)
    for inside, said in found["files"].items():
        content = (folder / "made" / inside).read_bytes()
        assert said == {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", TARGETS)
def test_every_file_answers_as_the_record_does(name: str, folder: Path, call: Call) -> None:
    out, _ = call("eval", folder / "made" / name, "--data", folder / "test.npz",
                  "--base", folder / "q.onnx", "--format", "json")  # fmt: skip
    found = json.loads(out)
    assert (found["n"], found["agreement"]) == (24, 1.0)
    assert found["cosine_least"] > 0.9999
    assert found["top1"] == found["base_top1"]


@pytest.mark.parametrize("name", TARGETS)
def test_every_file_is_validated_against_the_record(name: str, folder: Path, call: Call) -> None:
    args = ("validate", folder / "made" / name, "--against", folder / "q.onnx", "-t", 1)
    said, _ = call(*args)
    n = json.loads((folder / "made" / f"{name}.certificate.json").read_text())["weights_equal"]
    assert f"{n} have equal integers" in said
    assert "result   passed" in said
    first, again = (call(*args, "--format", "json")[0] for _ in range(2))
    assert first == again
    found = json.loads(first)
    assert found["passed"] is True
    assert set(found["error"]) == {"softmax11_out"}
    assert found["weights"].keys() == found["bits"].keys() == found["asked"].keys()


@pytest.mark.parametrize("name", ["m.ort", "fused.onnx", "m.tflite", "m.mlpackage"])
def test_a_runtimes_file_is_inspected(name: str, folder: Path, call: Call) -> None:
    path = folder / "made" / name
    said, _ = call("inspect", path)
    assert "8 bits" in said
    assert "activations are quantized to 8 bits" in said
    assert "--tensors lists each weight" in said
    assert "conv0" not in said
    assert "packed weight " in call("inspect", path, "--tensors")[0]
    first, again = (call("inspect", path, "--format", "json")[0] for _ in range(2))
    assert first == again
    found = json.loads(first)
    assert [w["bits"] for w in found["weights"].values() if w["bits"] != 32] == [8] * 4
    assert found["quants"]["x"] == vars(read(folder / "q.onnx").quants["x"])


def test_the_record_is_inspected_operator_by_operator(folder: Path, call: Call) -> None:
    found = json.loads(call("inspect", folder / "q.onnx", "--format", "json")[0])
    rows = {row["node"]: row["weight"] for row in found["operators"]}
    assert rows == {**dict.fromkeys(rows, ""), "conv0": "int8 channel", "conv2": "int8 channel",
                    "conv4": "int8 channel", "linear10": "int8 channel"}  # fmt: skip
    assert found["nbytes"] < found["float_bytes"]


def test_the_summaries_of_a_conversion_are_read_by_scripts(
    folder: Path, tmp_path: Path, call: Call
) -> None:
    args = ("convert", folder / "q.onnx", "--to", "tflite", "-o", tmp_path / "m.tflite",
            "--force", "--format", "json", "-t", 1)  # fmt: skip
    found = [json.loads(call(*args)[0]) for _ in range(2)]
    for summary in found:
        summary.pop("convert_seconds")
    assert found[0] == found[1]
    assert found[0]["weights"].keys() == packed(read(folder / "q.onnx")).keys()
    bare = json.loads(call(*args, "--no-validate")[0])
    assert (bare["passed"], bare["nbytes"]) == (None, (tmp_path / "m.tflite").stat().st_size)


@pytest.mark.parametrize("name", ["mobilenet_v2", "keyword_spotter", "bert"])
def test_nets_as_exporters_write_them(name: str, tmp_path: Path, call: Call) -> None:
    """With open axes, batch norms and spelled-out norms: float to quantized to three targets."""
    source = save(name, tmp_path)
    graph = canonical(name, tmp_path)
    arrays = [feeds(graph, seed=i) for i in range(10)]
    np.savez(tmp_path / "c.npz",
             **{n: np.concatenate([a[n] for a in arrays]) for n in graph.inputs})  # fmt: skip
    q = tmp_path / "q.onnx"
    shapes = [f"--shape={n}={','.join(map(str, graph.info(n).shape))}" for n in graph.inputs]
    call("quantize", source, "-o", q, "--calib", tmp_path / "c.npz", *shapes, "-t", 1)
    for made, target in (("m.onnx", "ort"), ("m.tflite", "tflite"), ("m.mlpackage", "coreml")):
        call("convert", q, "--to", target, "-o", tmp_path / made, "-t", 1)
        call("validate", tmp_path / made, "--against", q)
        out, _ = call("eval", tmp_path / made, "--data", tmp_path / "c.npz", "--base", source,
                      "--format", "json")  # fmt: skip
        assert json.loads(out)["cosine"] > 0.98


def test_a_real_classifier(tmp_path: Path, call: Call) -> None:
    source = need("data/mnist/mnist_cntk_opset8.onnx")

    def held(name: str, offset: int) -> np.ndarray:
        raw = gzip.decompress(need(f"data/mnist/t10k-{name}-ubyte.gz").read_bytes())
        return np.frombuffer(raw, np.uint8, offset=offset)

    images = held("images-idx3", 16).reshape(-1, 1, 28, 28).astype(np.float32)
    np.savez(tmp_path / "c.npz", Input3=images[5000:5064])
    np.savez(tmp_path / "t.npz", Input3=images[:300], labels=held("labels-idx1", 8)[:300])
    q = tmp_path / "q.onnx"
    call("quantize", source, "-o", q, "--calib", tmp_path / "c.npz", "-t", 1)
    answers = []
    for made, target in (("m.ort", "ort"), ("m.tflite", "tflite"), ("m.mlpackage", "coreml")):
        call("convert", q, "--to", target, "-o", tmp_path / made, "-t", 1)
        weights, _ = stored(tmp_path / made)
        levels = {n: w.levels for n, w in packed(read(q)).items() if w.bits == 8}
        assert levels
        for name, mine in levels.items():
            np.testing.assert_array_equal(weights[name].levels, mine)
        out, _ = call("eval", tmp_path / made, "--data", tmp_path / "t.npz", "--base", source,
                      "--format", "json")  # fmt: skip
        answers.append(json.loads(out))
    assert all(a["top1"] > 0.97 and a["agreement"] > 0.99 for a in answers)


# how long it takes


def test_files_take_turns_with_the_float_model(folder: Path, call: Call) -> None:
    made = folder / "made"
    out, _ = call("bench", made / "m.tflite", "--compare", made / "m.ort", "--compare",
                  folder / "float.onnx", "-r", 2, "-t", 1, "--format", "json")  # fmt: skip
    rows = json.loads(out)
    assert [Path(row["model"]).name for row in rows] == ["m.tflite", "m.ort", "float.onnx"]
    for row in rows:
        assert row["speedup"] == rows[-1]["ms_p50"] / row["ms_p50"]
        assert 0 < row["ms_p50"] <= row["ms_p90"]
    table, _ = call("bench", made / "m.tflite", "--compare", folder / "float.onnx", "-r", 1)
    assert "against float.onnx" in table
    _, err = call("bench", made / "m.mlpackage", "--compare", folder / "float.onnx", code=1)
    assert "m.mlpackage cannot be timed" in err
    _, err = call("bench", made / "m.tflite", "--n-gen", 4, code=2)
    assert "--n-gen is for language models" in err


@pytest.mark.parametrize("name", ["q.onnx", "made/m.ort", "made/fused.onnx"])
def test_operations_are_those_of_the_runtimes_own_profiler(
    name: str, folder: Path, tmp_path: Path, call: Call
) -> None:
    kept = tmp_path / "run.json"
    said, _ = call("profile", folder / name, "-n", 4, "-r", 2, "-t", 1, "-o", kept)
    assert "us/run" in said
    (run,) = json.loads(kept.read_text())["runs"]
    (phase,) = run["operations"]["phases"]
    ops = {row["op"] for row in phase["rows"]}
    # the integers are computed with, whether fused in the file or by the runtime
    assert "QLinearConv" in ops


def test_energy_of_a_graph_is_given_per_run(folder: Path, call: Call) -> None:
    said, _ = call("profile", folder / "made" / "m.tflite", "-n", 4, "-r", 2, "-t", 1,
                   "--estimate", "rpi5-8gb")  # fmt: skip
    assert "J/run" in said
    assert "CONV_2D" in said
    assert "token" not in said


# what is held in how many bits


def test_weights_that_a_target_holds_wider_are_named(
    folder: Path, tmp_path: Path, call: Call
) -> None:
    wide = "1 weight of 4 bits is stored in 8 bits: c5"
    out = tmp_path / "m.onnx"
    said, _ = call("convert", folder / "q4.onnx", *TARGETS["fused.onnx"], "-o", out, "-t", 1)
    assert wide in said
    assert wide in call("validate", out, "--against", folder / "q4.onnx")[0]
    certificate = json.loads((tmp_path / "m.onnx.certificate.json").read_text())
    assert certificate["weights"]["c5"] == {"equal": True, "bits": 8, "asked": 4}
    out = tmp_path / "m.tflite"
    said, _ = call("convert", folder / "q4.onnx", "--to", "tflite", "-o", out, "-t", 1)
    assert "held in" not in said
    assert stored(out)[0]["c5"].bits == 4


@pytest.mark.parametrize("validated", [True, False])
def test_a_target_that_leaves_a_weight_float_is_found_out(
    validated: bool, folder: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the check after writing can fail only where the converter is wrong, so it is made wrong here
    right = LiteRTGraphTarget.write

    def wrong(self: LiteRTGraphTarget, graph: Graph, *args: Any) -> None:
        loose = {**graph.constants, "c3": graph.array("c3")}
        right(self, replace(graph, constants=loose), *args)

    monkeypatch.setattr(LiteRTGraphTarget, "write", wrong)
    _, err = call("convert", folder / "w8.onnx", "--to", "tflite", "-o", tmp_path / "m.tflite",
                  *(() if validated else ("--no-validate",)), code=1)  # fmt: skip
    assert "1 of 4 weights that the source has as integers are not packed in the file: c3" in err
    assert not list(tmp_path.iterdir())


def test_another_model_is_found_out(folder: Path, tmp_path: Path, call: Call) -> None:
    tflite = folder / "made" / "m.tflite"
    said, _ = call("validate", tflite, "--against", folder / "q4.onnx", code=1)
    assert "FAILED" in said
    assert "c5: integers or scales differ from the source's" in said
    said, _ = call("validate", tflite, "--against", folder / "float.onnx", code=1)
    assert "c5: integers or scales differ from the source's" in said
    float_tflite = tmp_path / "float.tflite"
    call("convert", folder / "float.onnx", "--to", "tflite", "-o", float_tflite)
    write_onnx(cnn(seed=1), tmp_path / "other.onnx")
    said, _ = call("validate", float_tflite, "--against", tmp_path / "other.onnx", code=1)
    assert "none are integers" in said
    assert "softmax11_out: differs by" in said


def test_integer_weights_of_a_float_model_are_taken_back(
    folder: Path, tmp_path: Path, call: Call
) -> None:
    tflite, out = tmp_path / "w8.tflite", tmp_path / "again.onnx"
    call("convert", folder / "w8.onnx", "--to", "tflite", "-o", tflite, "-t", 1)
    for args in (("quantize", tflite, "-o", out, "--preset", "w8-channel"),
                 ("convert", tflite, "--to", "ort", "-o", out)):  # fmt: skip
        _, err = call(*args, code=1)
        assert "convert its weights back to float with edgeq quantize --dequantize" in err
        assert not out.exists()
    call("quantize", tflite, "-o", out, "--preset", "w8-channel", "--dequantize")
    graph = read(out)
    assert "weights were integers" in graph.meta["edgeq.dequantized"]
    first = packed(read(folder / "w8.onnx"))
    # quantized by the same rule from their own grid, they are the same integers again
    for name, held in packed(graph).items():
        twin = next(w for w in first.values() if w.levels.size == held.levels.size)
        assert sorted(held.levels.ravel()) == sorted(twin.levels.ravel()), name
    _, err = call("quantize", folder / "float.onnx", "-o", out, "--dequantize", "--preset",
                  "w8-channel", "--force", code=1)  # fmt: skip
    assert "leave --dequantize out" in err


def test_a_published_model_of_integer_weights(tmp_path: Path, call: Call) -> None:
    source = need("data/mlperf_tiny_ic_kws/kws_ref_model_float32.tflite")
    out = tmp_path / "kws.onnx"
    _, err = call("quantize", source, "-o", out, "--preset", "w8-channel", code=1)
    assert "--dequantize" in err
    said, _ = call("quantize", source, "-o", out, "--preset", "w8-channel", "--dequantize")
    assert "10 operators: int8 channel weights" in said


def test_pixels_that_are_their_own_levels(folder: Path, tmp_path: Path, call: Call) -> None:
    """A step of exactly 1: scales of weight and bias are equal, and onnxruntime keeps one."""
    x = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8)).astype(np.float32)
    x[:, 0, 0, :2] = 0, 255
    np.savez(tmp_path / "c.npz", x=x)
    q = tmp_path / "q.onnx"
    call("quantize", folder / "float.onnx", "-o", q, "--calib", tmp_path / "c.npz", "--observer",
         "minmax", "-t", 1)  # fmt: skip
    assert read(q).quants["x"].scale == 1.0
    out = tmp_path / "m.onnx"
    call("convert", q, *TARGETS["fused.onnx"], "-o", out, "-t", 1)
    np.testing.assert_array_equal(stored(out)[0]["c1"].scales, packed(read(q))["c1"].scales)
