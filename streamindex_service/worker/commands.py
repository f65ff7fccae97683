"""What the frontend has asked for and the device has not been given: tiles by priority, everything else in its order.

A tile goes to the device as late as it may, so that one of a higher band can still go before it: when the device has
nothing, or is about to be done with what it has. What comes behind a tile and is no tile may go before it: nothing that
a tile needs is taken away while it has not been answered. A tile whose pages are still being copied waits for them
here, and those behind it go before it: given to the device, it would keep it from them.

Tiles of searches and of attention have a lane each: they run beside each other, and one lane says nothing of when the
other is done.
"""

from __future__ import annotations

import itertools
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from streamindex_service.ipc.v1 import worker_pb2 as pb

MOST_ISSUED = 8  # tiles that the device is given at a time, however short they are
Tile = pb.SearchTile | pb.AttendTile


@dataclass(frozen=True)
class Command:
    """A message, and the descriptor that came with it."""

    message: pb.ToWorker
    fd: int | None = None

    @property
    def tile(self) -> Tile | None:
        """The tile that it asks for, if it does."""
        kind = self.message.WhichOneof("message")
        if kind == "search_tile":
            return self.message.search_tile
        return self.message.attend_tile if kind == "attend_tile" else None


_Waiting = tuple[int, int, int, Command]  # band, number of arrival, tile id


@dataclass(slots=True)
class _Lane:
    """Tiles of one kind: those that wait, in the order in which they go, and what the device has of them."""

    waiting: list[_Waiting] = field(default_factory=list)
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
    their estimates. lacks_pages: whether pages that a tile reads are still being copied; once they are not, `finished`
    is called.
    """

    def __init__(
        self,
        issue_ahead_s: float,
        clock: Callable[[], float] = time.monotonic,
        lacks_pages: Callable[[Tile], bool] = lambda tile: False,
    ) -> None:
        self._ahead_s = issue_ahead_s
        self._clock = clock
        self._lacks_pages = lacks_pages
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
                insort(lane.waiting, (tile.band, next(self._arrivals), tile.tile_id, command))
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
                if self._closed and not any(lane.waiting for lane in self._lanes.values()):
                    return None
                nexts = [(lane, next(self._ready(lane), None)) for lane in self._lanes.values()]
                waits = [(self._wait_s(lane, tile), lane, tile) for lane, tile in nexts if tile is not None]
                ready = [(tile, lane) for wait_s, lane, tile in waits if wait_s == 0.0]
                if ready:
                    return self._take_tile(*min(ready, key=lambda each: each[0][:2]))
                self._changed.wait(min((wait_s for wait_s, _, _ in waits if wait_s is not None), default=None))

    def finished(self, work_id: int) -> None:
        """The device is done with a tile, or was never given it; or pages were copied."""
        with self._changed:
            for lane in self._lanes.values():
                if lane.issued.pop(work_id, None) is not None:
                    lane.busy_until = self._clock() + sum(lane.issued.values())
            self._changed.notify()

    def _ready(self, lane: _Lane) -> Iterator[_Waiting]:
        """Tiles that need not wait for pages."""
        for tile in lane.waiting:
            _, _, tile_id, command = tile
            assert command.tile is not None
            if tile_id in self._cancelled or not self._lacks_pages(command.tile):
                yield tile

    def _take_tile(self, tile: _Waiting, lane: _Lane) -> tuple[Command, bool]:
        lane.waiting.remove(tile)
        _, _, tile_id, command = tile
        if tile_id in self._cancelled:
            self._cancelled.discard(tile_id)
            return command, True
        assert command.tile is not None
        seconds = command.tile.estimated_us / 1e6
        lane.issued[tile_id] = seconds
        lane.busy_until = max(lane.busy_until, self._clock()) + seconds
        return command, False

    def _wait_s(self, lane: _Lane, tile: _Waiting) -> float | None:
        return 0.0 if tile[2] in self._cancelled else lane.wait_s(self._ahead_s, self._clock())
