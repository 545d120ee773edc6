"""Instructions per multiply-accumulate of the matmul kernels, executed on an emulated board.

Exact and repeatable, and no speed: instructions differ in cost. `make bench-arm` runs this under
``armpy`` with the counting plugin, which writes the counts to standard error.

    python benchmarks/arm/instructions.py run       on the board: one line of counts a kernel
    python benchmarks/arm/instructions.py table     on the host: runs all boards, prints the table
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BOARDS = {"pi5": "Cortex-A76", "pi4": "Cortex-A72", "zero2": "Cortex-A53"}
SCHEMES = ("w4-g32", "w4-g32-asym", "w8-channel", "w3-g32")
TOKENS = (1, 8, 16, 64)
ROWS, COLUMNS = 64, 1024
MARK = 60001  # the system call that the plugin takes as a sign (count.c)


def run() -> None:
    """Count every kernel this board can run; needs the plugin."""
    import numpy as np

    from edgeq.core.cpu import this_cpu
    from edgeq.formats.schemes import QuantScheme, parse_scheme
    from edgeq.runtime.kernels import dispatch, jit
    from edgeq.runtime.kernels.abi import MatmulKernel, PackedWeights, Rows, group_shift
    from edgeq.runtime.kernels.microkernel import ACT_BLOCK

    syscall = ctypes.CDLL(None).syscall
    for kernel, name, tokens in (
        (kernel(), name, tokens)
        for kernel in dispatch.usable(this_cpu())
        for name in SCHEMES
        for tokens in TOKENS
    ):
        scheme = parse_scheme(name)
        assert isinstance(scheme, QuantScheme)
        function = MatmulKernel(jit.kernel_address(scheme, kernel))
        tiles, blocks = ROWS // 16, COLUMNS // 32
        memory = np.zeros(1 << 20, np.uint8)
        at = -(-memory.ctypes.data // 64) * 64
        out = np.zeros((tokens, ROWS), np.float32)
        acts = np.zeros((tokens, blocks * ACT_BLOCK), np.uint8)
        weights = PackedWeights(
            codes=at, code_step=blocks * 64 * scheme.bits, scales=at, scale_step=blocks * 32,
            zeros=at, zero_step=blocks * 16, blocks=blocks, shift=group_shift(scheme),
        )  # fmt: skip
        print(kernel.name, name, tokens, file=sys.stderr, flush=True)
        for last in (0, 0, tiles):  # the first warms up, the second is the cost of calling
            syscall(MARK)
            function(
                weights, Rows(acts.ctypes.data, acts.strides[0], tokens),
                Rows(out.ctypes.data, out.strides[0], tokens), 0, last,
            )  # fmt: skip
            syscall(MARK)


def counts(board: str) -> dict[tuple[str, str, int], float]:
    """(kernel, scheme, tokens) -> instructions per multiply-accumulate on a board."""
    done = subprocess.run(
        [str(HERE / "armpy"), board, __file__, "run"],
        env={**os.environ, "EDGEQ_ARM_COUNT": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{board}: {done.stderr}")
    found: dict[tuple[str, str, int], float] = {}
    lines = iter(done.stderr.splitlines())
    for line in lines:
        kernel, scheme, tokens = line.split()
        numbers = [int(next(lines).removeprefix("count ")) for _ in range(6)]
        macs = ROWS * COLUMNS * int(tokens)
        found[kernel, scheme, int(tokens)] = (numbers[5] - numbers[3]) / macs
    return found


def table() -> None:
    """Print the counts of every board as a Markdown table, with the ratio to `generic`."""
    print("| processor | kernel | weights |", *(f"M={m} |" for m in TOKENS))
    print("|---|---|---|" + "---:|" * len(TOKENS))
    for board, processor in BOARDS.items():
        found = counts(board)
        for kernel in dict.fromkeys(kernel for kernel, _, _ in found):
            for scheme in SCHEMES:
                cells = []
                for m in TOKENS:
                    value = found[kernel, scheme, m]
                    ratio = found["generic", scheme, m] / value
                    cells.append(f"{value:.3f}" + (f" ({ratio:.1f}x)" if ratio != 1 else ""))
                print(f"| {processor} | {kernel} | {scheme} |", " | ".join(cells), "|")


if __name__ == "__main__":
    {"run": run, "table": table}[sys.argv[1]]()
