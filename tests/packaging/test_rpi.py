"""A Raspberry Pi's package: the wheel, the requirements, the scripts, and a server that answers."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import zipfile
from base64 import urlsafe_b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq._version import __version__
from edgeq.core.cache import cache_home
from edgeq.packaging.build import package
from edgeq.packaging.verify import verify_package
from edgeq.packaging.wheel import write_wheel
from edgeq.runtime.kernels import warmup
from tests.loopback import free_port
from tests.packaging.twice import contents
from tests.paths import ROOT


def test_the_wheel_is_one_and_always_the_same(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    wheel = write_wheel(tmp_path / "a")
    assert wheel.read_bytes() == write_wheel(tmp_path / "b").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = f"edgeq-{__version__}.dist-info"
        rows = list(csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode())))
        assert [row[0] for row in rows] == names
        for name, digest, size in rows[:-1]:
            content = archive.read(name)
            assert urlsafe_b64decode(digest.removeprefix("sha256=") + "=") == (
                hashlib.sha256(content).digest()
            )
            assert int(size) == len(content)
    assert "edgeq/packaging/templates/rpi/run.sh" in names
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_runs_without_the_checkout(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path)
    place = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    program = (
        f"import sys; sys.path[:] = [{str(place)!r}, *(p for p in sys.path if p and "
        f"not p.startswith({str(ROOT)!r} + '/edgeq') and p != {str(ROOT)!r})]; "
        "import edgeq; print(edgeq.__file__); from edgeq.cli import main; "
        "raise SystemExit(main(['package', '--help']))"
    )
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path,
        env=settings,
    )  # fmt: skip
    assert done.stdout.startswith(str(place))


@pytest.mark.parametrize("kind", ["model", "graph"])
def test_requirements_are_pinned_with_hashes_and_wheels_for_the_pi_named(kind: str) -> None:
    text = (ROOT / f"edgeq/packaging/templates/rpi/requirements-{kind}.txt").read_text()
    pins = re.findall(r"^([a-z0-9-]+)==([^ ]+) \\$", text, re.MULTILINE)
    assert {"numpy"} <= {name for name, _ in pins}
    blocks = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)
    wheels = re.findall(r"^# (.*\.whl)$", text, re.MULTILINE)
    assert len(wheels) == len(re.findall("--hash=", text))
    compiled = [wheel for wheel in wheels if not wheel.endswith("none-any.whl")]
    for name in {wheel.split("-")[0] for wheel in compiled}:
        assert any(wheel.startswith(f"{name}-") and "aarch64" in wheel for wheel in compiled), name
    # what the project is tested with is what a Pi gets
    tested = dict(
        line.lower().split("==")
        for line in (ROOT / "tests/constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for name, version in pins:
        assert tested.get(name, version) == version, name


def test_scripts_are_shell_and_nothing_is_left_to_fill(rpi_made: Path) -> None:
    for name in ("install.sh", "run.sh", "healthcheck.sh", "image/pi-gen.sh"):
        subprocess.run(["sh", "-n", rpi_made / name], check=True)
        assert not re.search(r"@[A-Z_]+@", (rpi_made / name).read_text())
    unit = (rpi_made / "tale.service").read_text()
    limits = {key: int(size) for key, size in re.findall(r"(Memory\w+)=(\d+)M", unit)}
    manifest = json.loads((rpi_made / "manifest.json").read_text("utf-8"))
    planned = manifest["variants"][0]["memory"][-1]["total_bytes"] >> 20
    assert planned < limits["MemoryHigh"] < limits["MemoryMax"]


@pytest.mark.parametrize("prefix", ["inside", "{here}/inside", "{here}"])
def test_an_installation_into_the_package_is_refused(prefix: str, rpi: Path) -> None:
    before = contents(rpi)
    settings = os.environ | {"PREFIX": prefix.format(here=rpi), "PYTHON": sys.executable}
    settings["CDPATH"] = str(rpi.parent)
    done = subprocess.run(
        ["./install.sh"], cwd=rpi, env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "lies in this folder" in done.stderr
    assert contents(rpi) == before


def test_cloud_init_restores_the_modes_that_a_boot_partition_lacks(
    rpi: Path, tmp_path: Path
) -> None:
    lines = (rpi / "image/user-data").read_text().splitlines()
    assert lines[0] == "#cloud-config"
    commands = [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    for path in rpi.rglob("*"):
        path.chmod(0o755)
    for command in commands[1:3]:
        subprocess.run(command.replace("/root/tale", str(rpi)), shell=True, check=True)
    report = verify_package(rpi, run=False)
    assert report.passed, report.fault


def test_requirements_name_the_wheel_that_is_there(rpi_made: Path) -> None:
    text = (rpi_made / "requirements.txt").read_text()
    (found,) = re.findall(r"^\./(wheels/.*\.whl) \\\n    --hash=sha256:(\w+)$", text, re.MULTILINE)
    assert hashlib.sha256((rpi_made / found[0]).read_bytes()).hexdigest() == found[1]


@pytest.mark.slow
def test_the_server_of_a_package_answers_within_its_memory(rpi: Path, tmp_path: Path) -> None:
    """`run.sh` and `healthcheck.sh`, with this environment in place of the one on the Pi."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    place = tmp_path / "venv" / "bin"
    place.mkdir(parents=True)
    for name in ("python", "edgeq"):
        script = place / name
        module = "-m edgeq" if name == "edgeq" else ""
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    settings = os.environ | {"PREFIX": str(tmp_path), "PORT": str(free_port())}
    # install.sh compiles the kernels before; compiling takes more memory than serving
    settings |= {"PYTHONPATH": str(ROOT), "EDGEQ_CACHE": str(cache_home())}
    warmup()
    server = subprocess.Popen([rpi / "run.sh"], env=settings, stderr=subprocess.PIPE)
    try:
        done = subprocess.run(
            [rpi / "healthcheck.sh", "--wait", "120", "--ask"], env=settings, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "answers" in done.stdout
        status = Path(f"/proc/{server.pid}/status")
        if status.exists():
            (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
            manifest = json.loads((rpi / "manifest.json").read_text("utf-8"))
            assert int(peak) * 1024 <= manifest["variants"][0]["memory"][-1]["total_bytes"]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    gone = subprocess.run([rpi / "healthcheck.sh"], env=settings, capture_output=True, check=False)
    assert gone.returncode == 1


def test_a_graphs_program_needs_onnxruntime_and_numpy_alone(
    small_graph: Path, samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    package(small_graph, "rpi", tmp_path / "out", data=samples)
    assert "edgeq" not in (tmp_path / "out/run.py").read_text()
    purelib = str(Path(np.__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {purelib!r}); import runpy; " + (
        "sys.argv = ['run.py', '--check']; runpy.run_path('run.py', run_name='__main__')"
    )
    command = [sys.executable, "-I", "-S", "-B", "-c", program]
    done = subprocess.run(
        command, cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the golden tests passed"
    golden = tmp_path / "out/golden/run2-out0.bin"
    golden.write_bytes(bytes(len(golden.read_bytes())))
    done = subprocess.run(
        command, cwd=tmp_path / "out", capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "differs by" in done.stderr


@pytest.mark.parametrize("name", ["a", 'x"""\n`import os`\\ $y'])
def test_the_example_of_a_readme_runs_whatever_inputs_are_called(name: str, tmp_path: Path) -> None:
    """A graph with a float and an integer input, and the steps of its README as they stand."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    weights = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    graph = make.make_graph(
        [
            make.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            make.make_node("Add", [name, "rows"], ["sum"]),
            make.make_node("Softmax", ["sum"], ["out"], axis=-1),
        ],
        "two",
        [
            make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 16]),
            make.make_tensor_value_info("ids", onnx.TensorProto.INT64, [1]),
        ],
        [make.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, 16])],
        [onnx.numpy_helper.from_array(weights, "table")],
    )
    opset = [make.make_opsetid("", 17)]
    onnx.save(make.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "two.onnx")
    folder = tmp_path / "a folder"
    package(tmp_path / "two.onnx", "rpi", folder)
    readme = (folder / "README.md").read_text("utf-8")
    (example,) = re.findall(r"```\n( *import numpy\n.*?)```", readme, re.DOTALL)
    program = textwrap.dedent(example) + "print(outputs['out'].shape)\n"
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], cwd=folder, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "(1, 16)", done.stderr
    assert verify_package(folder).passed
