"""Convert a language model for iPhones (Core ML) and Android phones (LiteRT-LM).

    python examples/convert_for_a_phone.py model.edgeq [-o FOLDER] [--to coreml --to litertlm]

The files hold the artifact's integers. Each is run here, in the target's own runtime where it can
be installed, and compared with the artifact; the certificate beside it says how they compare.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import edgeq

ENDINGS = {"coreml": ".mlpackage", "litertlm": ".litertlm", "gguf": ".gguf"}


def main() -> None:
    """Convert to each target, and say how near the result is to its source."""
    parser = argparse.ArgumentParser(description="Convert a model for phones.")
    parser.add_argument("model", type=Path, help="an .edgeq file")
    parser.add_argument("-o", "--output", type=Path, default=Path("phone"))
    parser.add_argument("--to", action="append", choices=sorted(ENDINGS))
    parser.add_argument("--context", type=int, default=512, help="tokens that the file can hold")
    args = parser.parse_args()

    args.output.mkdir(parents=True, exist_ok=True)
    for target in args.to or ("coreml", "litertlm"):
        out = args.output / f"{args.model.stem}{ENDINGS[target]}"
        options = edgeq.Options() if target == "gguf" else edgeq.Options(context=args.context)
        try:
            made = edgeq.convert(args.model, target, out, options)
        except edgeq.MissingDependencyError as err:  # not every system has every runtime
            print(f"{target}: skipped: {err}")
            continue
        print(f"{target}: {made.path}, {made.nbytes / 1e6:.1f} MB in {made.seconds:.0f} s")
        if made.certificate is not None:
            tokens = made.certificate["greedy_tokens"]
            print(f"    same integers: {made.certificate['integers_equal']} matrices; "
                  f"KL divergence {made.certificate['kl']['mean']:.1e} nats; "
                  f"greedy tokens: {tokens['equal']} of {tokens['compared']} equal")  # fmt: skip


if __name__ == "__main__":
    main()
