"""Where edgeq keeps what it can make again: compiled kernels, the demo's packed model."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """EDGEQ_CACHE if set, else ``edgeq`` in the user's cache folder; it may not exist yet."""
    chosen = os.environ.get("EDGEQ_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeq"
