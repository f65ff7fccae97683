"""Four times what fits, on virtual time: nearly the work of what fits, and nobody is left out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from streamindex_service.core.band_queue import Band
from streamindex_service.core.caches import CacheSpec
from streamindex_service.core.governor import GovernorLimits
from streamindex_service.core.room import Room
from streamindex_service.core.scheduler import QueueLimits
from streamindex_service.core.sizes import PAGE_KEYS, KeyFormat
from streamindex_service.core.working_set import WorkingSet
from streamindex_service.testing.invariants import InvariantError, Watch
from streamindex_service.testing.simulated_service import (
    FLOP_PER_ROW,
    MOST_TILE_ROWS,
    PAGE_BYTES,
    SECONDS_PER_FLOP,
    SimulatedSearch,
    SimulatedService,
    Sizes,
)
from tests.support.broken import nobody_is_too_far_behind

FITTING, TIMES, PAGES = 4, 4, 4
FLOOR_BYTES = 4096
COPY_S = 0.02  # of a cache
TILE_S = 0.008
LEAST_THROUGHPUT = 0.9
ROWS = 400  # of a search


class Offer:
    """Caches of which `fitting` fit the device, and callers who search them.

    chunk_rows: of a search that arrive at once; gap_s: between two chunks, and between two searches of a cache; pages:
    of each cache; callers: how many there will be, as many as caches by default.
    """

    def __init__(
        self,
        caches: int,
        *,
        fitting: int = FITTING,
        gap_s: float = 0.0,
        chunk_rows: int = ROWS,
        pages: Sequence[int] = (),
        callers: int = 0,
    ) -> None:
        # the caches that fit, and the workspaces of as many tiles as the device has at a time
        hbm_bytes = fitting * PAGES * PAGE_BYTES + 6 * FLOOR_BYTES
        copy_bytes_per_s = PAGES * PAGE_BYTES / COPY_S
        sizes = Sizes(hbm_bytes, 1000 * PAGE_BYTES, PAGE_BYTES, FLOOR_BYTES, 100, copy_bytes_per_s=copy_bytes_per_s)
        queue = QueueLimits(max_turns=1000, max_s=1e6, ageing_s=0.5, quantum_s=0.1, max_turn_s=TILE_S)
        self.service = SimulatedService(sizes, GovernorLimits(max_device_turns=2, queue=queue))
        self.watch = Watch(self.service, callers or caches, check_period_s=0.5)
        self.searches: list[SimulatedSearch] = []
        self.rows: Counter[str] = Counter()
        self.given_s: Counter[str] = Counter()
        self.waited_s: dict[Band, float] = {}
        self._gap_s, self._chunk_rows = gap_s, chunk_rows
        spec = CacheSpec(1, 16, 1, KeyFormat.BF16, 1, "", 0, 1e9, 2)
        self.caches = [self.service.caches.create("owner", spec) for _ in range(caches)]
        for number, cache in enumerate(self.caches):
            self.service.write(cache, 0, 0, (pages[number] if pages else PAGES) * PAGE_KEYS)
        taken = self.service.on_taken

        def count(turn):
            taken(turn)
            waited_s = self.now_s - turn.arrived_at
            self.waited_s[turn.band] = max(self.waited_s.get(turn.band, 0.0), waited_s)
            self.rows[turn.caller] += turn.need.size_bytes // 64
            self.given_s[turn.caller] += turn.cost_s

        self.service.on_taken = count
        self.service.governor.device_ready()

    @property
    def now_s(self) -> float:
        return self.service.time.now_s

    @property
    def copies_s(self) -> float:
        """What the device has spent on copies."""
        return self.service.device.loaded_pages * COPY_S / PAGES

    def search(self, number: int, rows: int = ROWS, band: Band = Band.STANDARD, name: str = "") -> SimulatedSearch:
        """Rows come in chunks, with gaps in between."""
        search = SimulatedSearch(self.service, self.caches[number], 0, name or f"caller{number}", band, rows, None)
        self.searches.append(search)

        def feed(left):
            search.feed(min(left, self._chunk_rows))
            if left > self._chunk_rows:
                self.service.time.after(self._gap_s, lambda: feed(left - self._chunk_rows))

        feed(rows)
        return search

    def work(self, at_once: int, name: str = "", searches: int = 4) -> float:
        """All caches are searched so many times, so many at a time. Returns rows by the virtual second."""
        begun, left = self.now_s, list(range(len(self.caches)))
        going: dict[int, tuple[int, SimulatedSearch]] = {}
        while left or going:
            for number, (times, search) in list(going.items()):
                if search.outcome:
                    assert search.outcome == "DONE"
                    del going[number]
                    if times < searches:
                        going[number] = (times + 1, self.search(number, name=name))
            while left and len(going) < at_once:
                number = left.pop(0)
                going[number] = (1, self.search(number, name=name))
            self.step()
        return sum(self.rows.values()) / (self.now_s - begun)

    def visits(self, number: int, rows: int, name: str = "", band: Band = Band.STANDARD, times: int = 10**6) -> None:
        """A cache is searched time and again, a gap after the last answer."""

        def look(search):
            if not search.outcome:
                self.service.time.after(TILE_S / 2, lambda: look(search))
            elif times > 1:
                self.service.time.after(self._gap_s, lambda: self.visits(number, rows, name, band, times - 1))

        look(self.search(number, rows, band, name))

    def step(self) -> None:
        self.service.time.step()
        self.watch.look()

    def run(self, seconds: float) -> None:
        end = self.now_s + seconds
        self.service.time.after(seconds, lambda: None)
        while self.now_s < end:
            self.step()

    def rest(self) -> None:
        """To its end; everything has come back."""
        while self.service.time.step():
            self.watch.look()
        for cache in self.caches:
            self.service.caches.delete(cache)
        self.watch.at_rest(self.searches)


def four_times_what_fits(name: str = "", searches: int = 4, fitting: int = FITTING, **options) -> tuple[float, Offer]:
    """Throughput, as a part of that of what fits."""
    fits = Offer(fitting * TIMES, fitting=fitting, **options).work(fitting, name, searches)
    over = Offer(fitting * TIMES, fitting=fitting, **options)
    ratio = over.work(fitting * TIMES, name, searches) / fits
    over.rest()
    return ratio, over


@pytest.mark.parametrize("name", ["", "everybody"], ids=["callers", "one caller"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gap_s": 0.03, "chunk_rows": 20},
        {"gap_s": 0.15, "chunk_rows": 40},
        {"fitting": 16, "gap_s": 0.1, "chunk_rows": 200, "searches": 1},
    ],
    ids=["busy", "gaps", "slow", "64 caches"],
)
def test_four_times_what_fits_is_no_slower(options, name):
    ratio, over = four_times_what_fits(name, **options)
    assert ratio >= LEAST_THROUGHPUT
    assert over.copies_s <= 0.1 * (over.now_s - 1000)


def nothing_is_held_back(patch):
    patch.setattr(Room, "held_s", lambda self, turn: 0.0)
    patch.setattr(WorkingSet, "kept_pages", lambda self: ())


def pages_that_are_not_kept(patch):
    patch.setattr(WorkingSet, "kept_pages", lambda self: ())
    patch.setattr(WorkingSet, "fits", lambda self, page_set, workspace_bytes, room_bytes: True)


def a_gate_that_never_closes(patch):
    patch.setattr(WorkingSet, "gate_is_open", lambda self, band, now: True)


@pytest.mark.parametrize("mutation", [nothing_is_held_back, pages_that_are_not_kept, a_gate_that_never_closes])
def test_without_load_control_it_would_thrash(mutation, monkeypatch):
    mutation(monkeypatch)
    assert four_times_what_fits()[0] < LEAST_THROUGHPUT


def test_callers_of_one_cache_and_of_many_get_equal_shares():
    """One has a cache, the other all the others, three times what fits."""
    offer = Offer(3 * FITTING + 1)
    for number in range(3 * FITTING + 1):
        for _ in range(3 if number == 0 else 1):  # all of one caller's tiles may be with the device, of one search
            offer.search(number, 10**5, name="one" if number == 0 else "many")
    offer.run(6.0)
    assert offer.rows["one"] >= 0.45 * (offer.rows["one"] + offer.rows["many"])
    assert offer.rows["many"] >= 0.45 * (offer.rows["one"] + offer.rows["many"])
    offer.run(6.0)
    assert offer.rows["one"] >= 0.47 * (offer.rows["one"] + offer.rows["many"])
    assert offer.rows["many"] >= 0.47 * (offer.rows["one"] + offer.rows["many"])


class Roamers(Offer):
    """One caller with a layer, and three who have four large ones each, and a tile for each."""

    def __init__(self) -> None:
        super().__init__(13, pages=[PAGES, *[3 * PAGES] * 12], callers=4)
        for _ in range(3):  # so that it has tiles waiting at all times
            self.search(0, 10**6, name="stays")
        for number in range(1, 13):
            self.visits(number, 1, name=f"roams{number % 3}")

    @property
    def ahead_s(self) -> float:
        return self.given_s["stays"] - min(self.given_s.values())


def test_who_needs_another_layer_for_every_tile_falls_behind_only_so_far():
    offer = Roamers()
    offer.run(12.0)
    ahead_s = offer.ahead_s
    offer.run(6.0)
    assert offer.ahead_s <= ahead_s + 0.5


def test_the_watch_sees_who_falls_behind_for_ever(monkeypatch):
    nobody_is_too_far_behind(monkeypatch)
    with pytest.raises(InvariantError, match="behind"):
        Roamers().run(30.0)


def test_callers_with_a_tile_at_a_time_get_equal_shares():
    """Not at once: who waits for room saves up only what the others were given, a short tile each round."""
    offer = Offer(FITTING * TIMES)
    for number in range(FITTING * TIMES):
        offer.visits(number, 8)
    offer.run(12.0)
    assert min(offer.rows.values()) >= 0.5 * max(offer.rows.values())
    offer.run(12.0)
    assert min(offer.rows.values()) >= 0.75 * max(offer.rows.values())
    assert offer.copies_s <= 0.08 * 24


def test_beside_callers_who_come_with_a_few_rows_at_a_time_nobody_drifts_away():
    """Rounds of theirs are short, those of the others long, and each is held back now and then. The watch compares."""
    offer = Offer(5, fitting=2)
    for number in range(2):
        for _ in range(3):
            offer.search(number, 10**7)
    for number in range(2, 5):
        offer.visits(number, 2)
    offer.run(120.0)
    assert min(offer.given_s["caller0"], offer.given_s["caller1"]) >= 40.0


def test_callers_who_come_and_go_leave_the_others_their_share():
    offer = Offer(FITTING * TIMES)
    steady = 6
    for number in range(steady):
        for _ in range(2):
            offer.search(number, 10**6)
    for number in range(steady, FITTING * TIMES):
        offer.service.time.after(0.3 * number, lambda number=number: offer.visits(number, 50, times=4))
    offer.run(25.0)
    rows = [offer.rows[f"caller{number}"] for number in range(steady)]
    assert min(rows) >= 0.75 * max(rows)
    assert all(offer.rows[f"caller{number}"] == 4 * 50 for number in range(steady, FITTING * TIMES))


def test_a_layer_as_large_as_the_device_takes_part():
    offer = Offer(9, pages=(FITTING * PAGES, *[PAGES] * 8))
    for number in range(9):
        for _ in range(2):
            offer.search(number, 10**6)
    offer.run(30.0)
    assert min(offer.given_s.values()) >= 0.5 * 30 / 9
    assert offer.copies_s <= 0.1 * 30


def test_a_higher_band_waits_for_no_gate_behind_a_lower_one():
    offer = Offer(FITTING * TIMES)
    for number in range(1, FITTING * TIMES):
        offer.search(number, 10**6)
    offer.run(4.0)
    for _ in range(5):
        offer.search(0, 1, Band.INTERACTIVE)
        offer.run(0.2)
    # what the device has begun, two tiles, which nothing cut before the band was active, and the copies of their caches
    longest_s = MOST_TILE_ROWS * FLOP_PER_ROW * SECONDS_PER_FLOP + 1e-3 + COPY_S
    assert 2 * longest_s < GovernorLimits().working_set.promotion_factor * COPY_S
    assert offer.waited_s[Band.INTERACTIVE] <= 2 * longest_s


def test_two_bands_that_do_not_fit_do_not_thrash():
    """Twice what fits of each; the device is never idle, and the lower band goes on for its age."""
    offer = Offer(4 * FITTING)
    for number in range(2 * FITTING):
        offer.visits(number, 20, band=Band.INTERACTIVE)
    for number in range(2 * FITTING, 4 * FITTING):
        offer.search(number, 10**6, Band.BATCH)
    offer.run(10.0)
    below = sum(offer.rows[f"caller{number}"] for number in range(2 * FITTING, 4 * FITTING))
    assert below > 100
    assert offer.copies_s <= 0.2 * 10


def test_a_search_that_is_silent_keeps_its_place_no_longer_than_a_copy_takes():
    """While the device has nothing else to do."""
    offer = Offer(FITTING + 1, gap_s=10.0, chunk_rows=10)
    for number in range(FITTING):
        offer.search(number, 20)
    offer.run(0.2)
    assert offer.service.governor.in_flight == 0
    waiting = offer.search(FITTING, 10)
    offer.run(2 * COPY_S + 0.02)
    assert waiting.outcome == "DONE"
