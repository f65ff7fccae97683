"""Who goes next: bands, ageing, shares, estimates and refusals."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from streamindex_service.core.band_queue import Band, Turn
from streamindex_service.core.scheduler import QueueLimits, Scheduler
from streamindex_service.errors import DeadlineUnreachableError, QueueFullError

LIMITS = QueueLimits(max_turns=64, ageing_s=10.0, ageing_turns=4, quantum_s=0.5, max_turn_s=0.1)
EXACT = QueueLimits(quantum_s=0.625, max_turn_s=0.125)  # binary fractions: an allowance is three turns of 1/8 s


def turn(caller="a", cost_s=0.1, band=Band.STANDARD, at=0.0):
    return Turn(caller, band, cost_s, 1, at)


def drain(scheduler, now=0.0, most=10**6):
    """Everything, in the order in which it goes."""
    order = []
    while len(order) < most and (found := scheduler.next_turn(now)) is not None:
        assert scheduler.next_turn(now) is found, "asked again it answers the same"
        scheduler.take(found)
        order.append(found)
    return order


def filled(*turns, limits=LIMITS):
    scheduler = Scheduler(limits)
    for each in turns:
        scheduler.add(each)
    return scheduler


def test_bands_go_in_order():
    turns = [turn(band=band) for band in (Band.BATCH, Band.STANDARD, Band.INTERACTIVE) for _ in range(3)]
    assert [each.band for each in drain(filled(*turns))] == sorted(each.band for each in turns)


def test_a_callers_turns_go_in_order_of_arrival():
    turns = [turn(cost_s=cost) for cost in (0.1, 0.001, 3.0, 0.05)]
    assert drain(filled(*turns)) == turns


def test_a_band_that_waits_gets_one_turn_in_four_once_it_is_old():
    turns = [turn(band=Band.INTERACTIVE, at=20.0) for _ in range(12)] + [turn(band=Band.BATCH) for _ in range(3)]
    young = [each.band for each in drain(filled(*turns), now=9.9)]
    assert young == [Band.INTERACTIVE] * 12 + [Band.BATCH] * 3
    old = [each.band for each in drain(filled(*turns), now=20.0)]
    assert old == ([Band.INTERACTIVE] * 3 + [Band.BATCH]) * 3 + [Band.INTERACTIVE] * 3


def test_two_bands_that_are_old_take_turns():
    turns = [turn(band=Band.INTERACTIVE, at=40.0) for _ in range(12)]
    turns += [turn(band=band) for band in (Band.STANDARD, Band.BATCH) for _ in range(2)]
    bands = [each.band for each in drain(filled(*turns), now=40.0)]
    assert bands[3::4] == [Band.STANDARD, Band.BATCH, Band.STANDARD, Band.BATCH]


@pytest.mark.parametrize("seed", range(30))
def test_no_caller_falls_behind_its_share_by_more_than_the_quantum(seed):
    """Callers of unequal greed and turns of unequal size, any number of them coming and going."""
    draw = random.Random(seed)
    scheduler = Scheduler(LIMITS)
    greed = {f"caller{number}": draw.randint(1, 8) for number in range(draw.randint(2, 6))}
    served: dict[str, float] = {}  # of each caller that has turns queued: device seconds since it has
    for _ in range(2000):
        for caller, most in greed.items():
            held = scheduler.queued_by_caller().get(caller, (0, 0.0))[0]
            if held < most and draw.random() < 0.5:
                served.setdefault(caller, 0.0)
                scheduler.add(turn(caller, draw.choice((0.1, 0.03, 0.001))))
        found = scheduler.next_turn(0.0)
        if found is None:
            continue
        present = set(served)
        scheduler.take(found)
        served[found.caller] += found.cost_s
        assert min(served.values()) >= sum(served.values()) / len(served) - LIMITS.quantum_s
        queued = scheduler.queued_by_caller()
        if present - set(queued):  # somebody left: shares are counted anew among those who stay
            served = dict.fromkeys(queued, 0.0)


def test_a_turn_goes_within_the_bound():
    """All callers flood; one turn of a newcomer, with p of its own before it."""
    for before in (0, 1, 5):
        turns = [turn(f"greedy{number}", 0.1) for number in range(7) for _ in range(40)]
        scheduler = filled(*turns)
        drain(scheduler, most=13)
        mine = [turn("mine", 0.1) for _ in range(before + 1)]
        for each in mine:
            scheduler.add(each)
        order = drain(scheduler)
        waited_s = sum(each.cost_s for each in order[: order.index(mine[-1])])
        rounds = math.ceil((before + 1) * (LIMITS.allowance_s + 0.1) / LIMITS.allowance_s)
        assert waited_s <= (rounds + 1) * 8 * (LIMITS.allowance_s + 0.1)


def test_rows_that_cost_many_allowances_go_all_the_same():
    turns = [turn(name, cost_s=1000.0) for name in "abc" for _ in range(2)]
    assert [each.caller for each in drain(filled(*turns))] == list("abcabc")


class Holding:
    """Holds these turns back for so many device seconds, until others may make room."""

    def __init__(self, turns, seconds=1.0):
        self.turns, self.seconds, self.open, self.shut = turns, seconds, False, False
        self.changes = self.asked = 0

    def as_of(self, band):
        return self.changes

    def held_s(self, each):
        self.asked += 1
        return self.seconds if each in self.turns else 0.0

    def gate_is_shut(self, band):
        return self.shut

    def may_displace(self, each, *, for_age):
        return self.open or for_age


def taken(scheduler, admission, most=10**6, now=0.0):
    order = []
    while len(order) < most and (found := scheduler.next_turn(now, admission)) is not None:
        assert scheduler.next_turn(now, admission) is found, "asked again it answers the same"
        scheduler.take(found)
        order.append(found)
    return order


def test_turns_that_are_held_back_let_others_go():
    """Of their caller, of their band, of a band below; and lose nothing while nobody goes."""
    held = [turn("a", 0.125) for _ in range(2)]
    own, other, below = turn("a", 0.125), turn("b", 0.125), turn("b", 0.125, band=Band.BATCH)
    scheduler = filled(*held, own, other, below, limits=EXACT)
    admission = Holding(held)
    assert taken(scheduler, admission) == [own, other, below]
    assert scheduler.held_back() == held[:1]
    for _ in range(100):
        assert scheduler.next_turn(0.0, admission) is None
    scheduler.add(turn("b", 0.125))
    admission.open = True
    assert [each.caller for each in taken(scheduler, admission)] == ["a", "a", "b"]


def test_what_was_said_of_a_turn_is_asked_again_when_something_has_changed():
    held = [turn(name, 0.125) for name in "abcdefgh"]
    scheduler, admission = filled(*held, limits=EXACT), Holding(list(held))
    for _ in range(10):
        assert scheduler.next_turn(0.0, admission) is None
    assert admission.asked == len(held)
    scheduler.add(turn("a", 0.125))
    scheduler.reprice(held[1], 0.25, 1, 0.0)
    assert scheduler.next_turn(0.0, admission).caller == "a"
    assert admission.asked == len(held) + 2
    scheduler.remove(scheduler.next_turn(0.0, admission))
    del admission.turns[3:]
    assert scheduler.next_turn(0.0, admission) is None
    admission.changes += 1
    assert scheduler.next_turn(0.0, admission) is held[3]
    assert admission.asked == len(held) + 2 + len(held)


def test_who_is_held_back_goes_once_the_caller_is_an_interval_for_each_caller_behind():
    held = turn("a", 0.125)
    scheduler = filled(held, *(turn("b", 0.125) for _ in range(40)), limits=EXACT)
    order = taken(scheduler, Holding([held], 1.0), most=30)
    before_s = 0.125 * order.index(held)
    assert abs(before_s - 2 * 1.0) <= EXACT.allowance_s + 2 * 0.125


def test_who_is_held_back_saves_up_no_more_than_others_were_given():
    """They come with one short turn at a time; its own is long, for its keys are to be brought."""
    held, short_s, names = turn("a", 0.125), 1 / 128, "bcd"
    scheduler = filled(held, *(turn(name, short_s) for name in names), limits=EXACT)
    admission, given_s = Holding([held], 1.0), Counter()
    while (found := scheduler.next_turn(0.0, admission)) is not held:
        assert given_s.total() < 100.0
        scheduler.take(found)
        given_s[found.caller] += found.cost_s
        scheduler.add(turn(found.caller, short_s))
    for name in names:
        assert abs(given_s[name] - (0.125 + 4 * 1.0)) <= 0.125


class Spells:
    """Holds back one caller's turns; once one goes, none of the next `spell_s` of them."""

    def __init__(self, name, spell_s):
        self.name, self.spell_s, self.left_s, self.changes = name, spell_s, 0.0, 0

    def as_of(self, band):
        return self.changes

    def held_s(self, each):
        return 1.0 if each.caller == self.name and self.left_s <= 0.0 else 0.0

    def gate_is_shut(self, band):
        return True

    def took(self, each):
        if each.caller == self.name:
            before, self.left_s = self.left_s, (self.left_s if self.left_s > 0.0 else self.spell_s) - each.cost_s
            self.changes += (before > 0.0) != (self.left_s > 0.0)


