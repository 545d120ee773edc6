"""``edgeq eval`` for graphs: what it says, writes and refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the extra ort")
pytest.importorskip("onnx", reason="needs the extra ort")

from edgeq.cli import main
from edgeq.core.errors import UsageError
from edgeq.evaluation.confusion import write_confusion
from edgeq.evaluation.graph import GraphEvaluation
from edgeq.graph.ir import Graph, Info, Node
from edgeq.graph.onnx.save import write_onnx
from edgeq.quant.graph.images import Preprocess
from tests.conftest import need

CLASSES = 3


@pytest.fixture(autouse=True)
def _without_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.cli.options.DebugFlag.on", False)


def linear(path: Path, scale: float = 1.0, meta: dict[str, str] | None = None) -> Path:
    """A model of 12 inputs [1, 3, 2, 2] that finds the brightest channel."""
    weights = np.kron(np.eye(CLASSES), np.ones(4)).astype(np.float32) * np.float32(scale)
    weights[0] += np.float32(1 - scale)  # another scale is another model
    graph = Graph(
        "brightest", ("image",), ("scores",),
        (Node("Reshape", "flat", ("image", "shape"), ("flat",)),
         Node("Linear", "scores", ("flat", "w"), ("scores",))),
        {"shape": np.array([1, 12]), "w": weights},
        {"image": Info((1, 3, 2, 2)), "flat": Info((1, 12)), "scores": Info((1, CLASSES))},
        meta=meta or {},
    )  # fmt: skip
    write_onnx(graph, path)
    return path


def samples(path: Path, labeled: bool = True) -> Path:
    """Six samples, of which the last has a wrong label."""
    rng = np.random.default_rng(0)
    labels = np.array([0, 1, 2, 0, 1, 2])
    images = rng.uniform(0, 0.1, (6, 3, 2, 2)).astype(np.float32)
    images[np.arange(6), labels] += 1
    labels[5] = 0
    np.savez(path, image=images, **({"labels": labels} if labeled else {}))
    return path


def test_labeled_samples_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = linear(tmp_path / "m.onnx"), samples(tmp_path / "d.npz")
    table = tmp_path / "confusion.csv"
    args = ["eval", str(model), "--data", str(data), "-t", "1", "--confusion", str(table)]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "top-1               83.33 % +- 15.21" in out
    assert "confused            0 predicted as 2: 1" in out
    assert out.startswith("runtime             onnxruntime ")
    rows = list(csv.reader(table.read_text("utf-8").splitlines()))
    assert rows == [["label \\ largest score", "0", "1", "2"], ["0", "2", "0", "1"],
                    ["1", "0", "2", "0"], ["2", "0", "0", "1"]]  # fmt: skip


def test_a_base_is_run_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, base = linear(tmp_path / "m.onnx"), linear(tmp_path / "b.onnx", scale=0.5)
    data = samples(tmp_path / "d.npz", labeled=False)
    args = ["eval", str(model), "--data", str(data), "--against", str(base), "--format", "json"]
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 6
    assert found["top1"] is None
    assert 0 < found["agreement"] <= 1
    assert 0.5 < found["cosine"] < 1
    assert found["model"] == str(model)


def pictures(folder: Path) -> Path:
    """Two pictures of each of three classes."""
    image = pytest.importorskip("PIL.Image", reason="needs the extra vision")
    for label, color in enumerate(((200, 10, 10), (10, 200, 10), (10, 10, 200))):
        own = folder / f"{label}-{'rgb'[label]}"
        own.mkdir(parents=True)
        for n in range(2):
            image.new("RGB", (2, 2), color).save(own / f"{n}.png")
    return folder


def test_folders_of_pictures_are_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pictures(tmp_path / "data")
    meta = Preprocess(mean=(0.5,), std=(0.25,)).to_meta()
    model = linear(tmp_path / "m.onnx", meta=meta)
    args = ["eval", str(model), "--data", str(data), "--format", "json"]
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["top1"], found["classes"]) == (1.0, ["0-r", "1-g", "2-b"])
    assert found["preprocess"]["mean"] == [0.5]  # what the file was quantized with
    assert main([*args, "--mean", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["preprocess"]["mean"] == [0.0]


@pytest.mark.parametrize(
    ("name", "package", "runtime"),
    [("m.ort", "onnxruntime", "onnxruntime"), ("m.tflite", "ai_edge_litert", "LiteRT"),
     ("m.mlpackage", "coremltools", "edgeq.converters.coreml.exec")],
)  # fmt: skip
def test_every_artifact_knows_how_its_pictures_were_made(
    name: str, package: str, runtime: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(package, reason=f"needs {package}")
    from edgeq.converters.convert import convert

    data = pictures(tmp_path / "data")
    model = linear(tmp_path / "m.onnx", meta=Preprocess(mean=(0.5,), std=(0.25,)).to_meta())
    target = {"m.ort": "ort", "m.tflite": "tflite", "m.mlpackage": "coreml"}[name]
    convert(model, target, tmp_path / name)
    capsys.readouterr()
    args = [
        "eval",
        str(tmp_path / name),
        "--data",
        str(data),
        "--base",
        str(model),
        "--format",
        "json",
    ]
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runtime"].startswith(runtime)
    assert (found["top1"], found["agreement"], found["base_top1"]) == (1.0, 1.0, 1.0)
    assert found["cosine"] > 0.9999
    assert found["preprocess"]["mean"] == [0.5]


def test_a_foreign_tflite_is_read_as_a_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ai_edge_litert", reason="needs the extra tflite")
    from tests.tflite_nets import Net

    net = Net()
    x = net.op("RESHAPE", [net.conv(net.input(1, 2, 2, 3), (3, 2)), net.const([1, 8])],
               "ReshapeOptions")  # fmt: skip
    path = net.save(tmp_path / "m.tflite", net.dense(x, 8, CLASSES))
    data = samples(tmp_path / "d.npz")
    args = ["eval", str(path), "--data", str(data), "--format", "json"]
    assert main(args) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 6
    assert found["runtime"].startswith("onnxruntime")


@pytest.mark.parametrize(
    ("args", "words", "code"),
    [
        (["m.onnx"], "give either --task FILE", 2),
        (["m.onnx", "--data", "d.npz", "--task", "d.npz"], "give either --task FILE", 2),
        (["m.onnx", "--data", "d.npz", "--kv-bits", "16"], "--kv-bits is for language models", 2),
        (["m.onnx", "--task", "d.npz", "--mean", "1"], "--mean is for graphs", 2),
        (["m.onnx", "--data", "none.npz"], "there are no samples at none.npz", 1),
        (["m.onnx", "--data", "d.npz", "--scores", "score"], "did you mean 'scores'", 1),
        (["m.onnx", "--data", "d.npz", "--confusion", "c.txt"], "written as .csv or .svg", 1),
        (["m.onnx", "--data", "d.npz", "--base", "other.onnx"], "made from the same model", 1),
        (["none.onnx", "--data", "d.npz"], "none.onnx does not exist", 1),
        (
            ["d.npz", "--data", "d.npz"],
            "d.npz is not a graph; its name must end in one of .onnx",
            1,
        ),
        (["bad.onnx", "--data", "d.npz"], "bad.onnx", 1),
        (["bad.tflite", "--data", "d.npz"], "bad.tflite", 1),
        (["m.onnx", "--data", "plain.npz"], "nothing to measure", 1),
        (["m.onnx", "--data", "d.npz", "--layout", "nhwc"], "channels", 1),
    ],
)
def test_eval_refuses_wrong_options(
    args: list[str],
    words: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    linear(Path("m.onnx"))
    samples(Path("d.npz"))
    samples(Path("plain.npz"), labeled=False)
    Path("bad.onnx").write_bytes(b"\x08\x09nonsense")
    Path("bad.tflite").write_bytes(b"\x08\x00\x00\x00TFL3nonsense")
    other = Graph("o", ("x",), ("y",), (Node("Relu", "y", ("x",), ("y",)),), {},
                  {"x": Info((1, 4)), "y": Info((1, 4))})  # fmt: skip
    write_onnx(other, Path("other.onnx"))
    before = sorted(tmp_path.iterdir())
    assert main(["eval", *args]) == code
    said = capsys.readouterr()
    assert words in " ".join(said.err.split())
    assert not said.out
    assert sorted(tmp_path.iterdir()) == before


def test_a_confusion_matrix_is_drawn(tmp_path: Path) -> None:
    found = GraphEvaluation("scores", 3, confusion=((1, 1), (0, 1)), classes=("cat", "dog"))
    write_confusion(found, tmp_path / "c.svg")
    texts = [text.text for text in ElementTree.parse(tmp_path / "c.svg").iter() if text.text]
    assert [text.strip() for text in texts if text.strip()][1:] == [
        "cat", "cat", "dog", "dog", "1", "1", "1",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no confusion matrix"):
        write_confusion(GraphEvaluation("scores", 3), tmp_path / "d.csv")


@pytest.mark.parametrize("name", ["kws_ref_model.tflite", "pretrainedResnet_quant.tflite"])
def test_integer_files_of_other_tools_are_inspected_and_evaluated(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ai_edge_litert")
    path = need(f"data/mlperf_tiny_ic_kws/{name}")
    assert main(["inspect", str(path), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["operators"]["CONV_2D int8"] > 3
    (given,) = found["inputs"].values()
    assert given.startswith("int8")
    images = name.startswith("pretrained")
    shape = (3, 32, 32) if images else (1, 49, 10)
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 255, (8, *shape)) if images else rng.normal(-20, 30, (8, *shape))
    np.savez(tmp_path / "x.npz", x=x.astype(np.float32))
    base = "pretrainedResnet.tflite" if images else name
    arguments = ["eval", str(path), "--data", str(tmp_path / "x.npz"), "--format", "json",
                 "--base", str(need(f"data/mlperf_tiny_ic_kws/{base}"))]  # fmt: skip
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runtime"].startswith("LiteRT")
    assert told["cosine"] > 0.9
