"""Which layers stay on the device: who makes room, for whom, and when."""

from __future__ import annotations

import pytest

from streamindex_service.core.band_queue import Band
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.room import Room
from streamindex_service.core.working_set import WorkingSet, WorkingSetLimits

FACTOR, MOST_S, ACTIVE_S, COPY_S = 10.0, 5.0, 1.0, 0.1
LIMITS = WorkingSetLimits(FACTOR, MOST_S, linger_s=0.0)
BUDGET = 4  # page sets of one byte


class OneByte:
    """A page."""

    page_bytes = 1


def working_set(limits: WorkingSetLimits = LIMITS) -> WorkingSet:
    return WorkingSet(limits, Ledger("hbm", BUDGET), ACTIVE_S)


def asked(working, band=Band.STANDARD, size=1, copy_s=COPY_S, now=0.0):
    """A tile of a new search waits for a new page set."""
    found = working.ask([OneByte() for _ in range(size)], band, copy_s, now)
    working.come(found)
    return found


def admitted(working, band=Band.STANDARD, now=0.0, **options):
    page_set = asked(working, band, now=now, **options)
    working.admit(page_set, 0, now, through_gate=True)
    return page_set


def left(working, page_set, now):
    """Its tile and its search end."""
    working.turn_over(page_set, page_set.band, now)
    working.go(page_set, to_another=False)


def test_what_fits_closes_no_gate():
    working = working_set()
    for _ in range(BUDGET):
        admitted(working)
    assert working.complete
    assert working.gate_is_open(Band.STANDARD, 0.0)
    assert working.room_bytes(Band.STANDARD, 0.0) == 0
    assert sum(map(len, working.kept_pages())) == BUDGET


def test_what_a_worker_says_of_its_memory_counts_at_once():
    hbm = Ledger("hbm", 2 * BUDGET)
    working = WorkingSet(LIMITS, hbm, ACTIVE_S)
    hbm.limit_bytes = BUDGET
    for _ in range(BUDGET):
        admitted(working)
    assert working.room_bytes(Band.STANDARD, 0.0) == 0
    assert not working.fits(asked(working), 0, working.room_bytes(Band.STANDARD, 0.0))


def test_the_first_that_came_makes_room_and_the_gate_is_closed():
    working = working_set()
    first, second, *_ = [admitted(working) for _ in range(BUDGET)]
    waits = asked(working)
    assert working.room_bytes(Band.STANDARD, 0.0, waits) == BUDGET
    working.admit(waits, 0, 0.0, through_gate=True)
    assert not first.admitted
    assert second.admitted
    assert not working.gate_is_open(Band.STANDARD, FACTOR * COPY_S - 0.01)
    assert working.gate_is_open(Band.STANDARD, FACTOR * COPY_S)
    assert working.gate_is_open(Band.INTERACTIVE, 0.0)
    assert working.next_change(Band.STANDARD, 0.0) == FACTOR * COPY_S


def test_a_gate_opens_when_as_much_was_given():
    working = working_set()
    for _ in range(BUDGET + 1):
        admitted(working)
    working.given_s += FACTOR * COPY_S
    assert working.gate_is_open(Band.STANDARD, 0.0)


def test_who_is_too_far_behind_leaves_the_gate_as_it_is():
    working = working_set()
    for _ in range(BUDGET):
        admitted(working)
    working.admit(asked(working), 0, 0.0, through_gate=False)
    assert working.gate_is_open(Band.STANDARD, 0.0)


def test_no_interval_is_longer_than_the_limit():
    assert working_set().interval_s(asked(working_set(), copy_s=100.0)) == MOST_S


def test_who_has_left_makes_room_after_the_seconds_of_its_copy():
    working = working_set()
    page_set = admitted(working)
    left(working, page_set, 1.0)
    for band, grace_s in ((Band.INTERACTIVE, 0.0), (Band.STANDARD, COPY_S), (Band.BATCH, ACTIVE_S)):
        assert working.room_bytes(band, 1.0 + grace_s) == BUDGET
        if grace_s:
            assert working.room_bytes(band, 1.0 + grace_s - 0.01) == BUDGET - 1
            assert working.next_change(band, 1.0) == pytest.approx(1.0 + grace_s)


@pytest.mark.parametrize("linger_s", [0.0, COPY_S / 2, 3 * COPY_S])
def test_who_has_left_stays_for_the_next_search_of_the_same_for_a_while(linger_s):
    """At least: as long as its copy takes, as before."""
    working = working_set(WorkingSetLimits(FACTOR, MOST_S, linger_s))
    page_set = admitted(working)
    left(working, page_set, 1.0)
    stays_s = max(linger_s, COPY_S)
    assert working.room_bytes(Band.STANDARD, 1.0 + 0.99 * stays_s) == BUDGET - 1
    assert working.room_bytes(Band.STANDARD, 1.0 + 1.01 * stays_s) == BUDGET


