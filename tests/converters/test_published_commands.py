"""What the commands promise, on a published chat model: its first layers, and as a whole."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeq
from edgeq.cli import main
from edgeq.converters.gguf import run as gguf_run
from edgeq.converters.validate import validate
from edgeq.core.errors import EdgeqError
from edgeq.importers import load
from edgeq.model import artifact
from edgeq.model.model import Model
from tests.converters.test_published_models import LAYERS, cut
from tests.converters.validate.test_damage import copied, damage, places
from tests.devices.test_contention import LINUX, busy_neighbors, one_core
from tests.families import quantized
from tests.real_models import SMOLLM2, real_model

__all__ = ["one_core"]


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the model's first layers, tokenizer included."""
    path = tmp_path_factory.mktemp("short") / "short.edgeq"
    artifact.save(quantized(cut(load(real_model(SMOLLM2)), LAYERS), "w4-g32"), path)
    return path


@pytest.fixture(scope="module")
def model(short: Path) -> Model:
    return artifact.load(short)


@pytest.fixture(scope="module")
def converted(short: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a .tflite file, by the defaults, with its certificate."""
    pytest.importorskip("ai_edge_litert")
    out = tmp_path_factory.mktemp("tflite") / "m.tflite"
    args = ["convert", str(short), "--to", "tflite", "-o", str(out), "--steps", "2", "-t", "1"]
    assert main(args) == 0
    return out


@pytest.fixture
def _no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gguf_run.has_llama_cpp.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    yield
    gguf_run.has_llama_cpp.cache_clear()


@pytest.mark.heavy
@pytest.mark.usefixtures("_no_llama_cpp")
def test_gguf_is_written_where_llama_cpp_is_absent(
    short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    assert main(["convert", str(short), "--to", "gguf", "-o", str(out), "--steps", "2"]) == 0
    assert "llama.cpp was not run, as llama-cpp-python is not installed" in capsys.readouterr().out
    assert load(out).config.layers == LAYERS


@pytest.mark.parametrize(
    ("target", "package"), [("genai", "onnxruntime_genai"), ("litertlm", "litert_lm_builder")]
)
def test_a_missing_package_is_told_before_any_work(
    target: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EdgeqError, match=rf"pip install 'edgeq\[{target}\]'"):
        edgeq.convert(real_model(SMOLLM2), target, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@LINUX
@pytest.mark.usefixtures("one_core")
def test_bench_and_profile_warn_on_a_busy_machine(
    short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = ["bench", str(short), "-p", "0", "-n", "2", "-t", "1", "--backend", "numpy", "-r", "2"]
    profile = ["profile", str(short), "-p", "0", "-n", "2", "-t", "1", "--backend", "numpy",
               "-r", "2", "--no-operations"]  # fmt: skip
    for args in (bench, profile):
        with busy_neighbors(1):
            assert main(args) == 0
        assert capsys.readouterr().out.startswith("Warning: This machine was busy during")


@pytest.mark.slow
@pytest.mark.parametrize("constant", ["decode/rope.global.cos", "decode/rope.global.sin", "norm"])
def test_64_altered_bytes_of_a_constant_are_found(
    constant: str, converted: Path, model: Model, tmp_path: Path
) -> None:
    path = copied(converted, tmp_path)
    where = places("tflite", path)
    name = next(key for key in where if constant in key)
    path.with_name(f"{path.name}.certificate.json").unlink()
    damage(where[name], random.Random(0))
    report = validate(path, model, "tflite", threads=1, steps=2)
    assert not report.passed
    assert any(name.split("/")[-1] in fault.name for fault in report.decoder.tensor_faults)


@pytest.mark.slow
def test_the_certificate_s_sha256_is_checked(converted: Path, model: Model, tmp_path: Path) -> None:
    path = copied(converted, tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")  # no constant lies there
    report = validate(path, model, "tflite", threads=1, steps=2)
    assert "is not the file that m.tflite.certificate.json was made for" in report.explain()


@pytest.mark.heavy
def test_steps_scale_the_validation(converted: Path, model: Model) -> None:
    few, more = (validate(converted, model, "tflite", threads=1, steps=n) for n in (2, 4))
    assert few.passed
    assert more.passed
    assert 0 < few.decoder.greedy_compared < more.decoder.greedy_compared


@pytest.mark.slow
def test_names_of_tensors_are_unique_across_signatures(converted: Path) -> None:
    from edgeq.converters.tflite.read import read

    graphs = read(converted).model.subgraphs
    names = [tensor.name for graph in graphs for tensor in graph.tensors]
    assert len(graphs) > 1
    assert len(set(names)) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tflite", "litertlm"])
def test_the_default_context_is_told(
    target: str, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of the model, 8192, would make LiteRT copy a cache of 8192 tokens at each one."""
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("litert_lm_builder")
    out = tmp_path / f"m.{target}"
    assert main(["convert", str(short), "--to", target, "-o", str(out), "--no-validate"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "tokens (the model allows 8192)" in said
    assert "--ctx-size changes it" in said


@pytest.mark.slow
def test_python_takes_names_texts_and_says_what_is_wrong(short: Path, tmp_path: Path) -> None:
    made = edgeq.quantize(short, tmp_path / "a.edgeq", recipe="w4-g32", requantize=True)
    assert len(repr(made)) < 300
    again = edgeq.load(tmp_path / "a.edgeq")
    assert len(repr(again)) < 300
    tokenizer = edgeq.Tokenizer(again)
    with edgeq.Engine(again, threads=1, context=64) as engine:
        assert len(repr(engine)) < 300
        chunks = list(edgeq.generate(engine, tokenizer, "hello", max_tokens=3))
    assert chunks[-1].n_generated == 3 or chunks[-1].finish_reason == "stop"
    for call in (
        lambda: edgeq.quantize(short, tmp_path / "b.edgeq", recipe="w5-g7", requantize=True),
        lambda: edgeq.quantize(tmp_path / "none.gguf", tmp_path / "b.edgeq"),
        lambda: edgeq.convert(short, "tflight", tmp_path / "m.tflite"),
        lambda: edgeq.load(tmp_path),
    ):
        with pytest.raises(EdgeqError):
            call()
    assert not (tmp_path / "b.edgeq").exists()
