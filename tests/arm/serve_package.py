"""A package for the Raspberry Pi, installed, checked and served on an emulated board:

    python -m tests.arm.serve_package PACKAGE [BOARD]

It does what the package's install.sh does, and starts its run.sh and healthcheck.sh, but that pip
runs on this machine and fetches the board's wheels: those of the package's requirements.txt, each
by its SHA-256. The checkout is not on the path: edgeq is the package's own wheel. It fails if the
golden tests fail, the server does not answer, or takes more memory than the manifest says.

The memory is that of the emulated program. The emulator's own (its code, and what it translates) is
in the same process; the program's mappings lie below it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.loopback import free_port

HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ROOT = Path(os.environ.get("EDGEQ_ARM") or HOME / "edgeq-arm")
CPUS = {"pi5": "cortex-a76", "pi4": "cortex-a72", "zero2": "cortex-a53"}
GLIBC = range(17, 37)
"""Raspberry Pi OS 12 has glibc 2.36."""
EMULATED = 1 << 44
"""The program's addresses are below; qemu and its libraries are put above by the kernel."""
WAIT = "1800"
"""Seconds that the server may take to answer."""


def install(package: Path) -> Path:
    """The packages of requirements.txt for 64-bit ARM; they are kept for the next run."""
    requirements = (package / "requirements.txt").read_bytes()
    site = ROOT / "packages" / hashlib.sha256(requirements).hexdigest()[:16]
    if not site.exists():
        half = site.with_name(f"{site.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
             "--require-hashes", "--no-compile", "--only-binary=:all:", "--python-version=3.11",
             "--implementation=cp", "--platform=manylinux2014_aarch64", *platforms,
             f"--target={half}", "-r", "requirements.txt"],
            cwd=package, check=True,
        )  # fmt: skip
        half.rename(site)
    return site


def environment(prefix: Path, site: Path, board: str) -> dict[str, str]:
    """Put the board's `python` and `edgeq` where install.sh puts them; gives the settings."""
    place = prefix / "venv" / "bin"
    place.mkdir(parents=True)
    for name, module in (("python", ""), ("edgeq", "-m edgeq")):
        start = f'exec qemu-aarch64 "{ROOT}/system/usr/bin/python3" {module}'
        (place / name).write_text(f'#!/bin/sh\n{start} "$@"\n')
        (place / name).chmod(0o755)
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return kept | {
        "PREFIX": str(prefix), "PORT": str(free_port()), "PYTHONPATH": str(site),
        "PYTHONNOUSERSITE": "1", "QEMU_CPU": CPUS[board],
        "QEMU_LD_PREFIX": str(ROOT / "boards" / board),
        # kept between runs: LLVM takes minutes where it is emulated
        "EDGEQ_CACHE": str(ROOT / "cache" / f"package-{board}"),
    }  # fmt: skip


def emulated_bytes(pid: int) -> int:
    """What the emulated program has in memory."""
    total, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            counts = int(mapping[1], 16) < EMULATED
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def serve(package: Path, settings: dict[str, str]) -> tuple[int, int]:
    """Start the server and ask it; most bytes of the emulated program, and of the process."""
    server = subprocess.Popen([package / "run.sh"], env=settings)
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            most[0] = max(most[0], emulated_bytes(server.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        asked = [package / "healthcheck.sh", "--wait", WAIT, "--ask"]
        subprocess.run(asked, env=settings, check=True)
        for _ in range(3):  # an answer fills caches that the next one needs
            subprocess.run([package / "healthcheck.sh", "--ask"], env=settings, check=True)
        status = Path(f"/proc/{server.pid}/status").read_text()
        process = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10
    finally:
        over.set()
        watching.join()
        server.send_signal(signal.SIGTERM)
        server.wait(120)
    return most[0], process


def main(package: Path, board: str = "pi5") -> None:
    """Install, check and serve."""
    manifest = json.loads((package / "manifest.json").read_text("utf-8"))
    planned = manifest["variants"][0]["memory"][-1]["total_bytes"]
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        settings = environment(Path(folder), install(package), board)
        edgeq = Path(folder) / "venv" / "bin" / "edgeq"
        subprocess.run([edgeq, "warmup"], env=settings, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([edgeq, "package", "--verify", package], env=settings, check=True)
        most, process = serve(package, settings)
    print(
        f"{board}: the server answered, and took {most >> 20} MiB of the {planned >> 20} MiB "
        f"planned ({process >> 20} MiB with the emulator's own)"
    )
    if most > planned:
        sys.exit("it took more memory than the manifest says")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), *sys.argv[2:3])