def test_nobody_lingers_while_the_device_stands_still():
    """It has had nothing to do for as long as a copy takes: to wait any longer would cost more."""
    working = working_set(WorkingSetLimits(FACTOR, MOST_S, linger_s=5.0))
    page_set = admitted(working)
    left(working, page_set, 1.0)
    for idle_since, lapses_at in ((0.0, 1.0 + COPY_S), (2.0, 2.0 + COPY_S), (9.0, 6.0)):
        working.idle_since = idle_since
        assert working.next_change(Band.STANDARD, 1.0) == pytest.approx(lapses_at)
        assert working.room_bytes(Band.STANDARD, lapses_at - 0.01) == BUDGET - 1
        assert working.room_bytes(Band.STANDARD, lapses_at + 0.01) == BUDGET


def test_whatever_may_give_somebody_room_is_a_change():
    working = working_set()
    seen = [working.changes]

    def changed():
        seen.append(working.changes)
        return seen[-1] != seen[-2]

    page = OneByte()
    page_set = working.ask([page], Band.STANDARD, COPY_S, 0.0)
    assert not changed()
    working.admit(page_set, 0, 0.0, through_gate=True)
    assert changed()
    working.ask([page], Band.STANDARD, COPY_S, 0.0)
    assert not changed()
    working.ask([page, OneByte()], Band.STANDARD, COPY_S, 0.0)
    assert changed(), "it needs more than before"
    working.clear()
    assert changed()


def test_seconds_in_which_the_device_stands_still_add_up():
    """A device that has something to do now and then has still done nothing for as long as a copy takes."""
    working = working_set(WorkingSetLimits(FACTOR, MOST_S, linger_s=5.0))
    working.device_works(0.0)
    page_set = admitted(working)
    left(working, page_set, 1.0)
    for begin in (1.2, 1.4):
        working.device_idles(begin)
        working.device_works(begin + 0.4 * COPY_S)
    assert working.next_change(Band.STANDARD, 2.0) == pytest.approx(6.0)
    working.device_idles(2.0)
    assert working.next_change(Band.STANDARD, 2.0) == pytest.approx(2.0 + 0.2 * COPY_S)
    working.device_works(2.0 + 0.3 * COPY_S)
    assert working.room_bytes(Band.STANDARD, 2.0 + 0.3 * COPY_S) == BUDGET


def test_a_closed_gate_is_shut_only_while_the_device_works():
    """Who stands still long enough may displace others all the same."""
    working = working_set()
    room = Room(working, Ledger("hbm", BUDGET), lambda: 1.0, lambda size: COPY_S, print)
    room.device_works()
    assert not room.gate_is_shut(Band.STANDARD)
    for _ in range(BUDGET + 1):
        admitted(working, now=1.0)
    assert room.gate_is_shut(Band.STANDARD)
    assert not room.gate_is_shut(Band.BATCH)
    room.device_idles()
    assert not room.gate_is_shut(Band.STANDARD)


def test_what_it_stood_still_before_does_not_count():
    working = working_set(WorkingSetLimits(FACTOR, MOST_S, linger_s=5.0))
    page_set = admitted(working)
    working.device_idles(0.0)
    left(working, page_set, 1.0)
    assert working.next_change(Band.STANDARD, 1.0) == pytest.approx(1.0 + COPY_S)
    working.device_works(1.0 + 0.5 * COPY_S)
    assert working.next_change(Band.STANDARD, 1.1) == pytest.approx(6.0)


def test_who_is_there_for_nobody_makes_room_before_who_is_in_use():
    working = working_set(WorkingSetLimits(FACTOR, MOST_S, linger_s=10.0))
    first, second, *_ = [admitted(working) for _ in range(BUDGET)]
    left(working, second, 0.0)  # it lingers
    admitted(working)
    assert (first.admitted, second.admitted) == (True, False)
    admitted(working)
    assert not first.admitted


def test_a_search_that_has_come_and_needs_nothing_yet_finds_what_takes_part():
    working = working_set()
    page_set = admitted(working)
    assert working.taking_part(page_set.pages) is page_set
    assert working.taking_part([page_set.pages[0], OneByte()]) is page_set  # the layer has grown
    assert working.taking_part(()) is None
    assert working.taking_part([OneByte()]) is None
    assert working.taking_part(asked(working).pages) is None  # it waits for room itself


def test_a_silent_search_keeps_its_place_from_its_own_band_only():
    working = working_set()
    page_set = admitted(working)
    working.turn_over(page_set, page_set.band, 0.0)
    assert working.room_bytes(Band.STANDARD, 100.0) == BUDGET - 1
    assert working.room_bytes(Band.BATCH, ACTIVE_S) == BUDGET


