"""Profile models on a Raspberry Pi over SSH, beside what `edgeq plan` expects of it.

    python examples/profile_on_a_pi.py ssh://pi@raspberrypi model.edgeq [MODEL ...]

edgeq need not be installed there: Python with NumPy and Numba is enough (docs/remote.md).
"""

from __future__ import annotations

import argparse
from typing import Any

import edgeq
from edgeq.profiling.summary import summary


def median(spread: dict[str, float] | None) -> str:
    """The median of a figure that may not have been measured."""
    return "unknown" if spread is None else f"{spread['p50']:.1f}"


def main() -> None:
    """Profile, compare with the plan, write a report."""
    parser = argparse.ArgumentParser(description="Profile models on a Raspberry Pi.")
    parser.add_argument("place", help="ssh://user@host[:port]")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--python", help="the Python there, if it is not python3")
    parser.add_argument("--device", default="rpi5", help="see: edgeq devices list")
    parser.add_argument("-o", "--output", default="pi.html")
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("-r", "--repeats", type=int, default=5)
    parser.add_argument("--backend", default="numba", help="numpy needs no Numba there")
    args = parser.parse_args()

    work = edgeq.Workload(n_prompt=args.tokens, n_gen=args.tokens, repeats=args.repeats)
    document = edgeq.profile(
        args.models, work, on=args.place, on_python=args.python, backend=args.backend,
        operations=args.backend == "numba",
    )  # fmt: skip
    for path, run in zip(args.models, document.runs, strict=True):
        found: dict[str, Any] = summary(document, run)
        planned = edgeq.plan(path, args.device, context=2 * args.tokens)
        rate = planned.decode_tokens_per_s
        expected = "unknown" if rate is None else f"{rate:.0f}"
        print(f"{path}: first token after {median(found['ttft_ms'])} ms, then "
              f"{median(found['decode_tokens_per_s'])} tokens per second "
              f"(planned for {planned.device}: {expected})")  # fmt: skip
    print(f"report: {edgeq.report(document, args.output)}")


if __name__ == "__main__":
    main()
