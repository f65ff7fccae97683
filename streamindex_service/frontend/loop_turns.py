"""Work of some tenths of a millisecond on the event loop, one piece a turn."""

from __future__ import annotations

import asyncio
import heapq
import itertools

# Turns of which those behind get one while others wait: so that they are not forgotten under a load that never ends.
_ONE_IN = 4
_GONE = 64  # entries that a heap may have too many


class _Line:
    """Those who wait, by their rank and by how long they do."""

    def __init__(self) -> None:
        self._there: dict[int, asyncio.Future[None]] = {}  # by arrival
        self._ranks: list[tuple[tuple[int, ...], int]] = []  # a heap of ranks and arrivals; may hold some that are gone
        self._arrivals = itertools.count()
        self._by_rank = False  # the last one went by its rank, not for having waited longest

    def __len__(self) -> int:
        return len(self._there)

    def push(self, rank: tuple[int, ...], turn: asyncio.Future[None]) -> None:
        """One more."""
        arrival = next(self._arrivals)
        self._there[arrival] = turn
        heapq.heappush(self._ranks, (rank, arrival))
        if len(self._ranks) > 2 * len(self._there) + _GONE:
            self._ranks = [each for each in self._ranks if each[1] in self._there]
            heapq.heapify(self._ranks)

    def pop(self) -> asyncio.Future[None]:
        """The lowest rank and who waits longest, in turn: by rank alone, those who bring a little again and again would
        keep the others from it for ever."""
        self._by_rank = not self._by_rank
        arrival = next(iter(self._there))
        if self._by_rank:
            arrival = next(each for _, each in iter(lambda: heapq.heappop(self._ranks), None) if each in self._there)
        return self._there.pop(arrival)


class LoopTurns:
    """Streams that bring much take turns: one piece of their work in each turn of the event loop.

    A call goes through several turns of the loop, and in each of them waits for everything else that is ready. Were all
    streams that have a chunk to work on it at once, a decode step would wait for all of them several times over.

    Half of the turns go to whoever is first by its rank. Were all streams to share what the loop can bring, those that
    began together would be complete at the same time, which is late: the layers of all of them would make room for the
    next ones at once, and the device would have nothing meanwhile. What a stream brings that the device has no use for
    yet comes behind what it could go on with.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._taken = False  # this turn of the loop, or the next, is somebody's
        self._ahead, self._behind = _Line(), _Line()
        self._since_behind = 0  # turns since the last of those behind

    @property
    def waiting(self) -> int:
        """Streams that wait for a turn, without those behind."""
        return len(self._ahead)

    async def next(self, rank: tuple[int, ...], *, behind: bool = False) -> None:
        """Wait for a turn of the loop that nobody has; at once if it is this one.

        rank: the lowest and who waits longest go in turn. behind: for work that can wait.
        """
        if not self._taken:
            self._taken = True
            self._loop.call_soon(self._hand_on)
            return
        turn: asyncio.Future[None] = self._loop.create_future()
        (self._behind if behind else self._ahead).push(rank, turn)
        await turn

    def _hand_on(self) -> None:
        while self._ahead or self._behind:
            turn = self._pop()
            if not turn.done():  # else its stream has ended
                turn.set_result(None)
                self._loop.call_soon(self._hand_on)
                return
        self._taken = False

    def _pop(self) -> asyncio.Future[None]:
        if self._behind and (not self._ahead or self._since_behind >= _ONE_IN - 1):
            self._since_behind = 0
            return self._behind.pop()
        self._since_behind += 1
        return self._ahead.pop()
