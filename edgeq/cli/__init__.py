"""The ``edgeq`` command: thin commands over the library.

Results go to stdout, progress and timings to stderr. Exit codes: 0 done, 1 an error edgeq
explains, 2 wrong usage, 130 interrupted, 143 terminated. ``render`` is the only module that knows
colors.
"""

from __future__ import annotations

from edgeq.cli.app import main

__all__ = ["main"]
