"""edgeq and llama.cpp with one and the same GGUF file: speed, bytes a second, and memory.

    python same_file.py model-f16.gguf [more.gguf ...] --threads 1 2 -o result.json

Both read the file as it is. Runs alternate, and a ratio is that of the medians; the lowest and the
highest are of pairs of neighbors. ``--clock cpu`` compares processor time with one thread, which is
what tells on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Worker
from setting import HERE, ROOT, Others, home, machine, peers_python

PROMPT, GENERATED = 512, 64
CONTEXT = PROMPT + GENERATED
RUNTIMES = ("edgeq", "llama.cpp")


def worker(runtime: str, peers: str, file: Path, clock: str) -> Worker:
    """A runtime that will open one file."""
    script, python = ("edgeq_worker.py", sys.executable)
    if runtime != "edgeq":
        script, python = "llamacpp_worker.py", peers
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    log = home() / f"{runtime}-{file.name}.log"
    return Worker(runtime, [python, str(HERE / script)], log,
                  {"PYTHONPATH": path, "PEERS_CLOCK": clock})  # fmt: skip


def opening(runtime: str, file: Path, threads: int, cache: str) -> dict[str, Any]:
    """The request that makes a session."""
    more = {"cache": {"f16": "f16", "q8_0": "int8"}[cache]}
    if runtime != "edgeq":
        more = {"cache": cache, "flash": "auto" if cache == "f16" else "on"}
    return {"session": f"t{threads}", "model": "file", "path": str(file), "threads": threads,
            "context": CONTEXT, **more}  # fmt: skip


def compare(file: Path, options: argparse.Namespace, peers: str) -> list[dict[str, Any]]:
    """A row for every number of threads and kind of work."""
    rows: list[dict[str, Any]] = []
    for threads in options.threads:
        with ExitStack() as stack:
            workers = {
                name: stack.enter_context(worker(name, peers, file, options.clock))
                for name in RUNTIMES
            }
            session, logits = f"t{threads}", []
            for name, process in workers.items():
                process.ask("open_session", **opening(name, file, threads, options.cache))
                path = home() / f"logits-{name}.npy"
                process.ask("logits", session=session, n=32, path=str(path))
                logits.append(np.load(path).astype(np.float64))
            a, b = logits
            cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            for kind, do, args in (
                ("prefill", "read", {"n": PROMPT}),
                ("decode", "generate", {"n": GENERATED, "depth": 0}),
            ):
                rows.append(measure(workers, threads, kind, do, args, options))
                row = rows[-1] | {"file": file.name, "cosine": cosine}
                row["rss_bytes"] = {name: resident(w.pid) for name, w in workers.items()}
                rows[-1] = row
                print(line(row), flush=True)
    return rows


def resident(pid: int) -> int:
    """Bytes of a process that are in memory, pages of files included."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) << 10


def measure(
    workers: dict[str, Worker], threads: int, kind: str, do: str, args: dict[str, int],
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Warm up and alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    bandwidths: list[float] = []
    others, pids = Others(), [os.getpid(), *(w.pid for w in workers.values())]
    for turn in range(options.repeats + 1):
        if turn == 1:
            others.start(pids)
        for name, process in workers.items():
            found = process.ask(do, session=f"t{threads}", budget=options.seconds, **args)
            if turn:
                seconds[name].append(statistics.median(found))
        if turn and kind == "decode":
            bandwidths.append(workers["edgeq"].ask("bandwidth", threads=threads))
    ours, theirs = (seconds[name] for name in RUNTIMES)
    pairs = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    tokens = args["n"]
    row: dict[str, Any] = {
        "kind": kind, "threads": threads, "clock": options.clock, "cache": options.cache,
        "tokens_per_s": {name: tokens / value for name, value in middle.items()},
        "ratio": middle["llama.cpp"] / middle["edgeq"], "pairs": pairs, "seconds": seconds,
        "others_cores": others.cores(pids),
    }  # fmt: skip
    if bandwidths:
        reads = workers["edgeq"].ask("token_bytes", session=f"t{threads}", depth=tokens // 2)
        row["gb_per_s"] = {name: reads * rate / 1e9 for name, rate in row["tokens_per_s"].items()}
        row["read_bandwidth_gb_per_s"] = statistics.median(bandwidths)
    return row


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    rates = ", ".join(f"{name} {rate:.1f}" for name, rate in row["tokens_per_s"].items())
    text = (
        f"{row['file']} {row['kind']} t{row['threads']}: {row['ratio']:.2f}x "
        f"({row['pairs'][0]:.2f} - {row['pairs'][-1]:.2f}), {row['clock']} tokens/s {rates}"
    )
    if "gb_per_s" in row:
        read = row["gb_per_s"]["edgeq"]
        text += f"; {read:.1f} GB/s, plain reading {row['read_bandwidth_gb_per_s']:.1f}"
    memory = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in row["rss_bytes"].items())
    others = "" if row["others_cores"] is None else f"; others {row['others_cores']:.1f} cores"
    return f"{text}; {memory}; cosine {row['cosine']:.5f}{others}"


def main() -> None:
    """Compare, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--cache", choices=("f16", "q8_0"), default="f16")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each turn, at least")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--peers", help="an interpreter that has llama-cpp-python")
    parser.add_argument("-o", type=Path, help="write the figures here as JSON")
    options = parser.parse_args()
    peers = options.peers or peers_python()
    rows = [row for file in options.files for row in compare(file, options, peers)]
    if options.o:
        options.o.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
