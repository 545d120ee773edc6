"""What works, what does not, and the fix."""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from edgeq.cli import main
from edgeq.devices import doctor, installed
from edgeq.devices.detect import Detected, Throttle
from edgeq.devices.doctor import Check, checks, usable
from edgeq.devices.installed import EXTRAS, PURPOSES, REQUIRED, State, unavailable
from edgeq.devices.profile import Cluster
from tests.paths import ROOT

GIB = 1 << 30
FINE = Detected(
    title="A board", soc="A chip", arch="aarch64",
    clusters=(Cluster("Cortex-A76", 4, 2.4), Cluster("Cortex-A55", 4, 1.8)), threads=8,
    isa=("asimdhp", "dotprod", "neon"), ram_bytes=8 * GIB, available_bytes=7 * GIB,
    swap_bytes=GIB, governors={"policy0": "performance"}, temperatures_c={"cpu": 45.5},
    throttle=Throttle((), ()),
)  # fmt: skip


def examined(found: Detected, root: Path) -> dict[str, Check]:
    return {check.name: check for check in checks(found, imports=False, root=root)}


def root_of(tmp_path: Path, load: str = "0.10", pages: str = "always [madvise] never") -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/loadavg").write_text(f"{load} 0.1 0.1 1/200 300\n")
    folder = tmp_path / "sys/kernel/mm/transparent_hugepage"
    folder.mkdir(parents=True)
    (folder / "enabled").write_text(pages)
    return tmp_path


def test_a_machine_without_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_cores", lambda: 8)
    found = examined(FINE, root_of(tmp_path))
    troubles = [check for check in found.values() if check.ok is False]
    assert not troubles
    assert usable(found.values())
    assert "use -t 4" in found["threads"].found
    assert "the other 4 cores are slow" in found["threads"].fix
    assert found["throttling now"].found == "none"
    assert found["governor"].found == "performance"


