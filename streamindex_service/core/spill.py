"""Which pages leave host memory for a disk, and come back: least recent use, by cache.

A page that is shown is never written again, so its bytes can be copied while others read them; what matters is the
moment in which the copy takes the page's place. It does so only if nobody has begun to use the page since; else the
page stays where it was, and the copy is given up. Pure decisions: whoever carries them out writes and reads the bytes
between a move's `begin` and its `end`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from streamindex_service.core.caches import CacheStore
from streamindex_service.core.layers import KeyCache, Page
from streamindex_service.core.pages import PagePool, PageSlot
from streamindex_service.errors import ExceedsBudgetError, HostMemoryError

MOVE_BYTES = 32 << 20  # of a move: so much memory comes free at a time, and whoever needs the disk waits for so much


@dataclass(slots=True, eq=False)
class Move:
    """Pages on their way, and where each will lie: on disk, or in host memory again."""

    pages: list[Page]
    slots: list[PageSlot]


class Spill:
    """Host pages and disk pages of one store. Between `begin_*` and `end_*` a move's pages are held."""

    def __init__(self, store: CacheStore, disk: PagePool, clock: Callable[[], float], move_bytes: int) -> None:
        self.disk = disk
        self.spilled_pages = 0
        self.restored_pages = 0
        self._store = store
        self._clock = clock
        self._move_bytes = move_bytes
        store.drop_spilled = disk.free

    def begin_spill(self, needed_bytes: int, idle_s: float = 0.0) -> Move | None:
        """Choose pages of up to `needed_bytes`, of caches that nobody has used for `idle_s`; None when there are none.

        The disk's budget bounds it too.
        """
        move, size_bytes = Move([], []), 0
        for page in self._idle_pages(idle_s):
            slot = self.disk.try_allocate(page.page_bytes)
            if slot is None:
                break
            move.pages.append(page)
            move.slots.append(slot)
            size_bytes += page.page_bytes
            if size_bytes >= min(needed_bytes, self._move_bytes):
                break
        self._store.hold(move.pages)
        return move if move.pages else None

    def end_spill(self, move: Move, checksums: Sequence[int] | None) -> int:
        """The bytes are on disk, with these CRC-32C; None: they are not. Gives the bytes of host memory that are free.

        Pages that somebody has come to use meanwhile stay.
        """
        freed_bytes = 0
        # Not held by the move any more, or none of them would be idle; those that are gone go with the release.
        for number, (page, slot) in enumerate(zip(move.pages, move.slots, strict=True)):
            page.references -= 1
            if checksums is not None and page.idle:
                self._store.host.free(page.spill(slot, checksums[number]))
                freed_bytes += page.page_bytes
                self.spilled_pages += 1
            else:
                self.disk.free(slot)
            page.references += 1
        self._store.release(move.pages)
        return freed_bytes

    def refuse_what_never_fits(self, pages: Sequence[Page]) -> None:
        """Raises ExceedsBudgetError, with the figures, for pages that host memory cannot hold at a time."""
        needed_bytes = sum(page.page_bytes for page in pages)
        limit_bytes = self._store.host.ledger.limit_bytes
        if needed_bytes > limit_bytes:
            raise ExceedsBudgetError(
                "the layer does not fit the host memory budget",
                metadata={"needed_bytes": needed_bytes, "budget_bytes": limit_bytes, "budget": "host"},
            )

    def begin_restore(self, pages: Sequence[Page]) -> Move | None:
        """Take host memory for the first of these pages, which are on disk; None when there is none.

        No watermark holds for it: the memory that uploads leave is for this. Raises HostMemoryError when the system
        has none for the first of them.
        """
        move, size_bytes = Move([], []), 0
        for page in pages:
            try:
                slot = self._store.host.try_allocate(page.page_bytes) if size_bytes < self._move_bytes else None
            except HostMemoryError:
                if not move.pages:
                    raise
                slot = None  # those come back that there is memory for
            if slot is None:
                break
            move.pages.append(page)
            move.slots.append(slot)
            size_bytes += page.page_bytes
        self._store.hold(move.pages)
        return move if move.pages else None

    def end_restore(self, move: Move, restored: bool) -> None:
        """Whether the bytes are in host memory again, and are those that went."""
        for page, slot in zip(move.pages, move.slots, strict=True):
            if restored:
                self.disk.free(page.restore(slot))
                self._store.came_back(page)
                self.restored_pages += 1
            else:
                self._store.host.free(slot)
        self._store.release(move.pages)

    def _idle_pages(self, idle_s: float) -> Iterator[Page]:
        """Pages that may go, those of the cache used longest ago first. A shared one counts as used with the last of
        the caches that show it. Caches in use come last, and only at once: a caller who fills one has layers in it
        that nobody reads now."""
        seen: dict[Page, int] = {}
        busy = []
        used_before = self._clock() - idle_s
        for cache in list(self._store.by_use):
            if cache.used_at > used_before:
                break
            if not cache.host_bytes:
                del self._store.by_use[cache]
            elif cache.busy:
                busy += [] if idle_s else [cache]
            else:
                yield from (page for page in _pages(cache) if self._may_go(page, seen))
        for cache in busy:
            yield from (page for page in _pages(cache) if self._may_go(page, seen))

    def _may_go(self, page: Page, seen: dict[Page, int]) -> bool:
        if page.host is None or not page.idle:
            return False
        if page.shown > 1:
            seen[page] = seen.get(page, 0) + 1
        return page.shown == 1 or seen[page] == page.shown


def _pages(cache: KeyCache) -> Iterator[Page]:
    for layer in cache.all_layers:
        yield from layer.pages
