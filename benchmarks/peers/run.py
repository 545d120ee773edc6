"""Compare edgeq with llama.cpp and onnxruntime on this machine, side by side in one run.

    make bench-peers                    everything; writes docs/benchmarks.md and .json
    make bench-peers ARGS="--quick"     one small shape, few repeats; only prints
    make bench-peers ARGS="--only 'decode.*t1'"
    make bench-peers ARGS="--keep --only matmul"     the other rows stay as they were measured

Both sides do the same work on the same weights: the GGUF file holds the packed model's own
integers. Runs alternate (edgeq, peer, edgeq, peer ...), so that what the machine does meanwhile
hits both; loading, compiling and warming up are over before the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cases import QUICK, Case, Scale, Side, matmul_cases, model_cases
from protocol import Worker, WorkerError
from report import line, markdown
from setting import HERE, ROOT, Neighbor, Others, home, last_cache_bytes, machine, peers_python

from edgeq._version import __version__
from edgeq.core.cpu import available_cores
from edgeq.importers.shapes import SHAPES

MATMUL_ERROR = 0.02
"""Activations of 8 bits are off by less than this."""
AGREEMENT = 0.99
"""Cosine of both sides' logits, above which they have run the same model."""


class Comparison:
    """Workers of one group of cases, and what was found so far.

    Args:
        scale: how much is measured.
        peers: interpreter of the peers' virtual environment.
        result: where rows and readings are added.
    """

    def __init__(self, scale: Scale, peers: str, result: dict[str, Any]) -> None:
        self._scale, self._peers, self._result = scale, peers, result
        self._workers: dict[str, Worker] = {}
        self._neighbor: Neighbor | None = None
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def worker(self, runtime: str) -> Worker:
        """The process of a runtime, started when it is first asked for."""
        if runtime not in self._workers:
            log = home() / f"{runtime.replace(' ', '-')}.log"
            env = {}
            if runtime == "edgeq":
                command = [sys.executable, str(HERE / "edgeq_worker.py")]
                env["PYTHONPATH"] = str(ROOT)
            elif runtime == "llama.cpp":
                command = [self._peers, str(HERE / "llamacpp_worker.py")]
            else:  # NumPy is told its threads as it starts
                command = [self._peers, str(HERE / "matmul_worker.py")]
                env["OPENBLAS_NUM_THREADS"] = runtime.rpartition("t")[2]
            self._workers[runtime] = self._closing.enter_context(Worker(runtime, command, log, env))
            self._result["versions"].update(self._workers[runtime].ask("info"))
        return self._workers[runtime]

    def seconds(self, side: Side, budget: float) -> float:
        """Mean seconds of a side's work, repeated for ``budget`` seconds."""
        meanwhile: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if side.busy:
            if self._neighbor is None:
                self._neighbor = Neighbor()
                self._closing.callback(self._neighbor.close)
            meanwhile = self._neighbor.working()
        with meanwhile:
            found = self.worker(side.runtime).ask(side.do, budget=budget, **side.args)
        return statistics.fmean(found)

    def _pids(self) -> list[int]:
        """This process and those that belong to it."""
        workers = [worker.pid for worker in self._workers.values()]
        return [os.getpid(), *workers, *([self._neighbor.pid] if self._neighbor else [])]

    def bandwidth(self, threads: int) -> float:
        """Read bandwidth now, GB/s; kept with the others."""
        found = float(self.worker("edgeq").ask("bandwidth", threads=threads))
        self._result["bandwidth"].append({"threads": threads, "gb_per_s": found})
        return found

    def run(self, case: Case) -> None:
        """Warm up, alternate, and add a row for every peer."""
        sides = (case.ours, *case.peers)
        for side in sides:
            do, args = side.opening
            self.worker(side.runtime).ask(do, **args)
            self.seconds(side, 0)  # fills the cache, touches every page, compiles what is left
        reads = any(side.do == "generate" or side.token_bytes for side in sides)
        seconds: list[list[float]] = [[] for _ in sides]
        bandwidths = []
        others = Others()
        others.start(self._pids())
        for i in range(self._scale.repeats):
            if reads and i in (0, self._scale.repeats // 2):
                bandwidths.append(self.bandwidth(case.threads))
            for side, found in zip(sides, seconds, strict=True):
                found.append(self.seconds(side, self._scale.seconds))
        if reads:
            bandwidths.append(self.bandwidth(case.threads))
        others_cores = others.cores(self._pids())
        rows = self._rows(case, seconds, bandwidths)
        for row in rows:
            row["others_cores"], row["when"] = others_cores, self._result["when"]
        if case.section == "matmul":
            for side in sides:
                self._check_matmul(case, side)
        self._result["rows"].extend(rows)
        for row in rows:
            print(line(row), flush=True)

    def _rows(
        self, case: Case, seconds: list[list[float]], bandwidths: list[float]
    ) -> list[dict[str, Any]]:
        ours, *theirs = seconds
        peak = statistics.median(bandwidths) if bandwidths else None
        rows = []
        for peer, found in zip(case.peers, theirs, strict=True):
            pairs = [b / a for a, b in zip(ours, found, strict=True)]
            rows.append(
                {
                    "section": case.section,
                    "keys": list(case.keys),
                    "threads": case.threads,
                    "tokens": case.tokens,
                    "peer": peer.name,
                    "ratio": statistics.median(found) / statistics.median(ours),
                    "lowest": min(pairs),
                    "highest": max(pairs),
                    "goal": case.goals.get(peer.name),
                    "read_bandwidth_gb_per_s": peak,
                    "edgeq": self._figures(case, case.ours, ours, peak),
                    "theirs": self._figures(case, peer, found, peak),
                }
            )
        return rows

    def _figures(
        self, case: Case, side: Side, seconds: list[float], peak: float | None
    ) -> dict[str, Any]:
        middle = statistics.median(seconds)
        found: dict[str, Any] = {"seconds": seconds, "median_seconds": middle}
        if case.tokens:
            found["tokens_per_s"] = case.tokens / middle
        size = side.token_bytes
        if side.runtime == "edgeq" and side.do == "generate":
            size = self.worker("edgeq").ask(
                "token_bytes", session=side.args["session"], depth=case.depth
            )
        if size and peak:
            found["token_bytes"] = size
            found["gb_per_s"] = size * (case.tokens or 1) / middle / 1e9
            found["bandwidth_percent"] = 100 * found["gb_per_s"] / peak
        return found

    def _check_matmul(self, case: Case, side: Side) -> None:
        worker, session = self.worker(side.runtime), side.args["session"]
        error = worker.ask("check_matmul", session=session)
        if error > MATMUL_ERROR:
            raise SystemExit(f"{case.name}: {side.name} is off by {error:.3f}; nothing to compare")
        worker.ask("close_matmul", session=session)

    def agreement(self, name: str, case: Case) -> None:
        """Check that both sides have the same model: cosine of the logits after a prompt."""
        found = []
        for side in (case.ours, case.peers[0]):
            do, args = side.opening
            self.worker(side.runtime).ask(do, **args)
            path = home() / f"logits-{side.runtime}.npy"
            self.worker(side.runtime).ask(
                "logits", session=side.args["session"], n=32, path=str(path)
            )
            found.append(np.load(path).astype(np.float64))
        a, b = found
        cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        self._result["agreement"][name] = cosine
        print(f"{name}: both sides' logits agree, cosine {cosine:.4f}", flush=True)
        if not cosine > AGREEMENT:
            raise SystemExit(f"{name}: cosine {cosine:.4f}: these are not the same models")


def _models(name: str, peers: str, fresh: bool) -> tuple[str, str]:
    """Paths of the packed model and of the same as GGUF, written if they are not there."""
    folder = home() / "models"
    ours, theirs = folder / f"{name}-{__version__}.edgeq", folder / f"{name}-{__version__}.gguf"
    if fresh:
        ours.unlink(missing_ok=True)
    if not ours.exists():
        print(f"making {ours.name} ...", flush=True)
        theirs.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "edgeq_worker.py")]
        with Worker("edgeq", command, home() / "make.log", {"PYTHONPATH": str(ROOT)}) as worker:
            worker.ask("make", name=name, path=str(ours))
    if not theirs.exists():
        print(f"making {theirs.name} ...", flush=True)
        subprocess.run(
            [peers, str(HERE / "write_gguf.py"), str(ours), str(theirs)],
            check=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    return str(ours), str(theirs)


def _groups(
    options: argparse.Namespace, scale: Scale, peers: str
) -> Iterator[tuple[str, list[Case]]]:
    """Cases that share processes: those of a shape, then the matmuls."""
    wanted = re.compile(options.only or "")
    for name in scale.shapes:
        # paths are not part of what is matched, so nothing is written for what is not wanted
        if any(wanted.search(c.name) for c in model_cases(name, "", "", options.threads, scale)):
            ours, theirs = _models(name, peers, options.fresh)
            yield name, list(
                model_cases(name, None if options.in_memory else ours, theirs,
                            options.threads, scale)
            )  # fmt: skip
    yield "matmul", list(matmul_cases(options.threads, scale, last_cache_bytes()))


def _all_cases(threads: tuple[int, ...], scale: Scale) -> Iterator[Case]:
    """What a whole run measures, in its order, with no files named."""
    for name in scale.shapes:
        yield from model_cases(name, "", "", threads, scale)
    yield from matmul_cases(threads, scale, last_cache_bytes())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small shape, few repeats")
    parser.add_argument("--only", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--keep", action="store_true",
                        help="put the rows beside those of docs/benchmarks or STEM")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="names of the cases")
    parser.add_argument("--shapes", help="comma-separated, instead of the usual ones")
    parser.add_argument("--threads", default="1,2", help="numbers of threads  [1,2]")
    parser.add_argument("--repeats", type=int, help="alternating runs  [7]")
    parser.add_argument("--in-memory", action="store_true",
                        help="edgeq's weights in memory of its own, not a mapped file")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="write the models anew")
    parser.add_argument("--out", type=Path, metavar="STEM",
                        help="write STEM.md and .json  [docs/benchmarks if all run]")  # fmt: skip
    options = parser.parse_args()
    cores = available_cores()
    options.threads = tuple(t for t in map(int, options.threads.split(",")) if t <= cores)
    return options


