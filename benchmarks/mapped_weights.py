"""Decoding from a mapped file against decoding from copied weights in huge pages.

    python benchmarks/mapped_weights.py --shape llama-3.2-1b --threads 1 2

Both engines live in one process, each with a mapping of its own, and take turns; medians are
printed with the least and most. The artifact is made of random weights in a temporary folder.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from edgeq.formats.schemes import parse_scheme
from edgeq.importers.shapes import SHAPES, random_model, shape
from edgeq.model import artifact
from edgeq.runtime.engine import Engine

PROMPT = list(range(3, 35))


def huge_pages() -> float:
    """Megabytes of this process that lie in huge pages; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return (
        sum(int(line.split()[1]) for line in lines if line.startswith(("AnonHuge", "FilePmd")))
        / 1000
    )


def measure(path: Path, threads: int, rounds: int, steps: int) -> None:
    """Print tokens a second of both, taking turns."""
    engines: dict[str, Engine] = {}
    try:
        for name, mmap in (("mapped", True), ("copied", False)):
            before, started = huge_pages(), time.perf_counter()
            engines[name] = Engine(artifact.load(path), context=512, threads=threads, mmap=mmap)
            engines[name].forward(PROMPT)
            ready = time.perf_counter() - started
            grown = huge_pages() - before
            print(f"  {name}: ready in {ready:.2f} s, {grown:.0f} MB more in huge pages")
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds + 1):
            for name, engine in engines.items():
                engine.truncate(len(PROMPT))
                started = time.perf_counter()
                engine.greedy(PROMPT[-1], steps)
                if turn:  # the first warms up
                    speeds[name].append(steps / (time.perf_counter() - started))
    finally:
        for engine in engines.values():
            engine.close()
    for name, found in speeds.items():
        median = statistics.median(found)
        print(f"  {name}: {median:.2f} tok/s ({min(found):.2f} .. {max(found):.2f})")
    ratio = statistics.median(
        b / a for a, b in zip(speeds["mapped"], speeds["copied"], strict=True)
    )
    print(f"  copied / mapped: {ratio:.3f}, the median of the turns' ratios")


def main() -> None:
    """Read the options, make the artifact, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--scheme", default="w4-g32")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="keep the artifact here, or use the one there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = (options.folder or Path(temporary)) / f"{options.shape}.{options.scheme}.edgeq"
        if not path.exists():
            scheme = parse_scheme(options.scheme)
            assert scheme is not None
            model = random_model(shape(options.shape), lambda _name, _shape: scheme)
            artifact.save(model, path)
            del model
        for threads in options.threads:
            print(f"{options.shape} {options.scheme}, threads: {threads}")
            measure(path, threads, options.rounds, options.steps)


if __name__ == "__main__":
    main()
