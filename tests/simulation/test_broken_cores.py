"""What histories reach, and that the simulator would see it if the core were wrong."""

from __future__ import annotations

from collections import Counter

import pytest

from streamindex_service.core.band_queue import BandQueue
from streamindex_service.core.caches import CacheStore
from streamindex_service.core.governor import Governor
from streamindex_service.core.layers import Page
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.residency import Residency
from streamindex_service.core.room import Room
from streamindex_service.core.scheduler import Scheduler
from streamindex_service.core.spill import Spill
from streamindex_service.core.working_set import WorkingSet
from streamindex_service.testing.simulation import History
from tests.support.broken import nobody_is_too_far_behind

SEEDS_TO_FAIL = 400  # of a broken core, so many histories must show it


def test_the_histories_reach_what_they_are_about():
    outcomes: Counter[str] = Counter()
    for seed in range(300):
        history = History(seed)
        history.run()
        outcomes += history.outcomes
    for name in (
        "DONE", "CANCELLED", "DEADLINE", "QUEUE_FULL", "DEADLINE_UNREACHABLE", "EXCEEDS_BUDGET", "WORKER_LOST",
        "DEVICE_MEMORY", "NOT_READY", "HOST_MEMORY", "SPILL_UNREADABLE", "evicted pages", "moved pages",
        "spilled pages", "restored pages",
    ):  # fmt: skip
        assert outcomes[name] > 5, f"{name}: {outcomes}"


def test_a_seed_is_the_same_history_every_time():
    for seed in (3, 77):
        told: list[list[str]] = []
        for _ in range(2):
            lines: list[str] = []
            History(seed, tell=lines.append).run()
            told.append(lines)
        assert told[0] == told[1]
        assert len(told[0]) > 3


def forgotten_workspace(patch):
    class Careless(Governor):
        def finish(self, grant, device_s=None):
            super().finish(grant, device_s)
            if device_s is None:
                self.hbm.reserved_bytes += grant.workspace_bytes

    patch.setattr("streamindex_service.testing.simulated_service.Governor", Careless)


def forgotten_pins(patch):
    patch.setattr(Residency, "unpin", lambda self, pages: None)


def forgotten_pump(patch):
    pump = Governor.pump
    patch.setattr(Governor, "pump", lambda self: None if len(self.scheduler) == 1 and not self._grants else pump(self))


def pins_that_are_not_looked_at(patch):
    def pin(self, pages):
        for page in pages:
            page.pins += 1

    patch.setattr(Residency, "_pin", pin)


def a_ledger_without_a_limit(patch):
    def reserve(self, size_bytes):
        self.reserved_bytes += size_bytes
        return True

    patch.setattr(Ledger, "try_reserve", reserve)


def first_come_first_served(patch):
    patch.setattr(BandQueue, "next_turn", lambda self, admission, *, for_age=False: next(iter(self.turns)))


def turns_that_cost_nothing(patch):
    take = BandQueue.take

    def free(self, turn):
        caller = self.callers[turn.caller]
        take(self, turn)
        caller.deficit_s += turn.cost_s

    patch.setattr(BandQueue, "take", free)


def bands_that_never_age(patch):
    patch.setattr(Scheduler, "_old_bands", lambda self, now: [])


def waits_that_never_end(patch):
    patch.setattr(Governor, "expire", lambda self: 0)


def a_device_that_is_not_forgotten(patch):
    def forget(self):
        self._unpinned.clear()
        self.device.reset()

    patch.setattr(Residency, "forget", forget)


def forks_that_are_not_counted(patch):
    fork = CacheStore.fork

    def careless(self, cache, keys):
        twin = fork(self, cache, keys)
        for layer in twin.layers:
            for page in layer.pages:
                page.references -= 1
        return twin

    patch.setattr(CacheStore, "fork", careless)


def alone_in_name_only(patch):
    patch.setattr(Governor, "_device_takes", lambda self, turn: True)
    patch.setattr(Residency, "evict_all", lambda self: None)


def a_copy_that_is_left_out(patch):
    promote = Residency._promote

    def lazy(self, pages, leave_bytes):
        load, self._load = self._load, lambda page: None
        try:
            return promote(self, pages, leave_bytes)
        finally:
            self._load = load

    patch.setattr(Residency, "_promote", lazy)


def pages_that_never_move(patch):
    patch.setattr(Residency, "_move_together", lambda self, needed_bytes: False)