def main() -> None:
    """Run what was asked for."""
    options = _options()
    scale = QUICK if options.quick else Scale()
    if options.shapes:
        shapes = tuple(options.shapes.split(","))
        if unknown := set(shapes) - set(SHAPES):
            raise SystemExit(f"unknown shapes: {', '.join(sorted(unknown))}")
        scale = replace(scale, shapes=shapes)
    if options.repeats:
        scale = replace(scale, repeats=options.repeats)
    wanted = re.compile(options.only or "")
    if options.list:
        for case in _all_cases(options.threads, scale):
            print(case.name)
        return
    peers = peers_python()
    result: dict[str, Any] = {
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": {},
        "repeats": scale.repeats,
        "agreement": {},
        "bandwidth": [],
        "rows": [],
    }
    for name, cases in _groups(options, scale, peers):
        chosen = [case for case in cases if wanted.search(case.name)]
        if not chosen:
            continue
        with Comparison(scale, peers, result) as comparison:
            if name != "matmul":
                comparison.agreement(name, cases[0])
            for case in chosen:
                comparison.run(case)
    if not result["rows"]:
        raise SystemExit("no case matches; --list names them")
    whole = options.keep or not (options.quick or options.only or options.shapes)
    stem = options.out or (ROOT / "docs" / "benchmarks" if whole else home() / "latest")
    if options.keep:
        _add_kept(
            result,
            json.loads(stem.with_name(stem.name + ".json").read_text()),
            options.threads,
            scale,
        )
    _write(stem, result)


