"""Which streams read their next message: few at a time, and first those whose rows the device can go on with."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Iterator

_PLACES = 6  # streams that read at a time: others are received while one is copied
_MOST_S = 0.005  # for which one has a place: who brings nothing for so long is not waited for
# Places of which those behind get one while others wait: so that they are not forgotten under a load that never ends.
_ONE_IN = 4


class Reading:
    """Streams that bring much read a message, and copy it, in few places.

    With all of them reading at once, each message would lie about until the others are copied, and be out of the
    processor's cache by then: with 64 streams a copy takes more than twice as long as with few.

    What a stream brings that the device has no use for yet comes behind what it could go on with, and is brought stream
    by stream: were all of them to share what the loop can bring, all would be complete at the same time, which is late,
    and the device would have nothing until then and everything at once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, places: int = _PLACES) -> None:
        self._loop = loop
        self._free = places
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._behind: list[tuple[tuple[int, ...], int, asyncio.Future[None]]] = []  # a heap
        self._arrivals = itertools.count()
        self._ahead = 0  # places since the last of those behind

    @property
    def waiting(self) -> int:
        """Streams that wait for a place, without those behind."""
        return len(self._waiting)

    async def begin(self, behind: tuple[int, ...] | None = None) -> Place:
        """Wait for a place, first come first served. It is to be given back; after a while it is of itself.

        behind: for what can wait; what has none goes first, then the lowest.
        """
        if self._free:
            self._free -= 1
            return Place(self, self._loop)
        turn: asyncio.Future[None] = self._loop.create_future()
        if behind is None:
            self._waiting.append(turn)
        else:
            heapq.heappush(self._behind, (behind, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.hand_on()  # given and cancelled at the same moment
            raise
        return Place(self, self._loop)

    def hand_on(self) -> None:
        """A place is given back."""
        for turn in self._in_order():
            if not turn.done():  # else its stream has ended
                turn.set_result(None)
                return
        self._free += 1

    def _in_order(self) -> Iterator[asyncio.Future[None]]:
        while self._waiting or self._behind:
            if self._behind and (not self._waiting or self._ahead >= _ONE_IN - 1):
                self._ahead = 0
                yield heapq.heappop(self._behind)[-1]
            else:
                self._ahead += 1
                yield self._waiting.popleft()


class Place:
    """The right to read a message and to copy it."""

    def __init__(self, reading: Reading, loop: asyncio.AbstractEventLoop) -> None:
        self._reading: Reading | None = reading
        self._timer = loop.call_later(_MOST_S, self.give_back)

    def give_back(self) -> None:
        """Let another read; nothing if that was done."""
        reading, self._reading = self._reading, None
        self._timer.cancel()
        if reading is not None:
            reading.hand_on()
