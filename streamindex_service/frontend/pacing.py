"""Streams that bring much hold back while decode steps are on their way."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

# Decode steps follow each other: a little after the last one the next is expected.
_LINGER_S = 0.01


class Pacing:
    """Who reads the next message, and when.

    A decode step goes through a dozen turns of the event loop and waits in each for whatever else is ready. Receiving a
    message is the largest piece of that, and nothing can divide it; so while decode steps are being answered streams
    read one message at a time, and as much time lies between two as the first is worth. Otherwise nothing waits.

    bytes_per_s: what all of them together may bring meanwhile. A MiB costs the loop 0.8 ms or so.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, bytes_per_s: int) -> None:
        self._loop = loop
        self._bytes_per_s = bytes_per_s
        self._steps = 0
        self._until = 0.0  # on the loop's clock: streams hold back until then without a step
        self._next_at = 0.0  # when the next of them may read
        self._apart_s = 0.0
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
        while self._waiting:
            turn = self._waiting.popleft()
            if turn.done():  # its stream has ended
                continue
            turn.set_result(None)
            if held:
                self._next_at = self._loop.time() + self._apart_s
                break
        if self._waiting:
            self._timer = self._loop.call_at(self._next_at, self._hand_on)
