"""Seeded histories of the core: a seed replays a failure exactly."""

from __future__ import annotations

import numpy as np
import pytest

from streamindex_service.core.band_queue import Band
from streamindex_service.core.sizes import KeyFormat
from streamindex_service.core.turns import Need
from streamindex_service.errors import ServiceError
from tests.support.core_world import OWNER, World, choose, spec

SPECS = [
    spec(KeyFormat.BF16, 16),
    spec(KeyFormat.FP8_E4M3, 16),
    spec(KeyFormat.BF16, 32, layers=1, ttl_s=5.0),
    spec(KeyFormat.FP32, 16, layers=3),
]


class History:
    """One seed's history."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.world = World(
            hbm_bytes=int(self.random.integers(100_000, 500_000)),
            host_bytes=int(self.random.integers(300_000, 1_500_000)),
            max_device_turns=int(self.random.integers(2, 6)),
        )
        self.world.governor.device_ready()
        self.uploads = []
        self.counts: dict[str, int] = {}

    @property
    def caches(self):
        return list(self.world.store._caches.values())

    def run(self, steps: int) -> None:
        weights = {
            "create": 2, "append": 8, "rewrite": 3, "decode": 8, "truncate": 2, "fork": 2, "delete": 1,
            "search": 14, "end": 12, "start": 3, "feed": 12, "close": 3, "lose": 0.4, "ready": 1, "wait": 2,
        }  # fmt: skip
        names, odds = list(weights), np.array(list(weights.values()))
        for _ in range(steps):
            step = str(self.random.choice(names, p=odds / odds.sum()))
            try:
                if getattr(self, step)():
                    self.counts[step] = self.counts.get(step, 0) + 1
            except ServiceError as error:
                self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
            self.world.clock.advance(float(self.random.random()) / 10)
            self.world.check()
        self.wind_down()

    def create(self):
        self.world.store.create(OWNER, choose(self.random, SPECS))
        return True

    def pick(self):
        if not self.caches:
            return None, 0
        cache = choose(self.random, self.caches)
        return cache, int(self.random.integers(len(cache.layers)))

    def write(self, rows, back):
        cache, layer = self.pick()
        if cache is None:
            return False
        length = cache.layers[layer].length_keys
        first = max(0, length - int(self.random.integers(back + 1)))
        self.world.write(cache, layer, first, rows)
        assert cache.layers[layer].length_keys == max(length, first + rows)
        return True

    def append(self):
        return self.write(int(self.random.integers(1, 1500)), 0)

    def rewrite(self):
        return self.write(int(self.random.integers(1, 700)), 900)

    def decode(self):
        return self.write(1, 1)

    def truncate(self):
        cache, layer = self.pick()
        if cache is not None:
            keys = int(self.random.integers(cache.layers[layer].length_keys + 2))
            self.world.store.truncate(cache, keys, layer if self.random.integers(2) else None)
        return cache is not None

    def fork(self):
        cache, layer = self.pick()
        if cache is not None:
            keys = int(self.random.integers(cache.layers[layer].length_keys + 2))
            twin = self.world.store.fork(cache, keys if self.random.integers(2) else None)
            for source, target in zip(cache.layers, twin.layers, strict=True):
                assert target.pages == source.pages[: len(target.pages)]
        return cache is not None

    def delete(self):
        cache, _ = self.pick()
        if cache is not None:
            self.world.delete(cache)
        return cache is not None

    def search(self):
        cache, layer = self.pick()
        if cache is None:
            return False
        floor = int(self.random.integers(1, 60_000))
        deadline = float(self.random.random()) if self.random.integers(2) else None
        want, band = floor + int(self.random.integers(90_000)), Band(int(self.random.integers(1, 4)))
        return self.world.search(cache, layer, floor, want, deadline, band) is not None

    def end(self):
        if self.world.searches:
            self.world.end(choose(self.random, self.world.searches))
            return True
        return False

    def start(self):
        cache, layer = self.pick()
        if cache is None:
            return False
        length = cache.layers[layer].length_keys
        first, rows = int(self.random.integers(length + 1)), int(self.random.integers(1, 2000))
        upload = self.world.uploads.start(cache, layer, first, rows, 1 << 20)
        self.world.uploads.attach(upload)
        self.uploads.append(upload)
        return True

    def feed(self):
        if not self.uploads:
            return False
        upload = choose(self.random, self.uploads)
        rows = min(upload.row_count - upload.rows_held, int(self.random.integers(1, 700)))
        if rows:
            self.world.hold(upload, rows)
        elif not upload.committed:
            self.world.uploads.commit(upload)
        return True

    def close(self):
        if self.uploads:
            upload = self.uploads.pop(int(self.random.integers(len(self.uploads))))
            self.world.uploads.detach(upload)
            if upload.upload_id in self.world.uploads._uploads and self.random.integers(2):
                self.world.uploads.attach(upload)  # resumed
                self.uploads.append(upload)
            return True
        return False

    def lose(self):
        self.world.device_lost()
        return True

    def ready(self):
        self.world.governor.device_ready()
        return True

    def wait(self):
        self.world.clock.advance(float(self.random.random()) * 8)
        self.world.uploads.expire()
        for cache in self.world.store.expired():
            assert not cache.busy
            self.world.delete(cache)
        return True

    def wind_down(self):
        world = self.world
        if world.governor.paused:
            world.governor.device_ready()
        while world.searches:  # everybody gets a turn
            running = [search for search in world.searches if search.grant is not None]
            assert running
            world.end(running[0])
            world.check()
        for upload in self.uploads:
            world.uploads.detach(upload)
        for cache in self.caches:
            world.delete(cache)
        world.clock.advance(100)
        world.uploads.expire()
        assert (world.hbm.reserved_bytes, world.host.reserved_bytes) == (0, 0)
        assert (world.device_memory.extents, world.host_memory.extents) == ({}, {})
        assert world.uploads.open_uploads == 0
        assert not world.uploads._uploads


@pytest.mark.parametrize("seed", range(80))
def test_any_history(seed):
    History(seed).run(600)


def test_the_histories_reach_what_they_are_about():
    """Refusals, evictions, reloads and losses all come up, or the test above shows nothing."""
    seen: dict[str, int] = {}
    evicted = loads = 0
    for seed in range(12):
        history = History(seed)
        history.run(600)
        evicted += history.world.governor.residency.evicted_pages
        loads += history.world.loads
        for name, count in history.counts.items():
            seen[name] = seen.get(name, 0) + count
    assert evicted > 100
    assert loads > evicted
    for name in ("search", "end", "fork", "lose", "close", "delete", "HOST_MEMORY", "LAYER_CHANGED", "TOO_MANY"):
        assert seen.get(name, 0) > 0, f"no {name} in {seen}"


def test_a_layer_scattered_over_extents_is_still_let_in():
    """Caches that grow in turn share extents; the one that needs the workspace must not wait for ever."""
    world = World(hbm_bytes=2 * 65_536 + 8_192, host_bytes=10_000_000)
    world.governor.device_ready()
    kind = spec(KeyFormat.BF16, 16, layers=1)  # pages of 8 KiB, eight an extent
    caches = [world.store.create(OWNER, kind) for _ in range(4)]
    for _ in range(4):
        for cache in caches:
            world.write(cache, 0, cache.layers[0].length_keys, 256)
            search = world.search(cache, 0, 1, 1)
            assert search.grant is not None
            world.end(search)
    # four pages of it lie among others' in both extents; its floor needs more than what is left beside two extents
    search = world.search(caches[0], 0, 2 * 65_536 + 8_192 - 4 * 8_192, 10**9)
    world.check()
    assert search.grant is not None


def test_pages_that_only_the_queue_holds_do_not_block_its_head():
    world = World(hbm_bytes=100_000, host_bytes=10_000_000)
    world.governor.device_ready()
    kind = spec(KeyFormat.BF16, 16, layers=1)
    first, second = (world.store.create(OWNER, kind) for _ in range(2))
    for cache in (first, second):
        world.write(cache, 0, 0, 5 * 256)  # 40 KiB
    running = world.search(second, 0, 1, 1)
    head = world.search(first, 0, 59_000, 59_000)  # waits for the one that runs
    behind = world.search(second, 0, 1, 1)  # will hold pages on the device that no layer has any more
    world.delete(second)
    assert (head.grant, behind.grant) == (None, None)
    world.end(running)
    world.check()
    assert head.grant is not None
    world.end(head)
    assert behind.grant is not None


def test_the_workspace_grows_to_what_is_free_and_evicts_nothing_for_it():
    world = World(hbm_bytes=100_000, host_bytes=10_000_000)
    world.governor.device_ready()
    kind = spec(KeyFormat.BF16, 16, layers=1)
    first, second = (world.store.create(OWNER, kind) for _ in range(2))
    for cache in (first, second):
        world.write(cache, 0, 0, 4 * 256)
    world.end(world.search(first, 0, 1, 1))
    free = world.hbm.free_bytes
    search = world.search(second, 0, 1_000, 10**9)
    assert search.grant.workspace_bytes >= 1_000
    assert world.hbm.free_bytes == 0
    assert world.governor.residency.evicted_pages == 0
    assert free > 0


def test_what_can_never_fit_is_refused_with_the_figures():
    world = World(hbm_bytes=100_000)
    world.governor.device_ready()
    cache = world.store.create(OWNER, spec(KeyFormat.BF16, 16, layers=1))
    world.write(cache, 0, 0, 10 * 256)
    snapshot = world.store.snapshot(cache, 0)
    with pytest.raises(ServiceError) as caught:
        world.governor.open(snapshot, OWNER, Band.STANDARD, Need(snapshot.pages, 18_081, 18_081, 1), 0.0, None)
    assert (caught.value.reason, caught.value.retry_after_ms) == ("EXCEEDS_BUDGET", None)
    assert caught.value.metadata == {"needed_bytes": "100001", "budget_bytes": "100000"}
    world.store.release_snapshot(snapshot)


def test_a_snapshot_holds_the_pages_that_will_be_asked_for():
    world = World()
    cache = world.store.create(OWNER, spec(layers=1))
    world.write(cache, 0, 0, 10 * 256)
    snapshot = world.store.snapshot(cache, 0, held=lambda pages: (pages - 3, pages - 1))
    assert snapshot.held == snapshot.pages[7:9]
    assert len(snapshot.pages) == 10
    assert [page.references for page in snapshot.pages] == [1] * 7 + [2, 2, 1]
    assert snapshot.held_pages(7, 9) == snapshot.held
    assert snapshot.held_pages(8, 9) == snapshot.held[1:]
    assert snapshot.held_pages(2, 2) == ()
    for first, stop in ((6, 8), (8, 10), (0, 1), (9, 10)):
        with pytest.raises(AssertionError, match="2 are held from 7"):
            snapshot.held_pages(first, stop)
    used = world.store.accounts.of(OWNER).host_bytes
    world.store.truncate(cache, 0, 0)
    assert [page.references for page in snapshot.pages] == [0] * 7 + [1, 1, 0]
    assert world.store.accounts.of(OWNER).host_bytes == used * 2 // 10
    world.store.release_snapshot(snapshot)
    assert world.store.accounts.of(OWNER).host_bytes == 0
    with pytest.raises(AssertionError, match="twice"):
        world.store.release_snapshot(snapshot)


def test_a_queue_that_is_full_and_a_deadline_that_cannot_be_met():
    world = World(max_device_turns=2)
    world.governor.device_ready()
    assert world.governor.limits.ahead_s == 1.0
    cache = world.store.create(OWNER, spec(layers=1))
    world.write(cache, 0, 0, 10)
    world.end(world.search(cache, 0, 1, 1, flop=1000), device_s=10.0)  # ten seconds for a thousand operations
    running = [world.search(cache, 0, 1, 1, deadline_s=0.001, flop=1)]  # nobody is ahead of it
    running.append(world.search(cache, 0, 1, 1, flop=1000))
    assert all(search.grant is not None for search in running)
    patient = world.search(cache, 0, 1, 1, flop=1000)
    assert patient.grant is None
    assert world.search(cache, 0, 1, 1, deadline_s=5.0) is None  # ten seconds of what runs, ten of what waits
    others = [world.search(cache, 0, 1, 1) for _ in range(15)]
    assert None not in others
    snapshot = world.store.snapshot(cache, 0)
    for deadline, reason in ((None, "QUEUE_FULL"), (10**9, "QUEUE_FULL")):
        with pytest.raises(ServiceError) as caught:
            world.governor.open(snapshot, OWNER, Band.STANDARD, Need(snapshot.pages, 1, 1, 1), 0.0, deadline)
        assert caught.value.reason == reason
        assert 100 <= caught.value.retry_after_ms <= 10_000
        assert caught.value.metadata["queued"] == caught.value.metadata["limit"] == "16"
        assert int(caught.value.metadata["estimated_wait_ms"]) > 10_000
    world.store.release_snapshot(snapshot)
    while world.searches:
        world.end(next(search for search in world.searches if search.grant is not None))
        world.check()


@pytest.mark.parametrize(("flop", "taken"), [(1, 4), (300, 3), (600, 2), (4_000, 2)])
def test_the_device_has_many_small_tiles_or_few_large_ones(flop, taken):
    """ahead_s is one second here, and an operation takes a millisecond. With two tiles it is never idle."""
    world = World()
    world.governor.device_ready()
    cache = world.store.create(OWNER, spec(layers=1))
    world.write(cache, 0, 0, 10)
    world.end(world.search(cache, 0, 1, 1, flop=flop), device_s=flop / 1000)
    made = [world.search(cache, 0, 1, 1, flop=flop) for _ in range(5)]
    assert sum(search.grant is not None for search in made) == taken == world.governor.in_flight
    while world.searches:
        world.end(next(search for search in world.searches if search.grant is not None))


def test_one_in_a_hurry_goes_to_the_device_past_those_below():
    """The worker has them in the order of their bands: what is there of lower ones is in nobody's way."""
    world = World(max_device_turns=2)
    world.governor.device_ready()
    cache = world.store.create(OWNER, spec(layers=1))
    world.write(cache, 0, 0, 10)
    below = [world.search(cache, 0, 1, 1, band=Band.BATCH) for _ in range(3)]
    assert [search.grant is not None for search in below] == [True, True, False]
    hurried = [world.search(cache, 0, 1, 1, band=Band.INTERACTIVE) for _ in range(3)]
    assert [search.grant is not None for search in hurried] == [True, True, False]
    standard = world.search(cache, 0, 1, 1, band=Band.STANDARD)
    assert standard.grant is None  # two of a band above it are there
    while world.searches:
        world.end(next(search for search in world.searches if search.grant is not None))
        world.check()


