"""For how long rows of a search are gathered before a tile of them goes to the device."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from streamindex_service.frontend.loop_turns import LoopTurns

_GATHER_S = 0.002  # between tiles of a search that could be larger, for each stream that brings rows
_GATHER_MOST_S = 0.1
# While rows keep coming, of those times, and the most of it: a tile costs the event loop 0.7 ms, however few rows
# it has.
_WHILE_COMING = 8
_COMING_MOST_S = 0.4
_SILENT_GAPS = 2.0  # without rows for so many times as long as the last took to come, no more are waited for


class Gathering:
    """Of one stream. Times are the event loop's.

    A tile costs the device and the loop about as much for few rows as for many. Where many streams bring rows, a tile
    of what each of them has brought in 2 ms is next to nothing, and the loop has less time to bring the rest. So rows
    gather for one turn of each stream that waits for the loop; and for several while they keep coming, which they do
    where the caller does not wait for answers. Who sends nothing more before its answer waits for none of that.

    came_at: when the last rows came. with_others: for others that bring rows; not for a decode step. time_remaining: of
    the call, in seconds, or None.
    """

    def __init__(self, loop_turns: LoopTurns, time_remaining: Callable[[], float | None], *, with_others: bool) -> None:
        self._loop_turns = loop_turns
        self._time_remaining = time_remaining
        self._with_others = with_others
        self._loop = asyncio.get_running_loop()
        self.came_at = self._went_at = self._loop.time()
        self._until = self._went_at + min(_GATHER_S * self._others, _GATHER_MOST_S)
        self._since: float | None = None  # since when rows wait for more
        self._most_s = math.inf

    def rows_came(self, *, unasked: bool) -> None:
        """Rows are there. unasked: the caller had not had the answers to those before."""
        now = self._loop.time()
        gap_s, self.came_at = now - self.came_at, now
        if unasked and self._others:
            longest_s = min(_WHILE_COMING * _GATHER_S * (1 + self._others), _COMING_MOST_S)
            self._until = max(self._until, min(now + _SILENT_GAPS * gap_s, self._went_at + longest_s))

    def tile_went(self) -> None:
        """What had gathered is on its way; what comes from now on is for the next."""
        self._since = None
        self._went_at = self._loop.time()
        self._until = self._went_at + min(_GATHER_S * (1 + self._others), _GATHER_MOST_S)

    def ends_at(self, *, for_copy_s: float, full: bool) -> float:
        """When rows that are there may go. for_copy_s: the most that they gather for if their layer has to displace
        others; full: there are as many as a tile can have."""
        if self._since is None:
            left_s = self._time_remaining()
            self._since, self._most_s = self._loop.time(), math.inf if left_s is None else left_s / 2
        until = self._since + min(for_copy_s, self._most_s)
        return until if full else max(until, min(self._until, self._since + self._most_s))

    @property
    def _others(self) -> int:
        return self._loop_turns.waiting if self._with_others else 0
