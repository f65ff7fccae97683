"""Pages move together, so that sparse extents of one page size keep no memory from pages of another."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from streamindex_service.core.accounts import NO_QUOTA, Account
from streamindex_service.core.band_queue import Band
from streamindex_service.core.layers import Page
from streamindex_service.core.ledger import Ledger
from streamindex_service.core.pages import PagePool, PageSlot
from streamindex_service.core.residency import Residency
from streamindex_service.core.sizes import KeyFormat
from streamindex_service.core.turns import Need
from streamindex_service.testing.invariants import least_given_back
from tests.support.core_world import EXTENT_BYTES, OWNER, Memory, World, spec

KIB, MIB = 1024, 1 << 20
# bf16 and fp8 keys of 128 elements, KV rows of both fp8 formats: none is a multiple of another
SIZES = (65_536, 33_792, 149_504, 167_936)
ACCOUNT = Account(OWNER, NO_QUOTA)


class Pool:
    """A pool, and which page lies where."""

    def __init__(self, limit: int, extent: int) -> None:
        self.ledger, self.memory = Ledger("x", limit), Memory()
        self.pool = PagePool(self.ledger, extent, self.memory.make, self.memory.drop)
        self.sizes: dict[PageSlot, int] = {}  # of the pages that are allocated

    def in_extent(self, extent_id: int) -> list[PageSlot]:
        return [slot for slot in self.sizes if slot.extent_id == extent_id]

    def free_places(self, size: int) -> int:
        extents = {slot.extent_id for slot, each in self.sizes.items() if each == size}
        return sum(self.memory.extents[extent_id] // size - len(self.in_extent(extent_id)) for extent_id in extents)

    def given_back(self, stuck: set[int]) -> int:
        """Bytes that moving gives back, whatever is moved first."""
        total = 0
        for size in set(self.sizes.values()):
            extents = {slot.extent_id for slot, each in self.sizes.items() if each == size} - stuck
            if extents:
                places = [self.memory.extents[extent_id] // size for extent_id in extents]
                total += size * least_given_back(places, self.free_places(size))
        return total

    def empty(self, extent_ids: list[int]) -> None:
        """Move all pages out of them, as the residency does."""
        self.pool.close(extent_ids)
        for extent_id in extent_ids:
            for slot in self.in_extent(extent_id):
                size = self.sizes.pop(slot)
                place = self.pool.try_allocate(size)
                assert place is not None
                assert place.extent_id not in extent_ids
                assert place not in self.sizes
                self.sizes[place] = size
                self.pool.free(slot)


def test_extents_that_are_found_can_be_emptied_and_none_is_overlooked():
    found = [sum(each) for each in zip(*(history_of_a_pool(seed) for seed in range(30)), strict=True)]
    assert min(found) > 300, found


def history_of_a_pool(seed: int) -> tuple[int, int]:
    """How often extents were found, and how often none."""
    random = np.random.default_rng(seed)
    world = Pool(
        limit=int(random.integers(4 * MIB, 20 * MIB)), extent=int(random.choice([256 * KIB, MIB, 3 * MIB // 2]))
    )
    found_some = refused = 0
    for step in range(400):
        size = int(random.choice(SIZES))
        if random.random() < 0.5 + 0.3 * np.sin(step / 40):
            for slot in world.pool.try_allocate_some(size, int(random.integers(1, 20))):
                world.sizes[slot] = size
        slots = list(world.sizes)
        for at in sorted(random.choice(len(slots), len(slots) // 12, replace=False), reverse=True):
            world.sizes.pop(slots[at])
            world.pool.free(slots[at])
        extents = list(world.memory.extents)
        stuck = {extent_id for extent_id in extents if random.random() < 0.2}
        sure_bytes = world.given_back(stuck)
        free_bytes = world.ledger.free_bytes
        before = dict(world.sizes)
        assert world.pool.sparse(world.ledger.limit_bytes + 1, stuck) == []
        # exactly what must come, and more than that
        wanted_bytes = free_bytes + (sure_bytes if step % 2 and sure_bytes else int(random.integers(1, 4 * MIB)))
        found = world.pool.sparse(wanted_bytes, stuck)
        assert before == world.sizes, "a question changes nothing"
        assert not stuck.intersection(found)
        if not found:
            refused += 1
            assert wanted_bytes > free_bytes + sure_bytes
            continue
        found_some += 1
        gained = sum(world.memory.extents[extent_id] for extent_id in found)
        moved = sum(world.sizes[slot] for extent_id in found for slot in world.in_extent(extent_id))
        assert moved <= gained
        last = world.memory.extents[found[-1]]
        assert free_bytes + gained - last < wanted_bytes <= free_bytes + gained, "no more than is needed"
        world.empty(found)
        assert not set(found).intersection(world.memory.extents)
        assert set(extents).issuperset(world.memory.extents), "an extent was made for pages that move"
        assert world.ledger.free_bytes == free_bytes + gained
        assert world.pool.pages_in_use == len(world.sizes)
    for slot in list(world.sizes):
        world.pool.free(slot)
    assert (world.ledger.reserved_bytes, world.memory.extents) == (0, {})
    return found_some, refused


def test_what_has_the_least_to_be_moved_goes_first():
    world = Pool(limit=3072, extent=1024)
    slots = [world.pool.try_allocate(256) for _ in range(12)]
    for slot in (*slots[:2], *slots[4:7], slots[9]):  # 2, 1 and 3 are left of four places each
        world.pool.free(slot)
    assert world.pool.sparse(1) == [2]
    assert world.pool.sparse(1, {2}) == [1]
    assert world.pool.sparse(1025) == []  # six places are free, and two extents have eight


# What the residency makes of it.


class Device:
    """A residency on memory that remembers what was copied where. Sequences of pages are layers, or parts of them."""

    def __init__(self, limit: int, extent: int) -> None:
        self.hbm, self.memory = Ledger("hbm", limit), Memory()
        pool = PagePool(self.hbm, extent, self.memory.make, self.memory.drop)
        self.residency = Residency(self.hbm, pool, self.load)
        self.loads: list[Page] = []
        self._hosts = itertools.count()

    def load(self, page: Page) -> None:
        assert page.host is not None
        assert page.device is not None
        self.memory.content[page.device] = id(page)
        self.loads.append(page)

    def pages(self, size: int, count: int) -> tuple[Page, ...]:
        return tuple(Page(PageSlot(1, next(self._hosts)), size, ACCOUNT, None) for _ in range(count))

    def place(self, pages: Sequence[Page], workspace_bytes: int = 0) -> bool:
        return self.residency.try_place(pages, workspace_bytes)

    def scatter(self, size: int, extents: int, places: int) -> list[tuple[Page, ...]]:
        """Layers of a page each, each in an extent of its own that has so many places. No tile uses them; they are
        kept."""
        layers = [self.pages(size, 1) for _ in range(extents * places)]
        for layer in layers:
            assert self.place(layer)
            self.residency.unpin(layer)
        for layer in layers:
            self.residency.let_go(layer)
            if layer not in layers[::places]:
                self.residency.drop(layer[0])
        self.residency.kept = lambda: layers[::places]
        self.loads.clear()
        return layers[::places]


def test_sparse_extents_of_one_size_make_room_for_pages_of_another():
    device = Device(limit=4 * MIB, extent=MIB)
    layers = device.scatter(65_536, extents=4, places=16)
    residency = device.residency
    assert (device.hbm.free_bytes, len(residency), residency.moves) == (0, 4, 60)
    other = device.pages(167_936, 18)  # six go into a MiB
    assert device.place(other)
    assert [page.device is not None for layer in layers for page in layer] == [True] * 4
    assert len({layer[0].device.extent_id for layer in layers}) == 1
    assert (residency.moved_pages, residency.evicted_pages, residency.promoted_pages) == (3, 0, 64 + 18)
    assert residency.resident_bytes == 4 * 65_536 + 18 * 167_936
    assert residency.moves > 60
    assert device.loads[:3] == [
        page for page in device.loads[:3] if page.page_bytes == 65_536
    ]  # before what came for it
    for page in (*other, *(layer[0] for layer in layers)):
        assert device.memory.content[page.device] == id(page)


def test_a_workspace_finds_room_as_pages_do_and_what_does_not_help_is_not_done():
    device = Device(limit=4 * MIB, extent=MIB)
    device.scatter(33_792, extents=4, places=31)
    rest = device.hbm.free_bytes  # what 31 pages leave of each MiB
    extent = 31 * 33_792
    assert not device.place((), 3 * extent + rest + 1)
    assert (device.loads, device.residency.moved_pages) == ([], 0)
    assert device.place((), 3 * extent + rest)
    assert (len(device.loads), device.hbm.free_bytes) == (3, 0)
    assert device.residency.evicted_pages == 0


def test_pages_that_a_tile_uses_stay_and_those_that_are_pinned_for_the_next_move():
    device = Device(limit=4 * MIB, extent=MIB)
    layers = device.scatter(65_536, extents=4, places=16)
    for layer in layers:
        assert device.place(layer)
    places = [layer[0].device for layer in layers]
    for layer in layers[1:]:
        device.residency.unpin(layer)
    assert device.place((), 3 * MIB)
    assert layers[0][0].device == places[0]
    assert device.residency.moved_pages == 3
    assert {layer[0].device.extent_id for layer in layers} == {places[0].extent_id}
    assert {layer[0].pins for layer in layers} == {1}


def test_a_page_that_two_layers_share_stays_while_a_tile_of_either_runs():
    device = Device(limit=4 * MIB, extent=MIB)
    layers = device.scatter(65_536, extents=4, places=16)
    forks = [(page,) for (page,) in layers]
    for layer, fork in zip(layers, forks, strict=True):
        assert device.place(layer)
        assert device.place(fork)
        device.residency.unpin(layer)
    places = [layer[0].device for layer in layers]
    assert not device.place((), 1)
    assert [layer[0].device for layer in layers] == places
    for fork in forks:
        device.residency.unpin(fork)
    assert device.place((), 3 * MIB)


def test_a_tile_s_own_pages_may_move_before_it_has_begun():
    device = Device(limit=4 * MIB, extent=MIB)
    layers = device.scatter(65_536, extents=4, places=16)
    whole = tuple(page for layer in layers for page in layer)
    assert device.place(whole, 2 * MIB)
    assert device.residency.moved_pages == 2
    device.hbm.release(2 * MIB)
    device.residency.unpin(whole)
    assert device.place(whole, 3 * MIB)  # the next tile of the same search, with a larger workspace
    assert device.residency.moved_pages == 3
    assert not device.place(whole, 1)  # and one beside it: none is left over
    assert {page.pins for page in whole} == {1}
    device.hbm.release(3 * MIB)
    device.residency.unpin(whole)
    assert device.residency.let_go(whole)


@pytest.mark.parametrize("why", ["copied", "on disk"])
def test_a_page_without_a_copy_at_rest_in_memory_stays(why):
    device = Device(limit=4 * MIB, extent=MIB)
    layers = device.scatter(65_536, extents=4, places=16)
    for (page,) in layers[:2]:
        if why == "copied":
            page.copies = 1
        else:
            page.host, page.spilled = None, PageSlot(5, 0)
    places = [layer[0].device for layer in layers]
    assert not device.place((), 2 * MIB + 1)
    assert device.place((), 2 * MIB)
    assert [layer[0].device for layer in layers[:2]] == places[:2]
    assert {layer[0].device.extent_id for layer in layers[2:]} <= {place.extent_id for place in places[:2]}


def test_an_extent_that_has_to_stay_hides_no_other():
    """Of three lengths, as at the end of a budget: the one that has the least to be moved is in use."""
    size = 65_536
    device = Device(limit=14 * size, extent=6 * size)
    residency, layers = device.residency, []
    for places, beside in ((6, 0), (5, 3), (3, 0)):
        assert device.hbm.try_reserve(beside * size)
        layers.append([device.pages(size, 1) for _ in range(places)])
        for layer in layers[-1]:
            assert device.place(layer)
        device.hbm.release(beside * size)
    assert list(device.memory.extents.values()) == [6 * size, 5 * size, 3 * size]
    in_use = [*layers[0][:4], layers[2][0]]
    kept = [*in_use, *layers[1][:3]]
    residency.kept = lambda: kept
    for layer in itertools.chain.from_iterable(layers):
        if layer not in in_use:
            residency.unpin(layer)
        if layer not in kept:
            residency.let_go(layer)
            residency.drop(layer[0])
    assert device.place((), 5 * size)
    assert residency.moved_pages == 3
    assert list(device.memory.extents.values()) == [6 * size, 3 * size]


def test_nobody_leaves_the_working_set_for_what_others_left_behind():
    """A layer in use lies scattered over extents whose other pages are gone, and one of another format comes."""
    world = World(hbm_bytes=6 * EXTENT_BYTES + 10_000, host_bytes=10_000_000)
    world.governor.device_ready()
    caches = [world.store.create(OWNER, spec(KeyFormat.BF16, 16, layers=1)) for _ in range(8)]  # 8 pages an extent
    for _ in range(6):
        for cache in caches:
            world.write(cache, 0, cache.layers[0].length_keys, 256)
            world.end(world.search(cache, 0, 1, 1))
    governor, residency, grants = world.governor, world.governor.residency, []
    snapshot = world.store.snapshot(caches[0], 0)
    need = Need(snapshot.pages, 1, 1, 1)
    in_use = governor.open(snapshot, OWNER, Band.STANDARD, need, 0.0, None)
    governor.request(in_use, need, grants.append, lambda error: None)
    governor.finish(grants[0], 0.001)
    for cache in caches[1:]:
        world.delete(cache)
    world.clock.advance(1.0)
    governor.expire()  # nobody is there for theirs
    assert len({page.device.extent_id for page in snapshot.pages}) == 6
    evicted = residency.evicted_pages
    other = world.store.create(OWNER, spec(KeyFormat.FP32, 16, layers=1))  # 4 pages an extent
    world.write(other, 0, 0, 20 * 256)
    search = world.search(other, 0, 1, 1)
    assert search.grant is not None
    assert len(governor.working_set) == 2
    assert (residency.evicted_pages, residency.moved_pages) == (evicted, 5)
    governor.request(in_use, need, grants.append, lambda error: None)
    for page in snapshot.pages:
        assert world.device_memory.content[page.device] == world.host_memory.content[page.in_host]
    governor.finish(grants[1], 0.001)
    world.end(search)
    governor.close(in_use)
    world.store.release_snapshot(snapshot)
    world.check()


# Any history of it.


class History:
    """Layers of ragged pages, some of them shared; tiles that read them; copies that take a while; keys that go to disk
    and come back. A seed says all of it."""

    def __init__(self, seed: int) -> None:
        self.random = random = np.random.default_rng(seed)
        limit, extent = int(random.integers(3 * MIB, 12 * MIB)), int(random.choice([256 * KIB, MIB]))
        self.counts: Counter[str] = Counter()
        self.device = Device(limit, extent)
        self.residency, self.hbm = self.device.residency, self.device.hbm
        self.residency.kept = lambda: self.kept
        self.layers: list[tuple[Page, ...]] = []
        for _ in range(14):
            size = int(random.choice(SIZES))
            pages = self.device.pages(size, int(random.integers(1, max(2, limit // size // 4))))
            self.layers += [pages, pages[: len(pages) // 2 + 1] + self.device.pages(size, 2)]  # and a fork of it
        self.kept: list[tuple[Page, ...]] = []
        self.tiles: list[tuple[tuple[Page, ...], int, list[PageSlot]]] = []

    @property
    def pages(self) -> set[Page]:
        return {page for layer in self.layers for page in layer}

    def some(self, items: Sequence) -> int:
        return int(self.random.integers(len(items)))

    def run(self, steps: int) -> None:
        steps_and_odds = {
            "place": 0.36,
            "end": 0.3,
            "let_go": 0.06,
            "drop": 0.12,
            "keep": 0.04,
            "copy": 0.06,
            "disk": 0.06,
        }
        for _ in range(steps):
            step = str(self.random.choice(list(steps_and_odds), p=list(steps_and_odds.values())))
            getattr(self, step)()
            self.check()
        while self.tiles:
            self.end()
        self.kept = []
        self.residency.evict_all()
        assert (self.hbm.reserved_bytes, self.residency.resident_bytes) == (0, 0)
        self.counts["moved"] += self.residency.moved_pages

    def place(self) -> None:
        layer = self.layers[self.some(self.layers)]
        for page in layer:  # a search does not begin before its keys are in memory
            if page.host is None:
                page.host, page.spilled = page.spilled, None
        workspace = int(self.random.choice([1, 100_000, 300_000, MIB]))
        if len(self.tiles) > 3 or sum(page.page_bytes for page in layer) + workspace > self.hbm.limit_bytes:
            return
        if self.residency.try_place(layer, workspace):
            self.tiles.append((layer, workspace, [page.device for page in layer]))
            self.counts["placed"] += 1
        else:
            self.refused(layer, workspace)

    def end(self) -> None:
        if self.tiles:
            layer, workspace, places = self.tiles.pop(self.some(self.tiles))
            assert [page.device for page in layer] == places, "pages moved while a tile read them"
            self.hbm.release(workspace)
            self.residency.unpin(layer)

    def let_go(self) -> None:
        self.residency.let_go(self.layers[self.some(self.layers)])

    def drop(self) -> None:
        """Keys are truncated, or a cache is deleted: some of its pages are gone."""
        for page in list(self.residency._unpinned):
            if self.random.random() < 0.5:
                self.residency.drop(page)

    def keep(self) -> None:
        self.kept = [layer for layer in self.layers if self.random.random() < 0.2]

    def copy(self) -> None:
        for page in self.pages:
            page.copies = int(page.device is not None and self.random.random() < 0.05)

    def disk(self) -> None:
        for page in self.pages:
            if page.host is not None and not page.pins and self.random.random() < 0.1:
                page.host, page.spilled = None, page.host

    def refused(self, layer: tuple[Page, ...], workspace: int) -> None:
        """Nothing could be evicted any more, and free places do not add up."""
        kept = {page for each in self.kept for page in each}
        assert not [page for page in self.residency._unpinned if page not in kept and page not in layer]
        in_use = {page for each, _, _ in self.tiles for page in each}
        lying: dict[int, list[Page]] = {}
        for page in self.pages:
            if page.device is not None:
                lying.setdefault(page.device.extent_id, []).append(page)
        size, missing = layer[0].page_bytes, sum(page.device is None for page in layer)
        room_bytes, stuck_places = self.hbm.free_bytes, 0
        for each in SIZES:
            extents = {extent_id: pages for extent_id, pages in lying.items() if pages[0].page_bytes == each}
            places = {extent_id: self.device.memory.extents[extent_id] // each for extent_id in extents}
            free = sum(places.values()) - sum(map(len, extents.values()))
            movable = [
                places[extent_id]
                for extent_id, pages in extents.items()
                if not any(page in in_use or page.copies or page.host is None for page in pages)
            ]
            if each == size and missing:
                missing = max(0, missing - free)
            elif movable:
                room_bytes += each * least_given_back(movable, free)
            stuck_places += free
        assert workspace + missing * size > room_bytes
        self.counts["refused"] += 1
        self.counts["refused with free places"] += stuck_places > 0

    def check(self) -> None:
        memory, residency = self.device.memory, self.residency
        assert self.hbm.reserved_bytes == sum(memory.extents.values()) + sum(each for _, each, _ in self.tiles)
        resident = [page for page in self.pages if page.device is not None]
        assert len(resident) == len(residency) == residency.device.pages_in_use
        assert len({page.device for page in resident}) == len(resident)
        assert residency.resident_bytes == sum(page.page_bytes for page in resident)
        for page in resident:
            assert memory.content[page.device] == id(page)
            assert page.device.offset_bytes + page.page_bytes <= memory.extents[page.device.extent_id]
        for layer, _, places in self.tiles:
            assert [page.device for page in layer] == places
        assert len(self.device.loads) == residency.promoted_pages + residency.moved_pages


def test_any_history():
    counts: Counter[str] = Counter()
    for seed in range(40):
        history = History(seed)
        history.run(250)
        counts += history.counts
    for name in ("placed", "refused", "refused with free places", "moved"):
        assert counts[name] > 100, counts
