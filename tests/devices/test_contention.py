"""Measurements on a busy machine say so, and figures beyond the machine are marked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from edgeq.cli import main
from edgeq.cli.profile import run_figures
from edgeq.core.cpu import available_cores, cache_bytes
from edgeq.devices.contention import Contention, Watch
from edgeq.model.artifact import save
from edgeq.profiling.document import read
from edgeq.profiling.limits import bandwidth_doubt, throughput_doubt
from edgeq.profiling.summary import by_operation, summary
from edgeq.reporting.tables import machine
from tests.families import quantized, random_model, tiny_config
from tests.profiling.test_document import handmade

LINUX = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux has /proc/stat")
TICK = 1 / os.sysconf("SC_CLK_TCK")


@contextmanager
def busy_neighbors(count: int) -> Iterator[None]:
    """Processes that do nothing but use the processor."""
    spin = "import time; print('on', flush=True); end = time.time() + 120\n"
    spin += "while time.time() < end: pass"  # not forever, should this process be killed
    started = [
        subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.fixture
def one_core() -> Iterator[None]:
    """This process and its neighbors share one core, so that a single neighbor is enough."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def counters(root: Path, busy_s: float, stolen_s: float = 0, throttled_s: float = 0) -> Path:
    """A /proc and /sys whose first core that this process may use was busy for so long."""
    core = min(os.sched_getaffinity(0))
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "sys/fs/cgroup/jobs").mkdir(parents=True, exist_ok=True)
    ticks = [round(seconds / TICK) for seconds in (busy_s, stolen_s)]
    (root / "proc/stat").write_text(
        f"cpu  9 9 9 9 9 9 9 9 9 9\ncpu{core} {ticks[0]} 0 0 500 70 0 0 {ticks[1]} 0 0\n"
        f"cpu{max(os.sched_getaffinity(0)) + 1} {999 * busy_s:.0f} 0 0 0 0 0 0 0 0 0\nintr 5\n"
    )
    (root / "proc/loadavg").write_text("1.50 1.0 1.0 1/100 7\n")
    (root / "proc/self/cgroup").write_text("4:memory:/x\n0::/jobs\n")
    (root / "sys/fs/cgroup/jobs/cpu.stat").write_text(
        f"usage_usec 1\nnr_throttled 3\nthrottled_usec {throttled_s * 1e6:.0f}\n"
    )
    return root


@LINUX
def test_the_kernels_counters_are_compared(tmp_path: Path) -> None:
    watch = Watch(counters(tmp_path, 10, 1, 2))
    time.sleep(0.3)
    counters(tmp_path, 12, 1.5, 2.03)
    found = watch.stop()
    # what this process used itself meanwhile is subtracted
    assert 1.5 <= found.other_cores * found.seconds <= 2.01
    assert found.stolen_cores * found.seconds == pytest.approx(0.5, abs=2 * TICK)
    assert found.paused_share == pytest.approx(0.03 / found.seconds)
    assert found.load_before == 1.5
    assert found.cores == available_cores()


@LINUX
def test_a_moment_says_nothing(tmp_path: Path) -> None:
    found = Watch(counters(tmp_path, 10)).stop()
    assert (found.other_cores, found.warning()) == (None, None)


