"""The table of kernels, and the choice among them by the features of the processor.

Order of preference, best first. `EDGEQ_KERNEL=name` overrides, within what the processor has:
a kernel it lacks would abort the compiler or the process, so that is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgeq.core.cpu import Cpu, this_cpu
from edgeq.core.errors import UnsupportedError, unknown
from edgeq.formats import schemes, two_level
from edgeq.model import memory_layout
from edgeq.runtime.kernels.isa_arm import Dotprod, Neon
from edgeq.runtime.kernels.isa_x86 import Avx2, Avx512Vnni, AvxVnni
from edgeq.runtime.kernels.microkernel import Isa

TABLE: tuple[tuple[type[Isa], str, frozenset[str]], ...] = (
    (Avx512Vnni, "x86_64", frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vnni"})),
    (AvxVnni, "x86_64", frozenset({"avx2", "fma", "avxvnni"})),
    (Avx2, "x86_64", frozenset({"avx2", "fma"})),
    (Dotprod, "aarch64", frozenset({"dotprod"})),
    (Neon, "aarch64", frozenset()),
    (Isa, "", frozenset()),
)
"""(kernel, architecture or "" for any, features it needs), best first."""


def usable(cpu: Cpu) -> list[type[Isa]]:
    """The kernels this processor can run, best first."""
    return [
        kernel for kernel, arch, needs in TABLE if arch in ("", cpu.arch) and needs <= cpu.features
    ]


def choose(cpu: Cpu, wanted: str | None = None) -> Isa:
    """The kernel to compile.

    Args:
        cpu: the processor.
        wanted: a kernel by name, or None for the best.

    Raises:
        UnsupportedError: no such kernel, or the processor lacks what it needs.
    """
    kernels = usable(cpu)
    if not wanted:
        return kernels[0]()
    names = {kernel.name: kernel for kernel, _, _ in TABLE}
    if wanted not in names:
        raise UnsupportedError(f"EDGEQ_KERNEL: {unknown('kernel', wanted, names)}")
    if names[wanted] not in kernels:
        raise UnsupportedError(
            f"EDGEQ_KERNEL={wanted} needs instructions this {cpu.arch} processor does not have; "
            f"use one of {', '.join(k.name for k in kernels)}"
        )
    return names[wanted]()


ISA = choose(this_cpu(), os.environ.get("EDGEQ_KERNEL"))
"""The kernel of this process."""

KERNEL_SOURCES = (
    *sorted(Path(__file__).parent.glob("*.py")),
    Path(memory_layout.__file__),
    Path(schemes.__file__),
    Path(two_level.__file__),
)
"""Files that the compiled code of this folder is made from, besides `edgeq.compiler`."""