@pytest.mark.parametrize(
    ("change", "name", "ok", "words", "fix"),
    [
        ({"governors": {"policy0": "powersave"}}, "governor", False, "powersave", "tee /sys"),
        ({"governors": {"policy0": "ondemand"}}, "governor", True, "ondemand", "steady"),
        ({"governors": {}}, "governor", None, "not set", ""),
        ({"throttle": Throttle(("under-voltage",), ())}, "throttling now", False,
         "under-voltage", "power supply"),
        ({"throttle": Throttle((), ("throttled", "soft temperature limit"))},
         "throttling since boot", False, "throttled, soft", "heat sink"),
        ({"throttle": None}, "throttling", None, "cannot be determined on this system", ""),
        ({"temperatures_c": {"cpu": 45.0, "soc": 86.2}}, "temperature", False, "86.2 °C", "fan"),
        ({"temperatures_c": {}}, "temperature", None, "no sensor", ""),
        ({"isa": ("neon",)}, "integer products", None, "no dotprod", "no fix needed"),
        ({"isa": ("avx2", "fma")}, "integer products", None, "no VNNI", "4 bits"),
        ({"isa": ("avx512vnni",)}, "integer products", True, "avx512vnni", ""),
        ({"isa": ()}, "integer products", None, "none that edgeq uses", ""),
        ({"available_bytes": GIB // 4}, "memory", False, "0.25 of 8.00 GiB", "edgeq plan"),
        ({"available_bytes": None}, "memory", None, "cannot be determined", ""),
        ({"swap_bytes": 0}, "swap", None, "none", ""),
        ({"swap_bytes": 0, "ram_bytes": GIB // 2, "available_bytes": GIB // 2}, "swap", None,
         "none", "zram"),
        ({"swap_bytes": None}, "swap", None, "cannot be determined", ""),
        ({"cgroup_bytes": GIB // 4, "sources": {"cgroup_bytes": "/sys/x"}}, "control group", False,
         "0.25 GiB (/sys/x)", "container's memory limit"),
        ({"cgroup_bytes": 2 * GIB, "sources": {"cgroup_bytes": "/sys/x"}}, "control group", True,
         "2.00 GiB", ""),
        ({"threads": 64}, "threads", None, "this process may use 8", "taskset"),
        ({"clusters": (), "threads": 8}, "threads", True, "8 cores", ""),
    ],
)  # fmt: skip
def test_each_trouble_has_its_mend(
    change: dict[str, object], name: str, ok: bool | None, words: str, fix: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(doctor, "available_cores", lambda: 8)
    check = examined(replace(FINE, **change), root_of(tmp_path))[name]  # type: ignore[arg-type]
    assert check.ok is ok
    assert words in check.found
    assert fix in check.fix
    assert bool(check.fix) == bool(fix)


def test_a_busy_machine_without_huge_pages(tmp_path: Path) -> None:
    found = examined(FINE, root_of(tmp_path, load="7.5", pages="always madvise [never]"))
    assert found["load"].ok is False
    assert "too slow" in found["load"].fix
    assert found["huge pages"].ok is False
    assert "madvise" in found["huge pages"].fix


def test_where_proc_and_sys_are_not(tmp_path: Path) -> None:
    found = examined(FINE, tmp_path)
    assert found["load"].ok is None
    assert found["huge pages"].ok is None


def test_32_bits_are_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "maxsize", 2**31 - 1)
    found = examined(FINE, root_of(tmp_path))
    assert found["system"].ok is False
    assert "64-bit" in found["system"].fix
    assert not usable(found.values())


def test_an_old_python_or_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    assert doctor._python().ok is False
    monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("glibc", "2.19"))
    old = doctor._glibc()
    assert old.ok is False
    assert "2.27" in old.fix
    monkeypatch.setattr(doctor.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    assert "Alpine" in doctor._glibc().fix
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    assert doctor._glibc() == Check("glibc", None, "not used by this system")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    assert doctor._cache(tmp_path / "not" / "there" / "yet").ok
    file = tmp_path / "file"
    file.write_text("")
    assert "EDGEQ_CACHE" in doctor._cache(file / "below").fix


# packages


def states(**changed: State) -> dict[str, State]:
    packages = {*REQUIRED, *(p for extra in EXTRAS.values() for p in extra)}
    return {p: changed.get(p.replace("-", "_"), State("1.0")) for p in packages}


def by_name(results: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in results}


def test_a_required_package_that_is_missing_is_fatal() -> None:
    found = by_name(doctor._packages(states(numba=State(""))))["required packages"]
    assert found.ok is False
    assert found.needed
    assert found.fix == "pip install --force-reinstall numba"


def test_a_package_built_for_another_processor() -> None:
    found = by_name(doctor._packages(states(onnxruntime=State("1.2", "illegal instruction"))))
    for extra in ("extra ort", "extra genai"):
        assert found[extra].ok is False
        assert "onnxruntime does not import: illegal instruction" in found[extra].found
    assert found["extra gguf"].ok
    assert usable(found.values()), "an extra is not needed"
    broken = by_name(doctor._packages(states(numpy=State("1.2", "illegal instruction"))))
    assert not usable(broken.values())
    assert "numpy: illegal instruction" in broken["required packages"].found


def test_an_extra_that_is_not_installed_names_its_pip_line() -> None:
    found = by_name(doctor._packages(states(gguf=State(""), distributed=State(""))))
    assert found["extra gguf"].ok is None
    assert found["extra gguf"].fix == "pip install 'edgeq[gguf]' to read and write GGUF files"
    assert "dask 1.0; distributed not installed" in found["extra sweep"].found


def test_an_extra_that_cannot_be_had_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    found = by_name(doctor._packages(states(coremltools=State(""))))["extra coreml"]
    assert found.ok is None
    assert not found.fix
    assert "x86-64 Linux only" in found.found


@pytest.mark.parametrize(
    ("extra", "system", "machine", "python", "why"),
    [
        ("coreml", "Linux", "x86_64", (3, 13), ""),
        ("coreml", "Darwin", "arm64", (3, 12), ""),
        ("coreml", "Linux", "x86_64", (3, 14), "3.14"),
        ("coreml", "Linux", "aarch64", (3, 12), "macOS and x86-64 Linux"),
        ("tflite", "Windows", "AMD64", (3, 12), "Windows"),
        ("litertlm", "Darwin", "arm64", (3, 12), "Linux only"),
        ("gguf", "Windows", "AMD64", (3, 14), ""),
    ],
)
def test_which_packages_exist_where(
    extra: str, system: str, machine: str, python: tuple[int, int], why: str
) -> None:
    found = unavailable(extra, system, machine, python)
    assert why in found
    assert bool(found) == bool(why)


def test_the_table_of_extras_is_that_of_the_package() -> None:
    path = ROOT / "pyproject.toml"
    project = tomllib.loads(path.read_text("utf-8"))["project"]
    declared = project["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found = set()
        for line in declared[extra]:
            own = re.match(r"edgeq\[([\w,]+)\]", line)
            if own:
                found |= {p for inner in own[1].split(",") for p in packages(inner)}
            else:
                found.add(re.split(r"[<>=;\s]", line)[0])
        return found

    assert set(EXTRAS) == set(PURPOSES) == set(declared) - {"dev", "all"}
    for extra, listed in EXTRAS.items():
        assert set(listed) == packages(extra), extra
    required = {re.split(r"[<>=;\s]", line)[0] for line in project["dependencies"]}
    assert required <= set(REQUIRED)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("x = 1", ""),
        ("import of_a_package_that_is_not_there", "No module named"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "illegal instruction"),
        ("import os; os.kill(os.getpid(), 15)", "ended by signal 15"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_packages_are_really_imported(
    source: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edgeq_probe.py").write_text(source)
    info = tmp_path / "edgeq_probe-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgeq-probe\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = installed._state("edgeq-probe", imports=True)
    assert found.version == "1.5"
    assert fault in found.fault
    assert bool(found.fault) == bool(fault)
    assert found.works == (not fault)
    (tmp_path / "edgeq_probe.py").unlink()
    sys.path_importer_cache.clear()
    assert installed._state("edgeq-probe", imports=False).fault == "its files are gone"
    assert installed._state("edgeq-not-there", imports=True) == State("")


# the command


def test_doctor_on_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGEQ_KERNEL", raising=False)
    assert main(["doctor", "--quick"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ok  kernel +\S+: the best this processor runs", text, re.MULTILINE)
    assert text.rstrip().endswith("edgeq works on this machine")
    assert main(["doctor", "--quick", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usable"] is True
    assert {"name", "ok", "found", "fix", "needed"} == set(found["checks"][0])
    assert {check["ok"] for check in found["checks"]} <= {True, False, None}


def test_what_makes_edgeq_unusable_is_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    assert main(["doctor", "--quick"]) == 1
    assert "edgeq does not work on this machine" in capsys.readouterr().out


@pytest.mark.slow
def test_the_kernel_is_explained(capfd: pytest.CaptureFixture[str]) -> None:
    import subprocess

    def doctor_with(kernel: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "edgeq", "doctor", "--quick"], capture_output=True, text=True,
            env={**os.environ, "EDGEQ_KERNEL": kernel}, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    code, text = doctor_with("generic")
    assert code == 0
    assert "generic: EDGEQ_KERNEL asks for it" in text
    assert "unset EDGEQ_KERNEL" in text
    code, text = doctor_with("no-such-kernel")
    assert code == 1
    assert "unknown kernel 'no-such-kernel'" in text
