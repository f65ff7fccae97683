"""The worker, as the governor and the searches see it: residency decisions become messages, tiles become futures."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from streamindex_service.core.caches import Page, Snapshot
from streamindex_service.core.governor import Governor
from streamindex_service.errors import PoisonError, ServiceError, WorkerLostError
from streamindex_service.frontend.host_memory import Block, HostExtents, SharedSegment
from streamindex_service.ipc.link import PAGES_PER_MESSAGE
from streamindex_service.ipc.supervisor import Supervisor, WorkerLink
from streamindex_service.ipc.v1 import worker_pb2 as pb

_MAX_SUSPECTS = 1024
_SUSPICION_S = 3600.0  # a request is tried again after so long
_MEASURED_FLOP_PER_S = 1e10  # before anything was measured


@dataclass(frozen=True, slots=True)
class View:
    """The pages of a snapshot as one worker knows them."""

    view_id: int
    worker: WorkerLink
    defined: asyncio.Future[pb.FromWorker]


@dataclass(frozen=True, slots=True)
class TileSpec:
    """What all tiles of a search have in common."""

    heads: int
    ratio: int
    top_k: int
    order: int
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class TilePlace:
    """Where a tile's tensors lie in its block: byte offsets. `scores` is None when none are wanted."""

    rows: int
    q: int
    w: int
    positions: int
    indices: int
    scores: int | None


