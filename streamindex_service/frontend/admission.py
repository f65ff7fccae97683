"""From the governor's callbacks to `async with`: a search holds what it needs, and gives all of it back."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Protocol

from streamindex_service.core.caches import KeyCache
from streamindex_service.core.governor import Grant
from streamindex_service.frontend import requests
from streamindex_service.frontend.device import View
from streamindex_service.frontend.service import Service


class GivesBack(Protocol):
    """Something that runs on a view."""

    async def give_back(self) -> None:
        """Stop; the device is done with it when this returns."""


class AdmittedSearch:
    """A snapshot of a layer, a grant of the governor, a view on the worker, for the length of an `async with`.

    `users` are what runs on the view; they are stopped before anything is given back. Giving back goes on to its end
    even when the call is cancelled in the middle of it.
    """

    view: View
    grant: Grant

    def __init__(self, service: Service, cache: KeyCache, layer: int, deadline_s: float | None) -> None:
        self.users: list[GivesBack] = []
        self._service = service
        self._cache = cache
        self._deadline_s = deadline_s
        self.snapshot = service.caches.snapshot(cache, layer)

    async def __aenter__(self) -> AdmittedSearch:
        self._cache.busy += 1
        try:
            while True:
                self.grant = await self._admit()
                if self.grant.epoch == self._service.governor.epoch:
                    break
                self._service.governor.finish(self.grant)  # what it was granted has gone with its device
        except BaseException:
            self._cache.busy -= 1
            self._service.caches.release_snapshot(self.snapshot)
            raise
        try:
            self.view = self._service.device.define_view(self.snapshot)
        except BaseException:
            self._release()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self._service.background(self._give_back()))

    async def _admit(self) -> Grant:
        settings = self._service.settings
        floor = requests.search_floor_bytes(settings)
        want = int(settings.memory.workspace_bytes) + requests.staging_bytes(settings)
        governor = self._service.governor
        wake: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        grants: list[Grant] = []

        def granted(grant: Grant) -> None:
            grants.append(grant)
            if not wake.done():  # it is when the call was cancelled at this very moment
                wake.set_result(None)

        waiter = governor.submit(self.snapshot, floor, want, self._deadline_s, granted)
        try:
            await wake
        except asyncio.CancelledError:
            if grants:
                governor.finish(grants[0])
            else:
                governor.cancel(waiter)
            raise
        return grants[0]

    @property
    def workspace_bytes(self) -> int:
        """Of the grant, what tiles may use beyond their inputs and outputs."""
        return self.grant.workspace_bytes - requests.staging_bytes(self._service.settings)

    async def _give_back(self) -> None:
        await asyncio.gather(*(user.give_back() for user in self.users))
        self._service.device.drop_view(self.view)
        self._release()

    def _release(self) -> None:
        self._service.governor.finish(self.grant)
        self._service.caches.release_snapshot(self.snapshot)
        # Pages that only this search still held are gone with it: somebody may wait for their memory.
        self._service.governor.pump()
        self._cache.busy -= 1
        self._cache.used_at = self._service.clock()
