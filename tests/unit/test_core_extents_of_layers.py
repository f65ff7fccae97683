"""Pages that come together have extents of their own, so that these go back when they leave together."""

from __future__ import annotations

import pytest

from streamindex_service.core.accounts import NO_QUOTA, Account
from streamindex_service.core.layers import Page
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.residency import Residency

PAGE, PLACES = 100, 8
EXTENT = PAGE * PLACES
ACCOUNT = Account("x", NO_QUOTA)


class Device:
    """So many extents, and layers that tiles have used."""

    def __init__(self, extents: int) -> None:
        self.hbm = Ledger("hbm", extents * EXTENT)
        self.pool = PagePool(self.hbm, EXTENT, lambda *_: None, lambda *_: None)
        self.residency = Residency(self.hbm, self.pool, lambda page: None)
        self.kept: list[tuple[Page, ...]] = []
        self.residency.kept = lambda: self.kept

    def layer(self, pages: int) -> tuple[Page, ...]:
        return tuple(Page(None, PAGE, ACCOUNT, None) for _ in range(pages))

    def use(self, layer: tuple[Page, ...], workspace_bytes: int = 0) -> None:
        """For a tile, and no longer."""
        assert self.residency.try_place(layer, workspace_bytes)
        self.hbm.release(workspace_bytes)
        self.residency.unpin(layer)
        self.residency.let_go(layer)


def keeping(extents):
    """A device, and a layer on it that is not evicted for others."""
    device = Device(extents)
    layer = device.layer(PLACES)
    device.use(layer)
    device.kept = [layer]
    device.residency.tidy()
    return device, layer


def extents(layer):
    return {page.device.extent_id for page in layer}


def test_a_whole_extent_is_taken_only_by_as_many_pages_and_if_the_budget_allows_it():
    device = Device(3)
    assert device.pool.try_allocate_extent(PAGE, PLACES - 1) == []
    assert device.pool.try_allocate_extent(PAGE, PLACES, leave_bytes=2 * EXTENT + 1) == []
    few = device.pool.try_allocate_some(PAGE, 3)
    whole = device.pool.try_allocate_extent(PAGE, 2 * PLACES, leave_bytes=EXTENT)
    assert [slot.offset_bytes for slot in whole] == [PAGE * place for place in range(PLACES)]
    assert {slot.extent_id for slot in whole}.isdisjoint(slot.extent_id for slot in few)
    assert len(device.pool.try_allocate_some(PAGE, 100)) == PLACES - 3  # places of the first are still there
    device.pool.free_some(whole[:2])
    assert device.pool.try_allocate_some(PAGE, 100) == whole[:2]
    device.pool.free_some(whole)
    assert device.hbm.free_bytes == 2 * EXTENT


def test_a_large_layer_leaves_the_places_between_others_to_small_ones():
    device = Device(6)
    small = device.layer(3)
    large = device.layer(2 * PLACES + 2)
    device.use(small)
    device.use(large)
    assert [len(extents(large[first : first + PLACES])) for first in (0, PLACES)] == [1, 1]
    assert extents(large[2 * PLACES :]) == extents(small)
    assert device.hbm.free_bytes == 3 * EXTENT