class DeviceWorker:
    """One worker behind one governor."""

    def __init__(self, extents: HostExtents, poison_deaths: int, tile_s: float, clock: Callable[[], float]) -> None:
        self.supervisor: Supervisor | None = None  # set by the owner, once
        self.governor: Governor | None = None  # likewise
        self.extents = extents
        self._poison_deaths = poison_deaths
        self._tile_s = tile_s
        self._clock = clock
        self._flop_per_s = _MEASURED_FLOP_PER_S
        self._mapped: set[int] = set()
        self._loads: deque[Page] = deque()
        self._device_extents: set[int] = set()
        self._outstanding: OrderedDict[int, str] = OrderedDict()  # tile id -> request key, oldest first
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
        """Have the worker give it back."""
        self._device_extents.discard(extent_id)
        self._worker().send(pb.ToWorker(free_extent=pb.FreeExtent(extent_id=extent_id)))

    def load(self, page: Page) -> None:
        """Copy a page to the device, before anything that is asked for later."""
        self._loads.append(page)

    # What the supervisor calls.

    def on_ready(self) -> None:
        """A worker is ready for work."""
        assert self.governor is not None
        self.governor.device_ready()

    def on_down(self) -> None:
        """The worker and its memory are gone."""
        assert self.governor is not None
        self._accused = next(iter(self._outstanding.values()), None)  # the device works in order
        self._outstanding.clear()
        self._loads.clear()
        self._mapped.clear()
        self._device_extents.clear()
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

    def define_view(self, snapshot: Snapshot) -> View:
        """Tell the worker which pages a search reads, after the copies that the governor decided on."""
        worker = self._worker()
        self._send_loads(worker)
        view_id = worker.next_id()
        pages = snapshot.pages
        count = max(1, -(-len(pages) // PAGES_PER_MESSAGE))
        for part in range(count):
            some = [page.device for page in pages[part * PAGES_PER_MESSAGE : (part + 1) * PAGES_PER_MESSAGE]]
            message = pb.DefineView(
                view_id=view_id,
                key_format=int(snapshot.spec.key_format),
                head_dim=snapshot.spec.head_dim,
                length_keys=snapshot.length_keys,
                extent_ids=[slot.extent_id for slot in some if slot is not None],
                extent_offsets=[slot.offset_bytes for slot in some if slot is not None],
                complete=part == count - 1,
            )
            assert len(message.extent_ids) == len(some), "a pinned page is not on the device"
            if message.complete:
                defined = worker.request(pb.ToWorker(define_view=message), view_id)
                self._watch(defined)
            else:
                worker.send(pb.ToWorker(define_view=message))
        return View(view_id, worker, defined)

    def drop_view(self, view: View) -> None:
        """The search is over."""
        view.worker.send(pb.ToWorker(drop_view=pb.DropView(view_id=view.view_id)))

    def submit(
        self, view: View, spec: TileSpec, block: Block, place: TilePlace, request_key: str, flop: int
    ) -> tuple[int, asyncio.Future[pb.FromWorker]]:
        """Have a tile of about `flop` operations computed; the future is done when the answers are in the block.

        It raises WorkerLostError, DeviceMemoryError, CancelledTileError or InternalError.
        """
        worker = view.worker
        self._map(worker, block.shared)
        tile_id = worker.next_id()

        def span(offset: int) -> pb.Span:
            return pb.Span(segment_id=block.shared.segment_id, offset_bytes=block.offset_bytes + offset)

        message = pb.SearchTile(
            tile_id=tile_id,
            view_id=view.view_id,
            rows=place.rows,
            heads=spec.heads,
            ratio=spec.ratio,
            top_k=spec.top_k,
            order=spec.order,
            workspace_bytes=spec.workspace_bytes,
            q=span(place.q),
            w=span(place.w),
            positions=span(place.positions),
            indices=span(place.indices),
            scores=None if place.scores is None else span(place.scores),
        )
        if worker.alive:  # a search may not have learnt yet that its worker is gone
            self._outstanding[tile_id] = request_key
        future = worker.request(pb.ToWorker(search_tile=message), tile_id)
        future.add_done_callback(lambda done: self._tile_done(tile_id, done, flop))
        return tile_id, future

    def tile_rows(self, flop_per_row: int) -> int:
        """Query rows that the device computes in about `worker.tile_s`, by the speed it has shown; at least 1."""
        return max(1, int(self._flop_per_s * self._tile_s / flop_per_row))

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
        loads = deque(page for page in self._loads if page.device is not None)
        self._loads.clear()
        while loads:
            page_bytes = loads[0].page_bytes
            message = pb.LoadPages(operation_id=worker.next_id(), page_bytes=page_bytes)
            while loads and loads[0].page_bytes == page_bytes and len(message.extent_ids) < PAGES_PER_MESSAGE:
                page = loads.popleft()
                assert page.device is not None
                shared = self.extents.segment(page.host)
                self._map(worker, shared)
                message.segment_ids.append(shared.segment_id)
                message.segment_offsets.append(page.host.offset_bytes)
                message.extent_ids.append(page.device.extent_id)
                message.extent_offsets.append(page.device.offset_bytes)
            self._watch(worker.request(pb.ToWorker(load_pages=message), message.operation_id))

    def _tile_done(self, tile_id: int, future: asyncio.Future[pb.FromWorker], flop: int) -> None:
        if not future.cancelled() and future.exception() is None:
            # Small tiles are slow for their size and say little: they bring the speed down slowly.
            seconds = max(1e-6, future.result().tile_done.device_us / 1e6)
            self._flop_per_s = max(flop / seconds, 0.95 * self._flop_per_s)
        # A tile that died with its worker stays listed until `on_down` has looked at the list.
        if future.cancelled() or not isinstance(future.exception(), WorkerLostError):
            self._outstanding.pop(tile_id, None)

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
        # What is on the device is not what the governor believes. Forget all of it: running searches keep their views
        # (and with them the memory), everything else is copied again when it is used.
        worker = self._worker()
        for extent_id in sorted(self._device_extents):
            worker.send(pb.ToWorker(free_extent=pb.FreeExtent(extent_id=extent_id)))
        self._device_extents.clear()
        self._loads.clear()
        self.governor.device_in_doubt()


def flop_per_row(snapshot: Snapshot) -> int:
    """Operations that one query row takes at most: a product and a sum for each key, head and element."""
    spec = snapshot.spec
    return max(1, 2 * snapshot.length_keys * spec.heads * spec.head_dim)


def tile_error(view: View, error: ServiceError) -> ServiceError:
    """The cause of a tile's failure: if its view could not be made for lack of memory, that."""
    if view.defined.done() and not view.defined.cancelled():
        cause = view.defined.exception()
        if isinstance(cause, ServiceError):
            return cause
    return error
