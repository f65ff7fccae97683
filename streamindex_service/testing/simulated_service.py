"""The real core on virtual time and a device of numbers, with searches that behave as the frontend's do."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streamindex_service.core.band_queue import Band
from streamindex_service.core.caches import CacheStore
from streamindex_service.core.estimates import DeviceSpeed
from streamindex_service.core.governor import Governor, GovernorLimits
from streamindex_service.core.layers import KeyCache, Page
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool, PageSlot
from streamindex_service.core.residency import Residency
from streamindex_service.core.sizes import PAGE_KEYS, pages_of
from streamindex_service.core.specs import RowKind
from streamindex_service.core.tile_pieces import TilePieces
from streamindex_service.core.turns import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.core.uploads import UploadTable
from streamindex_service.errors import (
    DeviceMemoryError,
    ServiceError,
    WorkerLostError,
)
from streamindex_service.testing.fake_device import FakeDevice, FakeTile
from streamindex_service.testing.simulated_disk import SimulatedDisk
from streamindex_service.testing.virtual_time import VirtualTime

PAGE_BYTES = PAGE_KEYS * 16 * 2
TILES_AHEAD = 2
MOST_TILE_ROWS = 64
FLOP_PER_ROW = 1_000_000
SECONDS_PER_FLOP = 1e-9  # a row takes a millisecond


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a simulated service; bytes."""

    hbm_bytes: int
    host_bytes: int
    extent_bytes: int
    floor_bytes: int
    max_caches: int
    retries: int = 3
    disk_bytes: int = 0
    copy_bytes_per_s: float = 80e6  # to the device: a tenth of a row's time for a page


class SimulatedService:
    """Caches, governor and device. `on_taken(turn)` is told of every turn that goes to the device, before it does, and
    `on_refused(pages, workspace_bytes)` of everything that finds no room there."""

    def __init__(self, sizes: Sizes, limits: GovernorLimits) -> None:
        self.time = VirtualTime()
        self.sizes = sizes
        self.device = FakeDevice(self.time, sizes.hbm_bytes, sizes.copy_bytes_per_s)
        self.host_extents: dict[int, int] = {}
        self.content: dict[PageSlot, int] = {}  # of host pages
        self.written: dict[Page, int] = {}  # what each page must hold, wherever it is
        self.hbm, self.host = Ledger("hbm", 2 * sizes.hbm_bytes), Ledger("host", sizes.host_bytes)
        host_pool = PagePool(
            self.host, sizes.extent_bytes, self.host_extents.__setitem__, self.host_extents.__delitem__
        )
        pool = PagePool(self.hbm, sizes.extent_bytes, self.device.make_extent, self.device.drop_extent)
        self.residency = _ToldResidency(self.hbm, pool, self._load)
        self.residency.refused = lambda pages, workspace_bytes: self.on_refused(pages, workspace_bytes)
        ids = map(str, itertools.count())
        self.caches = CacheStore(
            host_pool, self.residency.drop, self.time, sizes.max_caches, new_id=lambda: "kc_" + next(ids)
        )
        self.uploads = UploadTable(
            self.caches, self.time, ttl_s=1e9, max_uploads=1000, new_id=lambda: "up_" + next(ids)
        )
        self.disk = SimulatedDisk(self.time, self.caches, self.content, sizes.disk_bytes, sizes.extent_bytes)
        speed = DeviceSpeed(sizes.copy_bytes_per_s)
        self.governor = Governor(self.residency, self.time, limits, speed, self._wake)
        self.hbm.limit_bytes = sizes.hbm_bytes  # as when a worker says what it has, which is less than the setting
        self.searches: list[SimulatedSearch] = []
        self.on_taken: Callable[[SearchTurn], None] = lambda turn: None
        self.on_refused: Callable[[Sequence[Page], int], None] = lambda pages, workspace_bytes: None
        self.tiles_out_of_memory: Callable[[], bool] = lambda: False
        self._contents = itertools.count(1)

    def write(self, cache: KeyCache, layer: int, first_row: int, rows: int, kind: RowKind = RowKind.KEYS) -> None:
        """An upload from start to commit; every page that it touches has new content. Raises ServiceError."""
        upload = self.uploads.start(cache, layer, first_row, rows, 1 << 30, kind)
        try:
            self.uploads.hold(upload, rows)
            upload.rows_held = rows
            for slot in upload.staged:
                self.content[slot] = next(self._contents)
            self.uploads.commit(upload)
            first = first_row // PAGE_KEYS
            for page in upload.layer.pages[first : first + pages_of(first_row % PAGE_KEYS + rows)]:
                self.written[page] = self.content[page.in_host]
        finally:
            self.uploads.drop(upload)

    def crash(self) -> None:
        """The worker dies."""
        self.governor.device_lost()
        self.device.crash()

    def doubt(self) -> None:
        """A copy to the device failed: what is there is given up."""
        self.device.forget()
        self.governor.device_in_doubt()

    def _wake(self, delay_s: float) -> None:
        self.time.after(delay_s, self.governor.woken)

    def _load(self, page: Page) -> None:
        assert page.device is not None
        self.device.load(page.device, page.page_bytes, self.content[page.in_host])


