from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool
from streamindex_service.core.sizes import MAX_BYTES, KeyFormat, KvFormat, RowForm, pages_of, product
from streamindex_service.errors import InvalidArgumentError


@given(st.lists(st.integers(0, 120), max_size=40))
def test_a_ledger_never_passes_its_limit(sizes):
    ledger, held = Ledger("x", 300), []
    for size in sizes:
        if ledger.try_reserve(size):
            held.append(size)
        elif held:
            ledger.release(held.pop())
        assert ledger.reserved_bytes == sum(held) <= 300
        assert ledger.free_bytes == 300 - sum(held)
        assert ledger.peak_bytes >= ledger.reserved_bytes


def test_a_ledger_reserves_all_or_nothing():
    ledger = Ledger("x", 10)
    assert ledger.try_reserve(10)
    assert not ledger.try_reserve(1)
    assert (ledger.reserved_bytes, ledger.peak_bytes) == (10, 10)
    assert ledger.try_reserve(0)


@pytest.mark.parametrize("size", [11, -1])
def test_a_ledger_that_is_given_back_what_it_never_gave(size):
    ledger = Ledger("x", 100)
    ledger.try_reserve(10)
    with pytest.raises(AssertionError):
        ledger.release(size)


@given(st.lists(st.integers(0, 2**64 - 1), max_size=5))
def test_products_that_pass_63_bits_are_refused(factors):
    exact = 1
    for factor in factors:
        exact *= factor
    if exact <= MAX_BYTES:
        assert product("f", *factors) == exact
    else:
        with pytest.raises(InvalidArgumentError) as caught:
            product("f", *factors)
        assert caught.value.field == "f"


def test_sizes():
    assert RowForm.of_keys(KeyFormat.BF16, 128).page_bytes == 65_536
    assert RowForm.of_keys(KeyFormat.FP8_E4M3, 128).page_bytes == 256 * (128 + 4)
    assert RowForm.of_kv(KvFormat.BF16, 512).page_bytes == 256 * 1024
    assert RowForm.of_kv(KvFormat.FP8_D512, 512).page_bytes == 256 * 584
    assert RowForm.of_kv(KvFormat.FP8_D576, 576).page_bytes == 256 * 656
    assert [pages_of(keys) for keys in (0, 1, 256, 257)] == [0, 1, 1, 2]


class Pool:
    """A pool, and what its extents and pages are, counted apart."""

    def __init__(self, limit: int, extent: int) -> None:
        self.ledger = Ledger("x", limit)
        self.extents: dict[int, int] = {}
        self.pool = PagePool(self.ledger, extent, self.extents.__setitem__, self.extents.__delitem__)
        self.pages: list[tuple] = []

    def check(self):
        assert self.ledger.reserved_bytes == sum(self.extents.values()) <= self.ledger.limit_bytes
        assert self.pool.pages_in_use == len(self.pages)
        spans = sorted((slot.extent_id, slot.offset_bytes, size) for slot, size in self.pages)
        for extent_id, offset, size in spans:
            assert 0 <= offset <= offset + size <= self.extents[extent_id]
        for (extent, offset, size), (next_extent, next_offset, _) in itertools.pairwise(spans):
            assert extent != next_extent or offset + size <= next_offset, "two pages overlap"


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_of_pages(seed):
    random = np.random.default_rng(seed)
    sizes = [512, 1024, 1280]
    world = Pool(limit=int(random.integers(3_000, 40_000)), extent=4096)
    for _ in range(1500):
        if random.random() < 0.5 + 0.3 * np.sin(_ / 100):
            size = int(random.choice(sizes))
            room = world.pool.room(size)
            slot = world.pool.try_allocate(size)
            assert (slot is None) == (room == 0)
            if slot is not None:
                world.pages.append((slot, size))
        elif world.pages:
            slot, _size = world.pages.pop(int(random.integers(len(world.pages))))
            world.pool.free(slot)
        world.check()
    for slot, _size in world.pages:
        world.pool.free(slot)
    assert (world.ledger.reserved_bytes, world.extents) == (0, {})