def test_those_below_make_room_before_ones_own_and_those_above_last():
    working = working_set()
    above, own, below, lapsed = (
        admitted(working, band) for band in (Band.INTERACTIVE, Band.STANDARD, Band.BATCH, Band.STANDARD)
    )
    left(working, lapsed, 0.0)
    page_set = admitted(working, size=3, now=COPY_S)
    assert [each.admitted for each in (above, own, below, lapsed)] == [True, False, False, False]
    working.admit(asked(working, Band.BATCH, size=BUDGET), 0, COPY_S, through_gate=True)
    assert not above.admitted
    assert not page_set.admitted


def test_a_window_that_is_done_with_leaves_at_once():
    working = working_set()
    page_set = admitted(working)
    working.turn_over(page_set, page_set.band, 0.0)
    working.go(page_set, to_another=True)
    assert working.room_bytes(Band.STANDARD, 0.0) == BUDGET
    assert not working.kept_pages()


def test_nobody_is_remembered_whom_nobody_needs():
    working = working_set()
    page_set = admitted(working)
    left(working, page_set, 0.0)
    working.lapse(ACTIVE_S - 0.01)
    assert len(working) == 1
    working.lapse(ACTIVE_S)
    assert len(working) == 0
    assert not working._known


def test_a_search_may_go_on_with_other_pages_after_the_device_was_lost():
    working = working_set()
    page_set = admitted(working)
    working.turn_over(page_set, page_set.band, 0.0)
    working.clear()
    working.go(page_set, to_another=True)
    assert len(working) == 0
    assert working.complete


def together(working, layers, band=Band.STANDARD, now=0.0):
    """A tile of a new search waits for all of these layers."""
    found = working.ask_together(layers, band, lambda size_bytes: COPY_S * size_bytes, now)
    working.come(found)
    return found


def test_layers_that_a_tile_needs_together_take_part_each_by_itself():
    """Only what is new needs room, is waited for, and makes others leave; what the tile has stays."""
    working = working_set()
    a, b, c, d, e = ([OneByte()] for _ in range(5))
    first, other = together(working, [a, b, c]), together(working, [d])
    for each in (first, other):
        working.admit(each, 0, 0.0, through_gate=True)
        left(working, each, 0.0)
    assert working.complete
    step = together(working, [c, e, b, a], now=COPY_S / 2)  # in another order, and one more
    assert not step.admitted
    assert step.copy_s == COPY_S
    assert not working.fits(step, 0, working.room_bytes(Band.STANDARD, COPY_S / 2))
    assert working.fits(step, 0, working.room_bytes(Band.STANDARD, COPY_S / 2, step))
    working.admit(step, 0, COPY_S / 2, through_gate=True)
    assert step.admitted
    assert not other.admitted
    assert sum(map(len, working.kept_pages())) == BUDGET
    assert not working.leave_one(step, COPY_S / 2)
    assert not working.gate_is_open(Band.STANDARD, COPY_S / 2)
    assert working.gate_is_open(Band.STANDARD, COPY_S / 2 + FACTOR * COPY_S)
    left(working, step, 0.0)
    working.clear()
    assert working.complete
    assert working.room_bytes(Band.BATCH, 0.0) == BUDGET


def test_what_needs_all_that_there_is_waits_for_no_more_than_that():
    """Its workspaces would not fit beside it, and part of it is there."""
    working = working_set()
    layers = [[OneByte()] for _ in range(BUDGET)]
    working.admit(together(working, layers[:2]), 0, 0.0, through_gate=True)
    step = together(working, layers)
    assert working.fits(step, 2, working.room_bytes(Band.STANDARD, 0.0, step))


def test_forks_are_one_page_set_however_many_a_tile_needs():
    working, page = working_set(), OneByte()
    fork = together(working, [[page], [page, OneByte()], [page], []])
    assert fork.size_bytes == 2
    assert fork.turns == fork.searches == 1
    left(working, fork, 0.0)
    assert working.ask_together([[]], Band.BATCH, float, 0.0) is None


def test_what_is_there_for_a_lower_band_alone_makes_room_for_a_higher():
    """A tile of each band came for the same pages, and the higher is done: the lower may wait, for other pages too."""
    working = working_set()
    page_set = admitted(working, Band.BATCH)
    assert working.ask(page_set.pages, Band.INTERACTIVE, COPY_S, 0.0) is page_set
    assert working.room_bytes(Band.STANDARD, 0.0) == BUDGET - 1
    working.turn_over(page_set, Band.INTERACTIVE, 0.0)
    assert page_set.turns == 1
    assert working.room_bytes(Band.STANDARD, 0.0) == BUDGET
