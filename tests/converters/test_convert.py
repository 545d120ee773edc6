"""``edgeq convert`` and ``edgeq validate``: what is written, refused, and left behind."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeq.cli import main
from edgeq.converters.convert import convert
from edgeq.converters.gguf import decoder as gguf_decoder
from edgeq.converters.gguf import run as gguf_run
from edgeq.core.errors import DoesNotFitError, EdgeqError, MissingDependencyError, UsageError
from edgeq.importers import load
from edgeq.model import artifact
from tests.conftest import clear_settings
from tests.families import quantized, random_model, tiny_config
from tests.paths import DEMO, ROOT


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch)
    monkeypatch.setenv("EDGEQ_THREADS", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.edgeq"
    config = tiny_config("qwen3", hidden=64, head_dim=16, context=256)
    artifact.save(quantized(random_model(config), "w4-g32"), path)
    return path


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_convert_writes_and_certifies(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    assert main(["convert", str(tiny), "--to", "gguf", "-o", str(out)]) == 0
    said, errors = capsys.readouterr()
    assert "integers of 15 of 15 tensors equal" in said
    assert f"certificate: {out}.certificate.json" in said
    assert re.fullmatch(
        r"The output will take about \d+ MiB; the source's tensors take \d+ MiB.\n"
        r"(llama.cpp has no [^\n]+\n)?", errors
    )  # fmt: skip
    assert left(tmp_path) == ["m.gguf", "m.gguf.certificate.json"]
    found = json.loads((tmp_path / "m.gguf.certificate.json").read_text())
    assert found["passed"] is True
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert found["files"] == {"m.gguf": {"nbytes": out.stat().st_size, "sha256": digest}}
    assert set(found["integers"].values()) == {True}
    assert found["greedy_tokens"]["compared"] == 27
    assert [len(p) for p in found["prompts"]] == [6, 21, 150]
    assert [len(t) for t in found["greedy"]] == [9, 9, 9]
    assert found["kl"]["mean"] <= found["kl"]["allowed"] < 0.01
    assert ({"llama-cpp-python", "gguf"} if gguf_run.has_llama_cpp() else {"gguf"}) <= set(
        found["libraries"]
    )
    assert found["machine"]["cores"] >= 1
    own = "llama.cpp" if gguf_run.has_llama_cpp() else "edgeq's own reference"
    assert found["runtime"].startswith(own)

    assert main(["validate", str(out), "--against", str(tiny)]) == 0
    assert "passed" in capsys.readouterr().out
    assert main(["validate", str(out), "--against", str(tiny), "--format", "json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["integers"] == found["integers"]
    assert again["greedy"] == found["greedy"]


def test_json_is_the_certificate(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["convert", str(tiny), "--to", "gguf", "-o", str(tmp_path / "m.gguf")]
    assert main([*args, "--format", "json", "--steps", "3", "-c", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nbytes"] == (tmp_path / "m.gguf").stat().st_size
    assert found["options"]["context"] == 100
    kept = json.loads((tmp_path / "m.gguf.certificate.json").read_text())
    assert {key: found[key] for key in kept} == kept
    # the file says itself how long its cache is
    assert main(["validate", str(tmp_path / "m.gguf"), "--against", str(tiny)]) == 0


def test_without_validation(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["convert", str(tiny), "--to", "gguf", "-o", str(tmp_path / "m.gguf"), "--no-validate"]
    assert main([*args]) == 0
    assert "not validated" in capsys.readouterr().out
    assert left(tmp_path) == ["m.gguf"]


def test_a_float_source_with_a_preset(tmp_path: Path) -> None:
    made = convert(DEMO, "gguf", tmp_path / "m.gguf", preset="w4-g32", threads=1, steps=2)
    assert made.certificate is not None
    assert len(made.certificate["integers"]) == 36
    assert made.nbytes < 2.3e6
    assert left(tmp_path) == ["m.gguf", "m.gguf.certificate.json"]


def test_a_float_source_without_one_stays_float(tmp_path: Path) -> None:
    made = convert(DEMO, "gguf", tmp_path / "m.gguf", threads=1, steps=2)
    assert made.certificate is not None
    assert made.certificate["integers"] == {}
    assert made.certificate["precision"] == ("float16" if gguf_run.has_llama_cpp() else "float32")
    assert made.nbytes > 6e6


def test_an_output_that_is_there(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("mine")
    args = ["convert", str(tiny), "--to", "gguf", "-o", str(out)]
    assert main(args) == 1
    assert "already exists; give another --output, or --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main([*args, "--force"]) == 0
    assert out.stat().st_size > 10000
    out.unlink()
    # nor is a certificate written over unasked
    assert main(args) == 1
    assert "m.gguf.certificate.json already exists" in capsys.readouterr().err
    assert left(tmp_path) == ["m.gguf.certificate.json"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--to", "gguff", "-o", "m.gguf"], 2, "'gguff' is not one of 'ort', 'genai'"),
        (["--to", "gguf"], 2, "Missing option '-o'"),
        (["-o", "m.gguf"], 2, "Missing option '--to'"),
        (["--to", "gguf", "-o", "no/where/m.gguf"], 1, "the folder of no/where/m.gguf does not"),
        (["--to", "gguf", "-o", "m.gguf", "--set", "x"], 2, "write NAME=VALUE"),
        (["--to", "gguf", "-o", "m.gguf", "--set", "x=1"], 1, "a GGUF file does not store x"),
        (["--to", "gguf", "-o", "m.gguf", "--kv", "int8"], 1, "a GGUF file does not store kv"),
        (["--to", "gguf", "-o", "m.gguf", "--preset", "w4-g33"], 1, "group_size is 33"),
        (["--to", "gguf", "-o", "m.gguf", "--preset", "w4-g32"], 1, "already quantized"),
        (["--to", "gguf", "-o", "m.gguf", "--max-ram", "1M"], 1, "MB are allowed; allow"),
    ],
)
def test_convert_refuses_wrong_options(
    args: list[str],
    code: int,
    words: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(tiny), *args]) == code
    said, errors = capsys.readouterr()
    assert words in errors
    assert "Traceback" not in errors
    assert not said
    assert left(tmp_path) == []


def test_what_validate_refuses(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").write_text("GGUF and no more")
    for args, words in (
        ([str(tmp_path / "none.gguf"), "--against", str(tiny)], "does not exist"),
        ([str(tmp_path / "m.gguf")], "give it as --against MODEL"),
        ([str(tmp_path / "m.gguf"), "--against", str(tiny)], "edgeq reads 2 and 3"),
        ([str(tiny), "--against", str(tiny)], "is unknown; name it with --target, one of ort"),
    ):
        assert main(["validate", *args]) == 1
        errors = capsys.readouterr().err
        assert words in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("target", "packages"),
    [
        ("genai", ["onnxruntime_genai"]),
        ("genai", ["onnx", "onnxruntime"]),
        ("litertlm", ["ai_edge_litert", "litert_lm_builder"]),
        ("tflite", ["flatbuffers"]),
        ("coreml", ["coremltools"]),
        ("ort", ["onnx"]),
    ],
)
def test_missing_packages_are_named_before_the_work(
    target: str, packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once, by the extra of what was asked, before the source is even opened."""
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'edgeq\[{target}\]'") as caught:
        convert(tmp_path / "nothing.edgeq", target, tmp_path / "m")
    assert all(repr(package) in str(caught.value) for package in packages)
    assert left(tmp_path) == []


