"""Streams that bring much hold back while decode steps are on their way."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Decode steps follow each other: a little after the last one the next is expected.
_LINGER_S = 0.01
# On a slower host the same bytes take more of the loop's time: of that, streams and steps together leave some.
_MOST_BUSY = 0.75
_MOST_TIMES_APART = 4.0  # so that streams go on where the steps alone take as much


class Pacing:
    """Who reads the next message, and when.

    A decode step goes through a dozen turns of the event loop and waits in each for whatever else is ready. Receiving a
    message is the largest piece of that, and nothing can divide it; so while decode steps are being answered streams
    read one message at a time, and as much time lies between two as the first is worth. Otherwise nothing waits.

    bytes_per_s: what all of them together may bring meanwhile. A MiB costs the loop 0.8 ms or so; where it costs more,
    they bring less. busy_s: processor seconds of the loop's thread.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, bytes_per_s: int, busy_s: Callable[[], float] = time.thread_time
    ) -> None:
        self._loop = loop
        self._busy_s = busy_s
        self._bytes_per_s = bytes_per_s
        self._steps = 0
        self._until = 0.0  # on the loop's clock: streams hold back until then without a step
        self._next_at = 0.0  # when the next of them may read
        self._apart_s = 0.0
        self._last_at = self._last_busy_s = 0.0  # when one was last told to read, and what the loop had worked by then
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """A decode step is being answered."""
        self._steps += 1
        try:
            yield
        finally:
            self._steps -= 1
            self._until = self._loop.time() + _LINGER_S

    async def before_reading(self) -> None:
        """Wait until the stream may read its next message; not at all while there are no decode steps."""
        if not self._waiting and not self._hold_back():
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(turn)
        if self._timer is None:
            self._timer = self._loop.call_at(self._next_at, self._hand_on)
        await turn

    def read(self, size_bytes: int) -> None:
        """A stream has read a message of that size."""
        self._apart_s = size_bytes / self._bytes_per_s

    def _hold_back(self) -> bool:
        return self._steps > 0 or self._loop.time() < self._until

    def _hand_on(self) -> None:
        self._timer = None
        held = self._hold_back()
        if held:
            self._leave_some()
            if self._next_at > self._loop.time():
                self._timer = self._loop.call_at(self._next_at, self._hand_on)
                return
        while self._waiting:
            turn = self._waiting.popleft()
            if turn.done():  # its stream has ended
                continue
            turn.set_result(None)
            if held:
                self._last_at, self._last_busy_s = self._loop.time(), self._busy_s()
                self._next_at = self._last_at + self._apart_s
                break
        if self._waiting:
            self._timer = self._loop.call_at(self._next_at, self._hand_on)

    def _leave_some(self) -> None:
        apart_s = (self._busy_s() - self._last_busy_s) / _MOST_BUSY
        self._next_at = max(self._next_at, self._last_at + min(apart_s, _MOST_TIMES_APART * self._apart_s))
