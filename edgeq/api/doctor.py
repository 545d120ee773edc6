"""What works on this machine, and how to fix what does not."""

from __future__ import annotations

import os

from edgeq.core.cpu import this_cpu
from edgeq.core.errors import EdgeqError
from edgeq.core.progress import Progress
from edgeq.devices.detect import detect
from edgeq.devices.doctor import Check, checks


def doctor(*, quick: bool = False, progress: Progress | None = None) -> list[Check]:
    """Check the system, the packages, the processor and the memory.

    Args:
        quick: only check whether packages are installed, without importing them.
        progress: called before each package is imported.

    Returns:
        Checks in the order to read them: ``ok`` is True if all is well, False for a problem that
        ``fix`` fixes, None where something is optional and absent or cannot be determined.

    Example:
        >>> {check.name: check.ok for check in edgeq.doctor(quick=True)}["kernel"]
        True
    """
    return [*checks(detect(), imports=not quick, progress=progress), _kernel()]


def _kernel() -> Check:
    """Which kernel is chosen, and why not a faster one."""
    cpu, wanted = this_cpu(), os.environ.get("EDGEQ_KERNEL")
    try:
        from edgeq.runtime.kernels.dispatch import ISA, TABLE
    except EdgeqError as err:  # of a kernel that EDGEQ_KERNEL names
        return Check("kernel", False, str(err), "unset EDGEQ_KERNEL", needed=True)
    except (ImportError, OSError) as err:
        fix = "pip install --force-reinstall numba llvmlite"
        return Check("kernel", False, str(err), fix, needed=True)
    better, usable = [], []
    for kernel, arch, needs in TABLE:
        if kernel.name == ISA.name:
            break
        if arch == cpu.arch:
            lacks = sorted(needs - cpu.features)
            better.append(f"{kernel.name} needs {' '.join(lacks)}" if lacks else kernel.name)
            usable += [] if lacks else [kernel.name]
    why = "EDGEQ_KERNEL asks for it" if wanted else "the best this processor runs"
    detail = f"{ISA.name}: {why}" + (f" ({'; '.join(better)})" if better else "")
    fix = f"unset EDGEQ_KERNEL to use {usable[0]}" if wanted and usable else ""
    return Check("kernel", True, detail, fix, needed=True)
