"""What must hold in every state of a simulated service, and what must have held once it has come to rest."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from streamindex_service.core.band_queue import Band, Turn
from streamindex_service.core.census import Residence
from streamindex_service.core.layers import Page
from streamindex_service.core.turns import SearchTurn
from streamindex_service.testing.simulated_service import SimulatedSearch, SimulatedService

# How a request may end; the refusals are those of docs/operations.md.
OUTCOMES = frozenset(
    {
        "DONE",
        "CANCELLED",
        "DEADLINE",
        "QUEUE_FULL",
        "DEADLINE_UNREACHABLE",
        "EXCEEDS_BUDGET",
        "WORKER_LOST",
        "DEVICE_MEMORY",
        "NOT_READY",
    }
)
_ROUNDING_S = 1e-6


class InvariantError(AssertionError):
    """Something that must always hold does not."""


def require(holds: bool, what: str) -> None:
    """Raises InvariantError."""
    if not holds:
        raise InvariantError(what)


def _residence(pages: int, on_device: int) -> Residence:
    if on_device == pages:
        return Residence.DEVICE
    return Residence.PARTIAL if on_device else Residence.NONE


def least_given_back(extents: Sequence[int], free: int) -> int:
    """Places of the extents that pages can be moved out of, at the least: in whatever order that is done, what is left
    over is less than the largest of them. extents: places of each; free: those without a page, here and elsewhere."""
    largest = max(extents)
    if min(extents) == largest:
        return min(len(extents), free // largest) * largest
    return min(sum(extents), max(0, free - largest + 1))


class Watch:
    """Looks at a service after every event, and at every turn that goes to the device."""

    def __init__(self, service: SimulatedService, callers: int, check_period_s: float) -> None:
        self.service = service
        self.turns = 0
        self.longest_wait_s = 0.0
        self._queue = service.governor.limits.queue
        self._callers = callers
        self._latest_s = service.governor.limits.max_wait_s + check_period_s
        self._largest_s = self._queue.max_turn_s
        self._held_s = 0.0  # the longest for which a copy may close a gate
        self._served: dict[Band, dict[str, float]] = {band: {} for band in Band}  # while they have work queued
        self._apart: dict[Band, dict[tuple[str, str], float]] = {band: {} for band in Band}
        self._given_s: dict[Band, float] = defaultdict(float)
        self._passed_over = 0  # turns in a row that went before a band that is old
        self._arrivals: dict[SearchTurn, tuple[float, int]] = {}  # what its band had been given, own turns before it
        service.on_taken = self._taken
        service.on_refused = self._refused

    def look(self) -> None:
        """After an event."""
        service = self.service
        governor = service.governor
        for ledger in (service.hbm, service.host, service.disk.ledger):
            if not 0 <= ledger.reserved_bytes <= ledger.limit_bytes:
                raise InvariantError(f"the ledger {ledger.name} passes its limit")
        require(service.hbm.reserved_bytes == service.device.used_bytes, "the ledger is not what the device holds")
        held = sum(service.host_extents.values()) + sum(c.record_bytes for c in service.caches._caches.values())
        require(service.host.reserved_bytes == held, "the ledger is not what the host holds")
        disk = service.disk
        require(disk.ledger.reserved_bytes == sum(disk.extents.values()), "the ledger is not what the disk holds")
        self._count_pages()
        require(governor.in_flight == len(service.device.tiles), "a turn is with the device for which it does nothing")
        waiting = len(governor.scheduler)
        woken = service.time.now_s <= governor.room.wake_at < math.inf
        require(not waiting or governor.paused or governor.in_flight > 0 or woken, "a waiter is forgotten")
        self._check_working_set()
        require(waiting == sum(search.turns for search in governor._open), "a turn is in no queue")
        self._note_queue()

    def at_rest(self, everyone: list[SimulatedSearch]) -> None:
        """Once nothing happens any more, and all caches are deleted."""
        service = self.service
        for search in everyone:
            require(search.outcome in OUTCOMES, f"a search ends with {search.outcome!r}")
        require(not service.searches, "a search is never closed")
        service.governor.working_set.lapse(math.inf)
        require(not service.governor.working_set._known, "a page set is remembered that nobody uses")
        governor = service.governor
        left = (len(governor.scheduler), governor.in_flight, governor.open_searches)
        require(left == (0, 0, 0), f"turns queued, on the device, searches open: {left}")
        for ledger in (service.hbm, service.host, service.disk.ledger):
            require(ledger.reserved_bytes == 0, f"{ledger.reserved_bytes} bytes of {ledger.name} are never given back")
        require(not len(service.caches.accounts), "a caller who holds nothing is remembered")
        left_extents = service.device.extents or service.host_extents or service.disk.extents
        require(not left_extents, "an extent is never given back")

    def _count_pages(self) -> None:
        self._count_layers()
        for snapshot_pages in self._snapshots():
            on_disk = [page for page in snapshot_pages if page.host is None]
            require(not on_disk, "a search has pages that are not in host memory")
        pages = self._pages()
        self._count_places(pages)
        resident = sum([page.page_bytes for page in pages if page.device is not None])
        require(resident == self.service.residency.resident_bytes, "the bytes on the device are counted wrongly")
        held = sum([page.page_bytes for page in pages])
        accounts = self.service.caches.accounts
        require(held == sum([each.host_bytes for each in accounts]), "the accounts are not what callers hold")
        uploads = sum([each.uploads for each in accounts])
        require(uploads == self.service.uploads.open_uploads, "the accounts are not what callers upload")

    def _snapshots(self) -> set[tuple[Page, ...]]:
        return {each.pages for search in self.service.searches for each in search.snapshots}

    def _pages(self) -> set[Page]:
        """All that there are."""
        caches = self.service.caches._caches.values()
        pages = {page for cache in caches for layer in cache.all_layers for page in layer.pages}
        return pages.union(*self._snapshots(), self.service.disk.held())

    def _count_layers(self) -> None:
        store = self.service.caches
        residences = dict.fromkeys(Residence, 0)
        caches_on_disk = 0
        for cache in store._caches.values():
            all_pages = on_device = on_disk = 0
            for layer in cache.all_layers:
                resident = len([page for page in layer.pages if page.device is not None])
                spilled = len([page for page in layer.pages if page.spilled is not None])
                if layer.resident_pages != resident:
                    raise InvariantError("a layer has lost count of its pages on the device")
                if layer.spilled_pages != spilled:
                    raise InvariantError("a layer has lost count of its pages on disk")
                all_pages += len(layer.pages)
                on_device += resident
                on_disk += spilled
            if all_pages:
                residences[_residence(all_pages, on_device)] += 1
                caches_on_disk += on_disk > 0
        require(store.census.by_residence == residences, "the census is not what caches have on the device")
        require(store.census.spilled == caches_on_disk, "the census is not what caches have on disk")

    def _count_places(self, pages: set[Page]) -> None:
        """Every page has exactly one place, and every place that is taken a page."""
        disk, host = self.service.disk, self.service.caches.host
        wrong = [page for page in pages if (page.host is None) == (page.spilled is None)]
        require(not wrong, "a page has two places, or none")
        in_host = len([page for page in pages if page.host is not None])
        to_disk, to_host = disk.on_their_way()
        require(in_host + to_host == host.pages_in_use, "the pages are not those that the host allocated")
        spilled = len(pages) - in_host
        require(spilled + to_disk == disk.spill.disk.pages_in_use, "the pages are not those that lie on disk")

    def _note_queue(self) -> None:
        for band, queue in self.service.governor.scheduler._bands.items():
            served = self._served[band]
            for caller in [caller for caller in served if caller not in queue.callers]:
                del served[caller]
            for caller in queue.callers:
                if caller not in served:
                    served[caller] = 0.0
                    for other, seconds in served.items():  # the two are compared from now on
                        self._apart[band][other, caller] = seconds
                        self._apart[band][caller, other] = -seconds
            for turn in queue.turns:
                # one that is cancelled counts too: its caller has saved up for it
                if turn.cost_s > self._largest_s:
                    self._largest_s = turn.cost_s
                if turn not in self._arrivals:
                    assert isinstance(turn, SearchTurn)
                    before = sum(1 for other in queue.turns if other.caller == turn.caller) - 1
                    self._arrivals[turn] = (self._given_s[band], before)
            self._note_held_back(queue.held_back())

    def _note_held_back(self, turns: Iterable[Turn]) -> None:
        for turn in turns:
            assert isinstance(turn, SearchTurn)
            assert turn.page_set is not None
            self._held_s = max(self._held_s, self.service.governor.working_set.interval_s(turn.page_set))

    def _taken(self, turn: SearchTurn) -> None:
        self.turns += 1
        band, caller, cost_s = turn.band, turn.caller, turn.cost_s
        self._largest_s = max(self._largest_s, cost_s)
        self._note_held_back(self.service.governor.scheduler.held_back())
        self._check_wait(turn)
        self._check_alone(turn)
        self._check_ageing(turn)
        self._given_s[band] += cost_s
        served = self._served[band]
        queued = self.service.governor.scheduler._bands[band].callers
        if caller not in served:
            return  # it came and went within one event
        served[caller] += cost_s
        bound_s = self._queue.allowance_s + 2 * (self._largest_s + self._saved_s)
        for other, seconds in served.items():
            if other != caller and other in queued:
                ahead_s = served[caller] - seconds - self._apart[band][caller, other]
                if ahead_s > bound_s + _ROUNDING_S:
                    raise InvariantError(f"{other} is {ahead_s:.3f} s behind {caller}: {bound_s:.3f}")
        if caller not in queued:
            del served[caller]

    @property
    def _saved_s(self) -> float:
        """What a caller may have saved up beyond the price of its turn while it is held back: an interval for each."""
        return self._callers * self._held_s

    def _check_working_set(self) -> None:
        governor = self.service.governor
        working_set = governor.working_set
        turns = [turn for queue in governor.scheduler._bands.values() for turn in queue.turns]
        turns += [grant.turn for grant in governor._grants]
        needed = [turn.page_set for turn in turns if isinstance(turn, SearchTurn) and turn.page_set is not None]
        for_pages = sum([len(each.parts) for each in needed])
        known = working_set._known.values()
        counted = sum([page_set.turns for page_set in known])
        require(for_pages == counted, "a page set has lost count of its turns")
        admitted_bytes = sum([page_set.size_bytes for page_set in known if page_set.admitted])
        require(working_set._admitted_bytes == admitted_bytes, "the working set has lost count of its bytes")

    def _refused(self, pages: Sequence[Page], workspace_bytes: int) -> None:
        """Nobody is told that there is no room where free places of extents would add up to it."""
        governor = self.service.governor
        running = [grant for grant in governor._grants if grant.epoch == governor.epoch]
        in_use = {page for grant in running for page in grant.turn.need.pages}
        extents: defaultdict[int, list[Page]] = defaultdict(list)
        for page in self._pages():
            if page.device is not None:
                extents[page.device.extent_id].append(page)
        require(extents.keys() == self.service.device.extents.keys(), "an extent is kept without a page")
        free: Counter[int] = Counter()  # places, by page size
        movable: defaultdict[int, list[int]] = defaultdict(list)  # places of each extent whose pages may move
        for extent_id, lying in extents.items():
            size = lying[0].page_bytes
            places = self.service.device.extents[extent_id] // size
            free[size] += places - len(lying)
            if not any(page in in_use or page.copies or page.host is None for page in lying):
                movable[size].append(places)
        missing = [page.page_bytes for page in pages if page.device is None]
        needed_bytes = workspace_bytes
        if missing:
            needed_bytes += max(0, len(missing) - free[missing[0]]) * missing[0]
        room_bytes = self.service.hbm.free_bytes
        for size, each in movable.items():
            if size not in missing[:1]:  # whose places are counted as they are
                room_bytes += size * least_given_back(each, free[size])
        require(needed_bytes > room_bytes, "sparse extents keep memory from those that need it")

    def _check_alone(self, turn: SearchTurn) -> None:
        on_device = [grant.turn for grant in self.service.governor._grants]
        alone = any(each.alone for each in on_device)
        require(not alone or len(on_device) == 1, "a turn that is to run alone does not")
        needed = {id(page) for page in turn.need.pages}
        require(not turn.alone or len(self.service.residency) == len(needed), "pages are in the way of a turn alone")

    def _check_ageing(self, turn: SearchTurn) -> None:
        now = self.service.time.now_s
        old = now - self._queue.ageing_s
        bands = self.service.governor.scheduler._bands
        passed_over = any(
            next(iter(queue.turns)).arrived_at <= old
            for band, queue in bands.items()
            # one that has just had a layer brought waits until that has paid for itself
            if band > turn.band and queue.turns and self.service.governor.working_set.gate_is_open(band, now)
        )
        self._passed_over = self._passed_over + 1 if passed_over else 0
        # of two bands that are old each has every other chance
        require(self._passed_over < 2 * self._queue.ageing_turns, "a band that is old gets no turn")

    def _check_wait(self, turn: SearchTurn) -> None:
        waited_s = self.service.time.now_s - turn.arrived_at
        self.longest_wait_s = max(self.longest_wait_s, waited_s)
        if waited_s > self._latest_s + _ROUNDING_S:
            raise InvariantError(f"a turn waited {waited_s:.3f} s")
        given_s, before = self._arrivals.pop(turn, (self._given_s[turn.band], 0))
        given_s = self._given_s[turn.band] - given_s
        if self._held_s and self._above_was_active(turn):
            return  # layers of the band above do not make room for it unless it is old
        bound_s = self._rounds_s(before)
        if (
            self._held_s
        ):  # each time that its turn comes, every caller may have one copy first, and each may take longer
            bound_s += self._callers * (before + 1) * (self._held_s + self._largest_s + self._rounds_s(0))
        if given_s > bound_s:
            raise InvariantError(f"{given_s:.3f} s were given to others of its band: {bound_s:.3f}")

    def _rounds_s(self, before: int) -> float:
        """The most that is given to a band before a turn that may go, with so many of its caller's before it."""
        round_s = self._queue.allowance_s + self._largest_s
        rounds = math.ceil(((before + 1) * round_s + self._saved_s) / self._queue.allowance_s) + 1
        return self._callers * (rounds * round_s + self._saved_s)

    def _above_was_active(self, turn: SearchTurn) -> bool:
        governor = self.service.governor
        since = turn.arrived_at - governor.limits.active_s
        return any(band < turn.band and at >= since for band, at in governor._last_turn.items())