def test_tiles_are_short_while_a_band_above_is_active():
    world = World()
    world.governor.device_ready()
    governor, limits = world.governor, world.governor.limits
    longest_s = limits.queue.max_turn_s
    assert [governor.tile_s(band) for band in Band] == [longest_s] * 3
    cache = world.store.create(OWNER, spec(layers=1))
    world.write(cache, 0, 0, 10)
    world.end(world.search(cache, 0, 1, 1, band=Band.STANDARD))
    assert [governor.tile_s(band) for band in Band] == [longest_s, longest_s, limits.short_turn_s]
    world.end(world.search(cache, 0, 1, 1, band=Band.INTERACTIVE))
    assert [governor.tile_s(band) for band in Band] == [longest_s, limits.short_turn_s, limits.short_turn_s]
    world.clock.advance(limits.active_s + 0.001)
    assert [governor.tile_s(band) for band in Band] == [longest_s] * 3


def test_pages_stay_pinned_from_tile_to_tile_until_somebody_needs_memory():
    world = World(hbm_bytes=2 * 65_536, host_bytes=10_000_000)
    world.governor.device_ready()
    kind = spec(KeyFormat.BF16, 16, layers=1)  # pages of 8 KiB, eight an extent
    first, second = (world.store.create(OWNER, kind) for _ in range(2))
    for cache in (first, second):
        world.write(cache, 0, 0, 8 * 256)
    governor, snapshot = world.governor, world.store.snapshot(first, 0)
    need, grants = Need(snapshot.pages, 1000, 1000, 1), []
    long = governor.open(snapshot, OWNER, Band.STANDARD, need, 0.0, None)
    for _ in range(3):
        governor.request(long, need, grants.append, lambda error: None)
        governor.finish(grants[-1], 0.001)
        assert {page.pins for page in snapshot.pages} == {1}
    assert governor.residency.promoted_pages == 8
    other = world.search(second, 0, 1000, 1000)  # a second extent does not fit beside the workspace
    assert other.grant is not None
    assert {page.pins for page in snapshot.pages} == {0}
    assert governor.residency.evicted_pages == 8
    world.end(other)
    governor.request(long, need, grants.append, lambda error: None)
    assert governor.residency.promoted_pages == 24
    governor.finish(grants[-1], 0.001)
    governor.close(long)
    assert {page.pins for page in snapshot.pages} == {0}
    world.store.release_snapshot(snapshot)
    world.check()


