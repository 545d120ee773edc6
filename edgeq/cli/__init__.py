"""The ``edgeq`` command: each command parses its options, calls the library, and prints.

Results go to standard output, progress and timings to standard error. Exit codes: 0 success, 1 an
error with an explanation, 2 wrong usage, 130 interrupted, 143 terminated. Only ``render`` uses
colors.
"""

from __future__ import annotations

from edgeq.cli.app import main

__all__ = ["main"]
