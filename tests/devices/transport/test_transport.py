"""Transports: the same over a local shell and over a real sshd, and nothing left behind."""

from __future__ import annotations

import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeq.core.errors import DeviceError, UsageError
from edgeq.devices.transport import Transport, open_transport
from tests.loopback import OPTIONS, Sshd, Wire, alive, eventually, free_port, small_disk, sshd

EVERY_BYTE = bytes(range(256)) * 5000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    # its sessions begin with what a login script might say
    noise = 'ForceCommand echo "welcome"; printf "no line end"; eval "$SSH_ORIGINAL_COMMAND"'
    home = {"HOME": str(tmp_path_factory.mktemp("home"))}
    with sshd(tmp_path_factory.mktemp("sshd"), home, noise) as running:
        yield running


@pytest.fixture
def reach(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Sshd:
    monkeypatch.setenv(OPTIONS, server.options())
    return server


@pytest.fixture(params=["local", "ssh"])
def there(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Transport, Path]:
    """A transport, and the folder in which it makes its own."""
    if request.param == "local":
        (tmp_path / "far").mkdir()
        return open_transport(f"local:{tmp_path}/far"), tmp_path / "far"
    server: Sshd = request.getfixturevalue("reach")
    return open_transport(server.where), server.parent


def test_bytes_go_and_come_back(there: tuple[Transport, Path], tmp_path: Path) -> None:
    transport, parent = there
    tree = tmp_path / "it's a tree"
    (tree / "a b").mkdir(parents=True)
    (tree / "a b" / "$c").write_bytes(EVERY_BYTE)
    (tree / "empty").touch()
    seen: list[tuple[str, int, int]] = []
    with transport as far:
        assert Path(far.folder).parent == parent
        assert stat.S_IMODE(Path(far.folder).stat().st_mode) == 0o700
        far.push(tree, "x/tree", lambda *told: seen.append(told))
        far.push(b"content", "y")
        far.pull("x/tree/a b/$c", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == EVERY_BYTE
        far.pull("x/tree/empty", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == b""
        far.remove("x")
        assert [f.name for f in Path(far.folder).iterdir()] == ["y"]
        with pytest.raises(DeviceError, match=r"nothing cannot be brought back: .*No such file"):
            far.pull("nothing", tmp_path / "back")
        with pytest.raises(DeviceError, match="not below"):
            far.push(b"", "../y")
    assert seen[-1] == ("$c", len(EVERY_BYTE), len(EVERY_BYTE))
    assert (tmp_path / "back").read_bytes() == b""
    assert not list(parent.iterdir())


def test_commands_get_their_words_and_give_their_code(there: tuple[Transport, Path]) -> None:
    transport, _ = there
    words = ["two  spaces", "$HOME", "it's", '"', "*", "!x", "a;b", "back\\slash"]
    with transport as far:
        lines: list[str] = []
        code = (
            'import os,sys; print(os.environ["V"]); [print(a) for a in sys.argv[1:]]; sys.exit(3)'
        )
        done = far.run([sys.executable, "-c", code, *words], {"V": "a 'b'"}, lines.append)
        assert done.code == 3
        assert lines == ["a 'b'", *words]
        done = far.run(["sh", "-c", "pwd; echo trouble >&2; kill -9 $$"], None, lines.append)
        assert lines[-1] == far.folder
        assert done.code == 137
        assert "trouble" in done.errors
        assert far.run(["no-such-program"]).code == 127


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("ours")])
def test_what_runs_is_killed_and_removed(
    there: tuple[Transport, Path], error: BaseException | type[BaseException]
) -> None:
    transport, parent = there
    pids: list[int] = []

    def heard(line: str) -> None:
        if line.isdigit():
            pids.append(int(line))
            raise error

    code = "import os,time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises((KeyboardInterrupt, ValueError)), transport as far:
        far.run([sys.executable, "-c", code], on_line=heard)
    assert pids
    assert eventually(lambda: not alive(pids[0]))
    assert not list(parent.iterdir())


def test_a_transport_is_used_in_its_block(there: tuple[Transport, Path]) -> None:
    with pytest.raises(DeviceError, match="with block"):
        there[0].push(b"", "x")


def test_a_full_disk_on_the_device(tmp_path: Path, reach: Sshd) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        for where in (f"local:{disk}", f"{reach.where}{disk}"):
            words = "no space left in .* for models/big .1.2 MiB"
            with pytest.raises(DeviceError, match=words), open_transport(where) as far:
                far.push(EVERY_BYTE, "models/big")
            assert not list(disk.iterdir())
        with open_transport(f"local:{disk}") as far:  # what runs is known on a full disk too
            with pytest.raises(DeviceError, match="no space"):
                far.push(EVERY_BYTE, "big")
            lines: list[str] = []
            code = "import os,time; print(os.getpid(), flush=True)"
            assert far.run([sys.executable, "-c", code], on_line=lines.append).code == 0
        assert not list(disk.iterdir())


def test_no_folder_can_be_made(reach: Sshd) -> None:
    with (
        pytest.raises(DeviceError, match=r"no folder can be made there: .*ssh://127.*/folder"),
        open_transport(f"{reach.where}/no/such/place"),
    ):
        pass


@pytest.mark.parametrize("when", ["run", "push", "pull"])
def test_the_connection_breaks(when: str, reach: Sshd, tmp_path: Path) -> None:
    pids: list[int] = []
    with Wire(reach.port) as wire:

        def heard(line: str) -> None:
            pids.append(int(line))
            wire.cut()

        def break_away() -> None:
            with open_transport(f"ssh://127.0.0.1:{wire.port}") as far:
                far.push(b"x", "x")
                assert len(wire.ends) == 2  # one connection is enough
                if when == "run":
                    code = "import os,time; print(os.getpid(), flush=True); time.sleep(600)"
                    far.run([sys.executable, "-c", code], on_line=heard)
                elif when == "push":
                    far.push(bytes(1 << 24), "y", lambda label, done, total: wire.cut())
                else:
                    wire.cut()
                    far.pull("x", tmp_path / "back")

        with pytest.raises(DeviceError, match=r"connection broke.*removed there as soon as"):
            break_away()
    assert not (tmp_path / "back").exists()
    assert eventually(lambda: not reach.left)
    assert len(pids) == (when == "run")
    assert eventually(lambda: not any(alive(pid) for pid in pids))


def test_the_other_side_falls_silent(reach: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = reach.options(ServerAliveInterval="1", ServerAliveCountMax="1")
    monkeypatch.setenv(OPTIONS, quick)
    with Wire(reach.port) as wire:
        where = f"ssh://127.0.0.1:{wire.port}"
        code = "import time; print(1, flush=True); time.sleep(600)"
        with pytest.raises(DeviceError, match="not responding"), open_transport(where) as far:
            far.run([sys.executable, "-c", code], on_line=lambda line: wire.flow.clear())
        assert reach.left  # it knows of nothing yet
    assert eventually(lambda: not reach.left)


def test_the_connection_breaks_at_the_end(reach: Sshd) -> None:
    with (
        Wire(reach.port) as wire,
        pytest.raises(DeviceError, match="at the very end"),
        open_transport(f"ssh://127.0.0.1:{wire.port}"),
    ):
        wire.cut()
    assert eventually(lambda: not reach.left)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"IdentityFile": "/dev/null"}, "does not accept the key; .*ssh-copy-id -p"),
        ({"HostKeyAlias": "stranger"}, "not known yet; log in once with ssh -p"),
        ({"HostKeyAlias": "changed"}, "has changed.*ssh-keygen -R"),
        ({"ProxyCommand": "false"}, "ssh failed"),
    ],
)
def test_what_ssh_refuses_is_explained(
    change: dict[str, str], words: str, reach: Sshd, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = reach.folder / "known"
    kind, key, *_ = (reach.folder / "key.pub").read_text().split()  # a key, but not the host's
    if "changed" not in known.read_text():
        known.write_text(known.read_text() + f"changed {kind} {key}\n")
    monkeypatch.setenv(OPTIONS, reach.options(**change))
    with pytest.raises(DeviceError, match=words), open_transport(reach.where):
        pass
    assert not reach.left


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1:{port}", "refuses the connection; start its SSH server"),
        ("edgeq-test.invalid", "is unknown; check its name"),
    ],
)
def test_nobody_there(host: str, words: str, reach: Sshd) -> None:
    where = f"ssh://{host.format(port=free_port())}"
    with pytest.raises(DeviceError, match=words), open_transport(where):
        pass


