"""What a pass costs that gives 1, 2, 4 and 8 sequences their next token, in one process.

    python benchmarks/serving/passes.py SHAPE [--preset w4-g32] [--depth 128] [--seconds 30]

SHAPE is a known one of `edgeq bench --list`; its weights are random. Passes of each size alternate
on one thread, and their times are processor time of that thread, so that other programs change
little: medians, and the median of each pass's ratio to the single one just before it. The second
table is the least wall time of each kind of step over all layers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter, defaultdict

import numpy as np

from edgeq.core.cpu import this_cpu
from edgeq.importers.shapes import random_model, shape
from edgeq.quant.recipe import Recipe
from edgeq.runtime.kernels import KERNEL
from edgeq.runtime.shared_decoder import SharedDecoder, TokenRequest
from edgeq.runtime.step_times import StepTimes

SIZES = (1, 2, 4, 8)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape")
    parser.add_argument("--preset", default="w4-g32")
    parser.add_argument("--depth", type=int, default=128, help="tokens in each cache")
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()
    model = random_model(shape(args.shape), Recipe.from_options(args.preset).scheme_for)
    decoder = SharedDecoder(model, args.depth + 1, 1, 8, False, SIZES[-1])
    prompt = np.random.default_rng(0).integers(0, model.config.vocab, args.depth)
    for sequence in range(SIZES[-1]):
        decoder.forward(sequence, prompt, 0, 1)
    times = StepTimes.new(decoder.program.labels)
    decoder.program.record["times"] = times.raw.ctypes.data

    def run(size: int) -> tuple[float, Counter[str]]:
        """Processor seconds of a pass, and wall nanoseconds of each kind of step."""
        requests = [TokenRequest(number, number, args.depth) for number in range(size)]
        times.raw[:] = 0
        start = time.thread_time()
        decoder.run_pass(requests)
        seconds, steps = time.thread_time() - start, Counter[str]()
        for (_, label), ns in times.ns.items():
            steps[label] += ns
        return seconds, steps

    for size in SIZES:  # kernels are loaded, pages are there
        run(size)
    seconds: dict[int, list[float]] = defaultdict(list)
    steps: dict[int, list[Counter[str]]] = defaultdict(list)
    end = time.monotonic() + args.seconds
    while time.monotonic() < end:
        for size in SIZES:
            taken, parts = run(size)
            seconds[size].append(taken)
            steps[size].append(parts)
    nbytes = decoder.arena.model.nbytes if decoder.arena else model.nbytes
    print(
        f"{args.shape} {args.preset}, {nbytes / 1e6:.0f} MB, {args.depth} tokens in each cache; "
        f"{this_cpu().name}, kernel {KERNEL}, one thread; {len(seconds[1])} passes of each"
    )
    for size in SIZES:
        middle = statistics.median(seconds[size])
        pairs = zip(seconds[1], seconds[size], strict=True)
        ratio = statistics.median(size * one / more for one, more in pairs)
        print(f"{size} sequences: {1000 * middle:.2f} ms, {size / middle:.0f} tok/s, "
              f"{nbytes / middle / 1e9:.1f} GB/s, {ratio:.2f} times the tokens of one")  # fmt: skip
    for label in steps[1][0]:
        least = (min(parts[label] for parts in steps[size]) / 1e6 for size in SIZES)
        print(f"{label:12}", *(f"{ms:8.3f} ms" for ms in least))


if __name__ == "__main__":
    main()