def moves_that_nobody_hears_of(patch):
    together = Residency._move_together

    def quietly(self, needed_bytes):
        moves = self.moves
        try:
            return together(self, needed_bytes)
        finally:
            self.moves = moves

    patch.setattr(Residency, "_move_together", quietly)


def pages_that_move_without_a_copy(patch):
    together = Residency._move_together

    def lazy(self, needed_bytes):
        load, self._load = self._load, lambda page: None
        try:
            return together(self, needed_bytes)
        finally:
            self._load = load

    patch.setattr(Residency, "_move_together", lazy)


def pages_that_move_under_a_tile(patch):
    together = Residency._move_together

    def careless(self, needed_bytes):
        tiles = [(pinned, pinned.tiles) for pinned in self._pinned.values()]
        for pinned, _ in tiles:
            pinned.tiles = 0
        try:
            return together(self, needed_bytes)
        finally:
            for pinned, number in tiles:
                pinned.tiles = number

    patch.setattr(Residency, "_move_together", careless)


def places_that_are_never_looked_for(patch):
    """But for extents that are all but empty."""
    sparse = PagePool.sparse

    def lazy(self, wanted_bytes, stuck=()):
        full = {extent_id for extent_id, extent in self._extents.items() if extent.slots > 2 * len(extent.free)}
        return sparse(self, wanted_bytes, full.union(stuck))

    patch.setattr(PagePool, "sparse", lazy)


def pages_in_use_that_are_spilled(patch):
    patch.setattr(Page, "idle", property(lambda self: self.shown > 0))


def moves_that_hold_nothing(patch):
    begin = Spill.begin_spill

    def careless(self, needed_bytes, idle_s=0.0):
        move = begin(self, needed_bytes, idle_s)
        for page in move.pages if move else ():
            page.references -= 1
        return move

    patch.setattr(Spill, "begin_spill", careless)


def pages_that_come_back_in_each_others_place(patch):
    end = Spill.end_restore

    def swapped(self, move, restored):
        move.slots.reverse()
        end(self, move, restored)

    patch.setattr(Spill, "end_restore", swapped)


def places_on_disk_that_are_never_freed(patch):
    end = Spill.end_spill

    def forgetful(self, move, checksums):
        free, self.disk.free = self.disk.free, lambda slot: None
        try:
            return end(self, move, checksums)
        finally:
            self.disk.free = free

    patch.setattr(Spill, "end_spill", forgetful)


def nobody_is_displaced(patch):
    patch.setattr(Room, "may_displace", lambda self, turn, *, for_age: False)
    nobody_is_too_far_behind(patch)


def room_that_is_noted_for_ever(patch):
    patch.setattr(Room, "as_of", lambda self, band: 0)


def a_wake_that_is_forgotten(patch):
    patch.setattr(Room, "wake_for", lambda self, held_back: None)


def tiles_of_a_page_set_that_never_end(patch):
    patch.setattr(Room, "turn_over", lambda self, turn: None)


def page_sets_that_leave_uncounted(patch):
    leave = WorkingSet._leave

    def careless(self, page_set):
        leave(self, page_set)
        self._admitted_bytes += page_set.size_bytes

    patch.setattr(WorkingSet, "_leave", careless)


MUTATIONS = [
    nobody_is_displaced, room_that_is_noted_for_ever, a_wake_that_is_forgotten,
    tiles_of_a_page_set_that_never_end, page_sets_that_leave_uncounted,
    forgotten_workspace, forgotten_pins, forgotten_pump, pins_that_are_not_looked_at, a_ledger_without_a_limit,
    first_come_first_served, turns_that_cost_nothing, bands_that_never_age, waits_that_never_end,
    a_device_that_is_not_forgotten, forks_that_are_not_counted, alone_in_name_only, a_copy_that_is_left_out,
    pages_in_use_that_are_spilled, moves_that_hold_nothing, pages_that_come_back_in_each_others_place,
    places_on_disk_that_are_never_freed, pages_that_never_move, moves_that_nobody_hears_of,
    pages_that_move_without_a_copy, pages_that_move_under_a_tile, places_that_are_never_looked_for,
]  # fmt: skip


# It takes a search whose pages move between two of its tiles, which one history in five hundred has.
SELDOM_SEEN = {moves_that_nobody_hears_of: 1000}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_broken_core_is_seen(mutation, monkeypatch):
    mutation(monkeypatch)
    seen = 0
    for seed in range(SELDOM_SEEN.get(mutation, SEEDS_TO_FAIL)):
        try:
            History(seed).run()
        except Exception:
            seen += 1
            break
    assert seen, "the simulator does not notice"
