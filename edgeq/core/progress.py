"""How long-running functions report their progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done now, the steps done, and the steps in total (0 if unknown)."""
