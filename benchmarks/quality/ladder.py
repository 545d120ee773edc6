"""The ladder of presets on a model that a user names: bytes, bits per weight, KL, same top token.

    python benchmarks/quality/ladder.py MODEL [--text TEXT] [--calib TEXT] [--rung NAME ...]

MODEL is anything that ``edgeq quantize`` takes. Quality is measured against it on TEXT, or on the
text that edgeq includes, by the quality report that every artifact carries; calibration is that of
``edgeq quantize`` without options. A row is printed as soon as it is measured. The last column is
KL as a multiple of the next larger rung's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from edgeq import quantize
from edgeq.calibration_text import calibration, held_out, own_calibration
from edgeq.importers import load
from edgeq.quant.presets import FAST, LADDER

HEAD = ("preset", "bytes", "bits per weight", "KL", "KL, 99 %", "same top token", "CPU s", "KL x")


def main() -> int:
    """Measure every rung, from the largest to the smallest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", help="that quality is measured on, UTF-8")
    parser.add_argument("--calib", help="calibration text, UTF-8")
    parser.add_argument("--windows", type=int, default=128, help="of the calibration text")
    parser.add_argument("--rung", action="append", help="measure these presets only")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    model = load(arguments.model)
    card = held_out(model, arguments.text)
    if isinstance(card, str):
        print(card, file=sys.stderr)
        return 1
    text = (
        calibration(model, arguments.calib, arguments.windows, 256)
        if arguments.calib
        else own_calibration(model)
    )
    print(f"{arguments.model}, measured on {card.n_tokens} tokens of {card.name}; calibrated with "
          f"{text.n_tokens} tokens, {text.sampled} of them sampled from the model\n")  # fmt: skip
    print("| " + " | ".join(HEAD) + " |\n| --- |" + " ---: |" * (len(HEAD) - 1), flush=True)
    above: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.rung or (*reversed(LADDER), FAST):
            summary = quantize(
                model, Path(folder) / "rung.edgeq", name,
                calibration=text, card=card, requantize=True, threads=arguments.threads,
            )  # fmt: skip
            found = summary.quality.evaluation
            if found is None or found.kl_mean is None:
                print(summary.quality.reason, file=sys.stderr)
                return 1
            times = f"{found.kl_mean / above:.2f}" if above and name in LADDER else ""
            row = (
                name, f"{summary.file_bytes:,}", f"{summary.bpw:.2f}", f"{found.kl_mean:.4f}",
                f"{found.kl_p99:.3f}", f"{100 * (found.top1_agreement or 0):.1f} %",
                f"{summary.cpu_seconds:.0f}", times,
            )  # fmt: skip
            print("| " + " | ".join(row) + " |", flush=True)
            above = found.kl_mean
    return 0


if __name__ == "__main__":
    sys.exit(main())
