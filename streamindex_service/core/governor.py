"""The memory governor: estimate, reserve, run, give back when the device has really finished.

A search is open from its header to its end, and holds nothing on the device for that. What runs there is a turn, one
tile of a search: its layer's pages, pinned, and a workspace of at least `floor_bytes`, given as much more, up to
`want_bytes`, as is free and its share. The scheduler says whose turn is next; the governor sees that it fits. A turn
that does not fit at this moment waits until the turns before it have given back what they hold, which takes as long as
they run and no longer: nothing overtakes it. What can never fit is refused at once, with figures.

When the layers in use do not all fit, those of the working set take part, and turns of the others are held back until
there is room for them (`working_set.py`) or their caller is too far behind (`scheduler.py`).

When a turn that fitted finds the device without memory in spite of all, it comes again `alone`: nothing else runs, and
every page that it does not need has gone.

Pure decisions: what they mean for the device is told through callbacks, in the order in which they were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streamindex_service.core.band_queue import Band, Turn
from streamindex_service.core.estimates import DeviceSpeed
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.meter import Meter
from streamindex_service.core.residency import Residency
from streamindex_service.core.room import FED, Room
from streamindex_service.core.scheduler import QueueLimits, Scheduler
from streamindex_service.core.turns import Grant, Need, OpenSearch, SearchTurn
from streamindex_service.core.working_set import WorkingSet, WorkingSetLimits
from streamindex_service.errors import ExceedsBudgetError, NotReadyError, QueueFullError, ServiceError


@dataclass(frozen=True, slots=True)
class GovernorLimits:
    """Bounds; times in seconds.

    max_open: searches open at a time. max_device_turns: turns that the device may have of a band and those above it, as
    long as they take no more than `ahead_s` together; it has two in any case. max_wait_s: a turn that has waited longer
    is refused. short_turn_s: what a turn is cut to while a band above its own is active, which it is for `active_s`
    after each of its turns.
    """

    max_open: int = 1024
    max_device_turns: int = 16
    ahead_s: float = 0.005
    max_wait_s: float = 60.0
    queue: QueueLimits = field(default_factory=QueueLimits)
    short_turn_s: float = 0.003
    active_s: float = 1.0
    working_set: WorkingSetLimits = field(default_factory=WorkingSetLimits)


class Governor:
    """Admits turns to one worker's device memory.

    `wake(delay_s)` has `woken` called so much later. Without it nobody is held back while the device has nothing to do.
    """

    def __init__(
        self,
        residency: Residency,
        clock: Callable[[], float],
        limits: GovernorLimits,
        speed: DeviceSpeed | None = None,
        wake: Callable[[float], object] | None = None,
    ) -> None:
        self.residency = residency
        self.limits = limits
        self.speed = speed or DeviceSpeed()
        self.scheduler = Scheduler(limits.queue)
        self.working_set = WorkingSet(limits.working_set, residency.hbm, limits.active_s)
        self.room = Room(self.working_set, residency.hbm, clock, lambda size: self.speed.promotion_s(size), wake)
        residency.kept = self.working_set.kept_pages
        self.meter = Meter()
        self._clock = clock
        self._open: set[OpenSearch] = set()
        self._grants: set[Grant] = set()
        self._in_flight_s = 0.0
        self._last_turn: dict[Band, float] = {}  # when a band last asked for one
        self._epoch = 0
        self._paused = True  # until the first worker is ready
        self._resume_when_idle = False
        self._pumping = False

    @property
    def hbm(self) -> Ledger:
        """Device memory."""
        return self.residency.hbm

    @property
    def open_searches(self) -> int:
        """Searches between their header and their end."""
        return len(self._open)

    @property
    def queued(self) -> int:
        """Of them, those that wait for the device and have nothing there."""
        return sum((search.turns > 0 or search.rows_wait) and search.grants == 0 for search in self._open)

    @property
    def running(self) -> int:
        """The others."""
        return self.open_searches - self.queued

    @property
    def in_flight(self) -> int:
        """Turns that the device has."""
        return len(self._grants)

    @property
    def in_flight_s(self) -> float:
        """Their estimated device seconds."""
        return self._in_flight_s

    @property
    def epoch(self) -> int:
        """Changes whenever everything that was on the device is gone."""
        return self._epoch

    @property
    def paused(self) -> bool:
        """True: nothing runs, for there is no device."""
        return self._paused

    def tile_s(self, band: Band) -> float:
        """Device seconds that a turn of this band had better not pass: what those above may have to wait for."""
        active = self._clock() - self.limits.active_s
        above = any(other < band and at >= active for other, at in self._last_turn.items())
        longest_s = self.limits.queue.max_turn_s
        return min(self.limits.short_turn_s, longest_s) if above else longest_s

    def open(
        self, snapshot: Snapshot, caller: str, band: Band, least: Need, run_s: float, deadline_s: float | None
    ) -> OpenSearch:
        """A search begins. The caller holds the snapshot until after `close`.

        least: the smallest turn that the search can be cut to; run_s: device seconds of all of it, 0 when unknown;
        deadline_s: the caller's remaining time. Raises ExceedsBudgetError for what can never fit, QueueFullError and
        DeadlineUnreachableError, with the figures.
        """
        self.refuse_what_never_fits(least)
        if len(self._open) >= self.limits.max_open:
            figures: dict[str, int | str] = {
                "open": len(self._open),
                "limit": self.limits.max_open,
                "estimated_wait_ms": int(1000 * (self._in_flight_s + self.scheduler.wait_s(caller, band))),
            }
            raise QueueFullError("as many searches are open as may be", metadata=figures)
        run_s = run_s if self.speed.measured else 0.0
        waiting = sum(each.rows_wait and not each.turns for each in self._open)
        self.scheduler.refuse_hopeless(caller, band, self._in_flight_s, run_s, deadline_s, waiting=waiting)
        search = OpenSearch(caller, band, snapshot)
        self._open.add(search)
        self.room.come(search, least)
        return search

    def refuse_what_never_fits(self, need: Need) -> None:
        """Raises ExceedsBudgetError, with the figures, when not even an empty device would do."""
        needed = (need.pages[0].page_bytes * len(need.pages) if need.pages else 0) + need.floor_bytes
        if needed > self.hbm.limit_bytes:
            raise ExceedsBudgetError(
                "the layer and the smallest workspace do not fit the device memory budget",
                metadata={"needed_bytes": needed, "budget_bytes": self.hbm.limit_bytes},
            )

    def close(self, search: OpenSearch) -> None:
        """A search is over. Its turns have been finished or cancelled."""
        assert not search.turns, "a search ends and its turns still wait"
        assert not search.grants, "a search ends and the device still works for it"
        for pages in search.used.values():
            self.residency.let_go(pages)
        self.room.go(search)
        self._open.remove(search)

    def request(
        self,
        search: OpenSearch,
        need: Need,
        granted: Callable[[Grant], None],
        refused: Callable[[ServiceError], None],
        *,
        alone: bool = False,
    ) -> SearchTurn:
        """Queue a turn. Exactly one of `granted` and `refused` is called, perhaps at once, unless it is cancelled."""
        promotion_s = self.speed.promotion_s(self.residency.missing_bytes(need.pages))
        page_set = self.room.ask(search, need)
        turn = SearchTurn(
            search.caller,
            search.band,
            self._speed_of(need).seconds(need.flop) + promotion_s,
            need.size_bytes,
            self._clock(),
            promotion_s,
            alone,
            open_search=search,
            need=need,
            granted=granted,
            refused=refused,
            page_set=page_set,
            workspaces_bytes=self.room.workspaces_bytes(need),
        )
        search.turns += 1
        self._last_turn[search.band] = turn.arrived_at
        self.scheduler.add(turn)
        self.pump()
        return turn

    def grow(self, turn: SearchTurn, need: Need) -> None:
        """A turn that still waits has become larger."""
        assert turn.waiting
        turn.need, turn.workspaces_bytes = need, self.room.workspaces_bytes(need)
        cost_s = self._speed_of(need).seconds(need.flop) + turn.promotion_s
        self.scheduler.reprice(turn, cost_s, need.size_bytes, turn.promotion_s)

    def let_go(self, search: OpenSearch, pages: Sequence[Page]) -> None:
        """The search has no more use for these pages, but for turns that have them now."""
        if self.residency.let_go(pages):
            search.used.pop(id(pages), None)

    def cancel(self, turn: SearchTurn) -> None:
        """A turn waits no longer; nobody is told."""
        self._leave_queue(turn)
        self.pump()

    def finish(self, grant: Grant, device_s: float | None = None, peak_bytes: int = 0) -> None:
        """The device has really finished with a turn: give everything back.

        device_s: what it took; None when it was not done. peak_bytes: the most device memory that it held beside its
        pages; 0 when that was not measured.
        """
        self._grants.remove(grant)
        turn = grant.turn
        turn.open_search.grants -= 1
        self.room.turn_over(turn)
        self._in_flight_s = self._in_flight_s - turn.cost_s if self._grants else 0.0
        if grant.epoch == self._epoch:  # else the device memory, and with it the pins, went with its worker
            self.residency.unpin(turn.need.pages, turn.need.layers)
        self.hbm.release(grant.workspace_bytes)
        if not self._grants:
            self.room.device_idles()
        if device_s is not None:
            self._speed_of(turn.need).observe(turn.need.flop, device_s)
            self.meter.tile_done(grant.waited_s, device_s, turn.band)
            self.meter.memory.add(peak_bytes, min(turn.need.estimate_bytes, grant.workspace_bytes))
        if self._resume_when_idle and not self._grants:
            self._resume_when_idle = self._paused = False
        self.pump()

    def pump(self) -> None:
        """Let turns run for as long as there is room."""
        if self._pumping:  # a callback came back here: the loop below goes on after it
            return
        self._pumping = True
        try:
            while not self._paused and not self._device_is_full():
                self.room.look_anew()
                turn = self.scheduler.next_turn(self._clock(), None if self.working_set.complete else self.room)
                if turn is None:
                    self.room.wake_for(self.scheduler.held_back())
                    return
                if not self._device_takes(turn):
                    return
                assert isinstance(turn, SearchTurn)
                grant = self._try_grant(turn)
                if grant is None:
                    return
                turn.granted(grant)
        finally:
            self._pumping = False

    def woken(self) -> None:
        """The time for which `wake` was asked has passed."""
        self.room.woken()
        self.pump()

    def expire(self) -> int:
        """Refuse every turn that has waited for `max_wait_s`; return how many. To be called now and then."""
        self.working_set.lapse(self._clock())
        self.residency.tidy()
        oldest = self._clock() - self.limits.max_wait_s
        expired = [turn for turn in self.scheduler if turn.arrived_at <= oldest]
        for turn in expired:
            assert isinstance(turn, SearchTurn)
            if turn.waiting:  # telling one may end the search of another
                self._leave_queue(turn)
                turn.refused(self._waited_too_long())
        self.pump()
        return len(expired)

    def device_lost(self) -> None:
        """The worker is gone and its memory with it: nothing is resident any more, and nothing runs."""
        self._forget_device()
        self._paused, self._resume_when_idle = True, False

    def device_in_doubt(self) -> None:
        """What is on the device may not be what is believed here: forget all of it.

        Turns that run keep their memory there, which no ledger counts any more; so nothing else runs before they are
        done.
        """
        self._forget_device()
        if not self._paused and self._grants:
            self._paused = self._resume_when_idle = True
        self.pump()

    def device_ready(self) -> None:
        """A worker is ready."""
        self._paused = False
        self.pump()

    def _device_takes(self, turn: Turn) -> bool:
        """Whether the device should have one more turn.

        It is never left with nothing to go on with. Of the turns that it has and has not begun it takes those of the
        highest band first, so that only these are in the way of a new one.
        """
        if not self._grants:
            return True
        return not turn.alone and self._device_goes_on(turn.band, turn.cost_s, cold=turn.promotion_s > 0.0)

    def _device_is_full(self) -> bool:
        """Whether it takes none of the turns that wait, whichever is next: then nobody looks for that."""
        band = self.scheduler.highest_band()
        return band is not None and not self._device_goes_on(band, 0.0, cold=False)

    def _device_goes_on(self, band: Band, cost_s: float, *, cold: bool) -> bool:
        """Whether it should have another turn of this band and this cost. cold: whose pages have to be brought."""
        turns = warm = 0  # those of the band and above it; of them, those whose pages are there
        ahead_s = cost_s
        for grant in self._grants:  # one look at each: this is asked several times a tile
            turn = grant.turn
            if turn.alone:
                return False
            if turn.band <= band:
                turns += 1
                warm += not turn.promotion_s
                ahead_s += turn.cost_s
        if turns < FED:
            return True
        if turns >= self.limits.max_device_turns:
            return False
        # Turns whose pages are on their way leave the device to others: it goes on with those that have theirs.
        return (not cold and warm < FED) or ahead_s <= self.limits.ahead_s

    def _place(self, turn: SearchTurn) -> bool:
        need = turn.need
        if turn.alone:  # the device has less than was thought: what is not needed now goes
            self._evict_all()
        self.room.admit(turn, through_gate=self.scheduler.is_offered(turn))
        if self.residency.try_place(need.pages, need.floor_bytes):
            return True
        while not self._grants and turn.page_set is not None:
            # Nothing runs, and yet there is no room: workspaces differ, and an extent of each page size is sparse.
            if not self.working_set.leave_one(turn.page_set, self._clock()):
                break
            if self.residency.try_place(need.pages, need.floor_bytes):
                return True
        if self._grants:
            return False
        # All of it fits an empty device. What is in the way is an extent of the search's own pages that is empty
        # otherwise, or has more of them than can move, or pages that a turn without any needs the place of.
        self._evict_all()
        self.room.admit(turn, through_gate=self.scheduler.is_offered(turn))
        return self.residency.try_place(need.pages, need.floor_bytes)

    def _evict_all(self) -> None:
        self.working_set.clear()
        self.residency.evict_all()

    def _try_grant(self, turn: SearchTurn) -> Grant | None:
        need = turn.need
        if not self._place(turn):
            return None
        self.scheduler.take(turn)
        self.working_set.given_s += turn.cost_s
        turn.waiting = False
        turn.open_search.turns -= 1
        turn.open_search.grants += 1
        turn.open_search.used[id(need.pages)] = need.pages
        more = self._more_bytes(need)
        reserved = self.hbm.try_reserve(more)
        assert reserved
        grant = Grant(turn, need.floor_bytes + more, self._clock() - turn.arrived_at, self._epoch)
        self._grants.add(grant)
        self.room.device_works()
        self._in_flight_s += turn.cost_s
        return grant

    def _more_bytes(self, need: Need) -> int:
        """What a turn that has its floor takes beside that.

        Elastic: what is free anyway makes the tiles larger. The next is left its floor, so that its keys come while
        this one runs; and of the memory that there is for workspaces no turn takes more than its share while there are
        others, or one would have all of it and the next its floor: two that are even are done before those. What nobody
        has use for at present is evicted for as much as makes a turn fast, and not for more.
        """
        others = bool(self._grants) or len(self.scheduler) > 0
        left_bytes = need.floor_bytes if len(self.scheduler) else 0
        ample_bytes = self.room.ample_bytes(need) - need.floor_bytes + left_bytes
        if self.hbm.free_bytes < ample_bytes and self.residency.resident_bytes > self.working_set.admitted_bytes:
            self.residency.make_room(ample_bytes)
        all_bytes = self.hbm.free_bytes + need.floor_bytes + sum(grant.workspace_bytes for grant in self._grants)
        most = min(need.want_bytes, all_bytes // FED if others else all_bytes)
        return max(0, min(most - need.floor_bytes, self.hbm.free_bytes - left_bytes))

    def _speed_of(self, need: Need) -> DeviceSpeed:
        return need.speed or self.speed

    def _leave_queue(self, turn: SearchTurn) -> None:
        self.scheduler.remove(turn)
        self.room.turn_over(turn)
        turn.waiting = False
        turn.open_search.turns -= 1

    def _waited_too_long(self) -> ServiceError:
        waited = {
            "waited_ms": int(1000 * self.limits.max_wait_s),
            "queued": len(self.scheduler),
            "queued_ms": int(1000 * self.scheduler.backlog_s),
        }
        if self._paused:
            return NotReadyError("no device process is ready", metadata={**waited})
        return QueueFullError("the device was busy with others for too long", metadata={**waited})

    def _forget_device(self) -> None:
        self._epoch += 1
        self.working_set.clear()
        self.residency.forget()
