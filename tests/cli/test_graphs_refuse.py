"""What the commands refuse of graphs: in which words, with which exit code, leaving nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the extra ort")
pytest.importorskip("onnx", reason="needs the extra ort")
pytest.importorskip("ai_edge_litert", reason="needs the extra tflite")
pytest.importorskip("coremltools", reason="needs the extra coreml")

import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeq.cli import main
from edgeq.converters.coreml.graph import CoreMLGraphTarget
from edgeq.converters.ort.graph import OrtGraphTarget
from edgeq.converters.tflite.graph import LiteRTGraphTarget
from edgeq.graph.onnx.file import NEWEST
from edgeq.graph.onnx.save import write_onnx
from tests.conftest import clear_settings
from tests.graph_made import cnn
from tests.loopback import small_disk
from tests.paths import ROOT

MODULES = {"m.onnx": ("ort", OrtGraphTarget), "m.tflite": ("tflite", LiteRTGraphTarget),
           "m.mlpackage": ("coreml", CoreMLGraphTarget)}  # fmt: skip
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, its weights in 8 bits, and samples."""
    at = tmp_path_factory.mktemp("models")
    write_onnx(cnn(), at / "float.onnx")
    rng = np.random.default_rng(0)
    np.savez(at / "c.npz", x=rng.standard_normal((12, 3, 8, 8)).astype(np.float32))
    assert main(["quantize", f"{at}/float.onnx", "-o", f"{at}/w8.onnx", "--preset",
                 "w8-channel"]) == 0  # fmt: skip
    return at


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must fail and leave the folder as it was; its message."""

    def run(*args: object, code: int = 1) -> str:
        before = tree(tmp_path)
        found = main([*map(str, args)])
        out, err = capsys.readouterr()
        assert found == code, err
        assert out == ""
        assert "Traceback" not in err
        assert "error in edgeq" not in err
        assert tree(tmp_path) == before
        return err

    return run


def tree(folder: Path) -> list[tuple[str, bytes]]:
    """Every file below a folder, hidden ones too, with what it holds."""
    return sorted(
        (str(path), path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*")
    )


def net(
    path: Path, op: str = "Relu", shape: tuple[Any, ...] = (1, 4), opset: int = 17, **attrs: Any
) -> Path:
    """A model of one operator and a matrix."""
    nodes = [helper.make_node(op, ["x"], ["a"], name="odd", **attrs),
             helper.make_node("MatMul", ["a", "w"], ["y"], name="product")]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)],
                                ir_version=8), path)  # fmt: skip
    return path


def both(model: Path, refused: Refused) -> set[str]:
    """The messages of quantizing and of converting a model."""
    return {
        refused("quantize", model, "-o", model.with_name("q.onnx"), "--preset", "w8-channel"),
        refused("convert", model, "--to", "tflite", "-o", model.with_name("m.tflite")),
    }


# the model


def test_damaged_files(tmp_path: Path, refused: Refused) -> None:
    for name, content, words in (
        ("m.onnx", b"no model", "is not an ONNX file, or is damaged"),
        ("m.onnx", b"", "it contains no graph"),
        ("m.tflite", b"no model", "does not have the identifier TFL3"),
        ("m.tflite", b"\x1c\x00\x00\x00TFL3" + bytes(40), "m.tflite contains no graph"),
    ):
        (tmp_path / name).write_bytes(content)
        out = tmp_path / "q.onnx"
        for args in (("quantize", "--preset", "w8-channel"), ("convert", "--to", "ort")):
            assert words in refused(*args, tmp_path / name, "-o", out)
        assert words in refused("inspect", tmp_path / name)
    for verb in ("inspect", "bench", "profile"):
        assert "none.onnx" in refused(verb, tmp_path / "none.onnx")


def test_a_file_that_is_cut_short(models: Path, tmp_path: Path, refused: Refused) -> None:
    whole = (models / "float.onnx").read_bytes()
    for part in (0.3, 0.7, 0.99):
        model = tmp_path / "m.onnx"
        model.write_bytes(whole[: int(len(whole) * part)])
        for said in both(model, refused):
            assert "m.onnx" in said


def test_open_axes(tmp_path: Path, refused: Refused) -> None:
    model = net(tmp_path / "m.onnx", shape=("batch", "time", 4))
    for said in both(model, refused):
        assert "axis 1 (time) of the input 'x' [batch, time, 4]" in said
        assert "--shape x=N,N,4 with a number for each N" in said
    for shape, words in (("x=1,2", "does not fit the input 'x'"), ("z=1,2,4", "has no input 'z'"),
                         ("x=1,2,5", "contradicts the model's")):  # fmt: skip
        assert words in refused("convert", model, "--to", "tflite", "-o", tmp_path / "m.tflite",
                                "--shape", shape)  # fmt: skip
    for shape in ("x", "x=1,b", "=1,2", "x=0,2,4"):
        assert "write NAME=" in refused(
            "convert",
            model,
            "--to",
            "tflite",
            "-o",
            tmp_path / "m.tflite",
            "--shape",
            shape,
            code=2,
        )
    assert main(["convert", str(model), "--to", "tflite", "-o", str(tmp_path / "m.tflite"),
                 "--shape", "x=2,3,4"]) == 0  # fmt: skip
    assert main(["validate", str(tmp_path / "m.tflite"), "--against", str(model)]) == 0


def test_a_batch_that_is_open_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = net(tmp_path / "m.onnx", shape=("n", 4))
    assert main(["inspect", str(model)]) == 0
    assert "x float32 [1, 4]" in capsys.readouterr().out


@pytest.mark.parametrize("opset", [1, 6, NEWEST])
def test_the_oldest_and_the_newest_opset(opset: int, tmp_path: Path) -> None:
    attrs = {"consumed_inputs": [0]} if opset == 1 else {}
    model = net(tmp_path / "m.onnx", opset=opset, **attrs)
    assert main(["convert", str(model), "--to", "tflite", "-o", str(tmp_path / "m.tflite")]) == 0


def test_opsets_that_are_not_known(tmp_path: Path, refused: Refused) -> None:
    for said in both(net(tmp_path / "m.onnx", opset=NEWEST + 1), refused):
        assert f"opset {NEWEST + 1}; edgeq reads opsets up to {NEWEST}: export it with" in said


def test_operators_that_are_not_known(tmp_path: Path, refused: Refused) -> None:
    for said in both(net(tmp_path / "m.onnx", "Asin"), refused):
        assert "Asin 'odd'" in said
        assert "no such operator is known" in said


@pytest.mark.parametrize(("name", "target"), [("m.tflite", "tflite"), ("m.mlpackage", "coreml")])
def test_what_a_target_cannot_hold_names_the_node(
    name: str, target: str, tmp_path: Path, refused: Refused
) -> None:
    model = net(tmp_path / "m.onnx", shape=(1, 1, 1, 1, 1, 1, 1, 4))
    said = refused("convert", model, "--to", target, "-o", tmp_path / name)
    assert "'x'" in said or "'odd'" in said
    assert "nearest" in said


def test_external_data(tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    model = net(folder / "m.onnx")
    onnx.save(onnx.load(model), model, save_as_external_data=True, location="w.bin",
              size_threshold=0)  # fmt: skip
    (folder / "w.bin").rename(tmp_path / "w.bin")
    for said in both(model, refused):
        assert "is stored in 'w.bin', which is missing from" in said
        assert "put it there" in said
    held = onnx.load(model, load_external_data=False)
    held.graph.initializer[0].external_data[0].value = "../w.bin"
    model.write_bytes(held.SerializeToString())
    for said in both(model, refused):
        assert "outside the folder of the model; only data in that folder is read" in said


def test_what_is_quantized_already(models: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out.onnx"
    said = refused("quantize", models / "w8.onnx", "-o", out, "--preset", "w8-channel")
    assert "is quantized already; give the float model it was made from" in said
    held = {"s": np.float32(0.1), "z": np.int8(0)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quant"),
             helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="undo")]  # fmt: skip
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in held.items()],
    )  # fmt: skip
    model = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), model)
    for said in both(model, refused):
        assert "already quantized by another tool" in said
        assert "QuantizeLinear 'quant'" in said


def test_files_made_for_a_runtime_are_not_taken_back(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "m.ort").write_bytes(b"any")
    (tmp_path / "m.mlpackage").mkdir()
    (tmp_path / "m.mlmodel").write_bytes(b"\x08\x04\x12\x02\x0a\x00")  # begins as an ONNX file
    said = refused("inspect", tmp_path / "m.mlmodel")
    assert "is a model that edgeq did not convert" in said
    for name in ("m.ort", "m.mlpackage", "m.mlmodel"):
        for args in (("quantize",), ("convert", "--to", "ort")):
            said = refused(*args, tmp_path / name, "-o", tmp_path / "out.onnx")
            assert (
                f"{name} was made for a runtime and cannot be converted again; give the .onnx"
                in said
            )


def test_commands_of_language_models(models: Path, refused: Refused) -> None:
    said = refused("plan", models / "w8.onnx")
    assert "is a graph of operators, but this command needs a language model" in said


# the samples


def test_samples(models: Path, tmp_path: Path, refused: Refused) -> None:
    x = np.load(models / "c.npz")["x"]
    bad = x.copy()
    bad[3, 0, 0, 0] = np.inf
    for name, arrays in (
        ("nan", {"x": bad}), ("last", {"x": x.transpose(0, 2, 3, 1)}), ("few", {"x": x[:3]}),
        ("none", {"x": x[:0]}), ("name", {"z": x}), ("size", {"x": x[:, :, :4]}),
    ):  # fmt: skip
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "loader.py").write_text("def fails():\n    raise ValueError('oh')\n    yield\n")
    args = ("quantize", models / "float.onnx", "-o", tmp_path / "q.onnx")
    assert "give --calib with a folder of images or arrays, an .npz file" in refused(*args)
    last = refused(*args, "--calib", tmp_path / "last.npz", "--layout", "nchw")
    assert "its channels are last and those of the graph first: use --layout nhwc" in last
    for given, words in (
        ("nan.npz", "sample 3"), ("few.npz", "at least 8"),
        ("none.npz", "none.npz"), ("size.npz", "has the shape [1, 3, 4, 8]"),
        ("empty", "empty"), ("text.npz", "text.npz"), ("absent", "no samples at"),
        ("loader.py:fails", "oh"), ("loader.py:absent", "absent"),
    ):  # fmt: skip
        assert words in refused(*args, "--calib", tmp_path / given), given


# the output and the options


def test_outputs_and_options(models: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "there.tflite").write_text("mine")
    for target, out, rest, words in (
        ("tflite", "there.tflite", (), "already exists; give another --output, or --force"),
        (
            "tflite",
            "m.onnx",
            (),
            "LiteRT (TensorFlow Lite) output must end in .tflite, but --output is",
        ),
        ("coreml", "m.mlmodel", (), "m.mlpackage"),
        ("ort", "m.tflite", (), "ONNX Runtime output must end in .onnx or .ort"),
        ("ort", "absent/m.onnx", (), "absent/m.onnx does not exist; make it first"),
        ("gguf", "m.gguf", (), "unknown target of a graph 'gguf' (known: coreml, ort, tflite)"),
        ("tflite", "m.tflite", ("--set", "fast=1"), "unknown option of the target tflite 'fast'"),
        ("tflite", "m.tflite", ("--set", "io=half"), "half"),
        ("ort", "m.onnx", ("--set", "forn=qdq"), "did you mean 'form'?"),
        ("ort", "m.onnx", ("--set", "form=qpq"), "(known: qdq, qoperator)"),
        ("coreml", "m.mlpackage", ("--set", "precision=half"), "(known: float16, float32)"),
        ("coreml", "m.mlpackage", ("--target-os", "ios3"), "(known: ios16, ios17, ios18)"),
    ):
        for model in (models / "float.onnx", models / "w8.onnx"):
            said = refused("convert", model, "--to", target, "-o", tmp_path / out, *rest)
            assert words in said, (target, out, rest)
    out = tmp_path / "m.tflite"
    for rest, words in ((("--set", "io"), "write NAME=VALUE"), (("--kv", "int8"), "--kv is for"),
                        (("--steps", "3"), "--steps is for language models")):  # fmt: skip
        assert words in refused("convert", models / "float.onnx", "--to", "tflite", "-o", out,
                                *rest, code=2)  # fmt: skip


def test_a_model_is_not_written_over(models: Path, tmp_path: Path, refused: Refused) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes((models / "float.onnx").read_bytes())
    for args in (("quantize", "--preset", "w8-channel"), ("convert", "--to", "ort")):
        assert "give another" in refused(*args, model, "-o", model, "--force")


# in mid-work


@pytest.mark.parametrize("name", MODULES)
def test_an_interrupt_leaves_what_was_there(
    name: str, models: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, module = MODULES[name]
    (tmp_path / name).mkdir() if name == "m.mlpackage" else (tmp_path / name).write_text("mine")
    _interrupted_after_writing(module, monkeypatch)
    said = refused("convert", models / "w8.onnx", "--to", target, "-o", tmp_path / name, "--force",
                   code=130)  # fmt: skip
    assert said.strip() == "interrupted"


def _interrupted_after_writing(module: type, monkeypatch: pytest.MonkeyPatch) -> None:
    right = module.write

    def write(*args: Any) -> None:
        right(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write", write)


def test_ctrl_c_in_mid_conversion(models: Path, tmp_path: Path) -> None:
    """An .ort takes seconds to make: the signal comes while it is half done."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeq", "convert", models / "w8.onnx", "--to", "ort", "-o",
         tmp_path / "m.ort"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".m.ort.*.tmp")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip().endswith("interrupted")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    ["m.onnx", "m.tflite", "m.ort", "q.onnx", pytest.param("m.mlpackage", marks=pytest.mark.slow)],
)
def test_no_room(name: str, models: Path, tmp_path: Path) -> None:
    """The system itself refuses to let a file grow past 2 kB."""
    work = ["quantize", models / "float.onnx", "--preset", "w8-channel"]
    if name != "q.onnx":
        target = "ort" if name == "m.ort" else MODULES[name][0]
        work = ["convert", models / "w8.onnx", "--to", target, "--no-validate"]
    code = (
        "import resource, sys; from edgeq.cli import main; "
        "import numpy, edgeq.converters.convert; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, *work, "-o", tmp_path / name],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "no room for" in done.stderr
    assert name in done.stderr
    assert not list(tmp_path.iterdir())


def test_graphs_on_a_full_disk(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "4k") as disk:
        (disk / "fill").write_bytes(bytes(2000))
        for args in (("convert", models / "w8.onnx", "--to", "tflite", "-o", disk / "m.tflite"),
                     ("quantize", models / "float.onnx", "--preset", "w8-channel", "-o",
                      disk / "q.onnx")):  # fmt: skip
            assert main([*map(str, args)]) == 1
            assert "no room for" in capsys.readouterr().err
            assert [path.name for path in disk.iterdir()] == ["fill"]
