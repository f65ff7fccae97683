"""What a caller may hold, what bookkeeping costs, and who goes first when the host is short of memory."""

from __future__ import annotations

import pytest

from streamindex_service.core.accounts import Quota
from streamindex_service.core.caches import CACHE_RECORD_BYTES, FORKED_PAGE_BYTES, LAYER_RECORD_BYTES
from streamindex_service.core.sizes import KeyFormat
from streamindex_service.errors import HostMemoryError, TooManyError
from tests.support.core_world import OWNER, World, spec

KIND = spec(KeyFormat.BF16, 16, layers=1)  # pages of 8 KiB
PAGE = 8192


def with_quota(**quota) -> World:
    world = World(host_bytes=10_000_000)
    world.store.accounts.quota = Quota(**quota)
    return world


def test_a_caller_has_no_more_caches_than_its_quota():
    world = with_quota(caches=2)
    first, _ = (world.store.create(OWNER, KIND) for _ in range(2))
    for make in (lambda: world.store.create(OWNER, KIND), lambda: world.store.fork(first, None)):
        with pytest.raises(TooManyError) as caught:
            make()
        assert caught.value.metadata == {"key_caches": "2", "limit": "2"}
    world.store.create("other", KIND)
    world.delete(first)
    world.store.create(OWNER, KIND)
    world.check()


@pytest.mark.parametrize("bound", ["of all callers", "of one"])
def test_caches_that_have_expired_are_in_nobodys_way(bound):
    """Nobody is told of too many because the sweep has not come yet."""
    world = with_quota(caches=12 if bound == "of one" else None)
    world.store._max_caches = 100 if bound == "of one" else 12
    for _ in range(12):
        world.store.create(OWNER, KIND)
    with pytest.raises(TooManyError):
        world.store.create(OWNER, KIND)
    world.clock.advance(KIND.idle_ttl_s)
    made = world.store.create(OWNER, KIND)
    assert world.store.owned_by(OWNER, 0, 100) == [made]
    assert world.store.accounts.of(OWNER).caches == len(world.store) == 1
    world.check()


def test_a_caller_has_no_more_host_memory_than_its_quota():
    world = with_quota(host_bytes=3 * PAGE)
    cache, other = world.store.create(OWNER, KIND), world.store.create("other", KIND)
    world.write(cache, 0, 0, 3 * 256)
    fork = world.store.fork(cache, None)  # what is shared counts once
    with pytest.raises(HostMemoryError) as caught:
        world.write(fork, 0, 768, 1)
    figures = {"needed_bytes": str(PAGE), "reserved_bytes": str(3 * PAGE), "quota_bytes": str(3 * PAGE)}
    assert caught.value.metadata == figures
    world.write(other, 0, 0, 3 * 256)
    world.store.truncate(cache, 300, None)
    world.store.truncate(fork, 300, None)
    world.write(fork, 0, 300, 1)
    assert world.store.accounts.of(OWNER).host_bytes == 3 * PAGE


def test_a_caller_has_no_more_open_uploads_than_its_quota():
    world = with_quota(uploads=2)
    cache, other = world.store.create(OWNER, KIND), world.store.create("other", KIND)

    def start(at=cache):
        return world.uploads.start(at, 0, 0, 10, 1 << 20)

    first, second = start(), start()
    with pytest.raises(TooManyError) as caught:
        start()
    assert caught.value.metadata == {"open_uploads": "2", "limit": "2"}
    start(other)
    world.uploads.attach(first)
    world.uploads.hold(first, 10)
    first.rows_held = 10
    world.uploads.commit(first)  # remembered, and not open
    third = start()
    world.uploads.drop(second)
    start()
    world.uploads.drop(first)
    world.uploads.drop(third)
    assert world.store.accounts.of(OWNER).uploads == 1
    world.delete(cache)
    assert len(world.store.accounts) == 1
    assert world.store.accounts.of("other").uploads == 1


def test_an_account_goes_with_the_last_that_its_caller_holds():
    world = World()
    cache = world.store.create(OWNER, KIND)
    world.write(cache, 0, 0, 600)
    world.governor.device_ready()
    search = world.search(cache, 0, 1, 1)
    world.delete(cache)
    assert len(world.store.accounts) == 1  # the search still holds its pages
    world.end(search)
    assert len(world.store.accounts) == 0


def test_empty_layers_and_page_lists_count():
    world = World(host_bytes=400_000)
    cache = world.store.create(OWNER, spec(KeyFormat.BF16, 16, layers=200))
    assert world.host.reserved_bytes == CACHE_RECORD_BYTES + 200 * LAYER_RECORD_BYTES
    world.write(cache, 0, 0, 5 * 256)
    fork = world.store.fork(cache, 4 * 256)
    assert fork.record_bytes == cache.record_bytes + 4 * FORKED_PAGE_BYTES
    made = [cache, fork]
    room = world.host.free_bytes // (cache.record_bytes + 5 * FORKED_PAGE_BYTES)
    made += [world.store.fork(cache, None) for _ in range(room)]
    with pytest.raises(HostMemoryError) as caught:
        world.store.fork(cache, None)
    assert caught.value.metadata["needed_bytes"] == str(cache.record_bytes + 5 * FORKED_PAGE_BYTES)
    for each in made:
        world.delete(each)
    assert (world.host.reserved_bytes, len(world.store.accounts)) == (0, 0)


def test_what_has_expired_goes_before_anybody_is_refused():
    world = World(host_bytes=40 * PAGE)
    old = world.store.create(OWNER, spec(KeyFormat.BF16, 16, layers=1, ttl_s=5.0))
    world.write(old, 0, 0, 20 * 256)
    cache = world.store.create(OWNER, KIND)
    with pytest.raises(HostMemoryError):
        world.write(cache, 0, 0, 25 * 256)
    world.clock.advance(6.0)
    assert old.cache_id in world.store._caches
    world.write(cache, 0, 0, 25 * 256)
    assert old.deleted
    world.check()


def test_a_layer_knows_how_many_of_its_pages_are_on_the_device():
    world = World(hbm_bytes=8 * PAGE + 10)
    world.governor.device_ready()
    cache = world.store.create(OWNER, KIND)
    world.write(cache, 0, 0, 4 * 256)
    world.end(world.search(cache, 0, 1, 1))
    forks = [world.store.fork(cache, keys) for keys in (None, 600, 0)]
    assert [each.resident_bytes // PAGE for each in (cache, *forks)] == [4, 4, 3, 0]
    world.write(forks[0], 0, 0, 1)  # a page of its own
    world.store.truncate(forks[1], 256, None)
    assert [each.resident_bytes // PAGE for each in (cache, *forks)] == [4, 3, 1, 0]
    world.delete(cache)
    world.check()
    assert [each.resident_bytes // PAGE for each in forks] == [3, 1, 0]
    world.device_lost()
    assert [each.resident_bytes for each in forks] == [0, 0, 0]


def test_callers_are_listed_without_looking_at_the_others():
    world = World()
    mine = [world.store.create(OWNER, KIND) for _ in range(3)]
    world.store.create("other", KIND)
    assert world.store.owned_by(OWNER, 0, 10) == mine
    assert world.store.owned_by(OWNER, mine[0].created, 1) == mine[1:2]
    assert world.store.owned_by("nobody", 0, 10) == []
