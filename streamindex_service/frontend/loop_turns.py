"""Work of some tenths of a millisecond on the event loop, one piece a turn."""

from __future__ import annotations

import asyncio
from collections import deque


class LoopTurns:
    """Streams that bring much take turns: one piece of their work in each turn of the event loop.

    A call goes through several turns of the loop, and in each of them waits for everything else that is ready. Were all
    streams that have a chunk to work on it at once, a decode step would wait for all of them several times over.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._taken = False  # this turn of the loop, or the next, is somebody's
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def next(self) -> None:
        """Wait for the next turn of the loop that nobody has, first come first served; at once if it is this one."""
        if not self._taken:
            self._taken = True
            self._loop.call_soon(self._hand_on)
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(turn)
        await turn

    def _hand_on(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():  # else its stream has ended
                turn.set_result(None)
                self._loop.call_soon(self._hand_on)
                return
        self._taken = False
