"""Quantize a checkpoint and let the result continue a text.

    python examples/quantize_and_generate.py [MODEL] [-o tale.edgeq] [--preset 3.75bpw]

MODEL is a Hugging Face folder or a GGUF file; without it the small model that edgeq includes is
quantized.
"""

from __future__ import annotations

import argparse

import edgeq


def main() -> None:
    """Quantize, say how large the result is, generate."""
    parser = argparse.ArgumentParser(description="Quantize a model and let it continue a text.")
    parser.add_argument("model", nargs="?", default=edgeq.demo_model())
    parser.add_argument("-o", "--output", default="tale.edgeq")
    parser.add_argument("--preset", help="such as 3.75bpw; the default takes about 5 bits a weight")
    parser.add_argument("--fast", action="store_true", help="round to nearest, in seconds")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=80)
    args = parser.parse_args()

    def show(what: str, done: int, total: int) -> None:
        print(f"\r{100 * done / max(total, 1):3.0f} % {what:60.60}", end="", flush=True)

    summary = edgeq.quantize(
        args.model, args.output, args.preset, fast=args.fast, progress=show
    )  # fmt: skip
    print(f"\n{args.output}: {summary.bpw:.2f} bits per weight in {summary.seconds:.1f} s\n")

    model = edgeq.load(args.output)
    tokenizer = edgeq.Tokenizer(model)
    params = edgeq.SamplingParams(temperature=0.6, seed=1)
    rate = None
    with edgeq.Engine(model) as engine:
        print(args.prompt, end="", flush=True)
        for chunk in edgeq.generate(
            engine, tokenizer, args.prompt, params, max_tokens=args.tokens
        ):  # fmt: skip
            print(chunk.text, end="", flush=True)
            rate = chunk.decode_tokens_per_s
    print(f"\n\n{rate:.0f} tokens per second" if rate else "")


if __name__ == "__main__":
    main()
