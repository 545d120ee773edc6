"""The instructions in the inner loops of the matmul kernels, for docs/kernels.md.

    python benchmarks/kernels/instructions.py       writes its section of docs/kernels.md anew

The kernels are compiled for one processor whatever the machine, so that the section depends on the
kernels' sources and on LLVM alone.
"""

from __future__ import annotations

import re
from pathlib import Path

import llvmlite

from edgeq.formats.schemes import QuantScheme
from edgeq.quant.recipe import Recipe
from edgeq.runtime.kernels.isa_x86 import Avx512Vnni
from edgeq.runtime.kernels.jit import assembly
from edgeq.runtime.kernels.microkernel import Isa, Variant

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
TITLE = "## The inner loops"
SCHEMES = ("w4-g32", "w4-g32-palette", "w3-g32", "w8-channel")
TRIPLE, CPU, ISA = "x86_64-unknown-linux-gnu", "znver4", Avx512Vnni()


def scheme_named(name: str) -> QuantScheme:
    """The scheme of most weights in a preset."""
    scheme = Recipe.named(name).default
    assert isinstance(scheme, QuantScheme)
    return scheme


def instructions(
    scheme: QuantScheme, isa: Isa = ISA, triple: str = TRIPLE, cpu: str = CPU
) -> dict[str, int]:
    """How often each instruction is in the inner loop, that is, for 16 rows x 32 columns."""
    text = assembly(scheme, isa, triple, cpu)
    name = Variant(scheme, 1).symbol
    body = re.split(rf"^{name}:.*$", text, flags=re.M)[1].split(".Lfunc_end")[0].splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(body) if re.match(r"\.\w+:", line)}
    jumps = [
        (labels[found[1]], i)
        for i, line in enumerate(body)
        if (found := re.match(r"\s+[bj][\w.]*\s+(\.\w+)", line)) and labels.get(found[1], i) < i
    ]
    first, last = jumps[0]
    found: dict[str, int] = {}
    for line in body[first : last + 1]:
        if match := re.match(r"\t([a-z]\w*)", line):
            found[match[1]] = found.get(match[1], 0) + 1
    return found


def section() -> str:
    """The section of the page."""
    lines = [
        TITLE,
        "",
        f"Written by `python benchmarks/kernels/instructions.py`: the kernel `{ISA.name}` for one "
        f"row of activations, compiled for {CPU} by llvmlite {llvmlite.__version__}. The counts "
        "are for a block of 16 rows x 32 columns.",
        "",
    ]
    for name in SCHEMES:
        mix = sorted(instructions(scheme_named(name)).items(), key=lambda item: -item[1])
        listed = ", ".join(f"{n} `{what}`" for what, n in mix)
        lines.append(f"- {name}: {sum(n for _, n in mix)} instructions: {listed}")
    return "\n".join([*lines, ""])


def main() -> None:
    """Write the section in place of the old one, at the end of the page."""
    before = PAGE.read_text("utf-8").partition(TITLE)[0]
    PAGE.write_text(before.rstrip() + "\n\n" + section(), "utf-8")


if __name__ == "__main__":
    main()
