"""A call between its header and its end: what it holds, and that all of it comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from streamindex_service.core.band_queue import Band
from streamindex_service.core.layers import KeyCache, Snapshot
from streamindex_service.core.specs import RowKind
from streamindex_service.core.turns import Need, OpenSearch
from streamindex_service.errors import CacheNotFoundError
from streamindex_service.frontend.index_tiles import IndexTiles
from streamindex_service.frontend.query_block import BlockLayout
from streamindex_service.frontend.requests import SearchParameters
from streamindex_service.frontend.service import Service


async def admit(
    service: Service,
    cache: KeyCache,
    layer: int,
    parameters: SearchParameters,
    deadline_s: Callable[[], float | None],
    version_is_right: Callable[[int], None] = lambda version: None,
    *,
    among_others: bool = False,
) -> AdmittedSearch:
    """Open a search on a cache that the caller has just found, once the layer's keys are in host memory.

    deadline_s: the caller's remaining time; `version_is_right` raises for a version of the layer. Both are asked when
    the keys are there. among_others: rows of other calls lie in the same blocks. Raises ServiceError.
    """
    found = service.caches.layer(cache, layer)
    async with service.room.with_pages(cache, lambda: found.pages if found.spilled_pages else []):
        if cache.deleted:  # while its keys were brought
            raise CacheNotFoundError
        version_is_right(found.version)
        return AdmittedSearch(service, cache, layer, parameters, deadline_s(), among_others)


class GivesBack(Protocol):
    """Something that runs in a call."""

    @property
    def runs(self) -> bool:
        """Whether something of it still goes on."""

    async def stop(self) -> None:
        """Let nothing go on; the device is done with it when this returns."""

    def give_back(self) -> None:
        """Give back what it holds. Nothing of it runs any more."""


class HasViews(Protocol):
    """An operation, which has views on the worker while it has tiles."""

    def drop_views(self) -> None:
        """No tile of it will come any more."""


class Place:
    """Where an open call stands among the others, for its operations: these refer to it and not to the call, which
    refers to them. What refers to itself waits for the garbage collector, which holds up all calls for as long as it
    looks at the pages of all caches (decision 0037).
    """

    __slots__ = ("search",)

    def __init__(self) -> None:
        self.search: OpenSearch | None = None

    def __call__(self) -> OpenSearch:
        """The search that the governor knows."""
        assert self.search is not None, "the call is not open"
        return self.search


class OpenCall:
    """An open call: snapshots of rows, its place among the others, and while it has tiles views on the worker.

    For the length of an `async with`. `users` are what runs in it; they are stopped before anything is given back.
    Giving back goes on to its end even when the call is cancelled in the middle of it. A subclass takes its snapshots,
    makes its operations and calls `_open`; where that raises, it calls `_let_go`.
    """

    def __init__(self, service: Service, cache: KeyCache) -> None:
        self.users: list[GivesBack] = []
        self.service = service
        self._cache = cache
        self._snapshots: list[Snapshot] = []
        self._operations: list[HasViews] = []
        self._place = Place()

    @property
    def search(self) -> OpenSearch:
        """Its place among the others."""
        return self._place()

    def _hold(
        self, layer: int, kind: RowKind = RowKind.KEYS, held: Callable[[int], tuple[int, int]] | None = None
    ) -> Snapshot:
        snapshot = self.service.caches.snapshot(self._cache, layer, kind, held)
        self._snapshots.append(snapshot)
        return snapshot

    def _open(self, snapshot: Snapshot, band: Band, least: Need, run_s: float, deadline_s: float | None) -> None:
        owner = self._cache.owner
        self._place.search = self.service.governor.open(snapshot, owner, band, least, run_s, deadline_s)
        self._cache.busy += 1

    def _let_go(self) -> None:
        for snapshot in self._snapshots:
            self.service.caches.release_snapshot(snapshot)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if any(user.runs for user in self.users):
            await asyncio.shield(self.service.background(self._stop()))
        else:  # as always when all went well: a task would come turns of the loop later
            self._give_back()

    async def _stop(self) -> None:
        await asyncio.gather(*(user.stop() for user in self.users))
        self._give_back()

    def _give_back(self) -> None:
        for user in self.users:
            user.give_back()
        for operation in self._operations:
            operation.drop_views()
        self.service.governor.close(self.search)
        self._let_go()
        # Pages that only this call still held are gone with it: somebody may wait for their memory.
        self.service.governor.pump()
        self._cache.busy -= 1
        self.service.caches.touch(self._cache)
        self.users.clear()  # they refer to this: messages and blocks' rows would wait for the garbage collector


class AdmittedSearch(OpenCall):
    """An open search: `tiles` computes it. The blocks of all searches of a kind whose rows lie `among_others` are laid
    out alike."""

    def __init__(
        self,
        service: Service,
        cache: KeyCache,
        layer: int,
        parameters: SearchParameters,
        deadline_s: float | None,
        among_others: bool = False,
    ) -> None:
        super().__init__(service, cache)
        self.snapshot = self._hold(layer)
        block_bytes = service.blocks.block_bytes
        try:
            self.tiles = IndexTiles(
                service,
                self.snapshot,
                parameters,
                lambda scored: BlockLayout.of(cache.spec, parameters.top_k, scored or among_others, block_bytes),
                self._place,
            )
            self._operations.append(self.tiles)
            self._open(
                self.snapshot,
                parameters.band,
                self.tiles.least,
                self.tiles.seconds(max(1, parameters.row_count)),
                deadline_s,
            )
        except BaseException:
            self._let_go()
            raise