def _add_kept(
    result: dict[str, Any], kept: dict[str, Any], threads: tuple[int, ...], scale: Scale
) -> None:
    """Take over what was measured before and not now, in the order of a whole run."""
    if {**result["machine"], "load_at_start": 0} != {**kept["machine"], "load_at_start": 0}:
        raise SystemExit("the rows to keep are of another machine or system; measure all")

    def known_by(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["section"], tuple(row["keys"]), row["threads"], row["peer"]

    new = {known_by(row) for row in result["rows"]}
    old = [{"when": kept["when"], **row} for row in kept["rows"] if known_by(row) not in new]
    order = {(c.section, c.keys, c.threads): i for i, c in enumerate(_all_cases(threads, scale))}

    def place(row: dict[str, Any]) -> int:
        return order.get((row["section"], tuple(row["keys"]), row["threads"]), len(order))

    result["rows"] = sorted(old + result["rows"], key=place)
    result["bandwidth"] = kept["bandwidth"] + result["bandwidth"]
    result["versions"] = kept["versions"] | result["versions"]
    result["agreement"] = kept["agreement"] | result["agreement"]


def _write(stem: Path, result: dict[str, Any]) -> None:
    text = markdown(result)
    print("\n" + text)
    stem.with_name(stem.name + ".md").write_text(text)
    stem.with_name(stem.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {stem}.md and .json")


if __name__ == "__main__":
    try:
        main()
    except WorkerError as err:
        raise SystemExit(str(err)) from None
