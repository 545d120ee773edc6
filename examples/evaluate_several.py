"""Quantize a model with several presets and compare size, quality and speed in one table.

    python examples/evaluate_several.py MODEL --text heldout.txt [--task lambada.jsonl]

The text must not be one that the model was calibrated with. The task is a question set as published
(HellaSwag, MMLU, LAMBADA or GSM8K).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import edgeq


def main() -> None:
    """One artifact and one row for each preset."""
    parser = argparse.ArgumentParser(description="Compare presets of a model.")
    parser.add_argument("model", help="a float checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--task", help="questions to answer, JSON lines")
    parser.add_argument("--presets", nargs="+", default=["8.5bpw", "4.75bpw", "3.75bpw"])
    parser.add_argument("--windows", type=int, default=8, help="of the text, 256 tokens each")
    parser.add_argument("-o", "--output", type=Path, default=Path("compared"))
    args = parser.parse_args()

    text = args.text.read_text("utf-8")
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"{'preset':10} {'MB':>8} {'bits':>6} {'perplexity':>11} {'KL, nats':>9} {'top-1':>6}"
          f" {'task':>6} {'tok/s':>7}")  # fmt: skip
    for preset in args.presets:
        path = args.output / f"{preset}.edgeq"
        made = edgeq.quantize(args.model, path, preset)
        result = edgeq.perplexity(
            path, text, context=256, windows=args.windows, base=args.model
        )  # fmt: skip
        right = edgeq.evaluate(path, args.task).accuracy if args.task else None
        decode = edgeq.bench(path, n_prompt=[], n_gen=[32], repetitions=3)[0]["avg_ts"]
        print(
            f"{preset:10} {path.stat().st_size / 1e6:8.2f} {made.bpw:6.2f} {result.ppl:11.3f} "
            f"{result.kl_mean or 0:9.4f} {result.top1_agreement or 0:6.1%} "
            f"{'-' if right is None else f'{right:.0%}':>6} {decode:7.0f}"
        )


if __name__ == "__main__":
    main()