def test_the_whole_budget_can_be_used_to_the_last_page():
    world = Pool(limit=10 * 512 + 511, extent=4096)
    slots = [world.pool.try_allocate(512) for _ in range(11)]
    assert slots[-1] is None
    assert None not in slots[:10]


def test_pages_come_from_the_oldest_extent_so_that_younger_ones_empty_out():
    world = Pool(limit=10_000, extent=1024)
    slots = [world.pool.try_allocate(512) for _ in range(6)]
    assert [slot.extent_id for slot in slots] == [1, 1, 2, 2, 3, 3]
    for slot in (slots[0], slots[2], slots[4]):
        world.pool.free(slot)
    assert world.pool.try_allocate(512) == slots[0]
    world.pool.free(slots[5])
    assert set(world.extents) == {1, 2}


@pytest.mark.parametrize("backwards", [False, True])
def test_pages_that_are_taken_together_lie_one_after_another(backwards):
    """In whatever order they were freed: so that they are one copy."""
    pool = PagePool(Ledger("hbm", 100), 100, lambda *_: None, lambda *_: None)
    pages = pool.try_allocate_some(10, 10)
    for page in pages[8:1:-1] if backwards else pages[2:9]:
        pool.free(page)
    assert pool.try_allocate_some(10, 7) == pages[2:9]


def test_pages_of_one_size_never_fragment_and_an_extent_is_of_one_size_until_its_pages_go_or_move():
    world = Pool(limit=4096, extent=1024)
    slots = [world.pool.try_allocate(512) for _ in range(8)]
    kept = slots[::2]  # one of each extent
    for slot in slots[1::2]:
        world.pool.free(slot)
    assert world.pool.try_allocate(256) is None
    again = [world.pool.try_allocate(512) for _ in range(4)]
    assert sorted(again, key=str) == sorted(slots[1::2], key=str)
    world.pool.free(kept[0])
    world.pool.free(next(slot for slot in again if slot.extent_id == kept[0].extent_id))
    assert [world.pool.try_allocate(256).extent_id for _ in range(4)] == [5] * 4
    assert world.pool.try_allocate(256) is None
    # Host pages stay where they are. Whoever has copies of them elsewhere moves them: see test_core_moved_pages.py.
    for slot in kept[1:3]:
        world.pool.free(slot)
    (emptied,) = world.pool.sparse(1024)
    world.pool.close([emptied])
    assert world.pool.try_allocate(512).extent_id != emptied
    world.pool.free(next(slot for slot in again if slot.extent_id == emptied))
    assert [world.pool.try_allocate(256).extent_id for _ in range(4)] == [6] * 4


def test_an_extent_that_cannot_be_made_costs_nothing():
    def fail(extent_id, size):
        raise OSError("no memory")

    ledger = Ledger("x", 10_000)
    pool = PagePool(ledger, 1024, fail, lambda extent_id: None)
    with pytest.raises(OSError, match="no memory"):
        pool.try_allocate(512)
    assert ledger.reserved_bytes == 0


def test_a_page_freed_twice_is_noticed():
    world = Pool(limit=10_000, extent=1024)
    first = world.pool.try_allocate(512)
    world.pool.free(first)
    with pytest.raises(KeyError):  # the extent went with its last page
        world.pool.free(first)


def test_reset_forgets_everything():
    world = Pool(limit=10_000, extent=1024)
    for _ in range(5):
        world.pool.try_allocate(512)
    world.pool.reset()
    assert (world.ledger.reserved_bytes, world.pool.pages_in_use) == (0, 0)
    assert world.pool.try_allocate(512).extent_id == 4  # numbers are never used twice


def test_a_steady_state_takes_no_more_and_more_memory():
    """One page comes and goes beside one that stays."""
    world = Pool(limit=10_000, extent=1024)
    world.pool.try_allocate(512)
    for _ in range(1000):
        world.pool.free(world.pool.try_allocate(512))
    assert sum(len(heap) for heap in world.pool._with_room.values()) <= 2
