"""What the frontend has asked for and the device has not been given: tiles by priority, everything else in its order.

A tile goes to the device as late as it may, so that one of a higher band can still go before it: when the device has
nothing, or is about to be done with what it has. What comes behind a tile and is no tile may go before it: nothing that
a tile needs is taken away while it has not been answered.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from streamindex_service.ipc.v1 import worker_pb2 as pb

MOST_ISSUED = 8  # tiles that the device is given at a time, however short they are


@dataclass(frozen=True)
class Command:
    """A message, and the descriptor that came with it."""

    message: pb.ToWorker
    fd: int | None = None


class Commands:
    """The queue between the thread that reads, the one that issues and the one that reports.

    issue_ahead_s: the device is given a tile so long before it will be done with those that it has, by their
    estimates.
    """

    def __init__(self, issue_ahead_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ahead_s = issue_ahead_s
        self._clock = clock
        self._changed = threading.Condition()
        self._others: deque[Command] = deque()
        self._tiles: list[tuple[int, int, Command]] = []  # a heap: band, number of arrival
        self._arrivals = itertools.count()
        self._cancelled: set[int] = set()  # of the tiles that wait
        self._issued: dict[int, float] = {}  # tile -> estimated seconds
        self._busy_until = 0.0
        self._closed = False

    def put(self, command: Command) -> None:
        """One more."""
        with self._changed:
            if command.message.WhichOneof("message") == "search_tile":
                heapq.heappush(self._tiles, (command.message.search_tile.band, next(self._arrivals), command))
            else:
                self._others.append(command)
            self._changed.notify()

    def close(self) -> None:
        """No more will come."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def cancel(self, tile_ids: list[int]) -> None:
        """Do not start these tiles; those that were taken are not touched."""
        with self._changed:
            waiting = {command.message.search_tile.tile_id for _, _, command in self._tiles}
            self._cancelled.update(waiting.intersection(tile_ids))
            self._changed.notify()

    def take(self) -> tuple[Command, bool] | None:
        """The next to be carried out, and whether it was cancelled; None when no more will come. Waits for it.

        The device counts as having a tile from here on, until `finished`.
        """
        with self._changed:
            while True:
                if self._others:
                    return self._others.popleft(), False
                if self._tiles:
                    cancelled = self._tiles[0][2].message.search_tile.tile_id in self._cancelled
                    wait_s = 0.0 if cancelled else self._wait_s()
                    if wait_s == 0.0:
                        return self._take_tile(), cancelled
                    self._changed.wait(wait_s)
                elif self._closed:
                    return None
                else:
                    self._changed.wait()

    def finished(self, tile_id: int) -> None:
        """The device is done with a tile, or was never given it."""
        with self._changed:
            if self._issued.pop(tile_id, None) is not None:
                self._busy_until = self._clock() + sum(self._issued.values())
                self._changed.notify()

    def _take_tile(self) -> Command:
        _, _, command = heapq.heappop(self._tiles)
        tile = command.message.search_tile
        if tile.tile_id in self._cancelled:
            self._cancelled.discard(tile.tile_id)
            return command
        seconds = tile.estimated_us / 1e6
        self._issued[tile.tile_id] = seconds
        self._busy_until = max(self._busy_until, self._clock()) + seconds
        return command

    def _wait_s(self) -> float | None:
        """How long the next tile has to wait yet: 0 for not at all, None for until something is finished."""
        if not self._issued:
            return 0.0
        if len(self._issued) >= MOST_ISSUED:
            return None
        return max(0.0, self._busy_until - self._ahead_s - self._clock())
