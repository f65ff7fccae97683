"""A disk of numbers behind the host memory of a simulated service: moves take time, one after another, and may fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from streamindex_service.core.caches import CacheStore
from streamindex_service.core.layers import Page
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool, PageSlot
from streamindex_service.core.spill import Move, Spill
from streamindex_service.errors import HostMemoryError, SpillUnreadableError
from streamindex_service.testing.virtual_time import VirtualTime

_MOVE_S = 0.01

Then = Callable[[str], object]
"""Told how it ended: "" or the reason of a refusal."""


class SimulatedDisk:
    """Pages that are spilled. `host` is what lies in host memory; `fails` says whether the next move fails."""

    def __init__(
        self, time: VirtualTime, store: CacheStore, host: dict[PageSlot, int], size_bytes: int, extent_bytes: int
    ) -> None:
        self.ledger = Ledger("spill", size_bytes)
        self.extents: dict[int, int] = {}
        self.fails: Callable[[], bool] = lambda: False
        pool = PagePool(self.ledger, extent_bytes, self.extents.__setitem__, self.extents.__delitem__)
        self.spill = Spill(store, pool, time, move_bytes=2 * extent_bytes)
        self._time = time
        self._store = store
        self._host = host
        self._content: dict[PageSlot, int] = {}
        self._moves: list[Move] = []
        self._wanted: list[Sequence[Page]] = []
        self._waiting: deque[Callable[[], None]] = deque()
        self._busy = False

    def held(self) -> Iterator[Page]:
        """Pages that moves hold, or that somebody waits for."""
        for move in self._moves:
            yield from move.pages
        for pages in self._wanted:
            yield from pages

    def on_their_way(self) -> tuple[int, int]:
        """Places that moves have taken and not given to their pages yet: on disk, in host memory."""
        to_disk = sum(len(move.slots) for move in self._moves if move.pages[0].spilled is None)
        return to_disk, sum(len(move.slots) for move in self._moves) - to_disk

    def free(self, needed_bytes: int, idle_s: float = 0.0) -> None:
        """Make room in host memory, as far as there is anything to spill."""
        self._when_free(lambda: self._spill_some(needed_bytes, idle_s, lambda freed: self._next()))

    def bring(self, pages: Sequence[Page], then: Then) -> None:
        """Bring pages back to host memory."""
        pages = list(pages)
        self._store.hold(pages)
        self._wanted.append(pages)

        def ended(reason: str) -> None:
            then(reason)  # while they are still held
            self._wanted.remove(pages)
            self._store.release(pages)
            self._next()

        self._when_free(lambda: self._bring_some(pages, ended))

    def _when_free(self, work: Callable[[], None]) -> None:
        self._waiting.append(work)
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._waiting)
        if self._waiting:
            self._waiting.popleft()()

    def _spill_some(self, needed_bytes: int, idle_s: float, then: Callable[[bool], object]) -> None:
        move = self.spill.begin_spill(needed_bytes, idle_s)
        if move is None:
            then(False)
            return
        written = [self._host[page.in_host] for page in move.pages]
        self._moves.append(move)

        def end() -> None:
            self._moves.remove(move)
            failed = self.fails()
            self._content.update(zip(move.slots, written, strict=True))
            then(self.spill.end_spill(move, None if failed else [0] * len(written)) > 0)

        self._time.after(_MOVE_S, end)

    def _bring_some(self, pages: Sequence[Page], ended: Then) -> None:
        missing = [page for page in pages if page.host is None]
        if not missing:
            ended("")
            return
        move = self.spill.begin_restore(missing)
        if move is None:
            needed_bytes = sum(page.page_bytes for page in missing)
            self._spill_some(
                needed_bytes,
                0.0,
                lambda freed: self._bring_some(pages, ended) if freed else ended(HostMemoryError.reason),
            )
            return
        self._moves.append(move)

        def end() -> None:
            self._moves.remove(move)
            failed = self.fails()
            for page, slot in zip(move.pages, move.slots, strict=True):
                assert page.spilled is not None
                self._host[slot] = self._content[page.spilled]
            self.spill.end_restore(move, not failed)
            if failed:
                ended(SpillUnreadableError.reason)
            else:
                self._bring_some(pages, ended)

        self._time.after(_MOVE_S, end)
