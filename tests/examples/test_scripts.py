"""The scripts in examples/ do what they say, run as a reader would run them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgeq
from edgeq.core.cache import cache_home
from tests.loopback import OPTIONS, sshd
from tests.paths import DEMO, ROOT

EXAMPLES = ROOT / "examples"
SHORT = (
    "quantize_and_generate", "convert_for_a_phone", "profile_on_a_pi", "serve_with_a_tool",
    "evaluate_several",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.content }} {% endfor %}"
    "{% if tools %}{# <tool_call> #}{{ tools[0].function.name }}{% endif %}"
)


def script(folder: Path, name: str, *arguments: object, **variables: str) -> str:
    """What an example prints, run in a folder of its own."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "tale.edgeq"
    edgeq.quantize(DEMO, path, fast=True, threads=1)
    return path


@pytest.mark.parametrize("name", SHORT)
def test_it_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) < 60


def test_quantize_and_generate(tmp_path: Path) -> None:
    said = script(tmp_path, "quantize_and_generate", "--fast", "--tokens", 12)
    assert re.search(r"^tale\.edgeq: \d\.\d\d bits per weight in ", said, re.MULTILINE)
    assert re.search(r"^Once upon a time\S* .+", said, re.MULTILINE)
    assert re.search(r"^\d+ tokens per second$", said, re.MULTILINE)
    assert edgeq.load(tmp_path / "tale.edgeq").config.layers == edgeq.load(DEMO).config.layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "package", "made"),
    [("litertlm", "litert_lm", "tale.litertlm"), ("coreml", "coremltools", "tale.mlpackage"),
     ("gguf", "gguf", "tale.gguf")],
)  # fmt: skip
def test_convert_for_a_phone(artifact: Path, tmp_path: Path, target: str, package: str, made: str
) -> None:  # fmt: skip
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"could not import '{package}'")
    said = script(tmp_path, "convert_for_a_phone", artifact, "--to", target, "--context", 128)
    assert re.match(rf"{target}: phone/{re.escape(made)}, \d\.\d MB in \d+ s\n", said)
    assert "same integers: 36 of 36 matrices" in said
    assert (tmp_path / "phone" / made).exists()


def test_profile_on_a_pi(artifact: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environment = {"EDGEQ_CACHE": str(cache_home()), "HOME": str(home), "OMP_NUM_THREADS": "1"}
    with sshd(tmp_path / "sshd", environment) as there:
        said = script(
            tmp_path, "profile_on_a_pi", there.where, artifact, "-n", 4, "-r", 2, "--python",
            sys.executable, **{OPTIONS: there.options()},
        )  # fmt: skip
        assert there.left == []
    figures = r"first token after \d+\.\d ms, then \d+\.\d tokens per second"
    assert re.search(figures + r" \(planned for Raspberry Pi 5 \(8 GB\): \d+\)", said), said
    assert "report: pi.html" in said
    assert "<html" in (tmp_path / "pi.html").read_text("utf-8")


def test_serve_with_a_tool(tmp_path: Path) -> None:
    for package in ("starlette", "uvicorn", "llguidance", "openai"):
        pytest.importorskip(package)
    shutil.copytree(DEMO, tmp_path / "caller")
    (tmp_path / "caller" / "chat_template.jinja").write_text(TEMPLATE)
    said = script(tmp_path, "serve_with_a_tool", "caller", "Is there room?")
    call = re.match(r"free_space\((system|temporary)\) -> (\{.*\})\n.+", said, re.DOTALL)
    assert call, said
    assert json.loads(call[2])["gigabytes"] >= 0


def test_evaluate_several(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    texts = ["Once upon a time there was a girl", "The sun was warm and the sky was blue"]
    (tmp_path / "lambada.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    said = script(
        tmp_path, "evaluate_several", "model", "--text", DEMO / "heldout.txt", "--task",
        "lambada.jsonl", "--presets", "w8-g32", "w2-g32", "--windows", 1,
    )  # fmt: skip
    rows = [line.split() for line in said.splitlines()[1:]]
    assert [row[0] for row in rows] == ["w8-g32", "w2-g32"]
    assert [float(row[4]) > 0 for row in rows] == [True, True]
    assert float(rows[0][2]) > float(rows[1][2])  # bits
    assert float(rows[0][4]) < float(rows[1][4])  # KL
    assert all(row[6].endswith("%") for row in rows)