class _ToldResidency(Residency):
    """Tells what it refuses."""

    refused: Callable[[Sequence[Page], int], None]

    def try_place(self, pages: Sequence[Page], workspace_bytes: int) -> bool:
        placed = super().try_place(pages, workspace_bytes)
        if not placed:
            self.refused(pages, workspace_bytes)
        return placed


class SimulatedSearch:
    """One search from its header to its end. `outcome` is "" until then. beside: caches that it searches as well, each
    tile all of them, as a decode step does. kind: rows that it needs, those of attention included.

    The places of its pages are noted for as long as none has moved, as the frontend's views do."""

    def __init__(
        self,
        service: SimulatedService,
        cache: KeyCache,
        layer: int,
        caller: str,
        band: Band,
        rows: int,
        deadline_s: float | None,
        beside: Sequence[KeyCache] = (),
        kind: RowKind = RowKind.KEYS,
    ) -> None:
        self.caller = caller
        self.band = band
        self.outcome = ""
        self.outstanding: list[SimulatedTile] = []
        self.service = service
        self._caches = (cache, *beside)
        self._rows = rows
        self._ready = 0
        self._submitted = 0
        self._ended = False
        self._places: tuple[PageSlot | None, ...] = ()
        self._moves = -1  # of the residency, when they were noted
        self.snapshots = [service.caches.snapshot(each, layer, kind) for each in self._caches]
        self.snapshot = self.snapshots[0]
        self.pages: Sequence[Page] = self.snapshot.pages
        self.layers: Sequence[Sequence[Page]] = ()
        if beside:
            self.layers = [each.pages for each in self.snapshots]
            self.pages = tuple(dict.fromkeys(page for pages in self.layers for page in pages))
        self.content = [service.written[page] for page in self.pages]
        least = Need(self.snapshot.pages, service.sizes.floor_bytes, 0, FLOP_PER_ROW)
        run_s = service.governor.speed.seconds(rows * FLOP_PER_ROW)
        for each in self._caches:
            each.busy += 1
        service.searches.append(self)
        self.open: OpenSearch | None = None
        try:
            self.open = service.governor.open(self.snapshot, caller, band, least, run_s, deadline_s)
        except ServiceError as error:
            self.end(error.reason)

    def places(self) -> tuple[PageSlot | None, ...]:
        """Where its pages are on the device, as they were when any page last lost its place."""
        residency = self.service.residency
        if self._moves != residency.moves:
            self._places, self._moves = tuple(page.device for page in self.pages), residency.moves
        return self._places

    def feed(self, rows: int) -> None:
        """So many rows more have arrived."""
        if not self._ended:
            self._ready = min(self._rows, self._ready + rows)
            self.pump()

    def pump(self) -> None:
        """Make tiles of what is there, as the frontend does."""
        governor = self.service.governor
        limit = governor.speed.rows(FLOP_PER_ROW, governor.tile_s(self.band), MOST_TILE_ROWS)
        while not self._ended and (ready := self._ready - self._submitted) > 0:
            last = self.outstanding[-1] if self.outstanding else None
            if last is not None and last.waiting and last.rows < limit:
                rows = min(ready, limit - last.rows)
                self._submitted += rows
                last.grow(rows)
            elif len(self.outstanding) < TILES_AHEAD:
                rows = min(ready, limit)
                self._submitted += rows
                tile = SimulatedTile(self, rows)
                self.outstanding.append(tile)
                tile.request()
            else:
                return

    def tile_over(self, tile: SimulatedTile, reason: str) -> None:
        """One of its tiles is done, or can never be."""
        self.outstanding.remove(tile)
        if reason:
            self.end(reason)
        elif not self._ended and self._submitted == self._rows and not self.outstanding:
            self.end("DONE")
        elif self._ended:
            self._close()
        else:
            self.pump()

    def end(self, outcome: str) -> None:
        """It is over for its caller; what the device has begun still ends."""
        if self._ended:
            self._close()
            return
        self._ended = True
        assert not self.outcome, "a search ends twice"
        self.outcome = outcome
        for tile in list(self.outstanding):
            tile.cancel()
        self._close()

    def _close(self) -> None:
        if self.outstanding or self not in self.service.searches:
            return
        self.service.searches.remove(self)
        if self.open is not None:
            self.service.governor.close(self.open)
        for snapshot, cache in zip(self.snapshots, self._caches, strict=True):
            self.service.caches.release_snapshot(snapshot)
            cache.busy -= 1
            cache.used_at = self.service.time.now_s
        self.service.governor.pump()


