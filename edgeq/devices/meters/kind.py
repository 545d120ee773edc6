"""What a kind of meter is: one row of `edgeq.devices.meters.KINDS`, made by the module of the kind.

A kind is found on the machine, named by a user (``--meter NAME:WHERE``), read from the log of
another program, or several of these; what it cannot do is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.devices.meters.base import Absent, Meter, Run

if TYPE_CHECKING:
    from edgeq.devices.meters.trace import Trace


@dataclass(frozen=True, kw_only=True)
class MeterKind:
    """One kind of meter.

    Args:
        name: of the kind; the NAME of ``--meter NAME:WHERE`` if it can be opened.
        find: the meters of a machine, and an `Absent` with the reason for each that cannot be
            read. It is called with the root of the machine's file system, and with what runs
            commands there, None where none can be run.
        open: the meter at WHERE; raises DeviceError if it cannot be read, UsageError if WHERE is
            not of its form.
        usage: examples of NAME:WHERE, for the error message.
        recognizes: whether a log is of this kind, from its path and its first 64 KiB (b"" for a
            folder).
        read_log: the traces in such a log.
    """

    name: str
    find: Callable[[Path, Run | None], Sequence[Meter | Absent]] | None = None
    open: Callable[[str], Meter] | None = None
    usage: str = ""
    recognizes: Callable[[Path, bytes], bool] | None = None
    read_log: Callable[[Path], list[Trace]] | None = None
