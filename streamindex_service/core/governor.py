"""The memory governor: ledgers, what is on the device, and who waits for it.

Estimate, reserve, run, release. A search needs its layer's pages on the device, pinned while it runs, and a workspace
of at least `floor_bytes`; it is given as much more, up to `want_bytes`, as is free. What does not fit now waits first
in, first out; what can never fit is refused at once, with figures.

Pure decisions: `load` is called for every page to be copied to the device, in the order of the decisions, and the
commands that follow it on the same link find the page there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from streamindex_service.core.caches import Layer, Page, Snapshot
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool, PageSlot
from streamindex_service.errors import DeadlineUnreachableError, ExceedsBudgetError, QueueFullError


@dataclass(slots=True, eq=False)
class Grant:
    """A search that may run: its pages are pinned, its workspace is reserved."""

    snapshot: Snapshot
    workspace_bytes: int
    queued_s: float
    granted_at: float
    epoch: int  # of the device memory that the pages are on


@dataclass(slots=True, eq=False)
class Waiter:
    """A search in the queue."""

    snapshot: Snapshot
    floor_bytes: int
    want_bytes: int
    arrived_at: float
    granted: Callable[[Grant], None]


class Governor:
    """Admits searches to one worker's device memory."""

    def __init__(
        self,
        hbm: Ledger,
        device: PagePool,
        layers: Callable[[], Iterable[Layer]],
        load: Callable[[Page], None],
        clock: Callable[[], float],
        max_queued: int,
        max_running: int,
    ) -> None:
        self.hbm = hbm
        self.device = device
        self.evicted_pages = 0
        self._layers = layers
        self._load = load
        self._clock = clock
        self._max_queued = max_queued
        self._max_running = max_running
        self._queue: deque[Waiter] = deque()
        self._mean_run_s = 0.0
        self._epoch = 0
        self._paused = True  # until the first worker is ready
        self._grants: set[Grant] = set()

    @property
    def running(self) -> int:
        """Searches admitted and not finished."""
        return len(self._grants)

    @property
    def queued(self) -> int:
        """Searches that wait."""
        return len(self._queue)

    @property
    def paused(self) -> bool:
        """True: nobody is admitted, for there is no device."""
        return self._paused

    def submit(
        self,
        snapshot: Snapshot,
        floor_bytes: int,
        want_bytes: int,
        deadline_s: float | None,
        granted: Callable[[Grant], None],
    ) -> Waiter:
        """Queue a search; `granted` is called, perhaps at once, when it may run.

        `deadline_s` is the caller's remaining time. Raises ExceedsBudgetError for what can never fit, QueueFullError
        and DeadlineUnreachableError with the figures. The caller holds the snapshot until after `finish` or `cancel`.
        """
        needed = len(snapshot.pages) * snapshot.spec.page_bytes + floor_bytes
        if needed > self.hbm.limit_bytes:
            raise ExceedsBudgetError(
                "the layer and the smallest workspace do not fit the device memory budget",
                metadata={"needed_bytes": needed, "budget_bytes": self.hbm.limit_bytes},
            )
        if self._queue or self.running >= self._max_running:
            self._refuse_hopeless(deadline_s)
        waiter = Waiter(snapshot, floor_bytes, want_bytes, self._clock(), granted)
        self._queue.append(waiter)
        self.pump()
        return waiter

    def cancel(self, waiter: Waiter) -> None:
        """A search stops waiting."""
        self._queue.remove(waiter)
        self.pump()

    def finish(self, grant: Grant) -> None:
        """A search is over and the device has really finished with it: give everything back."""
        self._grants.discard(grant)
        if grant.epoch == self._epoch:  # else the device memory, and with it the pins, went with its worker
            _unpin(grant.snapshot)
        self.hbm.release(grant.workspace_bytes)
        run_s = self._clock() - grant.granted_at
        self._mean_run_s = run_s if self._mean_run_s == 0.0 else 0.9 * self._mean_run_s + 0.1 * run_s
        self.pump()

    def pump(self) -> None:
        """Admit from the head of the queue for as long as it fits."""
        while self._queue and not self._paused and self.running < self._max_running:
            grant = self._try_admit(self._queue[0])
            if grant is None:
                return
            waiter = self._queue.popleft()
            self._grants.add(grant)
            waiter.granted(grant)

    def device_lost(self) -> None:
        """The worker is gone and its memory with it: nothing is resident any more, and nobody is admitted."""
        self._paused = True
        self._epoch += 1
        held = [grant.snapshot for grant in self._grants] + [waiter.snapshot for waiter in self._queue]
        for pages in (*(layer.pages for layer in self._layers()), *(snapshot.pages for snapshot in held)):
            for page in pages:
                page.device = None
                page.pins = 0
        self.device.reset()

    def device_ready(self) -> None:
        """A worker is ready: admit."""
        self._paused = False
        self.pump()

    def drop_device(self, page: Page) -> None:
        """A page is gone; free its copy on the device."""
        assert page.device is not None
        self.device.free(page.device)
        page.device = None

    def _refuse_hopeless(self, deadline_s: float | None) -> None:
        figures: dict[str, int | str] = {"queued": len(self._queue), "limit": self._max_queued}
        if len(self._queue) >= self._max_queued:
            raise QueueFullError("the queue is full", metadata=figures)
        wait_s = (len(self._queue) + 1) * self._mean_run_s / max(1, self.running)
        if deadline_s is not None and wait_s > deadline_s:
            figures["estimated_wait_ms"] = int(wait_s * 1000)
            raise DeadlineUnreachableError("the wait would be longer than the deadline", metadata=figures)

    def _try_admit(self, waiter: Waiter) -> Grant | None:
        grant = self._place(waiter)
        if grant is None and not self._grants:
            # Nothing runs, so all of it fits an empty device. What is in the way is pages that no layer has any more,
            # held by searches in the queue, or the search's own, scattered over extents that are empty otherwise.
            self._evict_all()
            grant = self._place(waiter)
        return grant

    def _place(self, waiter: Waiter) -> Grant | None:
        # Pinned first: pages may be shared with a layer that is about to be evicted for this very search.
        _pin(waiter.snapshot)
        if not self._reserve(waiter.floor_bytes, waiter.snapshot):
            _unpin(waiter.snapshot)
            return None
        if not self._make_resident(waiter.snapshot):
            self.hbm.release(waiter.floor_bytes)
            _unpin(waiter.snapshot)
            return None
        # Elastic: what is free anyway makes the tiles larger. Nothing is evicted for it.
        more = max(0, min(waiter.want_bytes - waiter.floor_bytes, self.hbm.free_bytes))
        reserved = self.hbm.try_reserve(more)
        assert reserved
        now = self._clock()
        waiter.snapshot.layer.used_at = now
        return Grant(waiter.snapshot, waiter.floor_bytes + more, now - waiter.arrived_at, now, self._epoch)

    def _reserve(self, size_bytes: int, spared: Snapshot) -> bool:
        if self.hbm.try_reserve(size_bytes):
            return True
        victims = self._victims(spared)
        while not self.hbm.try_reserve(size_bytes):
            if not self._evict_one(victims):
                return False
        return True

    def _make_resident(self, snapshot: Snapshot) -> bool:
        missing = [page for page in snapshot.pages if page.device is None]
        placed: list[tuple[Page, PageSlot]] = []
        victims: list[Layer] | None = None
        for page in missing:
            slot = self.device.try_allocate(page.page_bytes)
            while slot is None:
                victims = self._victims(snapshot) if victims is None else victims
                if not self._evict_one(victims):
                    for _, taken in placed:
                        self.device.free(taken)
                    return False
                slot = self.device.try_allocate(page.page_bytes)
            placed.append((page, slot))
        for page, slot in placed:
            page.device = slot
            self._load(page)
        return True

    def _victims(self, spared: Snapshot) -> list[Layer]:
        """Layers that may leave the device, the least recently used last."""
        candidates = [layer for layer in self._layers() if layer is not spared.layer]
        return sorted(candidates, key=lambda layer: layer.used_at, reverse=True)

    def _evict_all(self) -> None:
        held = [waiter.snapshot.pages for waiter in self._queue]
        for pages in (*(layer.pages for layer in self._layers()), *held):
            for page in pages:
                if page.device is not None and page.pins == 0:
                    self.drop_device(page)
                    self.evicted_pages += 1

    def _evict_one(self, victims: list[Layer]) -> bool:
        while victims:
            layer = victims.pop()
            before = self.evicted_pages
            for page in layer.pages:
                if page.device is not None and page.pins == 0:
                    self.drop_device(page)
                    self.evicted_pages += 1
            if self.evicted_pages > before:
                return True
        return False


def _pin(snapshot: Snapshot) -> None:
    for page in snapshot.pages:
        page.pins += 1


def _unpin(snapshot: Snapshot) -> None:
    for page in snapshot.pages:
        page.pins -= 1
        assert page.pins >= 0, "a page was unpinned twice"
