"""Which positions of a sequence have states that a multi-token-prediction head can read.

A ring holds the last `edgeq.model.memory_layout.KEPT_STATES` of them. A saved sequence does not
include it, so that its positions have none once it is loaded.
"""

from __future__ import annotations

from edgeq.model.memory_layout import KEPT_STATES


def kept_states(kept: range, position: int, tokens: int) -> range:
    """The positions whose states are kept after a pass of some tokens at a position.

    Example:
        >>> from edgeq.runtime.kept_states import kept_states
        >>> kept_states(range(0, 5), 4, 3), kept_states(range(0, 5), 8, 3)
        (range(0, 7), range(8, 11))
    """
    start = kept.start if kept.start <= position <= kept.stop else position
    return range(max(start, position + tokens - KEPT_STATES), position + tokens)


def cut_states(kept: range, length: int) -> range:
    """The positions whose states are kept when a sequence is cut to a length."""
    return range(min(kept.start, length), min(kept.stop, length))
