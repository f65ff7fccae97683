"""Which pages go to disk and come back: the decisions, page by page, and the books."""

from __future__ import annotations

import pytest

from streamindex_service.core.census import Residence
from streamindex_service.core.layers import Page
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.spill import Spill
from streamindex_service.errors import ExceedsBudgetError, HostMemoryError
from tests.support.core_world import EXTENT_BYTES, OWNER, Memory, World, check_census, spec

PAGE = 256 * 16 * 2


class SpillWorld(World):
    """A world with a disk; what is written there is remembered."""

    def __init__(self, disk_bytes: int = 400_000, move_bytes: int = 1 << 20, **others) -> None:
        super().__init__(**others)
        self.disk, self.disk_memory = Ledger("spill", disk_bytes), Memory()
        pool = PagePool(self.disk, EXTENT_BYTES, self.disk_memory.make, self.disk_memory.drop)
        self.spill = Spill(self.store, pool, self.clock, move_bytes)

    def go(self, needed_bytes=1 << 30, idle_s=0.0, fails=False) -> list[Page]:
        """One move to disk; the pages that it was about."""
        move = self.spill.begin_spill(needed_bytes, idle_s)
        if move is None:
            return []
        for page, slot in zip(move.pages, move.slots, strict=True):
            self.disk_memory.content[slot] = self.host_memory.content[page.in_host]
        self.spill.end_spill(move, None if fails else [0] * len(move.pages))
        return move.pages

    def come_back(self, pages, fails=False) -> None:
        while missing := [page for page in pages if page.host is None]:
            move = self.spill.begin_restore(missing)
            assert move is not None
            for page, slot in zip(move.pages, move.slots, strict=True):
                self.host_memory.content[slot] = self.disk_memory.content[page.spilled]
            self.spill.end_restore(move, not fails)
            if fails:
                return

    def content(self, layer) -> list[int]:
        return [
            self.host_memory.content[page.host] if page.host else self.disk_memory.content[page.spilled]
            for page in layer.pages
        ]

    def check_books(self) -> None:
        """Both ledgers are what the memories hold, and every page has exactly one place."""
        records = sum(cache.record_bytes for cache in self.store._caches.values())
        assert self.disk.reserved_bytes == sum(self.disk_memory.extents.values())
        assert self.host.reserved_bytes == sum(self.host_memory.extents.values()) + records
        pages = {page: None for cache in self.store._caches.values() for each in cache.layers for page in each.pages}
        assert all((page.host is None) != (page.spilled is None) for page in pages)
        assert self.spill.disk.pages_in_use == sum(page.spilled is not None for page in pages)
        assert self.store.host.pages_in_use == sum(page.host is not None for page in pages)
        for cache in self.store._caches.values():
            for layer in cache.layers:
                assert layer.spilled_pages == sum(page.spilled is not None for page in layer.pages)
        check_census(self.store)


@pytest.fixture
def world():
    return SpillWorld()


def made(world, pages=4, layers=1, **others):
    cache = world.store.create(OWNER, spec(layers=layers, **others))
    for layer in range(layers):
        world.write(cache, layer, 0, pages * 256)
    world.clock.advance(1.0)
    return cache


def test_there_and_back(world):
    cache = made(world, pages=5)
    layer = cache.layers[0]
    before = world.content(layer)
    assert world.go() == layer.pages
    world.check_books()
    assert (cache.host_bytes, cache.spilled_bytes) == (0, 5 * PAGE)
    assert world.host.reserved_bytes == cache.record_bytes
    assert world.store.accounts.of(OWNER).host_bytes == 5 * PAGE  # a quota counts them all the same
    world.come_back(layer.pages)
    world.check_books()
    assert (cache.host_bytes, cache.spilled_bytes, world.disk.reserved_bytes) == (5 * PAGE, 0, 0)
    assert world.content(layer) == before
    assert (world.spill.spilled_pages, world.spill.restored_pages) == (5, 5)


