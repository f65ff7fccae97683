"""Which pages are on the device: promotion, pins, and eviction by least recent use.

The device holds copies; the host keeps every page, so an eviction costs time and no keys. Two things keep pages from
going to and fro: those of the working set (`working_set.py`) are not evicted, and an eviction frees as much as an
extent at once, so that the next few allocations need none.

A search comes back with the same pages tile by tile, thousands of them at times. They stay pinned from one tile to the
next, and nobody looks at each, until somebody needs memory: then pins without a tile go before anything is evicted, but
for those of pages that would not be evicted anyway.

What nobody may evict does not keep memory from pages of other sizes for all that: where the free places of extents add
up to what is needed, pages move together, and the extents that are empty then go back to the ledger. A move is a copy
from host memory to another place; the old one is not read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from streamindex_service.core.layers import Page, displace_all, place_all
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool, PageSlot


@dataclass(slots=True, eq=False)
class _Pinned:
    """Pages that are on the device, and how many tiles use them."""

    pages: Sequence[Page]
    tiles: int = 0


@dataclass(slots=True, eq=False)
class _Spared:
    """Pages that are not evicted for others. used: a larger number than of all that were used before."""

    pages: Sequence[Page]
    used: int


class Residency:
    """The pages on one worker's device.

    `load` is called for every page to be copied there, in the order of the decisions; what is sent to the worker after
    that finds the page in place. `kept` gives the sequences of pages that are not evicted for others, pinned or not.
    """

    def __init__(self, hbm: Ledger, device: PagePool, load: Callable[[Page], None]) -> None:
        self.hbm = hbm
        self.device = device
        self.evicted_pages = 0
        self.promoted_pages = 0
        self.moved_pages = 0
        self.resident_bytes = 0
        self.moves = 0  # changes whenever a page loses its place: whoever noted places looks again
        self.kept: Callable[[], Sequence[Sequence[Page]]] = tuple
        self._load = load
        self._unpinned: dict[Page, None] = {}  # pages on the device that may go; those that may for longest first
        self._pages = 0  # on the device, pinned or not
        self._pinned: dict[int, _Pinned] = {}  # by the identity of the sequence
        self._idle: dict[int, _Pinned] = {}  # of them, those that no tile uses; idle for longest first
        self._spared: dict[int, _Spared] = {}  # what was `kept` at the last look, by identity
        self._uses = itertools.count()
        self._no_room: tuple[int, ...] = ()  # as things stood when there was no more to be had

    def __len__(self) -> int:
        return self._pages

    def pages(self) -> list[Page]:
        """Those that are on the device."""
        known = dict.fromkeys((*self._unpinned, *self._not_to_go()))  # several sequences may have one
        return [page for page in known if page.device is not None]

    def missing_bytes(self, pages: Sequence[Page]) -> int:
        """Bytes that would have to be brought to the device."""
        if id(pages) in self._pinned:
            return 0
        return sum(page.page_bytes for page in pages if page.device is None)

    def try_place(self, pages: Sequence[Page], workspace_bytes: int) -> bool:
        """Pin the pages, reserve the workspace, promote what is missing; or only evict and move, and say False.

        The very same sequence goes to `unpin`, and is not changed until then.
        """
        pinned = self._pinned.get(id(pages))
        if pinned is not None:
            return self._place_again(pinned, workspace_bytes)
        # Pinned first: pages may be shared with a layer that is about to be evicted for this very search.
        self._pin(pages)
        pinned = self._pinned[id(pages)] = _Pinned(pages)
        if self._reserve(workspace_bytes):
            if self._promote(pages, workspace_bytes):
                pinned.tiles = 1
                return True
            self.hbm.release(workspace_bytes)
        del self._pinned[id(pages)]
        self._unpin(pages)
        return False

    def make_room(self, size_bytes: int) -> None:
        """Evict until so much is free, as far as that makes whole extents free: other pages would go for nothing."""
        if self.hbm.free_bytes >= size_bytes:
            return
        if self._state() == self._no_room:  # nothing has changed since it was looked for
            return
        self.tidy()
        in_extent: dict[int, list[Page]] = {}
        going: list[Page] = []
        left_bytes = size_bytes - self.hbm.free_bytes
        for page in self._unpinned:
            assert page.device is not None
            extent_id = page.device.extent_id
            pages = in_extent.setdefault(extent_id, [])
            pages.append(page)
            if len(pages) == self.device.pages_in(extent_id):
                going += pages
                left_bytes -= self.device.bytes_of(extent_id)
                if left_bytes <= 0:
                    break
        if going:
            self._evict(going)
        if left_bytes > 0:
            self._no_room = self._state()

    def unpin(self, pages: Sequence[Page], layers: Sequence[Sequence[Page]] = ()) -> None:
        """A tile is done with them; they stay until their place is needed. layers: what they are, where they are of
        several: each of them was used, and may be kept by itself."""
        pinned = self._pinned[id(pages)]
        pinned.tiles -= 1
        assert pinned.tiles >= 0, "pages were unpinned twice"
        for each in (pages, *layers):
            if id(each) in self._spared:
                self._spared[id(each)].used = next(self._uses)
        if not pinned.tiles:
            self._idle[id(pages)] = pinned

    def let_go(self, pages: Sequence[Page]) -> bool:
        """No tile will come for them any more; False: there is one that uses them."""
        if id(pages) in self._idle:
            self._let_go(self._idle[id(pages)])
        return id(pages) not in self._pinned

    def evict_all(self) -> None:
        """Drop every page that no tile uses, kept or not."""
        for pinned in list(self._idle.values()):
            self._let_go(pinned)
        self._spare(())
        self._evict(list(self._unpinned))

    def drop(self, page: Page) -> None:
        """A page is gone, or must go: free its copy."""
        self._drop_all((page,))

    def _drop_all(self, pages: Sequence[Page]) -> None:
        self.device.free_some(displace_all(pages))
        self.resident_bytes -= sum(page.page_bytes for page in pages)
        self._pages -= len(pages)
        self.moves += 1
        for page in pages:
            self._unpinned.pop(page, None)  # a page that is gone may still be kept

    def forget(self) -> None:
        """What was on the device is lost, pins and all."""
        pages = self.pages()
        for page in self._not_to_go():
            page.pins = page.spared = 0
        displace_all(pages)
        self.moves += 1
        self.resident_bytes = self._pages = 0
        self._unpinned.clear()
        self._pinned.clear()
        self._idle.clear()
        self._spared.clear()
        self.device.reset()

    def _state(self) -> tuple[int, ...]:
        """Changes when there may be other pages to evict."""
        return self.moves, self.promoted_pages, len(self._unpinned), len(self._idle), *map(id, self.kept())

    def _place_again(self, pinned: _Pinned, workspace_bytes: int) -> bool:
        # Before the memory is looked for: its pages are not to go for it. They may move, if no other tile uses them.
        self._idle.pop(id(pinned.pages), None)
        placed = self._reserve(workspace_bytes)
        pinned.tiles += placed
        if not pinned.tiles:
            self._idle[id(pinned.pages)] = pinned
        return placed

    def _let_go(self, pinned: _Pinned) -> None:
        """Pins without a tile go: the pages are like any others, used just now."""
        del self._idle[id(pinned.pages)], self._pinned[id(pinned.pages)]
        self._unpin(pinned.pages)

    def _reserve(self, size_bytes: int) -> bool:
        victims: Iterator[Page] | None = None
        self.make_room(size_bytes)  # whole extents first, so that those of others stay whole
        while not self.hbm.try_reserve(size_bytes):
            victims = self._victims() if victims is None else victims
            page = next(victims, None)
            if page is not None:
                self._evict((page,))
            elif not self._move_together(size_bytes):
                return False
        return True

    def _promote(self, pages: Sequence[Page], leave_bytes: int) -> bool:
        """Bring what is missing. Pages are evicted before new extents take the last `leave_bytes`, which the workspace
        of the next tile will need: an extent comes back only once all its pages have gone, whoever's they are."""
        missing = [page for page in pages if page.device is None]
        if not missing:
            return True
        page_bytes, slots = missing[0].page_bytes, list[PageSlot]()
        whole_bytes = len(missing) // self.device.slots_of(page_bytes) * self.device.slots_of(page_bytes) * page_bytes
        if whole_bytes and self.device.free_places(page_bytes) < len(missing):
            # They get extents of their own, for which others go that have theirs; the rest takes places between others.
            self.make_room(leave_bytes + whole_bytes)
        while len(slots) < len(missing):
            left = len(missing) - len(slots)
            some = self.device.try_allocate_extent(page_bytes, left, leave_bytes)
            some = some or self.device.try_allocate_some(page_bytes, left, leave_bytes)
            slots += some
            if some or self._evict_some():
                continue
            if leave_bytes:
                leave_bytes = 0
            elif not self._move_together(left * page_bytes):
                for slot in slots:
                    self.device.free(slot)
                return False
        place_all(missing, slots)
        for page in missing:
            self._load(page)
        self.resident_bytes += sum(page.page_bytes for page in missing)
        self.promoted_pages += len(missing)
        self._pages += len(missing)
        return True

    def _evict_some(self) -> bool:
        """An extent's worth of pages. False: all that are left are pinned or kept."""
        pages: list[Page] = []
        evicted_bytes = 0
        self.tidy()
        for page in self._unpinned:
            pages.append(page)
            evicted_bytes += page.page_bytes
            if evicted_bytes >= self.device.extent_bytes:
                break
        if pages:
            self._evict(pages)
        return bool(pages)

    def _evict(self, pages: Sequence[Page]) -> None:
        self._drop_all(pages)
        self.evicted_pages += len(pages)

    def _victims(self) -> Iterator[Page]:
        """What may be evicted, in its order. To be used up before anything else changes."""
        self.tidy()
        return iter(list(self._unpinned))

    def tidy(self) -> None:
        """Let go of what is there for no tile, and is not kept. Layers have thousands of pages: those that are kept are
        marked, so that nobody looks at each of their pages for every eviction."""
        kept = self.kept()
        self._spare(kept)
        ids = {id(pages) for pages in kept}
        for pinned in list(self._idle.values()):
            if id(pinned.pages) not in ids:  # the others' pages would not be evicted anyway
                self._let_go(pinned)

    def _spare(self, kept: Sequence[Sequence[Page]]) -> None:
        before, self._spared = self._spared, {}
        for pages in kept:
            spared = before.pop(id(pages), None)
            if spared is None:
                spared = _Spared(pages, next(self._uses))
                for page in pages:
                    self._unpinned.pop(page, None)
                    page.spared += 1
            self._spared[id(pages)] = spared
        for spared in sorted(before.values(), key=lambda each: each.used):
            for page in spared.pages:
                page.spared -= 1
                self._may_go(page)

    def _not_to_go(self) -> Iterator[Page]:
        """Pages that are pinned or kept, some of them several times."""
        pinned = (each.pages for each in self._pinned.values())
        spared = (each.pages for each in self._spared.values())
        return itertools.chain.from_iterable(itertools.chain(pinned, spared))

    def _move_together(self, needed_bytes: int) -> bool:
        """Empty extents that have free places until so much is free, or move nothing and say False.

        Pages stay where they are that a tile uses, that are being copied, or whose only copy in memory is this one.
        """
        if self.hbm.free_bytes + self.device.sparse_bytes < needed_bytes:
            return False  # which is mostly so, and nobody has looked at each page
        stuck: set[int] = set()
        movable: dict[int, list[Page]] = {}
        for pinned in self._pinned.values():
            if pinned.tiles:
                stuck.update(page.device.extent_id for page in pinned.pages if page.device is not None)
        for page in self.pages():
            assert page.device is not None
            if page.copies or page.host is None:
                stuck.add(page.device.extent_id)
            movable.setdefault(page.device.extent_id, []).append(page)
        emptied = self.device.sparse(needed_bytes, stuck)
        if not emptied:
            return False
        self.device.close(emptied)
        for page in itertools.chain.from_iterable(movable[extent_id] for extent_id in emptied):
            slot = self.device.try_allocate(page.page_bytes)
            assert slot is not None, "a page has to move, and there is no place"
            freed = page.move(slot)
            self._load(page)
            self.device.free(freed)
            self.moved_pages += 1
        self.moves += 1
        assert self.hbm.free_bytes >= needed_bytes, "extents were emptied, and did not go"
        return True

    def _pin(self, pages: Sequence[Page]) -> None:
        unpinned = self._unpinned
        for page in pages:
            if not page.pins:
                unpinned.pop(page, None)  # it may not be on the device yet
            page.pins += 1

    def _unpin(self, pages: Sequence[Page]) -> None:
        for page in pages:
            page.pins -= 1
            assert page.pins >= 0, "a page was unpinned twice"
            self._may_go(page)

    def _may_go(self, page: Page) -> None:
        """Those that may go for longest are first. Of what was kept the most recently used comes last; what never was
        has not been used since, for whatever tiles need is kept while they do."""
        if not page.pins and not page.spared and page.device is not None:
            self._unpinned[page] = None