class SimulatedTile:
    """A tile of a search, from the queue to its end."""

    def __init__(self, search: SimulatedSearch, rows: int) -> None:
        self.rows = rows
        self._search = search
        self._service = search.service
        self._turn: SearchTurn | None = None
        self._pieces: TilePieces | None = None
        self._cancelled = False

    @property
    def waiting(self) -> bool:
        """Whether it may still grow."""
        return self._turn is not None and self._turn.waiting and self._pieces is None

    def grow(self, rows: int) -> None:
        """So many rows more."""
        assert self._turn is not None
        self.rows += rows
        self._service.governor.grow(self._turn, self._need(self.rows, smallest=False))

    def request(self) -> None:
        """Ask for a turn."""
        pieces = self._pieces
        alone, smallest = (pieces.alone, pieces.smallest) if pieces is not None else (False, False)
        rows = self.rows if pieces is None or pieces.current is None else pieces.current[1]
        assert self._search.open is not None
        need = self._need(rows, smallest)
        self._turn = self._service.governor.request(self._search.open, need, self._granted, self._refused, alone=alone)

    def cancel(self) -> None:
        """Do not go on."""
        self._cancelled = True
        if self._turn is not None and self._turn.waiting:
            self._service.governor.cancel(self._turn)
            self._search.tile_over(self, WorkerLostError.reason)

    def _need(self, rows: int, smallest: bool) -> Need:
        floor = self._service.sizes.floor_bytes
        want = floor if smallest else floor * (1 + rows % 3)
        search = self._search
        return Need(search.pages, floor, want, rows * FLOP_PER_ROW, 64 * rows, layers=search.layers)

    def _granted(self, grant: Grant) -> None:
        service = self._service
        service.on_taken(grant.turn)
        if self._pieces is None:
            self._pieces = TilePieces(0, self.rows, service.sizes.retries)
        assert self._pieces.current is not None
        rows = self._pieces.current[1]
        seconds = rows * FLOP_PER_ROW * SECONDS_PER_FLOP + 1e-4

        def ended(how: str) -> None:
            self._ran(grant, how, seconds)

        search = self._search
        tile = FakeTile(
            search.pages, search.places(), search.content, grant.workspace_bytes, ended, seconds, search.band
        )
        if service.tiles_out_of_memory():
            tile.outcome = "no memory"
        service.device.run(tile)

    def _refused(self, error: ServiceError) -> None:
        self._search.tile_over(self, error.reason)

    def _ran(self, grant: Grant, how: str, seconds: float) -> None:
        assert self._pieces is not None
        self._service.governor.finish(grant, seconds if how == "done" else None)
        if how == "done":
            self._pieces.computed()
        elif how == "lost":
            self._search.tile_over(self, WorkerLostError.reason)
            return
        elif not self._pieces.no_memory():
            self._search.tile_over(self, DeviceMemoryError.reason)
            return
        if self._pieces.current is None or self._cancelled:
            self._search.tile_over(self, "")
        else:
            self.request()
