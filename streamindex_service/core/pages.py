"""Pages of one size drawn from extents, for host memory and for device memory alike.

An extent is one piece of memory that somebody else makes (a memory segment of the host, an allocation of the device);
here it is a number and a length. The ledger is charged by the extent, so it says what is really taken.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from streamindex_service.core.ledger import Ledger

_GONE = 64  # extents that a heap may have too many


class PageSlot(NamedTuple):
    """Where a page lies."""

    extent_id: int
    offset_bytes: int


@dataclass(slots=True)
class _Extent:
    page_bytes: int
    slots: int
    # A stack. The places themselves, made once: layers move by thousands of pages, and new objects for each of them
    # cost more than all else that is done for one.
    free: list[PageSlot] = field(default_factory=list)
    closed: bool = False  # its pages are on their way to others: it takes no more


class PagePool:
    """Allocates and frees pages; takes extents as it needs them and gives an extent back once all its pages are free.

    `make_extent(extent_id, extent_bytes)` and `drop_extent(extent_id)` do the real work. Extents are `extent_bytes`
    long, or as long as the budget still allows. Pages come from the oldest extent with room, so that younger ones
    empty out.
    """

    def __init__(
        self,
        ledger: Ledger,
        extent_bytes: int,
        make_extent: Callable[[int, int], None],
        drop_extent: Callable[[int], None],
    ) -> None:
        self.ledger = ledger
        self.pages_in_use = 0
        self.extent_bytes = extent_bytes
        self._make_extent = make_extent
        self._drop_extent = drop_extent
        self._extents: dict[int, _Extent] = {}
        self._with_room: dict[int, list[int]] = {}  # page_bytes -> heap of extent ids; may hold ids that are gone
        self._free_pages: dict[int, int] = {}  # page_bytes -> pages that are free in extents
        self._next_extent_id = 1

    def try_allocate(self, page_bytes: int) -> PageSlot | None:
        """Take a page, or answer None when the budget does not allow it."""
        pages = self.try_allocate_some(page_bytes, 1)
        return pages[0] if pages else None

    def try_allocate_some(self, page_bytes: int, most: int, leave_bytes: int = 0) -> list[PageSlot]:
        """Take up to `most` pages of one extent, fewer if it has fewer; none when the budget does not allow any.

        leave_bytes: of the budget, what no new extent may take.
        """
        extent_id = self._extent_with_room(page_bytes)
        if extent_id is None:
            return self._take_of_new(page_bytes, most, leave_bytes)
        taken = self._take(extent_id, most)
        if not self._extents[extent_id].free:
            heapq.heappop(self._with_room[page_bytes])  # the extent itself: pages come from the first of the heap
        return taken

    def try_allocate_extent(self, page_bytes: int, most: int, leave_bytes: int = 0) -> list[PageSlot]:
        """Take all pages of a new extent, unless that is more than `most` or the budget does not allow it.

        Pages that come together leave together: where they have extents of their own, these go back with them.
        """
        slots = self.slots_of(page_bytes)
        if slots > most or self.ledger.free_bytes - leave_bytes < slots * page_bytes:
            return []
        return self._take_of_new(page_bytes, most, leave_bytes)

    def slots_of(self, page_bytes: int) -> int:
        """Pages of an extent that is as long as any."""
        return max(1, self.extent_bytes // page_bytes)

    def _take_of_new(self, page_bytes: int, most: int, leave_bytes: int) -> list[PageSlot]:
        extent_id = self._add_extent(page_bytes, leave_bytes)
        if extent_id is None:
            return []
        taken = self._take(extent_id, most)
        if self._extents[extent_id].free:
            self._has_room(extent_id)
        return taken

    def _take(self, extent_id: int, most: int) -> list[PageSlot]:
        extent = self._extents[extent_id]
        free = extent.free
        taken = free[: -most - 1 : -1]
        del free[-len(taken) :]
        # Pages that were freed one after another come back in the opposite order; in their own, they are one copy.
        taken.sort()
        self.pages_in_use += len(taken)
        self._free_pages[extent.page_bytes] -= len(taken)
        return taken

    @property
    def sparse_bytes(self) -> int:
        """The most that could be given back by emptying extents, whichever they are."""
        places = self._free_pages
        sizes = {each.page_bytes for each in self._extents.values() if each.slots <= places[each.page_bytes]}
        return sum(size * places[size] for size in sizes)

    def sparse(self, wanted_bytes: int, stuck: Collection[int] = ()) -> list[int]:
        """Extents to be emptied so that the ledger has so much free; none when that is not to be had.

        All their pages find free places in other extents of their size. It takes first what has the least to be moved
        for what it gives back; what is moved is never more than that. When it finds none, all that it could take would
        not be enough, and would leave free places of each size for less than any other extent whose pages may move.
        stuck: extents with pages that may not.
        """
        missing_bytes = wanted_bytes - self.ledger.free_bytes
        places = dict(self._free_pages)
        candidates = [
            (1 - len(extent.free) / extent.slots, -extent_id)  # of equals the youngest, so that the oldest fill up
            for extent_id, extent in self._extents.items()
            if extent.slots <= places[extent.page_bytes] and extent_id not in stuck
        ]
        found = []
        for _, number in sorted(candidates):
            extent = self._extents[extent_id := -number]
            # Its own free places go with it: used and free ones together have to be had from the free ones of all.
            if extent.slots <= places[extent.page_bytes]:
                places[extent.page_bytes] -= extent.slots
                missing_bytes -= extent.slots * extent.page_bytes
                found.append(extent_id)
                if missing_bytes <= 0:
                    return found
        return []

    def free_places(self, page_bytes: int) -> int:
        """Of pages of this size, in extents that there are."""
        return self._free_pages.get(page_bytes, 0)

    def bytes_of(self, extent_id: int) -> int:
        """How long an extent is."""
        extent = self._extents[extent_id]
        return extent.slots * extent.page_bytes

    def pages_in(self, extent_id: int) -> int:
        """How many pages of an extent are allocated."""
        extent = self._extents[extent_id]
        return extent.slots - len(extent.free)

    def close(self, extent_ids: Collection[int]) -> None:
        """Take no more pages from extents that `sparse` has found. Whoever asks moves their pages at once:
        `try_allocate` gives a place for each, and the last that is freed gives the extent back."""
        for extent_id in extent_ids:
            self._extents[extent_id].closed = True

    def free(self, page: PageSlot) -> None:
        """Give a page back."""
        self.free_some((page,))

    def free_some(self, pages: Sequence[PageSlot]) -> None:
        """Give pages back: thousands at a time, most of them neighbours."""
        self.pages_in_use -= len(pages)
        start = 0
        for stop in range(1, len(pages) + 1):
            if stop < len(pages) and pages[stop].extent_id == pages[start].extent_id:
                continue
            self._free_in_extent(pages[start].extent_id, pages[start:stop])
            start = stop

    def _free_in_extent(self, extent_id: int, pages: Sequence[PageSlot]) -> None:
        extent = self._extents[extent_id]
        if not extent.free and not extent.closed and len(pages) < extent.slots:
            self._has_room(extent_id)
        extent.free.extend(pages)
        self._free_pages[extent.page_bytes] += len(pages)
        assert len(extent.free) <= extent.slots, "a page was freed twice"
        if len(extent.free) == extent.slots:
            del self._extents[extent_id]
            self._free_pages[extent.page_bytes] -= extent.slots
            self.ledger.release(extent.slots * extent.page_bytes)
            self._drop_extent(extent_id)

    def _has_room(self, extent_id: int) -> None:
        """It had none. Those that are gone are mostly forgotten as they come first; where nobody asks, now."""
        page_bytes = self._extents[extent_id].page_bytes
        heap = self._with_room.setdefault(page_bytes, [])
        heapq.heappush(heap, extent_id)
        if len(heap) > 2 * len(self._extents) + _GONE:
            heap[:] = [each for each in heap if each in self._extents]
            heapq.heapify(heap)

    def reset(self) -> None:
        """Forget every extent: whoever held the memory is gone."""
        for extent in self._extents.values():
            self.ledger.release(extent.slots * extent.page_bytes)
        self._extents.clear()
        self._with_room.clear()
        self._free_pages.clear()
        self.pages_in_use = 0

    def room(self, page_bytes: int) -> int:
        """Pages of this size that could be allocated now."""
        return self._free_pages.get(page_bytes, 0) + self.ledger.free_bytes // page_bytes

    @property
    def page_bytes_in_use(self) -> int:
        """Bytes of the pages that are allocated; what is reserved for the free places beside them does not count."""
        extents = sum(extent.slots * extent.page_bytes for extent in self._extents.values())
        return extents - sum(size * pages for size, pages in self._free_pages.items())

    def used_bytes(self, page_bytes: int) -> int:
        """What of the budget is not there for pages of this size: all that is reserved, less their free places."""
        return self.ledger.reserved_bytes - self._free_pages.get(page_bytes, 0) * page_bytes

    def _extent_with_room(self, page_bytes: int) -> int | None:
        heap = self._with_room.get(page_bytes, [])
        while heap:
            extent = self._extents.get(heap[0])
            if extent is not None and extent.free and not extent.closed:
                return heap[0]
            heapq.heappop(heap)
        return None

    def _add_extent(self, page_bytes: int, leave_bytes: int) -> int | None:
        slots = min(self.slots_of(page_bytes), (self.ledger.free_bytes - leave_bytes) // page_bytes)
        if slots <= 0 or not self.ledger.try_reserve(slots * page_bytes):
            return None
        extent_id = self._next_extent_id
        try:
            self._make_extent(extent_id, slots * page_bytes)
        except BaseException:
            self.ledger.release(slots * page_bytes)
            raise
        self._next_extent_id += 1
        places = [PageSlot(extent_id, slot * page_bytes) for slot in range(slots - 1, -1, -1)]
        self._extents[extent_id] = _Extent(page_bytes, slots, places)
        self._free_pages[page_bytes] = self._free_pages.get(page_bytes, 0) + slots
        return extent_id