def test_the_cache_used_longest_ago_goes_first(world):
    first, second, third = (made(world) for _ in range(3))
    world.store.get(OWNER, first.cache_id)
    world.clock.advance(1.0)
    assert set(world.go(needed_bytes=1)) <= set(second.layers[0].pages)
    assert set(world.go(needed_bytes=4 * PAGE)) <= {*second.layers[0].pages, *third.layers[0].pages}
    assert first.spilled_bytes == 0
    assert set(world.go(idle_s=1.5)) <= set(third.layers[0].pages)
    assert first.spilled_bytes == 0
    world.go()
    assert (first.spilled_bytes, second.spilled_bytes, third.spilled_bytes) == (4 * PAGE,) * 3
    assert world.go() == []


def test_no_more_goes_than_is_asked_for(world):
    cache = made(world, pages=9)
    assert len(world.go(needed_bytes=2 * PAGE + 1)) == 3
    assert cache.spilled_bytes == 3 * PAGE
    world.check_books()


def test_a_disk_takes_what_it_has_room_for():
    world = SpillWorld(disk_bytes=3 * PAGE)
    cache = made(world, pages=9)
    assert len(world.go()) == 3
    assert world.go() == []
    assert (cache.spilled_bytes, world.disk.reserved_bytes) == (3 * PAGE, 3 * PAGE)
    world.check_books()


def test_what_is_in_use_stays(world):
    cache = made(world, pages=2, layers=2)
    searched, idle = cache.layers
    snapshot = world.store.snapshot(cache, 0)
    idle.pages[0].pins += 1
    idle.pages[1].copies += 1
    assert world.go() == []
    world.store.release_snapshot(snapshot)
    assert world.go() == searched.pages
    idle.pages[0].pins -= 1
    idle.pages[1].copies -= 1
    cache.busy += 1
    assert world.go(idle_s=0.5) == []
    cache.busy -= 1
    assert world.go() == idle.pages
    world.check_books()


def test_layers_of_a_cache_in_use_go_last(world):
    used, idle = made(world), made(world)
    used.busy += 1
    assert world.go(needed_bytes=4 * PAGE) == idle.layers[0].pages
    assert world.go() == used.layers[0].pages
    world.check_books()


@pytest.mark.parametrize("change", ["search", "delete", "truncate", "rewrite"])
def test_what_happens_while_a_move_is_under_way(world, change):
    cache = made(world, pages=4)
    layer = cache.layers[0]
    move = world.spill.begin_spill(1 << 30)
    snapshot = None
    if change == "search":
        snapshot = world.store.snapshot(cache, 0)
    elif change == "delete":
        world.delete(cache)
    elif change == "truncate":
        world.store.truncate(cache, 300, 0)
    else:
        world.write(cache, 0, 0, 256)
    freed = world.spill.end_spill(move, [0] * 4)
    world.check_books()
    assert freed == {"search": 0, "delete": 0, "truncate": 2 * PAGE, "rewrite": 3 * PAGE}[change]
    assert cache.spilled_bytes == freed
    if snapshot is not None:
        world.store.release_snapshot(snapshot)
    assert world.disk.reserved_bytes == (0 if freed == 0 else EXTENT_BYTES)
    assert len(layer.pages) == {"search": 4, "delete": 0, "truncate": 2, "rewrite": 4}[change]


def test_a_write_that_fails_changes_nothing(world):
    cache = made(world)
    before = world.content(cache.layers[0])
    assert world.go(fails=True)
    assert (cache.spilled_bytes, world.disk.reserved_bytes) == (0, 0)
    assert world.content(cache.layers[0]) == before
    world.check_books()


def test_a_read_that_fails_leaves_the_page_on_disk(world):
    cache = made(world)
    world.go()
    world.come_back(cache.layers[0].pages, fails=True)
    assert cache.spilled_bytes == 4 * PAGE
    world.check_books()
    world.come_back(cache.layers[0].pages)
    assert cache.spilled_bytes == 0


