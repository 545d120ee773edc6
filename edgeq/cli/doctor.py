"""``edgeq doctor``: what works here, what does not, and what to do about it."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import click

from edgeq.cli import render
from edgeq.cli.options import command, result_options

if TYPE_CHECKING:
    from edgeq.devices.doctor import Check

_MARKS = {True: "ok", False: "!!", None: "--"}


@command("doctor", "Check what works on this machine, and how to fix what does not.")
@click.option("--quick", is_flag=True, show_default=False,
              help="Only check whether packages are installed, without importing "
                   "them.")  # fmt: skip
@result_options("text", "json")
def doctor(quick: bool, form: str) -> int:
    """Check the system, the packages, the processor and the memory.

    ok: works. !!: a problem, with the fix on the next line. --: optional and absent, or cannot be
    determined. The exit code is 1 if edgeq cannot be used on this machine.
    """
    from edgeq.devices.detect import detect
    from edgeq.devices.doctor import checks, usable

    with render.progress("Checking") as bar:
        results = [*checks(detect(), imports=not quick, progress=bar), _kernel()]
    works = usable(results)
    if form == "json":
        found = {"usable": works, "checks": [vars(check) for check in results]}
        render.write(json.dumps(found, indent=2) + "\n")
    else:
        render.write(_text(results, works))
    return 0 if works else 1


def _kernel() -> Check:
    """Which kernel is chosen, and why none of the faster ones."""
    from edgeq.core.cpu import this_cpu
    from edgeq.core.errors import EdgeqError
    from edgeq.devices.doctor import Check

    cpu, wanted = this_cpu(), os.environ.get("EDGEQ_KERNEL")
    try:
        from edgeq.runtime.kernels.dispatch import ISA, TABLE
    except EdgeqError as err:  # of a kernel that EDGEQ_KERNEL names
        return Check("kernel", False, str(err), "unset EDGEQ_KERNEL", needed=True)
    except (ImportError, OSError) as err:
        mend = "pip install --force-reinstall numba llvmlite"
        return Check("kernel", False, str(err), mend, needed=True)
    better = []
    for kernel, arch, needs in TABLE:
        if kernel.name == ISA.name:
            break
        if arch == cpu.arch:
            lacks = sorted(needs - cpu.features)
            better.append(f"{kernel.name} needs {' '.join(lacks)}" if lacks else kernel.name)
    why = "EDGEQ_KERNEL asks for it" if wanted else "the best this processor runs"
    found = f"{ISA.name}: {why}" + (f" ({'; '.join(better)})" if better else "")
    mend = ""
    if wanted and better and "needs" not in better[0]:
        mend = f"unset EDGEQ_KERNEL to use {better[0]}"
    return Check("kernel", True, found, mend, needed=True)


def _text(results: list[Check], works: bool) -> str:
    width = max(len(check.name) for check in results)
    shown = render.width_of(sys.stdout)
    indent = " " * (width + 8)
    lines = []
    for check in results:
        line = f"{_MARKS[check.ok]}  {check.name:{width}}  {check.found}"
        lines.append(render.wrapped(line, shown, indent[2:]))
        if check.mend:
            lines.append(render.wrapped(f"{indent[2:]}> {check.mend}", shown, indent))
    troubles = sum(check.ok is False for check in results)
    last = "no problems" if not troubles else f"{troubles} problem{'s' * (troubles > 1)}"
    lines.append("")
    lines.append(f"{last}; edgeq {'works' if works else 'does not work'} on this machine")
    return "\n".join(lines) + "\n"