def test_an_open_search_that_waits_for_its_caller_holds_nothing_on_the_device():
    world = World(hbm_bytes=100_000)
    world.governor.device_ready()
    cache = world.store.create(OWNER, spec(KeyFormat.BF16, 16, layers=1))
    world.write(cache, 0, 0, 256)
    need = Need((), 60_000, 60_000, 1)
    snapshots = [world.store.snapshot(cache, 0) for _ in range(3)]
    idle = [world.governor.open(s, OWNER, Band.BATCH, need, 0.0, None) for s in snapshots]
    assert (world.governor.running, world.hbm.reserved_bytes) == (3, 0)
    assert world.search(cache, 0, 60_000, 60_000).grant is not None
    for search in idle:
        world.governor.close(search)
    for snapshot in snapshots:
        world.store.release_snapshot(snapshot)


def test_a_turn_that_waits_too_long_is_refused():
    world = World(hbm_bytes=100_000)
    cache = world.store.create(OWNER, spec(layers=1))
    world.write(cache, 0, 0, 10)
    snapshot = world.store.snapshot(cache, 0)
    need, told = Need(snapshot.pages, 1, 1, 1), []
    for ready in (False, True):
        if ready:
            world.governor.device_ready()
            held = [world.search(cache, 0, 1, 1) for _ in range(4)]
            assert len(held) == 4
        search = world.governor.open(snapshot, OWNER, Band.BATCH, need, 0.0, None)
        world.governor.request(search, Need(snapshot.pages, 1, 1, 10**12), lambda grant: None, told.append)
        world.clock.advance(59.0)
        assert world.governor.expire() == 0
        world.clock.advance(1.0)
        assert world.governor.expire() == 1
        assert len(world.governor.scheduler) == 0
        world.governor.close(search)
    assert [error.reason for error in told] == ["NOT_READY", "QUEUE_FULL"]
    assert all(error.retry_after_ms for error in told)
    assert all(error.metadata["waited_ms"] == "60000" and error.metadata["queued"] == "0" for error in told)


def test_the_wall_clock_means_nothing():
    """All times come from the clock that was given."""
    world = World()
    cache = world.store.create(OWNER, spec(ttl_s=60))
    world.clock.advance(59.9)
    assert world.store.expired() == []
    world.clock.advance(0.2)
    assert world.store.expired() == [cache]
