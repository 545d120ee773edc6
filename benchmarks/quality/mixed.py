"""Mixed bits beside the best uniform recipe on a published model: KL on held-out text, and seconds.

    python benchmarks/quality/mixed.py MODEL.gguf --text wikitext.txt

The first 80 % of the text calibrates and the quality is measured on what follows. A source whose
weights are quantized already is rounded again, and the divergence is from its own values.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from edgeq.cli import main as edgeq

HELD_OUT = 10_000
"""Characters that the quality is measured on."""


def main() -> int:
    """Split the text, and run the command as a user would."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--preset", default="mixed-palette-4.5bpw")
    parser.add_argument("--windows", default="32", help="of calibration")
    arguments = parser.parse_args()
    text = arguments.text.read_text("utf-8")
    cut = text.rfind("\n", 0, int(0.8 * len(text)))
    with tempfile.TemporaryDirectory() as temporary:
        calib, held = Path(temporary) / "calib.txt", Path(temporary) / "held.txt"
        calib.write_text(text[:cut], "utf-8")
        held.write_text(text[cut : cut + HELD_OUT], "utf-8")
        return edgeq([
            "quantize", arguments.model, "-o", str(Path(temporary) / "mixed.edgeq"),
            "--requantize", "--preset", arguments.preset, "--calib", str(calib),
            "--calib-windows", arguments.windows, "--eval-text", str(held),
        ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