@pytest.mark.parametrize("cost_s", [0.1, 0.085, 0.09, 1.0], ids=lambda cost_s: f"the other's turns are {cost_s} s")
def test_who_is_held_back_now_and_then_does_not_fall_ever_further_behind(cost_s):
    """What does not divide the allowance is kept for the next round, and what is longer is saved up for."""
    limits = QueueLimits(quantum_s=0.3, max_turn_s=0.1)
    scheduler, admission, given_s, costs_s = Scheduler(limits), Spells("a", 2.0), Counter(), {"a": 0.05, "b": cost_s}
    for name in ("a", "b") * 40:
        scheduler.add(turn(name, costs_s[name]))
    most_s = limits.allowance_s + 2 * (max(costs_s.values()) + 2 * 1.0)
    while given_s.total() < 500.0:
        found = scheduler.next_turn(0.0, admission)
        scheduler.take(found)
        admission.took(found)
        given_s[found.caller] += found.cost_s
        scheduler.add(turn(found.caller, costs_s[found.caller]))
        assert abs(given_s["a"] - given_s["b"]) <= most_s
    assert given_s["a"] > 200.0


def given_of(scheduler, held, held_s, total_s):
    """Device seconds of each caller, whose turns come again as they go; so do those that are held back."""
    admission, given_s = Holding(held, held_s), Counter()
    while given_s.total() < total_s:
        found = scheduler.next_turn(0.0, admission)
        scheduler.take(found)
        given_s[found.caller] += found.cost_s
        scheduler.add(again := turn(found.caller, found.cost_s))
        if found in held:
            held[held.index(found)] = again
    return given_s