def test_a_layer_takes_the_place_of_one_that_leaves_and_no_kept_one_moves():
    device = Device(6)
    layers = [device.layer(2 * PLACES) for _ in range(8)]
    for at, layer in enumerate(layers):
        device.kept = layers[max(0, at - 1) : at + 1]
        device.use(layer, EXTENT // 2)
        assert all(len(extents(each)) == 2 for each in device.kept)
    assert device.residency.moved_pages == 0
    # of the six extents one is left to workspaces
    assert device.residency.resident_bytes == 5 * EXTENT
    assert device.residency.evicted_pages == (8 * 2 - 5) * PLACES


def test_a_workspace_takes_whole_extents_and_no_pages_for_nothing():
    device = Device(3)
    kept, between, whole = device.layer(3), device.layer(5), device.layer(PLACES)
    device.kept = [kept]
    for layer in (kept, between, whole):
        device.use(layer)
    device.use((), EXTENT + 1)
    assert [sum(page.device is not None for page in layer) for layer in (kept, between, whole)] == [3, 5, 0]


def test_there_is_another_look_for_room_when_other_pages_may_go():
    device = Device(2)
    used, kept = device.layer(PLACES), device.layer(PLACES)
    assert device.residency.try_place(used, 0)
    device.use(kept)
    device.kept = [kept]
    device.residency.make_room(EXTENT)
    assert device.hbm.free_bytes == 0
    device.residency.unpin(used)
    device.residency.make_room(EXTENT)
    assert (device.hbm.free_bytes, used[0].device) == (EXTENT, None)
    device.residency.make_room(2 * EXTENT)
    assert device.hbm.free_bytes == EXTENT
    device.kept = [used]  # as many as before
    device.residency.make_room(2 * EXTENT)
    assert device.hbm.free_bytes == 2 * EXTENT


@pytest.mark.parametrize("together", [False, True], ids=["a layer for each tile", "the last tile is of two layers"])
def test_of_what_was_kept_the_most_recently_used_goes_last(together):
    device = Device(3)
    layers = [device.layer(PLACES) for _ in range(3)]
    device.kept = list(layers)
    device.residency.tidy()
    for layer in layers:
        device.use(layer)
    if together:
        both = (*layers[0], *layers[2])
        assert device.residency.try_place(both, 0)
        device.residency.unpin(both, (layers[0], layers[2]))
        device.residency.let_go(both)
    else:
        device.use(layers[0])
        device.use(layers[2])
    device.kept = []
    for number in (1, 0, 2):
        device.residency.make_room(device.hbm.free_bytes + 1)
        assert layers[number][0].device is None
        assert device.hbm.free_bytes % EXTENT == 0


def test_places_between_others_that_are_enough_are_taken_before_anything_goes():
    device = Device(4)
    kept, idle = [device.layer(PLACES // 2) for _ in range(4)], device.layer(PLACES)
    fillers = [device.layer(PLACES // 2) for _ in range(2)]
    for layer in (kept[0], fillers[0], kept[1], fillers[1], idle):
        device.use(layer)
    device.kept = kept
    for layer in fillers:
        for page in layer:
            device.residency.drop(page)
    device.use((), 0)
    assert device.hbm.try_reserve(device.hbm.free_bytes)
    device.use(device.layer(PLACES))
    assert all(page.device is not None for page in idle)


def test_a_heap_of_extents_with_room_does_not_grow():
    device = Device(4)
    for _ in range(1000):
        whole = device.pool.try_allocate_extent(PAGE, PLACES)
        for slot in whole:
            device.pool.free(slot)
    assert sum(map(len, device.pool._with_room.values())) <= 64 + 1


def test_what_is_lost_with_its_worker_is_kept_no_more():
    device, layer = keeping(extents=2)
    device.residency.forget()
    assert all((page.spared, page.pins, page.device) == (0, 0, None) for page in layer)
    assert device.residency.pages() == []
    device.use(layer)
    device.residency.tidy()
    assert {page.spared for page in layer} == {1}


@pytest.mark.parametrize("again", [False, True])
def test_what_is_kept_is_not_evicted_and_what_is_not_any_more_is(again):
    device = Device(3)
    layers = [device.layer(PLACES) for _ in range(3)]
    for layer in layers:
        device.use(layer)
    device.kept = layers[:2]
    assert not device.residency.try_place((), 2 * EXTENT)
    assert [layer[0].device is None for layer in layers] == [False, False, True]
    if again:  # a layer that is kept and gone comes back to where it may be evicted from
        device.residency.drop(layers[0][0])
        device.use(layers[0])
    device.kept = layers[1:2]
    assert device.residency.try_place((), 2 * EXTENT)
    assert layers[1][0].device is not None
    device.kept = []
    device.residency.tidy()
    assert all(page.spared == page.pins == 0 for layer in layers for page in layer)
    device.residency.evict_all()
    assert len(device.residency) == device.residency.resident_bytes == 0


def test_a_page_that_is_gone_while_it_was_kept_leaves_nothing_behind():
    device, layer = keeping(extents=3)
    for page in layer:
        device.residency.drop(page)
    assert (device.hbm.free_bytes, len(device.residency)) == (3 * EXTENT, 0)
    device.kept = []
    device.residency.tidy()
    assert device.residency.try_place((), 3 * EXTENT)
