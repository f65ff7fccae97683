"""Parts of one call that go on side by side, and what finds no room beside the others.

The rows of what a part works on stay in host memory until it ends, it is one of the searches that are open, and its
tiles are among those that wait. A part that finds no memory for its own rows, or the queue full, may have no other in
its way than its neighbours: it comes after them, and is refused only where there is no room without them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from streamindex_service.errors import HostMemoryError, QueueFullError

NO_ROOM = (HostMemoryError, QueueFullError)
"""What a part may be refused with for what its neighbours have."""

Result = TypeVar("Result")


class Neighbours:
    """The parts of one call."""

    def __init__(self) -> None:
        self._at_work = 0  # parts that may hold rows: not those that wait for others to end
        self._let_go = 0  # how often a part has let go of all that it held, by ending or to wait
        self._ends: list[asyncio.Future[None]] = []  # of those that wait

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """For as long as one of them may hold rows."""
        self._at_work += 1
        try:
            yield
        finally:
            self._rest()
            for end in self._ends:
                if not end.done():
                    end.set_result(None)
            self._ends.clear()

    async def beside(self, take: Callable[[], Awaitable[Result]]) -> Result:
        """Do what takes room and, where it fails, leaves none taken; again when a neighbour has ended.

        For a part that holds nothing. Raises HostMemoryError, QueueFullError when no neighbour was in the way.
        """
        while True:
            before = self._let_go
            try:
                return await take()
            except NO_ROOM:
                # A neighbour that let go while this was under way may have been what was in the way.
                if self._let_go == before:
                    if self._at_work == 1:
                        raise
                    await self._after_another()

    async def _after_another(self) -> None:
        # Of those that take at the same time all but one come to wait, and that one is not woken by them: each would
        # find the others in its way again.
        self._ends.append(end := asyncio.get_running_loop().create_future())
        self._rest()
        try:
            await end
        finally:
            self._at_work += 1

    def _rest(self) -> None:
        self._at_work -= 1
        self._let_go += 1
