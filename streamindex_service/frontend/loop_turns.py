"""Work of some tenths of a millisecond on the event loop, one piece a turn."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Iterator

# Turns of which those behind get one while others wait: so that they are not forgotten under a load that never ends.
_ONE_IN = 4


class LoopTurns:
    """Streams that bring much take turns: one piece of their work in each turn of the event loop.

    A call goes through several turns of the loop, and in each of them waits for everything else that is ready. Were all
    streams that have a chunk to work on it at once, a decode step would wait for all of them several times over.

    What a stream brings that the device has no use for yet comes behind what it could go on with, and is brought stream
    by stream: were all of them to share what the loop can bring, all would be complete at the same time, which is late,
    and the device would have nothing until then and everything at once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._taken = False  # this turn of the loop, or the next, is somebody's
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._behind: list[tuple[tuple[int, ...], int, asyncio.Future[None]]] = []  # a heap
        self._arrivals = itertools.count()
        self._ahead = 0  # turns since the last of those behind
        self._by_rank = False  # the last of those behind went by its rank, not for having waited longest

    @property
    def waiting(self) -> int:
        """Streams that wait for a turn, without those behind."""
        return len(self._waiting)

    async def next(self, behind: tuple[int, ...] | None = None) -> None:
        """Wait for the next turn of the loop that nobody has, first come first served; at once if it is this one.

        behind: for work that can wait; what has none goes first, then in turn the lowest, and who waits longest.
        """
        if not self._taken:
            self._taken = True
            self._loop.call_soon(self._hand_on)
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        if behind is None:
            self._waiting.append(turn)
        else:
            heapq.heappush(self._behind, (behind, next(self._arrivals), turn))
        await turn

    def _hand_on(self) -> None:
        for turn in self._in_order():
            if not turn.done():  # else its stream has ended
                turn.set_result(None)
                self._loop.call_soon(self._hand_on)
                return
        self._taken = False

    def _in_order(self) -> Iterator[asyncio.Future[None]]:
        while self._waiting or self._behind:
            if self._behind and (not self._waiting or self._ahead >= _ONE_IN - 1):
                self._ahead = 0
                yield self._next_behind()
            else:
                self._ahead += 1
                yield self._waiting.popleft()

    def _next_behind(self) -> asyncio.Future[None]:
        # By rank alone, those who bring a little again and again would keep the others from it for ever.
        self._by_rank = not self._by_rank
        if self._by_rank:
            return heapq.heappop(self._behind)[-1]
        longest = min(self._behind, key=lambda entry: entry[1])
        self._behind.remove(longest)
        heapq.heapify(self._behind)
        return longest[-1]