@pytest.mark.parametrize(("names", "cost_s"), [("a", 0.1), ("a", 1.0), ("ab", 0.1)])
def test_who_needs_other_keys_for_every_turn_has_its_share_and_no_more(names, cost_s):
    """Also once it has saved up enough: what it spends of that is nothing that it is owed again."""
    scheduler = Scheduler(LIMITS)
    held = [turn(name, cost_s) for name in names for _ in range(3)]
    for each in (*held, *(turn(name, 0.01) for name in "xyz")):
        scheduler.add(each)
    given_s = given_of(scheduler, held, 1.0, 400.0)
    callers = len(names) + 3
    most_s = LIMITS.allowance_s + 2 * (cost_s + callers * 1.0)
    for name in (*names, *"xyz"):
        assert abs(given_s[name] - 400.0 / callers) <= most_s
        assert given_s[name] <= 1.05 * 400.0 / callers


@pytest.mark.parametrize("others", [3, 9])
def test_who_comes_and_is_held_back_is_behind_by_no_more_than_is_promised(others):
    """The others have just had their allowances, which are large; intervals are short."""
    limits = QueueLimits(quantum_s=1.02, max_turn_s=0.01)
    names = "abcdefghi"[:others]
    scheduler, given_s = filled(*(turn(name, 0.01) for name in names for _ in range(600)), limits=limits), Counter()
    held = [turn("late", 0.01) for _ in range(2)]
    admission = Holding(held, 0.016)
    while (found := scheduler.next_turn(0.0, admission)).caller == "a":
        scheduler.take(found)
    for each in held:
        scheduler.add(each)
    most_s = limits.allowance_s + 2 * (0.01 + (others + 1) * 0.016)
    while (found := scheduler.next_turn(0.0, admission)) not in held:
        scheduler.take(found)
        given_s[found.caller] += found.cost_s
        assert given_s.total() / (others + 1) <= most_s


