"""adb: the real client and server, and a stand-in for the device (`tests.loopback_adb`).

No Android was at hand: what is shown is that our commands pass through adb as they should, not
that a device has what they need.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeq.core.errors import DeviceError
from edgeq.devices.meters import from_option
from edgeq.devices.transport import open_transport
from edgeq.model.artifact import save
from edgeq.profiling.foreign import Named
from edgeq.profiling.remote import profile_on
from edgeq.profiling.session import Workload
from tests.devices.meters.test_logs import DUMPSYS
from tests.families import quantized, random_model, tiny_config
from tests.loopback import alive, eventually
from tests.loopback_adb import Daemon, adb_server

EVERY_BYTE = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with adb_server(tmp_path_factory.mktemp("adb")) as found:
        yield dict(found)


@pytest.fixture
def device(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Daemon, str, Path]]:
    """A stand-in, where it is, and where its sessions make their folders."""
    for key, value in server.items():
        monkeypatch.setenv(key, value)
    parent = tmp_path / "far"
    parent.mkdir()
    daemon = Daemon({"TMPDIR": str(parent)})
    serial = f"127.0.0.1:{daemon.port}"
    told = subprocess.run(["adb", "connect", serial], capture_output=True, text=True, timeout=30)
    assert "connected to" in told.stdout, told
    yield daemon, f"adb://{serial}", parent
    subprocess.run(["adb", "disconnect", serial], capture_output=True, timeout=30)
    daemon.unplug()


def test_bytes_codes_and_cleaning(device: tuple[Daemon, str, Path], tmp_path: Path) -> None:
    _, where, parent = device
    with open_transport(where) as far:
        far.push(EVERY_BYTE, "a b/x")
        far.pull("a b/x", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == EVERY_BYTE
        lines: list[str] = []
        done = far.run(
            ["sh", "-c", "echo $0; echo no >&2; exit 7", "it's $HOME"], None, lines.append
        )
        assert (done.code, done.last_words, lines) == (7, "no", ["it's $HOME"])
        assert far.run(["sh", "-c", "kill -9 $$"]).code == 137
        far.remove("a b")
        assert not list(Path(far.folder).iterdir())
    assert not list(parent.iterdir())


def test_the_only_device(device: tuple[Daemon, str, Path]) -> None:
    with open_transport("adb://") as far:
        assert far.run(["true"]).code == 0


def test_a_device_that_is_unplugged(device: tuple[Daemon, str, Path]) -> None:
    daemon, where, parent = device
    pids: list[int] = []

    def heard(line: str) -> None:
        pids.append(int(line))
        daemon.unplug()

    code = "import os,time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(DeviceError, match="the connection broke"), open_transport(where) as far:
        far.run([sys.executable, "-c", code], on_line=heard)
    assert eventually(lambda: not list(parent.iterdir()))
    assert eventually(lambda: not alive(pids[0]))


def test_devices_that_are_not_there(
    server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in server.items():
        monkeypatch.setenv(key, value)
    for where, words in (
        ("adb://nothing", "no such device; `adb devices` shows them"),
        ("adb://", "no device; allow USB debugging"),
    ):
        with pytest.raises(DeviceError, match=words):
            open_transport(where).__enter__()


def test_a_profile(device: tuple[Daemon, str, Path], tmp_path: Path) -> None:
    _, where, parent = device
    artifact = tmp_path / "tiny.edgeq"
    save(quantized(random_model(tiny_config("llama")), "w4-g32"), artifact)
    made = profile_on(
        open_transport(where), [Named(artifact, None)], Workload(6, 4, repeats=2),
        python=sys.executable, backend="numpy", operations=False,
    )  # fmt: skip
    assert [len(s.step_ns) for s in made.runs[0].timed] == [4, 4]
    with pytest.raises(DeviceError, match=r"Android has no Python.*sshd.*adb forward"):
        profile_on(
            open_transport(where), [Named(artifact, None)], Workload(), python="no-such-python"
        )
    assert not list(parent.iterdir())


def test_the_battery_of_a_phone_is_a_meter(
    device: tuple[Daemon, str, Path], tmp_path: Path
) -> None:
    daemon, where, _ = device
    serial = where.removeprefix("adb://")
    with pytest.raises(DeviceError, match="dumpsys"):
        from_option(f"adb:{serial}")  # a stand-in without Android's command
    programs = tmp_path / "bin"
    programs.mkdir()
    counter = tmp_path / "counter"
    counter.write_text("3270000")
    script = f'#!/bin/sh\n[ "$1" = battery ] || exit 9\nsed "s/COUNTER/$(cat {counter})/" <<EOF\n'
    told = DUMPSYS.replace("3270000", "COUNTER")
    (programs / "dumpsys").write_text(f"{script}{told}EOF\n")
    (programs / "dumpsys").chmod(0o755)
    daemon.environment["PATH"] = f"{programs}:{daemon.environment['PATH']}"
    subprocess.run(["adb", "disconnect", serial], capture_output=True, timeout=30)
    subprocess.run(["adb", "connect", serial], capture_output=True, timeout=30)
    meter = from_option(f"adb:{serial}")
    assert meter.read().values == {"battery": 0}
    counter.write_text("3269000")  # 1 mAh at 4 V
    assert meter.read().values == {"battery": pytest.approx(14.4)}


def test_a_phone_that_is_not_there(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in server.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(DeviceError, match=r"nobody:1.* not found"):
        from_option("adb:nobody:1")
