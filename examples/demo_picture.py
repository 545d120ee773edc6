"""Write docs/demo.svg, the picture of `edgeq demo` in README.md."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

OUT = Path(__file__).resolve().parent.parent / "docs" / "demo.svg"
COLUMNS = 94


def main() -> None:
    """Run the demo and draw what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeq", "demo"], capture_output=True, text=True, check=True
    )
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "dim"), ("edgeq demo", "bold")))
    # the folder of the cache is the user's own
    shown = done.stdout.replace(str(Path.home()), "~").rstrip()
    shown = re.sub(r"next: .* run ", "next: edgeq run ", shown)
    for line in shown.splitlines():
        text = line.lstrip()
        style = "bold cyan" if re.match(r"\d\. ", text) else "white"
        # the indentation is a segment of its own, which the picture keeps
        console.print(Text.assemble(" " * (len(line) - len(text)), (text, style)))
    OUT.write_text(console.export_svg(title="edgeq demo", unique_id="edgeq-demo"), "utf-8")
    sys.stdout.write(f"{OUT}\n")


if __name__ == "__main__":
    main()
