"""``edgeq doctor``: check what works on this machine, and say how to fix what does not."""

from __future__ import annotations

import json
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
    from edgeq.api.doctor import doctor as check_all
    from edgeq.devices.doctor import usable

    with render.progress("Checking") as bar:
        results = check_all(quick=quick, progress=bar)
    works = usable(results)
    if form == "json":
        record = {"usable": works, "checks": [vars(check) for check in results]}
        render.write(json.dumps(record, indent=2) + "\n")
    else:
        render.write(_text(results, works))
    return 0 if works else 1


def _text(results: list[Check], works: bool) -> str:
    width = max(len(check.name) for check in results)
    shown = render.width_of(sys.stdout)
    indent = " " * (width + 8)
    lines = []
    for check in results:
        line = f"{_MARKS[check.ok]}  {check.name:{width}}  {check.found}"
        lines.append(render.wrapped(line, shown, indent[2:]))
        if check.fix:
            lines.append(render.wrapped(f"{indent[2:]}> {check.fix}", shown, indent))
    troubles = sum(check.ok is False for check in results)
    last = "no problems" if not troubles else f"{troubles} problem{'s' * (troubles > 1)}"
    lines.append("")
    lines.append(f"{last}; edgeq {'works' if works else 'does not work'} on this machine")
    return "\n".join(lines) + "\n"
