"""What the frontend has asked for and the device has not been given: tiles by priority, everything else in its order.

A tile goes to the device as late as it may, so that one of a higher band can still go before it: when the device has
nothing, or is about to be done with what it has. What comes behind a tile and is no tile may go before it: nothing that
a tile needs is taken away while it has not been answered.

Tiles of searches and of attention have a lane each: they run beside each other, and one lane says nothing of when the
other is done.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from streamindex_service.ipc.v1 import worker_pb2 as pb

MOST_ISSUED = 8  # tiles that the device is given at a time, however short they are


@dataclass(frozen=True)
class Command:
    """A message, and the descriptor that came with it."""

    message: pb.ToWorker
    fd: int | None = None

    @property
    def tile(self) -> pb.SearchTile | pb.AttendTile | None:
        """The tile that it asks for, if it does."""
        kind = self.message.WhichOneof("message")
        if kind == "search_tile":
            return self.message.search_tile
        return self.message.attend_tile if kind == "attend_tile" else None


@dataclass(slots=True)
class _Lane:
    """Tiles of one kind: those that wait, a heap of (band, number of arrival, tile id, command), and what the device
    has of them."""

    waiting: list[tuple[int, int, int, Command]] = field(default_factory=list)
    issued: dict[int, float] = field(default_factory=dict)  # tile -> estimated seconds
    busy_until: float = 0.0

    def wait_s(self, ahead_s: float, now: float) -> float | None:
        """How long the next tile has to wait yet: 0 for not at all, None for until something is finished."""
        if not self.issued:
            return 0.0
        if len(self.issued) >= MOST_ISSUED:
            return None
        return max(0.0, self.busy_until - ahead_s - now)


class Commands:
    """The queue between the thread that reads, the one that issues and those that report.

    issue_ahead_s: the device is given a tile so long before it will be done with those that it has of the lane, by
    their estimates.
    """

    def __init__(self, issue_ahead_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ahead_s = issue_ahead_s
        self._clock = clock
        self._changed = threading.Condition()
        self._others: deque[Command] = deque()
        self._lanes = {pb.SearchTile: _Lane(), pb.AttendTile: _Lane()}
        self._arrivals = itertools.count()
        self._cancelled: set[int] = set()  # of the tiles that wait
        self._closed = False

    def put(self, command: Command) -> None:
        """One more."""
        with self._changed:
            if (tile := command.tile) is not None:
                lane = self._lanes[type(tile)]
                heapq.heappush(lane.waiting, (tile.band, next(self._arrivals), tile.tile_id, command))
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
            waiting = {tile_id for lane in self._lanes.values() for _, _, tile_id, _ in lane.waiting}
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
                lanes = [lane for lane in self._lanes.values() if lane.waiting]
                if not lanes and self._closed:
                    return None
                waits = [(self._wait_s(lane), lane) for lane in lanes]
                ready = [lane for wait_s, lane in waits if wait_s == 0.0]
                if ready:
                    return self._take_tile(min(ready, key=lambda lane: lane.waiting[0][:2]))
                self._changed.wait(min((wait_s for wait_s, _ in waits if wait_s is not None), default=None))

    def finished(self, tile_id: int) -> None:
        """The device is done with a tile, or was never given it."""
        with self._changed:
            for lane in self._lanes.values():
                if lane.issued.pop(tile_id, None) is not None:
                    lane.busy_until = self._clock() + sum(lane.issued.values())
                    self._changed.notify()

    def _take_tile(self, lane: _Lane) -> tuple[Command, bool]:
        _, _, tile_id, command = heapq.heappop(lane.waiting)
        if tile_id in self._cancelled:
            self._cancelled.discard(tile_id)
            return command, True
        assert command.tile is not None
        seconds = command.tile.estimated_us / 1e6
        lane.issued[tile_id] = seconds
        lane.busy_until = max(lane.busy_until, self._clock()) + seconds
        return command, False

    def _wait_s(self, lane: _Lane) -> float | None:
        if lane.waiting[0][2] in self._cancelled:
            return 0.0
        return lane.wait_s(self._ahead_s, self._clock())
