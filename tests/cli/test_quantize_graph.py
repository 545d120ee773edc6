"""``edgeq quantize`` for graphs: from a file to a file, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgeq.cli import main
from edgeq.graph.ir import QuantWeight
from edgeq.quant.presets import presets_for
from tests.conftest import clear_settings, need
from tests.graph_made import cnn

pytest.importorskip("onnxruntime")
Run = Callable[..., str]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object, code: int = 0) -> str:
        assert main(["quantize", *map(str, args)]) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        return err if code else out

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from edgeq.graph.onnx.save import write_onnx

    write_onnx(cnn(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    rng = np.random.default_rng(4)
    np.savez(tmp_path / "c.npz", x=rng.standard_normal((20, 3, 8, 8)).astype(np.float32))
    return tmp_path / "c.npz"


def test_a_graph_is_quantized_and_summarized(run: Run, model: Path, calib: Path) -> None:
    from edgeq.graph.onnx.read import read_onnx

    out = model.with_name("q.onnx")
    said = run(model, "-o", out, "--preset", "w8a8-static", "--calib", calib, "-t", 1)
    assert "int8 channel weights, int8 activations" in said
    assert "outputs: cosine similarity to float" in said
    graph = read_onnx(out)
    assert graph.quants
    assert any(isinstance(held, QuantWeight) for held in graph.constants.values())
    assert json.loads(graph.meta["edgeq.recipe"])["activations"] == "static"
    assert "edgeq.preprocess" not in graph.meta  # arrays are fed as they are
    assert not list(model.parent.glob("*.tmp"))


def test_the_summary_as_json(run: Run, model: Path, calib: Path) -> None:
    out = model.with_name("q.onnx")
    said = run(
        model, "-o", out, "--calib", calib, "--calib-samples", 9, "--observer", "percentile",
        "--tensor-type", "conv4=w4-channel", "--format", "json", "-t", 1,
    )  # fmt: skip
    found = json.loads(said)
    assert found["file_bytes"] == out.stat().st_size
    assert found["recipe"]["observer"] == "percentile"
    assert found["agreement"]["samples"] == 9
    weights = {row["node"]: row["weight"] for row in found["operators"]}
    assert (weights["conv4"], weights["conv0"]) == ("int4 channel", "int8 channel")


def test_weights_alone_need_no_samples(run: Run, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('weights = "w8-channel"\nrest = "fp16"\n')
    for args in (("--preset", "w8-dynamic"), ("--recipe", recipe)):
        assert "smaller" in run(model, "-o", tmp_path / "q.onnx", *args, "--force", "-t", 1)


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--preset", "w8a8-static"], 1, "needs calibration data: give --calib"),
        (["--bits", "4"], 2, "--bits is for language models"),
        (["--calib-windows", "3"], 2, "--calib-windows is for language models"),
        (["--no-card"], 2, "--card is for language models"),
        (["--preset", "w4-g32-imatrix"], 1, "unknown preset for a graph"),
        (["--preset", "w8-channel", "--recipe", "R"], 1, "either a preset or"),
        (["--calib", "nowhere"], 1, "no samples at nowhere"),
        (["--shape", "x=1,3,a,8", "--preset", "w8-channel"], 2, "write NAME=1,3,224,224"),
        (["--shape", "x=1,3,²,8", "--preset", "w8-channel"], 2, "write NAME=1,3,224,224"),
        (["--calib", "C", "--layout", "nhwc"], 1, "leave out --layout nhwc"),
        (["--calib", "C", "--mean", "a"], 1, "--mean is 'a'"),
        (["--calib", "C", "--observer", "max"], 1, "unknown observer"),
        (["--calib", "C", "--calib-samples", "3"], 1, "give at least 8"),
        (["--preset", "w8-channel", "--tensor-type", "none=f32"], 1, "matches no node"),
        (["--preset", "w8-channel", "-o", "q.edgeq"], 1, "give q.onnx"),
        (["--preset", "w8-channel", "-o", "absent/q.onnx"], 1, "does not exist"),
    ],
)
def test_what_is_refused_leaves_nothing(
    run: Run, model: Path, calib: Path, monkeypatch: pytest.MonkeyPatch,
    args: list[str], code: int, word: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(model.parent)
    Path("R").write_text('{"weights": "w8-channel"}')
    given = [calib if arg == "C" else arg for arg in args]
    before = sorted(Path().iterdir())
    assert word in run(model, *([] if "-o" in args else ["-o", "q.onnx"]), *given, code=code)
    assert sorted(Path().iterdir()) == before


def test_a_quantized_graph_is_not_quantized_again(run: Run, model: Path, calib: Path) -> None:
    once = model.with_name("once.onnx")
    run(model, "-o", once, "--calib", calib, "-t", 1)
    again = model.with_name("again.onnx")
    assert "quantized already" in run(once, "-o", again, "--calib", calib, code=1)
    assert not again.exists()
    assert "exists" in run(model, "-o", once, "--calib", calib, code=1)


def test_a_sample_that_is_not_finite_is_named(run: Run, model: Path, tmp_path: Path) -> None:
    x = np.zeros((10, 3, 8, 8), np.float32)
    x[6, 0, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", x=x)
    out = tmp_path / "q.onnx"
    assert "sample 6" in run(model, "-o", out, "--calib", tmp_path / "nan.npz", code=1)
    assert not out.exists()


def test_options_of_graphs_are_refused_for_language_models(run: Run, tmp_path: Path) -> None:
    for option, value in (("--image-size", "8"), ("--observer", "mse"), ("--shape", "x=1")):
        said = run(tmp_path, "-o", tmp_path / "m.edgeq", option, value, code=2)
        assert f"{option} is for graphs" in said


def test_the_list_has_presets_of_graphs(run: Run) -> None:
    said = run("--list")
    assert "Presets for graphs" in said
    for name in presets_for("graph"):
        assert name in said


def test_a_real_classifier_stays_right(run: Run, tmp_path: Path) -> None:
    import gzip

    from edgeq.graph.execute import Session
    from edgeq.graph.onnx.read import read_onnx

    source = need("data/mnist/mnist_cntk_opset8.onnx")

    def held(name: str, offset: int) -> np.ndarray:
        raw = gzip.decompress(need(f"data/mnist/t10k-{name}-ubyte.gz").read_bytes())
        return np.frombuffer(raw, np.uint8, offset=offset)

    images = held("images-idx3", 16).reshape(-1, 1, 28, 28).astype(np.float32)
    labels = held("labels-idx1", 8)
    np.savez(tmp_path / "c.npz", Input3=images[5000:5064])
    out = tmp_path / "q.onnx"
    run(source, "-o", out, "--calib", tmp_path / "c.npz", "-t", 1)
    sessions = Session(read_onnx(source)), Session(read_onnx(out))
    right = [0, 0]
    for image, label in zip(images[:400], labels[:400], strict=True):
        for i, session in enumerate(sessions):
            (scores,) = session({"Input3": image[None]}).values()
            right[i] += int(scores.argmax() == label)
    assert right[0] > 390
    assert abs(right[1] - right[0]) <= 2
