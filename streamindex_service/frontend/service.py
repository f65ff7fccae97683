"""The state of a running service, put together once: caches, uploads, budgets, worker."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from streamindex_service.config import Settings
from streamindex_service.core.accounts import Quota
from streamindex_service.core.caches import CacheStore, Watermarks
from streamindex_service.core.estimates import DeviceSpeed
from streamindex_service.core.governor import Governor, GovernorLimits
from streamindex_service.core.layers import KeyCache, Page
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.residency import Residency
from streamindex_service.core.scheduler import QueueLimits
from streamindex_service.core.sizes import KeyFormat, KvFormat
from streamindex_service.core.spares import SpareLimits
from streamindex_service.core.uploads import UploadTable
from streamindex_service.core.working_set import WorkingSetLimits
from streamindex_service.errors import NotReadyError
from streamindex_service.frontend.device import DeviceWorker
from streamindex_service.frontend.host_memory import BlockPool, HostExtents, IngressBudget
from streamindex_service.frontend.loop_turns import LoopTurns
from streamindex_service.frontend.pacing import Pacing
from streamindex_service.frontend.read_ahead import ReadAhead
from streamindex_service.frontend.segment_closer import SegmentCloser
from streamindex_service.frontend.spill import HostRoom, SpillingRoom, SpillLimits
from streamindex_service.ipc.supervisor import Supervisor, WorkerEvents, WorkerOptions
from streamindex_service.ipc.v1 import worker_pb2 as pb
from streamindex_service.telemetry.counters import Counters

_WAIT_CHECK_S = 0.5  # how often tiles that have waited too long are looked for


class Service:
    """Everything that the servicers share. Lives on one event loop."""

    def __init__(self, settings: Settings, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.log = log
        self.clock = clock
        self.started_at = clock()
        self.counters = Counters()
        self.draining = asyncio.Event()
        self.worker_info: pb.Ready | None = None
        self.unusable: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.health_changed: Callable[[bool], None] = lambda ready: None
        self.admit: Callable[[], None] = lambda: None  # raises what a call is refused with before it starts
        memory = settings.memory
        host_limit = int(memory.host_budget_bytes) or _half_of_memory()
        self.host = Ledger("host", host_limit)
        self.ingress = Ledger("ingress", int(memory.ingress_budget_bytes))
        self.hbm = Ledger("hbm", int(memory.device_budget_bytes))
        self._closer = SegmentCloser()
        self.host_extents = HostExtents(
            self._segment_dropped, self.host, _spare_limits(settings), clock, asyncio.get_running_loop(), self._closer
        )
        self.device = DeviceWorker(self.host_extents, settings.worker.poison_deaths, clock)
        host_pool = PagePool(self.host, int(memory.extent_bytes), self.host_extents.make, self.host_extents.drop)
        device_pool = PagePool(self.hbm, int(memory.extent_bytes), self.device.make_extent, self.device.drop_extent)
        self.caches = CacheStore(
            host_pool,
            self._drop_device_page,
            clock,
            settings.server.max_caches,
            _quota(settings),
            self.host_extents.make_room,
            watermarks=Watermarks(memory.host_high_watermark, memory.host_critical_watermark),
        )
        residency = Residency(self.hbm, device_pool, self.device.load)
        self.attention_speed = DeviceSpeed()
        self.governor = Governor(residency, clock, _governor_limits(settings), wake=self._wake_governor)
        self.uploads = UploadTable(self.caches, clock, settings.server.upload_ttl_s, settings.server.max_uploads)
        self.ingress_budget = IngressBudget(self.ingress)
        self.blocks = BlockPool(
            self.ingress_budget,
            int(memory.search_block_bytes),
            int(memory.extent_bytes),
            self.host_extents.drop_spares,
        )
        self.room = self._make_room()
        self.loop_turns = LoopTurns(asyncio.get_running_loop())
        self.read_ahead = ReadAhead(asyncio.get_running_loop(), lambda: self.governor.working_set.changes)
        self.pacing = Pacing(asyncio.get_running_loop(), int(settings.scheduler.paced_bytes_per_s))
        self.ingest_threads = ThreadPoolExecutor(memory.ingest_threads, thread_name_prefix="ingest")
        self.supervisor = Supervisor(
            _worker_options(settings), WorkerEvents(self._ready, self._down, self._lost, self._unusable, log.info)
        )
        self.device.governor = self.governor
        self.device.supervisor = self.supervisor
        self._label_key = os.urandom(16)
        self._watchers: list[asyncio.Task[None]] = []
        self._background: set[asyncio.Task[None]] = set()

    def _wake_governor(self, delay_s: float) -> None:
        asyncio.get_running_loop().call_later(delay_s, self.governor.woken)

    def start(self) -> None:
        """Start the worker and the sweeper."""
        self.supervisor.start()
        self._watchers = [
            asyncio.create_task(self._every(period_s, work), name=work.__name__)
            for period_s, work in (
                (self.settings.server.sweep_s, self._sweep),
                (min(_WAIT_CHECK_S, self.settings.scheduler.max_wait_s), self._end_long_waits),
                (self.settings.server.sweep_s, self._keep_room),
            )
        ]

    async def stop(self) -> None:
        """Stop both; the worker may finish what it has been given."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        await self.supervisor.stop(grace_s=2.0)
        # With the worker gone nothing of the device can hold these up any more.
        await asyncio.gather(*self._background, return_exceptions=True)
        self.ingest_threads.shutdown(wait=True, cancel_futures=True)
        self.room.close()
        self._closer.stop()

    @property
    def formats(self) -> frozenset[KeyFormat]:
        """Formats that the implementation takes here. Raises NotReadyError before the first worker is ready."""
        ready = self.require_worker_info()
        chosen = next(i for i in ready.implementations if i.name == ready.implementation)
        return frozenset(KeyFormat(number) for number in chosen.key_formats)

    @property
    def kv_formats(self) -> frozenset[KvFormat]:
        """Formats of KV rows that attention takes here. Raises NotReadyError before the first worker is ready."""
        return frozenset(KvFormat(number) for number in self.require_worker_info().attention.kv_formats)

    def require_worker_info(self) -> pb.Ready:
        """What the worker is. Raises NotReadyError before the first one is ready."""
        if self.worker_info is None:
            raise NotReadyError("the device process is still starting")
        return self.worker_info

    def background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run something to its end, whatever becomes of the call that started it."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def label_of(self, caller: str) -> str:
        """What other callers are told in the place of a caller's name: the same for as long as the service runs."""
        return "caller-" + hashlib.blake2s(caller.encode(), key=self._label_key, digest_size=6).hexdigest()

    def delete_cache(self, cache: KeyCache) -> None:
        """Drop a cache with its uploads."""
        self.caches.delete(cache)
        self.uploads.drop_cache(cache)

    def _segment_dropped(self, segment_id: int) -> None:
        self.device.segment_dropped(segment_id)

    def _drop_device_page(self, page: Page) -> None:
        self.governor.residency.drop(page)

    def _ready(self, info: pb.Ready) -> None:
        if self.worker_info is None:
            self.hbm.limit_bytes = info.device_budget_bytes
        self.worker_info = info
        self.log.info("ready", device=info.device_name, implementation=info.implementation)
        self.device.on_ready()
        self.health_changed(True)

    def _down(self, running: list[int]) -> None:
        self.health_changed(False)
        self.device.on_down(running)

    def _unusable(self, why: str) -> None:
        self.log.error("unusable", detail=why)
        if not self.unusable.done():
            self.unusable.set_result(why)

    def _lost(self, blamed: bool) -> None:
        self.device.on_lost(blamed)

    async def _every(self, period_s: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do something again and again. A defect of ours that ends it once must not end it for good, unheard."""
        while True:
            await asyncio.sleep(period_s)
            try:
                await work()
            except Exception:
                self.log.error("watcher_failed", watcher=work.__name__, exc_info=True)

    async def _end_long_waits(self) -> None:
        expired = self.governor.expire()
        if expired:
            self.log.warning("waited_too_long", tiles=expired)

    def _make_room(self) -> HostRoom:
        limits = _spill_limits(self.settings)
        if limits is None:
            return HostRoom()
        return SpillingRoom(self.caches, self.uploads, self.host_extents, limits, self.clock, self.background, self.log)

    async def _keep_room(self) -> None:
        await self.room.keep_free()

    async def _sweep(self) -> None:
        uploads = self.uploads.expire()
        caches = self.caches.expired()
        for cache in caches:
            self.delete_cache(cache)
        self.host_extents.expire_spares()
        if uploads or caches:
            self.log.info("expired", caches=len(caches), uploads=uploads)


def _quota(settings: Settings) -> Quota:
    limits = settings.limits
    return Quota(
        limits.max_caller_caches or None, int(limits.max_caller_host_bytes) or None, limits.max_caller_uploads or None
    )


def _spare_limits(settings: Settings) -> SpareLimits:
    memory = settings.memory
    return SpareLimits(int(memory.spare_bytes), memory.spare_segments, memory.spare_s)


def _spill_limits(settings: Settings) -> SpillLimits | None:
    memory = settings.memory
    if not memory.spill_dir:
        return None
    return SpillLimits(
        directory=memory.spill_dir,
        size_bytes=int(memory.spill_bytes),
        extent_bytes=int(memory.extent_bytes),
        watermark=memory.spill_watermark,
        idle_s=memory.spill_idle_s,
        pause_s=memory.spill_pause_s,
        max_wait_s=settings.scheduler.max_wait_s,
    )


def _governor_limits(settings: Settings) -> GovernorLimits:
    scheduler = settings.scheduler
    queue = QueueLimits(
        max_turns=scheduler.max_queued_tiles,
        max_bytes=int(scheduler.max_queued_bytes),
        max_s=scheduler.max_queued_s,
        ageing_s=scheduler.ageing_s,
        ageing_turns=scheduler.ageing_tiles,
        quantum_s=scheduler.fair_quantum_s,
        max_turn_s=settings.worker.tile_s,
    )
    return GovernorLimits(
        max_open=settings.limits.max_open_searches,
        max_device_turns=scheduler.max_device_tiles,
        ahead_s=scheduler.device_ahead_s,
        max_wait_s=scheduler.max_wait_s,
        short_turn_s=scheduler.short_tile_s,
        active_s=scheduler.active_s,
        queue=queue,
        working_set=WorkingSetLimits(scheduler.promotion_factor, scheduler.promotion_wait_s, scheduler.linger_s),
    )


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _worker_options(settings: Settings) -> WorkerOptions:
    worker = settings.worker
    return WorkerOptions(
        device=worker.device,
        implementation=worker.implementation,
        device_budget_bytes=int(settings.memory.device_budget_bytes),
        cpu_threads=worker.cpu_threads,
        issue_ahead_s=worker.issue_ahead_s,
        log_level=settings.log.level,
        ready_timeout_s=worker.ready_timeout_s,
        heartbeat_s=worker.heartbeat_s,
        heartbeat_timeout_s=worker.heartbeat_timeout_s,
        work_timeout_s=worker.work_timeout_s,
        restart_backoff_s=worker.restart_backoff_s,
        max_restart_backoff_s=worker.max_restart_backoff_s,
    )
