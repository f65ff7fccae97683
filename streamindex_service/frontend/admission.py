"""A search between its header and its end: what it holds, and that all of it comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import fields
from types import TracebackType
from typing import Protocol

from streamindex_service.core.caches import KeyCache
from streamindex_service.core.estimates import TopkWork, WorkspaceTerms
from streamindex_service.core.governor import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.core.windows import MERGE_BYTES_PER_ENTRY, windows_of
from streamindex_service.errors import CacheNotFoundError, ServiceError
from streamindex_service.frontend import requests
from streamindex_service.frontend.device import TilePart, TilePlace, TileSpec, View
from streamindex_service.frontend.query_block import BlockLayout
from streamindex_service.frontend.requests import SearchParameters
from streamindex_service.frontend.service import Service
from streamindex_service.ipc.v1 import worker_pb2

_TERMS = [field.name for field in fields(WorkspaceTerms)]


async def admit(
    service: Service,
    cache: KeyCache,
    layer: int,
    parameters: SearchParameters,
    deadline_s: Callable[[], float | None],
    version_is_right: Callable[[int], None] = lambda version: None,
) -> AdmittedSearch:
    """Open a search on a cache that the caller has just found, once the layer's keys are in host memory.

    deadline_s: the caller's remaining time; `version_is_right` raises for a version of the layer. Both are asked when
    the keys are there. Raises ServiceError.
    """
    found = service.caches.layer(cache, layer)
    async with service.room.with_pages(cache, lambda: found.pages if found.spilled_pages else []):
        if cache.deleted:  # while its keys were brought
            raise CacheNotFoundError
        version_is_right(found.version)
        return AdmittedSearch(service, cache, layer, parameters, deadline_s())


class GivesBack(Protocol):
    """Something that runs in a search."""

    @property
    def runs(self) -> bool:
        """Whether something of it still goes on."""

    async def stop(self) -> None:
        """Let nothing go on; the device is done with it when this returns."""

    def give_back(self) -> None:
        """Give back what it holds. Nothing of it runs any more."""


class AdmittedSearch:
    """An open search: a snapshot of a layer, its place among the others, and while it has tiles a view on the worker.

    For the length of an `async with`. `users` are what runs in it; they are stopped before anything is given back.
    Giving back goes on to its end even when the call is cancelled in the middle of it.
    """

    def __init__(
        self,
        service: Service,
        cache: KeyCache,
        layer: int,
        parameters: SearchParameters,
        deadline_s: float | None,
    ) -> None:
        self.users: list[GivesBack] = []
        self.service = service
        self._cache = cache
        self._view: View | None = None
        self._viewed = 0  # the window that it shows
        spec = cache.spec
        self.snapshot = service.caches.snapshot(cache, layer)
        self.spec = TileSpec(spec.heads, spec.ratio, parameters.top_k, parameters.order)
        self.work = TopkWork(
            spec.key_format,
            spec.heads,
            spec.head_dim,
            self.snapshot.length_keys,
            parameters.top_k,
            parameters.want_scores,
            workspace_terms(service.require_worker_info().workspace),
        )
        beside, block_bytes = requests.search_floor_bytes(service.settings), service.blocks.block_bytes
        with_scores = BlockLayout.of(spec, parameters.top_k, True, block_bytes)
        # a merge takes no more than a block, or what a single row needs
        merge_bytes = max(block_bytes, self._merge_bytes(1))
        self.windows = windows_of(self.snapshot, service.hbm.limit_bytes, beside, merge_bytes)
        self.in_parts = len(self.windows) > 1
        self._most_rows = merge_bytes // self._merge_bytes(1)  # of a tile that is merged
        self.want_scores = parameters.want_scores
        # parts are merged by their scores, whether the caller wants them or not
        self.layout = (
            with_scores
            if self.in_parts
            else BlockLayout.of(spec, parameters.top_k, parameters.want_scores, block_bytes)
        )
        try:
            least = Need(
                self.windows[0].pages,
                beside + merge_bytes * self.in_parts,
                0,
                self.work.flop(1, self.windows[0].keys),
            )
            run_s = service.governor.speed.seconds(self.work.flop(max(1, parameters.row_count)))
            self._search: OpenSearch = service.governor.open(
                self.snapshot, cache.owner, parameters.band, least, run_s, deadline_s
            )
        except BaseException:
            service.caches.release_snapshot(self.snapshot)
            raise
        cache.busy += 1

    async def __aenter__(self) -> AdmittedSearch:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if any(user.runs for user in self.users):
            await asyncio.shield(self.service.background(self._stop()))
        else:  # as always when all went well: a task would come turns of the loop later
            self._give_back()

    def tile_rows(self, keys: int) -> int:
        """Query rows of the next tile, where they see up to so many keys: at least 1, at most a block.

        They are what the device computes in about `Governor.tile_s`, by the speed it has shown.
        """
        flop = self.work.flop(1, min(keys, self.windows[0].keys))
        most = min(self.layout.rows, self._most_rows) if self.in_parts else self.layout.rows
        governor = self.service.governor
        return governor.speed.rows(flop, governor.tile_s(self._search.band), most)

    def request(
        self,
        window: int,
        rows: int,
        keys: int,
        granted: Callable[[Grant], None],
        refused: Callable[[ServiceError], None],
        *,
        alone: bool = False,
        smallest: bool = False,
    ) -> SearchTurn:
        """Ask for a turn on the device, for a tile of so many rows that see up to so many keys, and a window of these.

        `smallest`: with no more workspace than any tile can do with.
        """
        need = self._need(window, rows, keys, smallest)
        return self.service.governor.request(self._search, need, granted, refused, alone=alone)

    def grow(self, turn: SearchTurn, rows: int, keys: int) -> None:
        """A tile that still waits has come to have so many rows, and to see so many keys."""
        self.service.governor.grow(turn, self._need(0, rows, keys, smallest=False))

    def keys_seen(self, last_position: int) -> int:
        """Keys that a query at this position sees."""
        return min((last_position + 1) // self.spec.ratio, self.snapshot.length_keys)

    def windows_seen(self, keys: int) -> int:
        """Windows of the layer that hold the first so many keys; at least 1."""
        return max(1, sum(window.first_key < keys for window in self.windows))

    def part(self, window: int, keys: int) -> TilePart:
        """Which part of the layer a window is, for a tile that sees so many keys."""
        return TilePart(self.windows[window].first_key, window == self.windows_seen(keys) - 1)

    def place(self, first: int, rows: int) -> TilePlace:
        """Where the worker finds the tensors of rows [first, first + rows) of a block."""
        return self.layout.place(first, rows, self.want_scores or self.in_parts)

    def view(self, number: int) -> View:
        """A window as the worker knows it. For the moment in which a turn is granted; raises WorkerLostError."""
        window, device = self.windows[number], self.service.device
        if self._view is not None and self._viewed != number:
            device.drop_view(self._view)
            self._view = None
        self._view = device.view_of(self._view, self.snapshot, window.pages, window.keys)
        self._viewed = number
        return self._view

    def workspace_bytes(self, grant: Grant, rows: int) -> int:
        """Of a grant, what a tile of so many rows may use beyond them and their answers."""
        return grant.workspace_bytes - self._staging_bytes(rows)

    def _merge_bytes(self, rows: int) -> int:
        return rows * self.work.top_k * MERGE_BYTES_PER_ENTRY

    def _staging_bytes(self, rows: int) -> int:
        return self.work.staging_bytes(rows) + (self._merge_bytes(rows) if self.in_parts else 0)

    def _need(self, number: int, rows: int, keys: int, smallest: bool) -> Need:
        memory, staging, window = self.service.settings.memory, self._staging_bytes(rows), self.windows[number]
        floor = int(memory.workspace_floor_bytes)
        seen = min(window.keys, max(0, keys - window.first_key))
        most = self.work.workspace_bytes(rows, seen)
        want = floor if smallest else min(int(memory.workspace_bytes), max(floor, most))
        flop = self.work.flop(rows, seen)
        return Need(window.pages, floor + staging, want + staging, flop, staging, most + staging)

    async def _stop(self) -> None:
        await asyncio.gather(*(user.stop() for user in self.users))
        self._give_back()

    def _give_back(self) -> None:
        for user in self.users:
            user.give_back()
        if self._view is not None:
            self.service.device.drop_view(self._view)
        self.service.governor.close(self._search)
        self.service.caches.release_snapshot(self.snapshot)
        # Pages that only this search still held are gone with it: somebody may wait for their memory.
        self.service.governor.pump()
        self._cache.busy -= 1
        self.service.caches.touch(self._cache)


def workspace_terms(message: worker_pb2.WorkspaceTerms) -> WorkspaceTerms:
    """What a worker said of its implementation."""
    return WorkspaceTerms(**{name: getattr(message, name) for name in _TERMS})
