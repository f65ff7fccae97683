"""Time that passes when nothing else is left to do."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class VirtualTime:
    """A clock and what will happen: `clock()` is the time in seconds, `run` lets it pass from event to event."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()  # events of one moment happen in the order in which they were planned

    def __call__(self) -> float:
        """Now, in seconds."""
        return self.now_s

    def __len__(self) -> int:
        return len(self._events)

    def after(self, delay_s: float, event: Callable[[], None]) -> None:
        """Have something happen later."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._numbers), event))

    def step(self) -> bool:
        """Let the next event happen; False when there is none."""
        if not self._events:
            return False
        self.now_s, _, event = heapq.heappop(self._events)
        event()
        return True
