"""Slots: the engines of a model, and the queue of requests that wait for one.

Requests get slots in the order in which they arrive. Of several free slots a request gets the one
whose KV cache has the longest prefix of its prompt.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from edgeq.runtime.draft import Draft
from edgeq.runtime.engine import Engine
from edgeq.serving.failures import busy
from edgeq.serving.prefix_cache import common_prefix


@dataclass(eq=False)
class Slot:
    """An engine that one request at a time may use.

    Args:
        number: number of the slot, from 0.
        engine: the engine, with the KV cache of its last sequence.
        draft: drafts tokens for the engine; None for no drafting.
        tokens: the last sequence of the engine when the slot was released.
    """

    number: int
    engine: Engine
    draft: Draft | None = None
    tokens: tuple[int, ...] = ()


class SlotPool:
    """The slots of one model. Only the event loop may use the pool; threads use the engines.

    Args:
        engines: one for each slot.
        queue: number of requests that may wait.
        drafts: one for each slot; empty for no drafting.
    """

    def __init__(self, engines: Sequence[Engine], queue: int, drafts: Sequence[Draft] = ()) -> None:
        helpers: Sequence[Draft | None] = drafts or [None] * len(engines)
        pairs = zip(engines, helpers, strict=True)
        self.slots = [Slot(number, engine, draft) for number, (engine, draft) in enumerate(pairs)]
        self._free = list(self.slots)
        self._queue = queue
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._prompts: dict[asyncio.Future[Slot], tuple[int, ...]] = {}

    @property
    def running(self) -> int:
        """Number of slots in use."""
        return len(self.slots) - len(self._free)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._waiting)

    async def take(self, prompt: tuple[int, ...], timeout_s: float) -> Slot:
        """Wait for a free slot for a prompt. `release` returns the slot to the pool.

        Raises:
            ApiError: the queue is full, or no slot became free in time.
        """
        if self._free and not self._waiting:
            return self._give(prompt)
        if self.waiting >= self._queue:
            raise busy(
                f"all {len(self.slots)} slots are in use and {self.waiting} requests wait in the "
                "queue, which is full; try again later",
                "queue_full",
            )
        place: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        self._prompts[place] = prompt
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(place)
        except BaseException as err:
            self._leave(place)
            if isinstance(err, TimeoutError):
                raise busy(
                    f"no slot became free within {timeout_s:.0f} s; try again later",
                    "queue_timeout",
                ) from err
            raise

    def release(self, slot: Slot) -> None:
        """Return a slot to the pool; the first request in the queue gets one."""
        slot.tokens = tuple(slot.engine.tokens)
        self._free.append(slot)
        while self._waiting and self._free:
            place = self._waiting.popleft()
            prompt = self._prompts.pop(place)
            place.set_result(self._give(prompt))

    def _give(self, prompt: tuple[int, ...]) -> Slot:
        best = max(self._free, key=lambda slot: common_prefix(slot.tokens, prompt))
        self._free.remove(best)
        return best

    def _leave(self, place: asyncio.Future[Slot]) -> None:
        """Remove a request from the queue; a slot that it was just given goes to the next one."""
        if place.done():
            self.release(place.result())
        else:
            self._waiting.remove(place)
            del self._prompts[place]