def test_where_nothing_is_known_nothing_is_said(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    time.sleep(0.25)
    found = watch.stop()
    assert (found.other_cores, found.stolen_cores, found.paused_share) == (None, None, None)


@pytest.mark.parametrize(
    ("found", "threads", "words"),
    [
        (Contention(9, 4, other_cores=0.2), 4, None),
        (Contention(9, 4, other_cores=0.5), 4, "other programs used 0.5 of 4 cores"),
        (Contention(9, 4, other_cores=0.5), 2, None),  # enough cores are left
        (Contention(9, 4, other_cores=1.5), 2, "other programs used 1.5 of 4 cores"),
        (Contention(9, 1, other_cores=0.6), 1, "other programs used 0.6 of 1 core."),
        (Contention(9, 4, 0.0, stolen_cores=0.4), 4, "the hypervisor took 10 % of"),
        (Contention(9, 4, 0.0, 0.01, paused_share=0.3), 4, "CPU limit paused it 30 % of the time"),
        (Contention(9, 4, load_before=3.0), 4, "load average before was 3.0 on 4 cores"),
        (Contention(9, 4, 0.0, load_before=9.0), 4, None),  # the counters know better
    ],
)
def test_what_is_worth_a_warning(found: Contention, threads: int, words: str | None) -> None:
    warning = found.warning(threads)
    assert (words or "") in (warning or "")
    assert (warning is None) == (words is None)
    assert Contention.from_json(json.loads(json.dumps(found.to_json()))) == found


@LINUX
@pytest.mark.usefixtures("one_core")
def test_real_neighbors_are_seen() -> None:
    with busy_neighbors(1):
        watch = Watch()
        time.sleep(1.0)
        warning = watch.stop().warning()
    assert warning is not None
    assert "other programs used" in warning


@LINUX
@pytest.mark.usefixtures("one_core")
def test_profile_and_bench_begin_with_the_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.edgeq"
    save(quantized(random_model(tiny_config("llama")), "w4-g32"), path)
    model = str(path)
    kept = tmp_path / "run.json"
    run = ["profile", model, "-p", "4", "-n", "8", "-t", "1", "--backend", "numpy",
           "--sustained", "0.5s", "--no-operations", "-o", str(kept)]  # fmt: skip
    bench = ["bench", model, "-p", "0", "-n", "32", "-t", "1", "--backend", "numpy", "-r", "20"]
    with busy_neighbors(1):
        assert main(run) == 0
        shown, _ = capsys.readouterr()
        assert main(bench) == 0
        table, _ = capsys.readouterr()
        assert main([*bench, "--format", "json"]) == 0
        out, err = capsys.readouterr()
    assert shown.startswith("Warning: This machine was busy during the measurement: ")
    found = read(kept).contention
    assert found is not None
    assert (found.other_cores or 0) > 0.25
    assert table.startswith("Warning: This machine was busy during the measurement: ")
    (row,) = json.loads(out)
    assert "other programs used" in row["warning"]
    assert err.startswith("Warning: This machine was busy")


# Figures beyond the machine


def test_a_bandwidth_beyond_memory_is_no_fact() -> None:
    assert bandwidth_doubt(None, 10**9) is None
    assert bandwidth_doubt(100.4, 10**9) is None
    assert "measured while other programs used 3.0 of 4 cores" in str(
        bandwidth_doubt(180.0, 10**9, ["other programs used 3.0 of 4 cores"])
    )
    assert "which cannot be" in str(bandwidth_doubt(180.0, 10**15))
    caches = cache_bytes()
    if caches is not None:
        assert "fit in the processor's caches" in str(bandwidth_doubt(180.0, caches))
    assert throughput_doubt(99.0) is None
    assert "peak as measured here, which cannot be" in str(throughput_doubt(101.0))


def test_a_profile_marks_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    slow = handmade([[40, 40], [40, 40], [40, 40]])  # 25 GB/s of 50
    figures = summary(slow, slow.runs[0])
    assert set(figures["suspect"].values()) == {None}
    assert "*" not in run_figures(figures)
    fast = handmade([[10, 10], [10, 10], [10, 10]])  # 100 GB/s of 50
    figures = summary(fast, fast.runs[0])
    assert figures["suspect"]["gb_per_s"]
    assert "100.00* GB/s, 200* % of what this machine reads (* more than memory" in " ".join(
        run_figures(figures).split()
    )
    disturbed = Contention(9.0, 2, other_cores=1.9).to_json()
    fast = replace(fast, environment={**fast.environment, "limits_contention": disturbed})
    assert "other programs used 1.9 of 2 cores, and is too low" in str(
        summary(fast, fast.runs[0])["suspect"]["gb_per_s"]
    )
    busy = replace(fast, environment={**fast.environment, "contention": disturbed})
    assert machine(busy)[0][0] == "warning"
    assert all(name != "warning" for name, _ in machine(fast))


def test_caches_are_counted_once(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    core = min(allowed)
    sizes = ((0, "Data", 1, "48K"), (1, "Instruction", 1, "64K"), (2, "Unified", 2, "2048K"),
             (3, "Unified", 3, "30M"))  # fmt: skip
    for index, kind, level, size in sizes:
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/cache/index{index}"
        folder.mkdir(parents=True)
        shared = str(core) if level < 3 else "0-63"
        for name, text in (("type", kind), ("level", level), ("size", size),
                           ("shared_cpu_list", shared)):  # fmt: skip
            (folder / name).write_text(f"{text}\n")
    assert cache_bytes(tmp_path) == 30 << 20
    assert cache_bytes(tmp_path / "none") is None


def test_only_an_operation_faster_than_memory_is_marked() -> None:
    from edgeq.profiling.operations import Operation, Phase
    from edgeq.profiling.summary import beyond_memory

    made = handmade([[10], [10]])
    rows = (
        Operation(0, "down", "", 1, (1_000_000,), 40_000_000),
        Operation(None, "head", "", 1, (1_000_000,), 60_000_000),
    )
    phase = Phase("decode", 1, rows, (2_000_000,))
    marked = {r["op"]: beyond_memory(made, made.runs[0], r) for r in by_operation(phase)}
    assert marked == {"head": True, "down": False, "(outside)": False}