@pytest.fixture
def _no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    gguf_run.has_llama_cpp.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    yield
    gguf_run.has_llama_cpp.cache_clear()


@pytest.mark.usefixtures("_no_llama_cpp")
def test_without_llama_cpp_a_file_is_made_and_computed_by_the_reference(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.gguf"
    assert main(["convert", str(tiny), "--to", "gguf", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "llama.cpp was not run, as llama-cpp-python is not installed" in said
    assert "integers of 15 of 15 tensors equal" in said
    found = json.loads((tmp_path / "m.gguf.certificate.json").read_text())
    assert "llama.cpp was not run" in found["note"]
    assert found["runtime"] == "edgeq's own reference, reading the file back"
    assert found["greedy_tokens"]["equal"] == found["greedy_tokens"]["compared"]
    assert main(["validate", str(out), "--against", str(tiny)]) == 0


@pytest.mark.usefixtures("_no_llama_cpp")
def test_without_the_gguf_package_a_file_is_made_and_compared(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    made = convert(tiny, "gguf", tmp_path / "m.gguf")
    assert made.certificate is not None
    assert made.certificate["integers_equal"] == "15 of 15"
    assert made.certificate["runtime"] == ""
    assert "computed" not in made.certificate["note"]


def test_memory_that_is_not_enough(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"takes \d+ MB of memory, 30 MB are allowed"):
        convert(tiny, "gguf", tmp_path / "m.gguf", max_ram=30_000_000)
    convert(tiny, "gguf", tmp_path / "m.gguf", max_ram=4_000_000_000, validate=False)


def test_convert_on_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    """The system itself refuses to let a file grow past 20 kB."""
    code = "import sys; from edgeq.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(tiny), "--to", "gguf",
         "-o", str(tmp_path / "m.gguf")],
        capture_output=True, text=True, check=False, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: no room for" in done.stderr
    assert "Traceback" not in done.stderr
    assert left(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="needs users")
def test_a_folder_of_somebody_else(tiny: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        model = load(tiny)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(EdgeqError, match="cannot be written"):
                # another user may not be able to read where the packages lie
                convert(model, "gguf", folder / "m.gguf", validate=False)
        finally:
            if root:
                os.seteuid(0)
        assert left(folder) == []


def test_what_computes_something_else_is_not_kept(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A converter with a fault: the old output stays, the tensor is named, nothing is left."""
    right = gguf_decoder.pack_blocks

    def wrong(*args: Any) -> Any:
        raw = right(*args)
        raw[0, 5] ^= 16
        return raw

    out = tmp_path / "m.gguf"
    out.write_text("mine")
    monkeypatch.setattr(gguf_decoder, "pack_blocks", wrong)
    assert main(["convert", str(tiny), "--to", "gguf", "-o", str(out), "--force"]) == 1
    errors = capsys.readouterr().err
    assert "does not compute what its source does and was deleted" in errors
    assert "tensor model.embed_tokens.weight, row 0, group 0: 1 of " in errors
    assert out.read_text() == "mine"
    assert left(tmp_path) == ["m.gguf"]
    # kept on request, and found again
    assert main(["convert", str(tiny), "--to", "gguf", "-o", str(out), "--force",
                 "--no-validate"]) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["validate", str(out), "--against", str(tiny)]) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert "tensor model.embed_tokens.weight, row 0, group 0" in said
    assert main(["validate", str(out), "--against", str(tiny), "--format", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["tensor_faults"][0]["name"] == "model.embed_tokens.weight"


def test_an_interrupt_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(label: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny, "gguf", tmp_path / "m.gguf", progress=interrupt)
    assert left(tmp_path) == []


def test_names_that_are_none(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown target 'tflit'; did you mean 'tflite'"):
        convert(tiny, "tflit", tmp_path / "m")
    with pytest.raises(UsageError, match="which cannot be overwritten"):
        convert(tiny, "gguf", "/")
    for target, ending in (("litertlm", ".litertlm"), ("coreml", ".mlpackage")):
        with pytest.raises(
            UsageError, match=f"output must end in {ending}, but .*; use .*{ending}"
        ):
            convert(tiny, target, tmp_path / "m")


def test_what_force_would_delete_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder, pipe = tmp_path / "letters", tmp_path / "pipe.gguf"
    folder.mkdir()
    (folder / "dear.txt").touch()
    with pytest.raises(UsageError, match="a folder with other files"):
        convert(tiny, "ort", folder, force=True)
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="is a device or a pipe"):
        convert(tiny, "gguf", pipe, force=True)
    assert left(tmp_path) == ["letters", "pipe.gguf"]
    assert left(folder) == ["dear.txt"]
    assert pipe.is_fifo()


def test_a_floating_point_model_has_no_integers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config("qwen3", hidden=64, head_dim=16, context=256)
    artifact.save(random_model(config), tmp_path / "f.edgeq")
    args = ["--to", "gguf", "-o", str(tmp_path / "f.gguf")]
    assert main(["convert", str(tmp_path / "f.edgeq"), *args]) == 0
    said = capsys.readouterr().out
    assert "validated in " in said
    assert "integers" not in said


def test_a_folder_has_its_certificate_inside(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "m"
    made = convert(tiny, "ort", out, steps=2, threads=1)
    assert left(tmp_path) == ["m"]
    assert "certificate.json" in left(out)
    assert made.certificate is not None
    assert set(made.certificate["files"]) == {"m/model.onnx", "m/model.onnx.data"}
    (out / "mine").touch()
    convert(tiny, "ort", out, steps=2, threads=1, force=True)
    assert "mine" not in left(out)


def test_companions_come_along(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    made = convert(tiny, "ort", tmp_path / "m.onnx", steps=2, threads=1)
    names = ["m.onnx", "m.onnx.certificate.json", "m.onnx.data"]
    assert left(tmp_path) == names
    assert made.nbytes == sum((tmp_path / n).stat().st_size for n in names if "cert" not in n)
    (tmp_path / "m.onnx").unlink()
    with pytest.raises(UsageError, match=r"m\.onnx\.certificate\.json already exists"):
        convert(tiny, "ort", tmp_path / "m.onnx", steps=2, threads=1)
    assert left(tmp_path) == names[1:]
