"""``edgeq doctor``: what works here, what does not, and what to do about it."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import click

from edgeq.cli import render
from edgeq.cli.options import command, format_option

if TYPE_CHECKING:
    from edgeq.devices.doctor import Check

_MARKS = {True: "ok", False: "!!", None: "--"}


@command("doctor", "What works on this machine, what does not, and the mend.")
@click.option("--quick", is_flag=True, show_default=False,
              help="Only look whether packages are there; do not import each one.")  # fmt: skip
@format_option("text", "json")
def doctor(quick: bool, form: str) -> int:
    """Look at the system, the packages, the processor and the memory.

    ok is fine, !! is a trouble with its mend below it, -- does not matter here or cannot be told.
    The exit code is 1 if something makes edgeq unusable, else 0.
    """
    from edgeq.devices.detect import detect
    from edgeq.devices.doctor import checks, usable

    with render.progress("looking") as bar:
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
    from edgeq.cpu import this_cpu
    from edgeq.devices.doctor import Check
    from edgeq.errors import EdgeqError

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
    lines = []
    for check in results:
        lines.append(f"{_MARKS[check.ok]}  {check.name:{width}}  {check.found}")
        if check.mend:
            lines.append(f"    {'':{width}}  > {check.mend}")
    troubles = sum(check.ok is False for check in results)
    last = "no trouble" if not troubles else f"{troubles} trouble{'s' * (troubles > 1)}"
    lines.append("")
    lines.append(f"{last}; edgeq {'works' if works else 'does not work'} here")
    return "\n".join(lines) + "\n"