def test_what_a_caller_leaves_of_its_allowance_is_owed_to_nobody():
    """It comes with one turn at a time, a little longer than an allowance: it has every other round."""
    held = [turn("a", 0.1) for _ in range(3)]
    given_s = given_of(filled(*held, turn("b", 0.31), limits=LIMITS), held, 0.1, 60.0)
    assert given_s["a"] == pytest.approx(30.0, abs=1.0)


def test_who_comes_anew_has_one_allowance():
    """Whatever part of the round is over."""
    scheduler = filled(*(turn(name, 0.125) for name in "abc" for _ in range(9)), limits=EXACT)
    order = []
    for _ in range(4):  # of b's three
        order.append(scheduler.next_turn(0.0))
        scheduler.take(order[-1])
    for _ in range(9):
        scheduler.add(turn("d", 0.125))
    order += drain(scheduler)
    assert "".join(each.caller for each in order)[:24] == "aaabbbcccaaadddbbbcccaaa"


def test_nobody_looks_for_who_may_go_while_the_gate_is_shut():
    held = turn("a", 0.125)
    scheduler, admission = filled(held, limits=EXACT), Holding([held])
    admission.open = admission.shut = True
    assert scheduler.next_turn(0.0, admission) is None
    admission.shut = False
    assert scheduler.next_turn(0.0, admission) is held


def test_who_is_alone_is_behind_nobody():
    """Its other turns go for as long as there are any; what is held back waits for room, and takes it first."""
    held, others = turn("a", 0.125), [turn("a", 0.125) for _ in range(40)]
    scheduler, admission = filled(held, *others, limits=EXACT), Holding([held], 0.01)
    assert taken(scheduler, admission, most=39) == others[:39]
    admission.open = True
    assert taken(scheduler, admission) == [held, others[39]]


def test_of_those_who_are_held_back_the_first_is_offered_room_first():
    names = "abc"
    held = {name: [turn(name, 0.125) for _ in range(2)] for name in names}
    everybody = [each for name in names for each in held[name]]
    scheduler = filled(*everybody, limits=EXACT)
    admission = Holding(everybody)
    assert scheduler.next_turn(0.0, admission) is None
    admission.open = True
    assert [each.caller for each in taken(scheduler, admission)] == list("abcabc")


def test_a_band_that_is_old_goes_though_its_turns_are_held_back():
    first, second = turn(band=Band.STANDARD), turn(band=Band.BATCH)
    above = [turn(band=Band.INTERACTIVE, at=20.0) for _ in range(12)]
    order = taken(filled(first, second, *above), Holding([first, second]), now=20.0)
    assert order[3::4] == [first, second, above[9]]


def test_what_was_not_used_is_not_kept():
    """A caller that comes back has no more of a round than the others."""
    scheduler = filled(turn("a", 0.125), limits=EXACT)
    drain(scheduler)
    turns = [turn(name, 0.125) for name in "ab" for _ in range(6)]
    for each in turns:
        scheduler.add(each)
    assert "".join(each.caller for each in drain(scheduler)) == "aaabbbaaabbb"


