"""What is on the disk after a run that did not end well: with real signals and full disks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeq import quantize
from edgeq.core.errors import EdgeqError
from edgeq.model.artifact import save
from tests.families import random_model, tiny_config
from tests.paths import ROOT

# quantizes until a third is written, says so, and waits for what comes
CHILD = """
import sys, time
from edgeq import quantize
from tests.families import random_model, tiny_config

def progress(name, done, total):
    if 3 * done > total:
        print("writing", flush=True)
        for _ in range(600):  # a signal just before a long sleep begins would wait for its end
            time.sleep(0.1)

quantize(random_model(tiny_config("llama")), sys.argv[1], fast=True, progress=progress)
"""


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_never_leaves_a_damaged_target(
    how: signal.Signals, existing: bool, tmp_path: Path
) -> None:
    target = tmp_path / "m.edgeq"
    if existing:
        target.write_bytes(b"the old file")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(target)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    temporaries = [p.name for p in tmp_path.iterdir() if p != target]
    assert len(temporaries) == 1
    assert re.fullmatch(rf"\.m\.edgeq\.{child.pid}-[0-9a-f]{{8}}\.tmp", temporaries[0])
    child.send_signal(how)
    _, errors = child.communicate(timeout=30)
    assert child.returncode != 0
    left = {p.name for p in tmp_path.iterdir()} - {"m.edgeq"}
    if how is signal.SIGINT:
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert not left
    else:
        assert left == set(temporaries)
    assert target.exists() == existing
    if existing:
        assert target.read_bytes() == b"the old file"


LIMITED = """
import resource, sys
from edgeq.core.errors import EdgeqError
from edgeq import quantize
from tests.families import random_model, tiny_config

model = random_model(tiny_config("llama"))
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    quantize(model, sys.argv[1], fast=True)
except EdgeqError as err:
    print(type(err).__name__, err)
"""


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "m.edgeq")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.match(r"EdgeqError no room for .*m\.edgeq: it takes 0\.\d MB \(File too large\); "
                    "free some space", done.stdout)  # fmt: skip
    assert not list(tmp_path.iterdir())


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a file may still be mapped


@pytest.mark.parametrize("reserves", [True, False])
def test_an_artifact_on_a_full_disk(
    reserves: bool, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reserves:  # as on a file system that cannot reserve: the write itself fails
        monkeypatch.delattr(os, "posix_fallocate")
    model = random_model(tiny_config("llama"))
    (full_disk / "m.edgeq").write_bytes(b"old")
    for write in (quantize, save):
        with pytest.raises(EdgeqError, match=r"no room for .*No space left on device"):
            write(model, full_disk / "m.edgeq")
        assert [p.name for p in full_disk.iterdir()] == ["m.edgeq"]
        assert (full_disk / "m.edgeq").read_bytes() == b"old"
