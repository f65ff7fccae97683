"""The worker, as the governor and the searches see it: residency decisions become messages, tiles become futures."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from streamindex_service.core.governor import Governor
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.pages import PageSlot
from streamindex_service.errors import PoisonError, ServiceError, WorkerLostError
from streamindex_service.frontend.host_memory import Block, HostExtents, SharedSegment
from streamindex_service.frontend.views import DeviceViews, View
from streamindex_service.ipc.link import PAGES_PER_MESSAGE
from streamindex_service.ipc.supervisor import Supervisor, WorkerLink
from streamindex_service.ipc.v1 import worker_pb2 as pb

_MAX_SUSPECTS = 1024
_SUSPICION_S = 3600.0  # a request is tried again after so long


class DeviceWorker:
    """One worker behind one governor."""

    def __init__(self, extents: HostExtents, poison_deaths: int, clock: Callable[[], float]) -> None:
        self.supervisor: Supervisor | None = None  # set by the owner, once
        self.governor: Governor | None = None  # likewise
        self.extents = extents
        self._poison_deaths = poison_deaths
        self._clock = clock
        self.views = DeviceViews(self._moves, self._watch)
        self._mapped: set[int] = set()
        self._loads: deque[Page] = deque()
        self._device_extents: set[int] = set()
        self._outstanding: dict[int, str] = {}  # tile id -> request key
        self._suspects: OrderedDict[str, tuple[int, float]] = OrderedDict()  # request key -> deaths, time of the last
        self._accused: str | None = None

    # What the governor's page pool calls.

    def make_extent(self, extent_id: int, extent_bytes: int) -> None:
        """Have the worker take device memory."""
        worker = self._worker()
        operation = worker.next_id()
        message = pb.AllocateExtent(operation_id=operation, extent_id=extent_id, extent_bytes=extent_bytes)
        self._device_extents.add(extent_id)
        self._watch(worker.request(pb.ToWorker(allocate_extent=message), operation))

    def drop_extent(self, extent_id: int) -> None:
        """Have the worker give it back. Views that a search keeps for its next tile would hold the memory: they go."""
        self._device_extents.discard(extent_id)
        self.views.retire_those_in(extent_id)
        self._worker().send(pb.ToWorker(free_extent=pb.FreeExtent(extent_id=extent_id)))

    def load(self, page: Page) -> None:
        """Copy a page to the device, before anything that is asked for later."""
        page.copies += 1  # until it is made: the page stays in host memory
        self._loads.append(page)

    def _forget_loads(self) -> None:
        _copied(self._loads)
        self._loads.clear()

    # What the supervisor calls.

    def on_ready(self) -> None:
        """A worker is ready for work."""
        assert self.governor is not None
        self.governor.device_ready()

    def on_down(self, running: Sequence[int]) -> None:
        """The worker and its memory are gone. running: tiles that the device was not done with, oldest first.

        What the worker had beside them was waiting there, overtaken or for its pages, and has done nothing.
        """
        assert self.governor is not None
        self._accused = self._outstanding.get(running[0]) if running else None
        self._outstanding.clear()
        self._forget_loads()
        self._mapped.clear()
        self._device_extents.clear()
        self.views.forget()
        self.governor.device_lost()

    def on_lost(self, blamed: bool) -> None:
        """It is known whether the work may have been the cause."""
        if blamed and self._accused is not None:
            deaths, _ = self._suspects.pop(self._accused, (0, 0.0))
            self._suspects[self._accused] = (deaths + 1, self._clock())
            while len(self._suspects) > _MAX_SUSPECTS:
                self._suspects.popitem(last=False)
        self._accused = None

    # What searches call.

    def refuse_poison(self, request_key: str) -> None:
        """Raises PoisonError for a request that has killed as many workers as it may."""
        deaths, last = self._suspects.get(request_key, (0, 0.0))
        if deaths >= self._poison_deaths and self._clock() - last < _SUSPICION_S:
            raise PoisonError(
                "this request was running each time when workers died; it is not tried again",
                metadata={"workers_lost": deaths},
            )

    def view_of(self, view: View | None, snapshot: Snapshot, pages: Sequence[Page], length_keys: int) -> View:
        """A view of resident pages, after the copies that the governor decided on: this one if it still is right, or
        another search's of the same pages. `drop_view` must follow for what is returned and not given here again."""
        worker = self._worker()
        self._send_loads(worker)
        return self.views.of(view, worker, snapshot, pages, length_keys)

    def drop_view(self, view: View) -> None:
        """The search is over, or has no more use for it."""
        self.views.drop(view)

    def submit(
        self, views: Sequence[View], block: Block, request_key: str, message: Callable[[int], pb.ToWorker]
    ) -> tuple[int, asyncio.Future[pb.FromWorker]]:
        """Have a tile computed that reads these views; the future is done when the answers are in the block.

        `message` makes the tile's message from its number. The future raises WorkerLostError, DeviceMemoryError,
        CancelledTileError or InternalError.
        """
        worker = views[0].worker
        self.views.tell()
        self._map(worker, block.shared)
        tile_id = worker.next_id()
        asked = message(tile_id)
        if worker.alive:  # a search may not have learnt yet that its worker is gone
            self._outstanding[tile_id] = request_key
        future = worker.request(asked, tile_id)
        for view in views:
            view.tiles += 1
        future.add_done_callback(lambda done: self._tile_done(tile_id, views, done))
        return tile_id, future

    def cancel(self, view: View, tile_ids: list[int]) -> None:
        """Do not start these tiles any more; their futures still end."""
        if tile_ids:
            view.worker.send(pb.ToWorker(cancel_tiles=pb.CancelTiles(tile_ids=tile_ids)))

    def segment_dropped(self, segment_id: int) -> None:
        """A host segment is gone."""
        if segment_id in self._mapped:
            self._mapped.discard(segment_id)
            self._worker().send(pb.ToWorker(unmap_segment=pb.UnmapSegment(segment_id=segment_id)))

    def _worker(self) -> WorkerLink:
        if self.supervisor is None or self.supervisor.link is None:
            raise WorkerLostError("no device process is running")
        return self.supervisor.link

    def _map(self, worker: WorkerLink, shared: SharedSegment) -> None:
        if shared.segment_id in self._mapped or not worker.alive:
            return
        message = pb.MapSegment(
            operation_id=worker.next_id(),
            segment_id=shared.segment_id,
            segment_bytes=shared.segment.size_bytes,
            writable=shared.writable_by_worker,
        )
        mapped = worker.request(pb.ToWorker(map_segment=message), message.operation_id, shared.segment.fd)
        self._mapped.add(shared.segment_id)
        mapped.add_done_callback(lambda done: self._segment_mapped(shared.segment_id, done))

    def _segment_mapped(self, segment_id: int, future: asyncio.Future[pb.FromWorker]) -> None:
        if not future.cancelled() and isinstance(future.exception(), ServiceError):
            self._mapped.discard(segment_id)  # what needed it fails; the next that does tries again

    def _send_loads(self, worker: WorkerLink) -> None:
        # A page may have lost its place since: its search was cancelled, and then the page was evicted or freed.
        pages = [page for page in self._loads if page.device is not None]
        if len(pages) < len(self._loads):
            _copied(page for page in self._loads if page.device is None)
        self._loads.clear()
        for page_bytes, group in itertools.groupby(pages, key=lambda page: page.page_bytes):
            same = list(group)
            for first in range(0, len(same), PAGES_PER_MESSAGE):
                self._send_some(worker, page_bytes, same[first : first + PAGES_PER_MESSAGE])

    def _send_some(self, worker: WorkerLink, page_bytes: int, pages: Sequence[Page]) -> None:
        sources = [page.in_host for page in pages]
        targets = [page.device for page in pages if page.device is not None]
        segments = {extent_id: self._source(worker, slot) for extent_id, slot in {s[0]: s for s in sources}.items()}
        operation = worker.next_id()
        fields = {
            "operation_id": operation,
            "page_bytes": page_bytes,
            "segment_ids": [segments[extent_id] for extent_id, _ in sources],
            "segment_offsets": [offset for _, offset in sources],
            "extent_ids": [extent_id for extent_id, _ in targets],
            "extent_offsets": [offset for _, offset in targets],
        }
        loaded = worker.request(pb.ToWorker(load_pages=fields), operation)
        self._watch(loaded)
        loaded.add_done_callback(partial(_copied, pages))

    def _source(self, worker: WorkerLink, slot: PageSlot) -> int:
        """The number under which the worker knows the segment of a page."""
        shared = self.extents.segment(slot)
        self._map(worker, shared)
        return shared.segment_id

    def _tile_done(self, tile_id: int, views: Sequence[View], future: asyncio.Future[pb.FromWorker]) -> None:
        self.views.tile_done(views)
        # A tile that died with its worker stays listed until `on_down` has looked at the list.
        if future.cancelled() or not isinstance(future.exception(), WorkerLostError):
            self._outstanding.pop(tile_id, None)

    def _moves(self) -> int:
        assert self.governor is not None
        return self.governor.residency.moves

    def _watch(self, operation: asyncio.Future[pb.FromWorker]) -> None:
        assert self.governor is not None
        epoch = self.governor.epoch
        operation.add_done_callback(lambda done: self._memory_operation_done(done, epoch))

    def _memory_operation_done(self, future: asyncio.Future[pb.FromWorker], epoch: int) -> None:
        error = None if future.cancelled() else future.exception()
        if not isinstance(error, ServiceError) or isinstance(error, WorkerLostError) or self.governor is None:
            return
        if epoch != self.governor.epoch:
            return  # what failed is forgotten already: one failure makes those that build on it fail too
        # What is on the device is not what the governor believes. Forget all of it: tiles that run keep their views
        # (and with them the memory), everything else is copied again when it is used.
        worker = self._worker()
        self.views.retire_all()
        for extent_id in sorted(self._device_extents):
            worker.send(pb.ToWorker(free_extent=pb.FreeExtent(extent_id=extent_id)))
        self._device_extents.clear()
        self._forget_loads()
        self.governor.device_in_doubt()


def _copied(pages: Iterable[Page], _: asyncio.Future[pb.FromWorker] | None = None) -> None:
    """Nobody reads their bytes in host memory any more, whatever became of the copies."""
    for page in pages:
        page.copies -= 1


def tile_error(views: Sequence[View], error: ServiceError) -> ServiceError:
    """The cause of a tile's failure: if one of its views could not be made for lack of memory, that."""
    for view in views:
        if view.defined is not None and view.defined.done() and not view.defined.cancelled():
            cause = view.defined.exception()
            if isinstance(cause, ServiceError):
                return cause
    return error
