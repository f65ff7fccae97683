"""Copies of pages to the device that may not be made yet, and which of them a tile has to wait for.

Copies are made in a stream of their own, in the order in which they are asked for. A tile waits for those into pages
that it reads, and for no others: what it reads is compared with what is being written, as pieces of device memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from streamindex_service.ipc.v1 import worker_pb2 as pb


class Event(Protocol):
    """What says when a copy is made; of CUDA, if not of a test."""

    def query(self) -> bool:
        """Whether it is."""


E = TypeVar("E", bound=Event)


class PageRun(NamedTuple):
    """Pages that follow each other both in a segment and in an extent: one copy."""

    segment_id: int
    start_bytes: int
    extent_id: int
    to_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryRanges:
    """Pieces [starts[i], stops[i]) of memory, addresses in bytes, in their order; none touches the next."""

    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]

    @classmethod
    def of(cls, addresses: npt.NDArray[np.int64], sizes_bytes: npt.NDArray[np.int64] | int) -> MemoryRanges:
        """Of pieces in any order. addresses: [n] int64; sizes_bytes: [n] int64, or one for all; above 0."""
        order = np.argsort(addresses)
        starts, stops = addresses[order], np.maximum.accumulate((addresses + sizes_bytes)[order])
        apart = np.flatnonzero(starts[1:] > stops[:-1])
        firsts, lasts = np.append(0, apart + 1), np.append(apart, len(starts) - 1)
        return cls(starts[firsts], stops[lasts]) if len(starts) else cls(starts, starts)

    def overlaps(self, other: MemoryRanges) -> bool:
        """Whether they have a byte in common."""
        few, many = (self, other) if len(self.starts) <= len(other.starts) else (other, self)
        if not len(few.starts) or few.starts[0] >= many.stops[-1] or many.starts[0] >= few.stops[-1]:
            return False
        at = np.searchsorted(many.stops, few.starts, side="right")  # the first that ends behind each start
        within = at < len(many.starts)
        return bool((many.starts[at[within]] < few.stops[within]).any())


@dataclass(frozen=True, slots=True)
class _Copy(Generic[E]):
    event: E
    targets: MemoryRanges
    segment_ids: frozenset[int]
    shown: dict[int, bool] = field(default_factory=dict)  # view -> whether it has any of it; views do not change

    def is_shown(self, view_id: int, memory_of: Callable[[int], MemoryRanges]) -> bool:
        found = self.shown.get(view_id)
        if found is None:
            found = self.shown[view_id] = self.targets.overlaps(memory_of(view_id))
        return found


class Promotions(Generic[E]):
    """Copies that were given to the device, until they are known to be made. For the thread that issues work."""

    def __init__(self) -> None:
        self._pending: deque[_Copy[E]] = deque()  # they are made in this order

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, event: E, targets: MemoryRanges, segment_ids: Iterable[int]) -> None:
        """A copy into this memory, out of these segments; `event` comes when it, and all before it, are made."""
        self._forget_made()
        self._pending.append(_Copy(event, targets, frozenset(segment_ids)))

    def awaited(self, view_ids: Iterable[int], memory_of: Callable[[int], MemoryRanges]) -> E | None:
        """The event after which what these views show is all there; None when it is. Nobody looks at the views while
        no copy is pending. A view has the same memory for as long as it is known by its number."""
        if not self._pending:
            return None
        self._forget_made()
        if not self._pending:
            return None
        views = list(view_ids)
        for copy in reversed(self._pending):  # the last of them is enough
            if any(copy.is_shown(view_id, memory_of) for view_id in views):
                return copy.event
        return None

    def reading(self, segment_id: int) -> E | None:
        """The event after which no copy reads a segment; None when none does."""
        self._forget_made()
        return next((copy.event for copy in reversed(self._pending) if segment_id in copy.segment_ids), None)

    def _forget_made(self) -> None:
        while self._pending and self._pending[0].event.query():
            self._pending.popleft()


def page_runs(message: pb.LoadPages) -> Iterator[PageRun]:
    """The copies that a message asks for."""
    if not message.segment_ids:
        return
    lists = (message.segment_ids, message.segment_offsets, message.extent_ids, message.extent_offsets)
    pages = np.array([list(numbers) for numbers in lists], dtype=np.int64)
    follows = (0, message.page_bytes, 0, message.page_bytes)
    breaks = (np.diff(pages) != np.array(follows)[:, None]).any(axis=0)
    firsts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
    for first, end in zip(firsts, [*firsts[1:], pages.shape[1]], strict=True):
        segment, start, extent, to = pages[:, first].tolist()
        yield PageRun(segment, start, extent, to, (end - first) * message.page_bytes)


def view_ids_of(tile: pb.SearchTile | pb.AttendTile) -> Iterator[int]:
    """The views that a tile reads."""
    for each in tile.sequences:
        yield each.view_id
        if isinstance(each, pb.AttendSequence) and each.HasField("window_view_id"):
            yield each.window_view_id
