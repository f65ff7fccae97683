"""The pure core on a virtual clock, with memories that remember what was written where."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from streamindex_service.core.band_queue import Band
from streamindex_service.core.caches import CacheStore
from streamindex_service.core.census import Residence
from streamindex_service.core.governor import Governor, GovernorLimits
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool, PageSlot
from streamindex_service.core.residency import Residency
from streamindex_service.core.scheduler import QueueLimits
from streamindex_service.core.sizes import KeyFormat
from streamindex_service.core.specs import CacheSpec
from streamindex_service.core.turns import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.core.uploads import Upload, UploadTable
from streamindex_service.errors import ServiceError

OWNER = "owner"
EXTENT_BYTES = 65_536


class VirtualClock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class Memory:
    """Extents, and which content lies in each page."""

    def __init__(self) -> None:
        self.extents: dict[int, int] = {}
        self.content: dict[PageSlot, int] = {}

    def make(self, extent_id: int, extent_bytes: int) -> None:
        assert extent_id not in self.extents
        self.extents[extent_id] = extent_bytes

    def drop(self, extent_id: int) -> None:
        del self.extents[extent_id]
        self.content = {slot: what for slot, what in self.content.items() if slot.extent_id != extent_id}


def spec(key_format: KeyFormat = KeyFormat.BF16, head_dim: int = 16, layers: int = 2, ttl_s: float = 60.0) -> CacheSpec:
    return CacheSpec(
        heads=1,
        head_dim=head_dim,
        ratio=1,
        key_format=key_format,
        layers=layers,
        convention="",
        expected_keys=0,
        idle_ttl_s=ttl_s,
        priority=2,
    )


@dataclass(eq=False)
class Search:
    """A search and what it must find on the device for as long as it runs."""

    number: int
    snapshot: Snapshot
    content: list[int]
    open: OpenSearch | None = None
    turn: SearchTurn | None = None
    grant: Grant | None = None
    lost: bool = False


class World:
    """Everything that a service's core consists of."""

    def __init__(self, hbm_bytes: int = 400_000, host_bytes: int = 600_000, max_device_turns: int = 4) -> None:
        self.clock = VirtualClock()
        self.hbm, self.host = Ledger("hbm", hbm_bytes), Ledger("host", host_bytes)
        self.device_memory, self.host_memory = Memory(), Memory()
        host_pool = PagePool(self.host, EXTENT_BYTES, self.host_memory.make, self.host_memory.drop)
        self.device_pool = PagePool(self.hbm, EXTENT_BYTES, self.device_memory.make, self.device_memory.drop)
        self.store = CacheStore(host_pool, lambda page: self.governor.residency.drop(page), self.clock, max_caches=12)
        limits = GovernorLimits(64, max_device_turns, 1.0, 60.0, QueueLimits(max_turns=16))
        self.governor = Governor(Residency(self.hbm, self.device_pool, self._load), self.clock, limits)
        self.uploads = UploadTable(self.store, self.clock, ttl_s=30.0, max_uploads=8)
        self.loads = 0
        self.searches: list[Search] = []
        self.granted: list[int] = []
        self._contents = itertools.count(1)
        self._numbers = itertools.count(1)

    def _load(self, page: Page) -> None:
        assert page.device is not None
        assert page.device.extent_id in self.device_memory.extents
        self.device_memory.content[page.device] = self.host_memory.content[page.in_host]
        self.loads += 1

    # Uploads.

    def hold(self, upload: Upload, rows: int) -> None:
        """Rows arrive; every page they lie in gets new content."""
        self.uploads.hold(upload, upload.rows_held + rows)
        first, _ = upload.place(upload.rows_held)
        upload.rows_held += rows
        last, _ = upload.place(upload.rows_held - 1)
        for slot in upload.staged[first : last + 1]:
            self.host_memory.content[slot] = next(self._contents)

    def write(self, cache, layer: int, first_row: int, rows: int) -> None:
        """An upload from start to commit."""
        upload = self.uploads.start(cache, layer, first_row, rows, 1 << 20)
        self.uploads.attach(upload)
        try:
            self.hold(upload, rows)
            self.uploads.commit(upload)
        finally:
            self.uploads.detach(upload)
            self.uploads.drop(upload)

    # Searches, as the frontend makes them.

    def search(
        self,
        cache,
        layer: int,
        floor: int,
        want: int,
        deadline_s: float | None = None,
        band: Band = Band.STANDARD,
        flop: int = 1,
    ) -> Search | None:
        """Open one and ask for its only turn; None when it was refused."""
        snapshot = self.store.snapshot(cache, layer)
        content = [self.host_memory.content[page.in_host] for page in snapshot.pages]
        search = Search(next(self._numbers), snapshot, content)

        def granted(grant: Grant) -> None:
            search.grant = grant
            self.granted.append(search.number)
            self.check_pages(search)

        self.searches.append(search)
        cache.busy += 1
        search.cache = cache
        need = Need(snapshot.pages, floor, want, flop)
        try:
            search.open = self.governor.open(snapshot, cache.owner, band, need, 0.0, deadline_s)
        except ServiceError:
            self._forget(search)
            return None
        search.turn = self.governor.request(search.open, need, granted, lambda error: None)
        return search

    def end(self, search: Search, device_s: float | None = None) -> None:
        """Finish it when it runs, else cancel it; then let go of what it held."""
        if search.grant is not None:
            self.check_pages(search)
            self.governor.finish(search.grant, device_s)
        else:
            self.governor.cancel(search.turn)
        self.governor.close(search.open)
        self._forget(search)
        self.governor.pump()

    def _forget(self, search: Search) -> None:
        self.searches.remove(search)
        search.cache.busy -= 1
        self.store.release_snapshot(search.snapshot)

    def device_lost(self) -> None:
        self.governor.device_lost()
        self.device_memory = Memory()
        self.device_pool._make_extent, self.device_pool._drop_extent = self.device_memory.make, self.device_memory.drop
        for search in self.searches:
            search.lost = search.lost or search.grant is not None

    def delete(self, cache) -> None:
        self.store.delete(cache)
        self.uploads.drop_cache(cache)

    # What must always be so.

    def check_pages(self, search: Search) -> None:
        """The snapshot is as it was taken, in the host and, while it runs, on the device."""
        for page, content in zip(search.snapshot.pages, search.content, strict=True):
            assert self.host_memory.content[page.in_host] == content
            if search.grant is not None and not search.lost:
                assert page.device is not None
                assert self.device_memory.content[page.device] == content

    def check(self) -> None:
        for ledger, memory in ((self.hbm, self.device_memory), (self.host, self.host_memory)):
            assert 0 <= ledger.reserved_bytes <= ledger.peak_bytes <= ledger.limit_bytes
            extents = sum(memory.extents.values())
            grants = sum(s.grant.workspace_bytes for s in self.searches if s.grant) if ledger is self.hbm else 0
            records = sum(c.record_bytes for c in self.store._caches.values()) if ledger is self.host else 0
            assert ledger.reserved_bytes == extents + grants + records
        for search in self.searches:
            self.check_pages(search)
        running = [search for search in self.searches if search.grant is not None]
        waiting = [search for search in self.searches if search.grant is None]
        assert (self.governor.running, self.governor.queued) == (len(running), len(waiting))
        assert self.governor.in_flight == len(running)
        if waiting and not self.governor.paused:
            assert running, "somebody waits, nobody runs, and nothing will ever change that"
        held = [page for cache in self.store._caches.values() for layer in cache.layers for page in layer.pages]
        held += [page for search in self.searches for page in search.snapshot.pages]
        places = {id(page): page.device for page in held if page.device is not None}
        assert len(set(places.values())) == len(places), "two pages in one place"
        assert len(places) == self.device_pool.pages_in_use
        distinct = {id(page): page for page in held}
        staged = sum(len(u.staged) for u in self.uploads._uploads.values())
        assert len(distinct) + staged == self.store.host.pages_in_use
        staged_bytes = sum(len(u.staged) * u.cache.spec.page_bytes for u in self.uploads._uploads.values())
        account = self.store.accounts.of(OWNER)
        assert account.host_bytes == sum(page.page_bytes for page in distinct.values()) + staged_bytes
        assert account.caches == sum(cache.owner == OWNER for cache in self.store._caches.values())
        for cache in self.store._caches.values():
            resident = sum(page.device is not None for layer in cache.layers for page in layer.pages)
            assert cache.resident_bytes == resident * cache.spec.page_bytes
        check_census(self.store)


def check_census(store: CacheStore) -> None:
    """Caches by what is on the device and on disk, against a look at each of their pages."""
    found, spilled = dict.fromkeys(Residence, 0), 0
    for cache in store._caches.values():
        pages = [page for layer in cache.all_layers for page in layer.pages]
        there = [page.device is not None for page in pages]
        if pages:
            found[Residence.DEVICE if all(there) else Residence.PARTIAL if any(there) else Residence.NONE] += 1
        spilled += any(page.spilled is not None for page in pages)
    assert (store.census.by_residence, store.census.spilled) == (found, spilled)


def choose(random: np.random.Generator, items: list):
    return items[int(random.integers(len(items)))]
