"""How much workspace a turn is given: what is free, its share of it, and what layers that nobody needs have."""

from __future__ import annotations

import pytest

from streamindex_service.core.band_queue import Band
from streamindex_service.core.governor import Governor, GovernorLimits
from streamindex_service.core.layers import Page, Snapshot
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.residency import Residency
from streamindex_service.core.turns import Grant, Need, OpenSearch

BUDGET, FLOOR = 1600, 16
AMPLE = BUDGET // 16


class World:
    """A governor, and layers of pages of 100 bytes."""

    def __init__(self, extent_bytes: int = 100) -> None:
        pool = PagePool(Ledger("hbm", BUDGET), extent_bytes, lambda *_: None, lambda *_: None)
        self.hbm = pool.ledger
        self.now = 0.0
        self.residency = Residency(pool.ledger, pool, lambda page: None)
        limits = GovernorLimits(max_device_turns=2)
        self.governor = Governor(self.residency, lambda: self.now, limits, wake=lambda delay_s: None)
        self.governor.device_ready()

    def open(self, pages: tuple[Page, ...], want: int) -> OpenSearch:
        least = Need(pages, FLOOR, want, 1)
        return self.governor.open(Snapshot(None, 0, pages, 1), "a", Band.STANDARD, least, 0.0, None)

    def turn(self, search: OpenSearch, pages: tuple[Page, ...], want: int) -> list[Grant]:
        """What it is granted, now or later."""
        granted: list[Grant] = []
        self.governor.request(search, Need(pages, FLOOR, want, 1), granted.append, pytest.fail)
        return granted

    def used(self, pages: tuple[Page, ...]) -> None:
        """A search of them comes and goes."""
        search = self.open(pages, FLOOR)
        (grant,) = self.turn(search, pages, FLOOR)
        self.governor.finish(grant, 1e-9)
        self.governor.close(search)


def layer(pages: int) -> tuple[Page, ...]:
    return tuple(Page(None, 100, None, None) for _ in range(pages))  # type: ignore[arg-type]


def test_who_is_alone_takes_all_that_it_can_use():
    world, pages = World(), layer(4)
    search = world.open(pages, 5000)
    (grant,) = world.turn(search, pages, 5000)
    assert grant.workspace_bytes == BUDGET - 400
    world.governor.finish(grant)
    (grant,) = world.turn(search, pages, 300)
    assert grant.workspace_bytes == 300


def test_two_that_keep_the_device_busy_have_the_same():
    """One with all of it and the next with its floor would take longer."""
    world, pages = World(), layer(4)
    search = world.open(pages, 5000)
    (first,) = world.turn(search, pages, 5000)
    waits = [world.turn(search, pages, 5000) for _ in range(3)]
    assert not any(waits)  # the first was alone, and has all
    world.governor.finish(first)
    found = [each.workspace_bytes for granted in waits[:2] for each in granted]
    assert found == [600, 600 - FLOOR]  # the next is left its floor
    world.governor.finish(waits[0][0])
    assert waits[2][0].workspace_bytes == 600


def test_layers_that_nobody_needs_make_room_for_as_much_as_makes_a_turn_fast():
    world = World()
    others, pages = [layer(4) for _ in range(3)], layer(3)
    for each in others:
        world.used(each)
    world.now = 10.0
    world.governor.expire()  # they are not remembered any more, and stay on the device
    assert world.residency.resident_bytes == 1200
    search = world.open(pages, 5000)
    (grant,) = world.turn(search, pages, 5000)
    assert grant.workspace_bytes == AMPLE  # 1 page of others went for it, and no more
    assert world.residency.evicted_pages == (1200 + 300 + AMPLE - BUDGET + 99) // 100
    world.governor.finish(grant)
    (grant,) = world.turn(search, pages, FLOOR)  # who can use no more has none evicted
    assert (grant.workspace_bytes, world.residency.evicted_pages) == (FLOOR, 0)


def test_layers_in_use_leave_room_for_two_turns_that_are_fast():
    """Of four that fit beside two floors one has to go, where turns could use more than these."""
    for want, fitting in ((FLOOR, 4), (5000, 3)):
        world = World()
        layers = [layer(4 if number else 3) for number in range(4)]
        searches = [world.open(pages, want) for pages in layers]
        running: list[Grant] = []
        for search, pages in zip(searches, layers, strict=True):
            running += world.turn(search, pages, want)
            for grant in running:
                world.governor.finish(grant, 1e-9)
            running.clear()
        assert len(world.governor.working_set) == fitting


def test_no_page_goes_where_its_extent_stays():
    """Eviction frees memory by the extent: of one that a layer in use is in, nothing is to be had."""
    world = World(extent_bytes=400)
    layers = [layer(1) for _ in range(15)]
    kept = [world.open(pages, FLOOR) for pages in layers[::4]]  # in each extent
    for number, pages in enumerate(layers):
        if number % 4:
            world.used(pages)
        else:
            (grant,) = world.turn(kept[number // 4], pages, FLOOR)
            world.governor.finish(grant, 1e-9)
    world.now = 10.0
    world.governor.expire()
    residency = world.residency
    assert (residency.resident_bytes, world.hbm.free_bytes) == (1500, 100)
    for _ in range(2):
        moves = residency.moves
        residency.make_room(500)
        assert (residency.evicted_pages, residency.moves) == (0, moves)
    world.governor.close(kept[1])
    world.now = 20.0
    world.governor.expire()
    residency.make_room(500)
    assert (residency.evicted_pages, world.hbm.free_bytes) == (4, 500)


def test_what_takes_part_no_more_may_be_evicted_though_nobody_needs_room():
    """It is noted when waits are looked at, and not only when somebody looks for room."""
    world, pages = World(), layer(4)
    world.used(pages)
    world.residency.tidy()
    assert {page.spared for page in pages} == {1}
    world.now += 10.0
    world.governor.expire()
    assert {(page.spared, page.pins) for page in pages} == {(0, 0)}
