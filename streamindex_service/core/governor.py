"""The memory governor: ledgers, what is on the device, and who waits for it.

Estimate, reserve, run, release. A search needs its layer's pages on the device, pinned while it runs, and a workspace
of at least `floor_bytes`; it is given as much more, up to `want_bytes`, as is free. What does not fit now waits first
in, first out; what can never fit is refused at once, with figures.

Pure decisions: `load` is called for every page to be copied to the device, in the order of the decisions, and the
commands that follow it on the same link find the page there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from streamindex_service.core.caches import Page, Snapshot
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
        load: Callable[[Page], None],
        clock: Callable[[], float],
        max_queued: int,
        max_running: int,
    ) -> None:
        self.hbm = hbm
        self.device = device
        self.evicted_pages = 0
        self._load = load
        self._clock = clock
        self._max_queued = max_queued
        self._max_running = max_running
        self._queue: deque[Waiter] = deque()
        self._mean_run_s = 0.0
        self._epoch = 0
        self._paused = True  # until the first worker is ready
        self._resume_when_idle = False
        self._grants: set[Grant] = set()
        self._resident: dict[Page, None] = {}  # least recently used first

    @property
    def running(self) -> int:
        """Searches admitted and not finished."""
        return len(self._grants)

    @property
    def queued(self) -> int:
        """Searches that wait."""
        return len(self._queue)

    @property
    def epoch(self) -> int:
        """Changes whenever everything that was on the device is gone."""
        return self._epoch

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
        if self._resume_when_idle and not self._grants:
            self._resume_when_idle = self._paused = False
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
        self._forget_device()
        self._paused, self._resume_when_idle = True, False

    def device_in_doubt(self) -> None:
        """What is on the device may not be what is believed here: forget all of it.

        Searches that run keep their memory there, which no ledger counts any more; so nobody is admitted before they
        are done.
        """
        self._forget_device()
        self._paused = self._resume_when_idle = bool(self._grants)
        self.pump()

    def device_ready(self) -> None:
        """A worker is ready: admit."""
        self._paused = False
        self.pump()

    def _forget_device(self) -> None:
        self._epoch += 1
        for page in self._resident:
            page.device = None
            page.pins = 0
        self._resident.clear()
        self.device.reset()

    def drop_device(self, page: Page) -> None:
        """A page is gone; free its copy on the device."""
        assert page.device is not None
        self.device.free(page.device)
        page.device = None
        del self._resident[page]

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
            # Nothing runs, so all of it fits an empty device. What is in the way is the search's own pages, scattered
            # over extents that are empty otherwise.
            victims = self._victims()
            while self._evict_one(victims):
                pass
            grant = self._place(waiter)
        return grant

    def _place(self, waiter: Waiter) -> Grant | None:
        # Pinned first: pages may be shared with a layer that is about to be evicted for this very search.
        _pin(waiter.snapshot)
        if not self._reserve(waiter.floor_bytes):
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
        return Grant(waiter.snapshot, waiter.floor_bytes + more, now - waiter.arrived_at, now, self._epoch)

    def _reserve(self, size_bytes: int) -> bool:
        if self.hbm.try_reserve(size_bytes):
            return True
        victims = self._victims()
        while not self.hbm.try_reserve(size_bytes):
            if not self._evict_one(victims):
                return False
        return True

    def _make_resident(self, snapshot: Snapshot) -> bool:
        placed: list[tuple[Page, PageSlot]] = []
        victims: Iterator[Page] | None = None
        for page in snapshot.pages:
            if page.device is not None:
                continue
            slot = self.device.try_allocate(page.page_bytes)
            while slot is None:
                victims = self._victims() if victims is None else victims
                if not self._evict_one(victims):
                    for _, taken in placed:
                        self.device.free(taken)
                    return False
                slot = self.device.try_allocate(page.page_bytes)
            placed.append((page, slot))
        for page, slot in placed:
            page.device = slot
            self._load(page)
        for page in snapshot.pages:  # the most recently used are last
            self._resident.pop(page, None)
            self._resident[page] = None
        return True

    def _victims(self) -> Iterator[Page]:
        """Pages that may leave the device, the least recently used first."""
        return iter([page for page in self._resident if page.pins == 0])

    def _evict_one(self, victims: Iterator[Page]) -> bool:
        page = next(victims, None)
        if page is None:
            return False
        self.drop_device(page)
        self.evicted_pages += 1
        return True


def _pin(snapshot: Snapshot) -> None:
    for page in snapshot.pages:
        page.pins += 1


def _unpin(snapshot: Snapshot) -> None:
    for page in snapshot.pages:
        page.pins -= 1
        assert page.pins >= 0, "a page was unpinned twice"
