"""Seeded histories of the whole core: governor, scheduler, residency and caches, on virtual time.

    python -m streamindex_service.testing.simulation            # the histories that CI runs
    python -m streamindex_service.testing.simulation 4711       # one of them, told event by event

A seed says everything: sizes, row formats, callers of unequal greed, arrivals in bursts, appends, forks, truncations
and deletions while searches run, caches that grow among each other's pages, keys that go to disk and come back,
cancellations, deadlines, workers that die, copies and disks that fail, and tiles that find no memory. The code under
test is the service's own; simulated are time, the device, the disk, and the callers.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

from streamindex_service.core.band_queue import Band
from streamindex_service.core.governor import GovernorLimits
from streamindex_service.core.layers import KeyCache
from streamindex_service.core.scheduler import QueueLimits
from streamindex_service.core.sizes import PAGE_KEYS, KeyFormat, KvFormat
from streamindex_service.core.specs import CacheSpec, KvSpec, RowKind
from streamindex_service.errors import ServiceError
from streamindex_service.testing.invariants import Watch, require
from streamindex_service.testing.simulated_service import PAGE_BYTES, SimulatedSearch, SimulatedService, Sizes

HISTORIES = 10_000
_EXPIRY_PERIOD_S = 0.5
_MOST_EVENTS = 20_000  # of a history; one that goes on for longer has lost its way
_BANDS = (Band.INTERACTIVE, Band.STANDARD, Band.STANDARD, Band.BATCH)
_ROWS = (1, 1, 2, 8, 40, 150, 500)
_STEPS = 0.25  # of searches, that are of several caches
_IN_TURN = 0.2  # of histories, in which caches grow in turn
# Pages of 8, 5 and 16 KiB, and of 8 and 12: they share the device, and no extent.
_SPECS = (
    CacheSpec(1, 16, 1, KeyFormat.BF16, 1, "", 0, 1e9, 2),
    CacheSpec(1, 16, 1, KeyFormat.FP8_E4M3, 1, "", 0, 1e9, 2),
    CacheSpec(1, 16, 1, KeyFormat.FP32, 1, "", 0, 1e9, 2),
    CacheSpec(1, 16, 1, KeyFormat.BF16, 1, "", 0, 1e9, 2, KvSpec(KvFormat.BF16, 24, 24, 1)),
)


class History:
    """One seed's history. `make_service` lets a test put a broken part in."""

    def __init__(
        self,
        seed: int,
        make_service: Callable[[Sizes, GovernorLimits], SimulatedService] = SimulatedService,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.seed = seed
        self.outcomes: Counter[str] = Counter()
        self._tell = tell
        self._random = draw = random.Random(seed)  # noqa: S311
        pages = draw.randint(6, 24)
        floor_bytes = draw.randint(1, 6) * 4096
        limits = GovernorLimits(
            max_open=draw.choice((8, 64)),
            max_device_turns=draw.randint(2, 6),
            ahead_s=draw.choice((0.002, 0.02)),
            max_wait_s=draw.choice((1.0, 5.0)),
            short_turn_s=draw.choice((0.003, 0.02)),
            active_s=draw.choice((0.01, 1.0)),
            queue=QueueLimits(
                max_turns=draw.choice((6, 32)),
                max_s=draw.choice((0.5, 30.0)),
                ageing_s=draw.choice((0.05, 0.5)),
                ageing_turns=draw.choice((2, 4)),
                quantum_s=0.1,
                max_turn_s=0.02,
            ),
        )
        extent_bytes = draw.choice((1, 4, 6)) * PAGE_BYTES
        host_pages, disk_pages = draw.choice(((60, 0), (60, 40), (24, 60), (14, 8)))
        sizes = Sizes(
            pages * PAGE_BYTES + floor_bytes,
            host_pages * PAGE_BYTES,
            extent_bytes,
            floor_bytes,
            max_caches=8,
            disk_bytes=disk_pages * PAGE_BYTES,
        )
        self.service = make_service(sizes, limits)
        self._callers = [f"caller{number}" for number in range(draw.randint(2, 4))]
        self._greed = [draw.choice((1, 1, 3, 9)) for _ in self._callers]
        self.watch = Watch(self.service, len(self._callers), _EXPIRY_PERIOD_S)
        self._everyone: list[SimulatedSearch] = []
        self._caches: list[KeyCache] = []
        self._short_of_memory_until = 0.0
        self._disk_fails_until = 0.0

    def run(self) -> None:
        """From the first event to rest. Raises InvariantError, or whatever the code under test raises."""
        self._plan()
        events = 0
        while self.service.time.step():
            self.watch.look()
            events += 1
            require(events < _MOST_EVENTS, "it does not come to rest")
            if self._only_expiry_is_left():
                break
        for cache in list(self._caches):
            self.service.caches.delete(cache)
        self.watch.look()
        self.watch.at_rest(self._everyone)
        self.outcomes.update(search.outcome for search in self._everyone)
        self.outcomes["turns"] += self.watch.turns
        self.outcomes["evicted pages"] += self.service.residency.evicted_pages
        self.outcomes["moved pages"] += self.service.residency.moved_pages
        self.outcomes["spilled pages"] += self.service.disk.spill.spilled_pages
        self.outcomes["restored pages"] += self.service.disk.spill.restored_pages

    def _plan(self) -> None:
        draw, after = self._random, self.service.time.after
        service = self.service
        service.tiles_out_of_memory = lambda: service.time.now_s < self._short_of_memory_until
        for _ in range(draw.randint(2, 4)):
            self._create()
        after(draw.choice((0.0, 0.0, 0.1, 2.0)), self._ready)
        for _ in range(draw.randint(1, 4)):  # bursts
            at = draw.random() * 0.5
            for _ in range(draw.choice((1, 4, 12))):
                after(at, self._arrive)
        service.disk.fails = lambda: service.time.now_s < self._disk_fails_until
        for event in (self._append, self._truncate, self._fork, self._delete, self._cancel, self._spill):
            for _ in range(draw.randint(0, 3)):
                after(draw.random(), event)
        troubles = ((0.3, self._crash), (0.3, self._doubt), (0.3, self._no_memory), (0.4, self._no_disk))
        for chance, trouble in troubles:
            if draw.random() < chance:
                after(draw.random() * 0.6, trouble)
        if draw.random() < _IN_TURN:
            self._grow_in_turn(draw.random() * 0.3)
        after(_EXPIRY_PERIOD_S, self._expire)

    def _only_expiry_is_left(self) -> bool:
        return len(self.service.time) == 1 and not self.service.searches and not self.service.governor.paused

    def _log(self, what: str) -> None:
        if self._tell is not None:
            governor = self.service.governor
            self._tell(
                f"{self.service.time.now_s - 1000:9.4f} s  {what:40} queued {len(governor.scheduler):3}  "
                f"device {governor.in_flight}  hbm {self.service.hbm.reserved_bytes}"
            )

    def _ready(self) -> None:
        self._log("a worker is ready")
        self.service.governor.device_ready()

    def _expire(self) -> None:
        self.service.governor.expire()
        self.service.time.after(_EXPIRY_PERIOD_S, self._expire)

    def _create(self) -> None:
        try:
            cache = self.service.caches.create("owner", self._random.choice(_SPECS))
        except ServiceError:
            return
        self._caches.append(cache)
        for kind in _kinds(cache):
            most = 8 * PAGE_BYTES // cache.spec.form(kind).page_bytes * PAGE_KEYS
            self._write(cache, kind, 0, self._random.randint(1, most))

    def _grow_in_turn(self, at: float) -> None:
        """Caches grow page by page and are searched, so that their pages lie among each other's; then some go."""
        draw, after = self._random, self.service.time.after
        spec, caches = draw.choice(_SPECS), list[KeyCache]()

        def make() -> None:
            with contextlib.suppress(ServiceError):
                for _ in range(draw.randint(2, 4)):
                    caches.append(self.service.caches.create("owner", spec))
            self._caches.extend(caches)

        def grow() -> None:
            for cache in caches:
                if cache in self._caches:
                    self._write(cache, RowKind.KEYS, cache.layers[0].length_keys, PAGE_KEYS)
                    if not cache.layers[0].spilled_pages:
                        self._begin(cache, RowKind.KEYS, self._callers[0])

        def go() -> None:
            for cache in caches[::2]:
                if cache in self._caches:
                    self._log("a cache that grew in turn is deleted")
                    self._caches.remove(cache)
                    self.service.caches.delete(cache)

        after(at, make)
        for _ in range(draw.randint(2, 6)):
            at += 0.02
            after(at, grow)
        after(at + draw.random() / 10, go)

    def _write(self, cache: KeyCache, kind: RowKind, first_row: int, rows: int) -> None:
        try:
            self.service.write(cache, 0, first_row, rows, kind)
        except ServiceError as error:
            self.outcomes[error.reason] += 1
            self.service.disk.free(rows * cache.spec.form(kind).page_bytes // PAGE_KEYS)

    def _pick(self) -> KeyCache | None:
        return self._random.choice(self._caches) if self._caches else None

    def _append(self) -> None:
        cache = self._pick()
        if cache is not None:
            kind = self._random.choice(_kinds(cache))
            length = cache.of_kind(kind)[0].length_keys
            first = max(0, length - self._random.choice((0, 0, 1, 300)))
            self._write(cache, kind, first, self._random.choice((1, 40, 700)))
            self._log(f"rows are appended ({kind.name})")

    def _truncate(self) -> None:
        cache = self._pick()
        if cache is not None:
            self.service.caches.truncate(cache, self._random.randint(0, cache.layers[0].length_keys), 0)
            self._log("a layer is truncated")

    def _fork(self) -> None:
        cache = self._pick()
        if cache is not None:
            try:
                self._caches.append(self.service.caches.fork(cache, None))
            except ServiceError as error:
                self.outcomes[error.reason] += 1
            self._log("a cache is forked")

    def _delete(self) -> None:
        cache = self._pick()
        if cache is not None:
            self._caches.remove(cache)
            self.service.caches.delete(cache)
            self._log("a cache is deleted")

    def _arrive(self) -> None:
        draw, cache = self._random, self._pick()
        if cache is None:
            return
        (caller,) = draw.choices(self._callers, self._greed)
        kind = draw.choice(_kinds(cache))
        layer = cache.of_kind(kind)[0]
        if not layer.spilled_pages:
            self._begin(cache, kind, caller)
            return

        def are_there(reason: str) -> None:
            cache.busy -= 1
            if reason:
                self.outcomes[reason] += 1
            elif not layer.spilled_pages and cache in self._caches:
                self._begin(cache, kind, caller)

        cache.busy += 1
        self._log(f"{caller} waits for keys from disk")
        self.service.disk.bring(layer.pages, are_there)

    def _begin(self, cache: KeyCache, kind: RowKind, caller: str) -> None:
        draw = self._random
        rows, band = draw.choice(_ROWS), draw.choice(_BANDS)
        deadline_s = draw.choice((None, None, 0.02, 0.3))
        beside = self._beside(cache, kind)
        search = SimulatedSearch(self.service, cache, 0, caller, band, rows, deadline_s, beside, kind)
        self._everyone.append(search)
        more = f" of {1 + len(beside)} caches" if beside else ""
        verb = "searches" if kind is RowKind.KEYS else "attends"
        self._log(f"{caller} {verb} {rows} rows{more}, {band.name.lower()} {search.outcome}")
        if deadline_s is not None:
            self.service.time.after(deadline_s, lambda: self._end(search, "DEADLINE"))
        first = draw.choice((rows, 1))
        search.feed(first)
        if first < rows:
            self.service.time.after(draw.random() / 10, lambda: search.feed(rows))

    def _beside(self, cache: KeyCache, kind: RowKind) -> list[KeyCache]:
        """Caches that are searched in the same tiles, now and then: as many as the device holds together."""
        draw, sizes = self._random, self.service.sizes
        if draw.random() >= _STEPS:
            return []
        form, first = cache.spec.form(kind), cache.of_kind(kind)[0]
        found, used_bytes = [], len(first.pages) * form.page_bytes + sizes.floor_bytes + sizes.extent_bytes
        alike = [other for other in self._caches if kind in other.spec.kinds and other.spec.form(kind) == form]
        for other in draw.sample(alike, min(3, len(alike))):
            layer = other.of_kind(kind)[0]
            size_bytes = len(layer.pages) * form.page_bytes
            if other is not cache and not layer.spilled_pages and used_bytes + size_bytes <= sizes.hbm_bytes:
                found.append(other)
                used_bytes += size_bytes
        return found

    def _end(self, search: SimulatedSearch, outcome: str) -> None:
        if not search.outcome:
            self._log(f"{search.caller} {outcome}")
            search.end(outcome)

    def _cancel(self) -> None:
        if self.service.searches:
            self._end(self._random.choice(self.service.searches), "CANCELLED")

    def _crash(self) -> None:
        self._log("the worker dies")
        self.service.crash()
        self.service.time.after(self._random.choice((0.01, 0.2, 8.0)), self._ready)

    def _doubt(self) -> None:
        if not self.service.governor.paused:
            self._log("a copy to the device fails")
            self.service.doubt()

    def _spill(self) -> None:
        self._log("idle keys go to disk")
        self.service.disk.free(self._random.randint(1, 20) * PAGE_BYTES, self._random.choice((0.0, 0.0, 0.1)))

    def _no_disk(self) -> None:
        self._log("the disk fails")
        self._disk_fails_until = self.service.time.now_s + self._random.choice((0.1, 0.5))

    def _no_memory(self) -> None:
        self._log("the device is short of memory")
        self._short_of_memory_until = self.service.time.now_s + self._random.choice((0.005, 0.02, 0.2))


def _kinds(cache: KeyCache) -> tuple[RowKind, ...]:
    """Rows that its callers write and need."""
    return (RowKind.KEYS,) if cache.spec.kv is None else (RowKind.KEYS, RowKind.KV)


def main(arguments: list[str]) -> None:
    """One history with its events, or all of them."""
    if arguments:
        History(int(arguments[0]), tell=lambda line: print(line)).run()  # noqa: T201
        return
    started = time.perf_counter()
    outcomes: Counter[str] = Counter()
    for seed in range(HISTORIES):
        history = History(seed)
        try:
            history.run()
        except Exception as error:
            command = f"python -m streamindex_service.testing.simulation {seed}"
            raise SystemExit(f"seed {seed}: {error!r}; replay: {command}") from error
        outcomes += history.outcomes
    print(f"{HISTORIES} histories in {time.perf_counter() - started:.1f} s: {dict(outcomes)}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
