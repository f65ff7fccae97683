"""How many caches are on the device and on disk, at each of the moments in which it changes."""

from __future__ import annotations

import pytest

from streamindex_service.core.census import Residence
from tests.support.core_world import OWNER, World, check_census, spec

PAGE_ROWS = 256


@pytest.fixture
def world():
    made = World()
    made.governor.device_ready()
    return made


def counts(world):
    check_census(world.store)
    found = world.store.census.by_residence
    return found[Residence.DEVICE], found[Residence.PARTIAL], found[Residence.NONE]


def made(world, layers=1, pages=3):
    cache = world.store.create(OWNER, spec(layers=layers))
    for layer in range(layers):
        world.write(cache, layer, 0, pages * PAGE_ROWS)
    return cache


def searched(world, cache, layer=0):
    world.end(world.search(cache, layer, PAGE_ROWS, PAGE_ROWS), 0.001)


def test_a_cache_without_rows_is_nowhere(world):
    cache = world.store.create(OWNER, spec())
    assert counts(world) == (0, 0, 0)
    world.write(cache, 0, 0, 1)
    assert counts(world) == (0, 0, 1)
    world.store.truncate(cache, 0, None)
    assert counts(world) == (0, 0, 0)


def test_a_cache_comes_layer_by_layer_and_goes_at_once(world):
    cache = made(world, layers=2)
    searched(world, cache, 0)
    assert counts(world) == (0, 1, 0)
    searched(world, cache, 1)
    assert counts(world) == (1, 0, 0)
    world.governor.residency.evict_all()
    assert counts(world) == (0, 0, 1)


def test_rows_that_are_written_are_not_on_the_device(world):
    cache = made(world)
    searched(world, cache)
    world.write(cache, 0, 3 * PAGE_ROWS, 1)
    assert counts(world) == (0, 1, 0)
    world.store.truncate(cache, 3 * PAGE_ROWS, None)
    assert counts(world) == (1, 0, 0)
    world.write(cache, 0, 0, 3 * PAGE_ROWS)
    assert counts(world) == (0, 0, 1)


def test_a_fork_is_where_its_pages_are(world):
    cache = made(world)
    searched(world, cache)
    fork = world.store.fork(cache, PAGE_ROWS)
    assert counts(world) == (2, 0, 0)
    world.write(fork, 0, PAGE_ROWS, PAGE_ROWS)
    assert counts(world) == (1, 1, 0)
    world.delete(cache)
    assert counts(world) == (0, 1, 0)
    world.governor.residency.evict_all()
    assert counts(world) == (0, 0, 1)
    world.delete(fork)
    assert counts(world) == (0, 0, 0)


def test_pages_that_are_shared_come_and_go_for_all_who_show_them(world):
    cache = made(world)
    fork = world.store.fork(cache, None)
    assert counts(world) == (0, 0, 2)
    searched(world, fork)
    assert counts(world) == (2, 0, 0)
    for page, expected in zip(fork.layers[0].pages, [(0, 2, 0), (0, 2, 0), (0, 0, 2)], strict=True):
        world.governor.residency.drop(page)
        assert counts(world) == expected


def test_nothing_is_on_a_device_that_is_lost(world):
    caches = [made(world) for _ in range(2)]
    searched(world, caches[0])
    assert counts(world) == (1, 0, 1)
    world.device_lost()
    assert counts(world) == (0, 0, 2)