def test_nothing_is_left_here(reach: Sshd, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        with open_transport(reach.where) as far:
            assert far.run(["true"]).code == 0
            assert list(Path(short).iterdir())  # the shared connection
        with pytest.raises(DeviceError), open_transport(f"ssh://127.0.0.1:{free_port()}"):
            pass
        assert not list(Path(short).iterdir())


def test_a_temporary_folder_too_deep_for_a_socket(
    reach: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with open_transport(reach.where) as far:
        assert far.run(["true"]).code == 0


def test_no_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for where, program in (("ssh://pi@host", "ssh"), ("adb://serial", "adb")):
        with pytest.raises(DeviceError, match=f"needs the program '{program}'"):
            open_transport(where).__enter__()


@pytest.mark.parametrize(
    "where",
    ["pi@host", "ssh://", "ssh://-oProxyCommand=x", "ssh://-l@host", "ssh://a:secret@host",
     "ssh://host:port", "adb://-x", "adb://a b", "local:here", "ftp://host"],
)  # fmt: skip
def test_places_that_are_none(where: str) -> None:
    with pytest.raises(UsageError, match=r"ssh://|adb://|local:"):
        open_transport(where)


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("ssh://pi@raspberrypi", ["-l", "pi", "--", "raspberrypi"]),
        ("ssh://Alias", ["--", "Alias"]),
        ("ssh://[fe80::1%eth0]:22", ["-p", "22", "--", "fe80::1%eth0"]),
    ],
)
def test_places_that_are(where: str, parts: list[str]) -> None:
    transport = open_transport(where)
    argv = transport._argv("true", first=True)  # type: ignore[attr-defined]
    transport._disconnect()  # type: ignore[attr-defined]
    assert argv[-1 - len(parts) : -1] == parts