def test_the_queue_counts_what_is_in_it():
    turns = [turn("a", 0.1), turn("a", 0.2), turn("b", 0.4, band=Band.BATCH)]
    scheduler = filled(*turns)
    scheduler.reprice(turns[1], 0.3, 5, 0.0)
    assert scheduler.backlog_s == pytest.approx(0.8)
    assert scheduler.queued_bytes == 7
    assert scheduler.queued_by_band() == {Band.INTERACTIVE: 0, Band.STANDARD: 2, Band.BATCH: 1}
    assert scheduler.queued_by_caller()["a"] == (2, pytest.approx(0.4))
    scheduler.remove(turns[0])
    assert list(scheduler) == turns[1:]
    drain(scheduler)
    assert (len(scheduler), scheduler.queued_bytes, scheduler.backlog_s) == (0, 0, 0.0)
    assert scheduler.next_turn(0.0) is None


def test_the_wait_is_what_goes_before():
    scheduler = filled(
        *(turn("greedy", 0.1) for _ in range(20)),
        turn("b", 0.1),
        turn("c", 0.05, band=Band.INTERACTIVE),
        turn("b", 5.0, Band.BATCH),
    )
    assert scheduler.wait_s("new", Band.INTERACTIVE) == pytest.approx(0.05)
    assert scheduler.wait_s("new", Band.STANDARD) == pytest.approx(0.05 + 0.3 + 0.1)
    assert scheduler.wait_s("b", Band.STANDARD) == pytest.approx(0.05 + 0.1 + 0.3 * (1 + 0.1 / 0.3))


@pytest.mark.parametrize(
    ("limits", "figure"),
    [
        (QueueLimits(max_turns=3), {"queued": "3", "limit": "3"}),
        (QueueLimits(max_bytes=3), {"queued_bytes": "3", "limit": "3"}),
        (QueueLimits(max_s=0.35), {"queued_ms": "400", "limit": "350"}),
    ],
)
def test_a_queue_that_is_full_refuses_with_the_figures(limits, figure):
    scheduler = filled(*(turn(cost_s=0.1) for _ in range(2)), limits=limits)
    scheduler.refuse_hopeless("b", Band.BATCH, 0.1, 0.0, None)
    scheduler.add(turn(cost_s=0.1))
    with pytest.raises(QueueFullError) as caught:
        scheduler.refuse_hopeless("b", Band.BATCH, 0.1, 0.0, None)
    assert caught.value.metadata == {**figure, "estimated_wait_ms": "400"}
    assert caught.value.retry_after_ms == 400  # when what is there now will be done


def test_searches_that_will_have_turns_are_in_the_queue():
    scheduler = filled(turn(cost_s=0.1), limits=QueueLimits(max_turns=3))
    scheduler.refuse_hopeless("b", Band.BATCH, 0.0, 0.0, None, waiting=1)
    with pytest.raises(QueueFullError) as caught:
        scheduler.refuse_hopeless("b", Band.BATCH, 0.0, 0.0, None, waiting=2)
    assert (caught.value.metadata["queued"], caught.value.metadata["limit"]) == ("3", "3")


def test_a_deadline_that_cannot_be_met_is_refused_with_the_figures():
    scheduler = filled(*(turn(cost_s=0.1) for _ in range(10)))
    scheduler.refuse_hopeless("b", Band.STANDARD, 0.1, 0.5, 0.91)
    with pytest.raises(DeadlineUnreachableError) as caught:
        scheduler.refuse_hopeless("b", Band.STANDARD, 0.1, 0.5, 0.89)
    assert caught.value.metadata == {"estimated_wait_ms": "400", "estimated_run_ms": "500", "deadline_ms": "890"}
    assert caught.value.retry_after_ms == pytest.approx(1100, abs=1)