def test_shared_pages_count_as_used_with_the_last_that_shows_them(world):
    source = made(world)
    fork = world.store.fork(source, 512)
    world.clock.advance(5.0)
    world.store.get(OWNER, fork.cache_id)
    assert world.go(idle_s=2.0) == source.layers[0].pages[2:]
    assert fork.spilled_bytes == 0
    world.go()
    assert (source.spilled_bytes, fork.spilled_bytes) == (4 * PAGE, 2 * PAGE)
    world.check_books()


def test_what_comes_back_for_a_fork_can_go_again_without_it(world):
    source = made(world)
    world.go()
    assert source not in world.store.by_use or world.go() == []
    fork = world.store.fork(source, None)
    world.come_back(fork.layers[0].pages)
    world.delete(fork)
    assert source.host_bytes == 4 * PAGE
    assert len(world.go()) == 4
    world.check_books()


def test_truncating_and_deleting_free_the_disk(world):
    cache = made(world, pages=8)
    fork = world.store.fork(cache, None)
    world.go()
    world.store.truncate(cache, 257, 0)
    world.store.truncate(fork, 1000, 0)
    world.check_books()
    assert world.spill.disk.pages_in_use == 4
    world.delete(cache)
    assert world.spill.disk.pages_in_use == 4
    world.delete(fork)
    assert (world.disk.reserved_bytes, world.host.reserved_bytes) == (0, 0)
    assert not world.disk_memory.extents


def test_a_copy_on_the_device_outlives_the_one_in_host_memory(world):
    world.governor.device_ready()
    cache = made(world)
    search = world.search(cache, 0, 1024, 1024)
    world.end(search, 0.001)
    world.go()
    assert (cache.host_bytes, cache.resident_bytes) == (0, 4 * PAGE)
    assert (world.store.census.by_residence[Residence.DEVICE], world.store.census.spilled) == (1, 1)
    world.check_books()
    world.delete(cache)
    assert (world.hbm.reserved_bytes, world.disk.reserved_bytes) == (0, 0)


def test_memory_comes_back_piece_by_piece():
    world = SpillWorld(move_bytes=2 * PAGE)
    cache = made(world, pages=5)
    while world.go():
        pass
    assert cache.spilled_bytes == 5 * PAGE
    move = world.spill.begin_restore(cache.layers[0].pages)
    assert len(move.pages) == 2
    world.spill.end_restore(move, False)
    world.check_books()


def test_a_system_that_lacks_memory_for_some_of_the_pages_gets_the_others_back():
    """The budget has room for all of them; what was taken for the first must not be forgotten."""
    world = SpillWorld()
    cache = made(world, pages=EXTENT_BYTES // PAGE + 2)
    while world.go():
        pass
    make, extents = world.store.host._make_extent, []

    def make_one(extent_id, extent_bytes):
        if extents:
            raise HostMemoryError("no descriptors")
        extents.append(extent_id)
        make(extent_id, extent_bytes)

    world.store.host._make_extent = make_one
    move = world.spill.begin_restore(cache.layers[0].pages)
    assert len(move.pages) == EXTENT_BYTES // PAGE
    with pytest.raises(HostMemoryError):
        world.spill.begin_restore(cache.layers[0].pages[len(move.pages) :])
    world.spill.end_restore(move, False)
    world.check_books()
    world.store.host._make_extent = make
    world.come_back(cache.layers[0].pages)
    world.delete(cache)
    assert (world.disk.reserved_bytes, world.host.reserved_bytes) == (0, 0)


def test_a_layer_larger_than_host_memory():
    world = SpillWorld(host_bytes=5 * PAGE + 10_000)
    cache = made(world, pages=4)
    world.go()
    world.write(cache, 0, 1024, 4 * 256)
    with pytest.raises(ExceedsBudgetError) as refused:
        world.spill.refuse_what_never_fits(cache.layers[0].pages)
    figures = {name: refused.value.metadata[name] for name in ("needed_bytes", "budget_bytes")}
    assert figures == {"needed_bytes": str(8 * PAGE), "budget_bytes": str(5 * PAGE + 10_000)}
