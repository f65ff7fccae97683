"""Caches opened, used and dropped, half of them aborted, for as long as one likes: everything must come back.

    python -m tests.faults.soak --caches 100000 --out soak.json      # or: make soak

Several callers at a time make caches, write keys, search them and delete them. The other half of the caches is aborted:
its upload or its search is cancelled, or its connection dropped, in the middle, and nobody deletes what is left; it
goes with its time to live. Each half begins with a warm-up. After it, and after every round, the service is left in
peace and looked at: descriptors, threads, segments and reserved bytes of frontend and worker must be what they were at
the start, and resident memory may grow by 16 bytes a clean and 128 bytes an aborted cache.

From the command line the service has one malloc arena for all its threads. With one for each of them what they keep of
freed memory goes up and down by more than the limits of such a run; what is never freed shows either way.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from streamindex.v1 import key_cache_pb2

from streamindex_service.testing.service import RunningService
from tests.support.calls import (
    TIMEOUT_S,
    Calls,
    StreamCall,
    answers,
    finish_message,
    key_chunks,
    query_chunk,
    search_header,
    start_message,
)
from tests.support.resources import ProcessFigures, figures_of, fill_ingress, more_than
from tests.support.run_header import run_header
from tests.support.services import CPU, MIB, is_idle, wait_for
from tests.support.tensors import Draw, Kind, expected

CLEAN_BYTES, ABORTED_BYTES = 16, 128  # that resident memory may grow by, a cache
KIND = Kind(heads=2, head_dim=32)
KEYS, CHUNK_KEYS, ROWS, TOP_K = 600, 300, 4, 8
VARIANTS = 16
# Small extents, so that segments come and go all the time; what is aborted goes after a second.
SETTINGS: dict[str, dict[str, Any]] = {
    "server": {"sweep_s": 0.1, "upload_ttl_s": 1.0},
    "memory": {
        "device_budget_bytes": 64 * MIB,
        "host_budget_bytes": 64 * MIB,
        "ingress_budget_bytes": 4 * MIB,
        "extent_bytes": 65_536,
        "search_block_bytes": MIB // 4,
        "search_blocks": 2,
        "workspace_bytes": 16 * MIB,
        "workspace_floor_bytes": 16 * MIB,
        "spare_bytes": MIB,
        "spare_s": 0.2,
        "ingest_threads": 2,
    },
    "worker": CPU,
}
ALLOCATOR = {"MALLOC_ARENA_MAX": "1"}
IDLE_TTL_S = 1
QUIET_S = 60.0  # the longest wait for everything to come back
LINE_SAMPLES = 5
CALM_LOOKS = 20  # that are alike: nothing is on its way any more
PROCESSES = ("frontend", "worker")


class Variant:
    """One cache's keys and queries, as messages, and the answer."""

    def __init__(self, seed: int) -> None:
        draw = Draw(seed)
        keys = draw.keys(KIND, KEYS)
        queries = draw.queries(KIND, ROWS, start_position=KEYS)
        self.chunks = key_chunks(KIND, keys, CHUNK_KEYS)
        self.finish = finish_message(KIND, keys)
        self.rows = query_chunk(KIND, queries, 0, ROWS)
        self.indices = expected(KIND, keys, queries, TOP_K)[0]


class Caller:
    """One caller on a connection of its own, which it makes anew when it has dropped it."""

    def __init__(self, address: str, seed: int, variants: list[Variant]) -> None:
        self.aborts: Counter[str] = Counter()
        self._address = address
        self._random = np.random.default_rng(seed)
        self._variants = variants
        self._calls = Calls(address)

    def clean(self) -> None:
        """A cache from its making to its deletion; its answer must be right."""
        variant, cache_id = self._variant(), self._make()
        self._write(cache_id, variant)
        with self._search(cache_id) as call:
            call.send(variant.rows)
            call.half_close()
            chunks = [message.chunk for message in call.rest() if message.WhichOneof("message") == "chunk"]
        assert np.array_equal(answers(chunks, TOP_K)[0], variant.indices), "a wrong answer"
        self._calls.delete(cache_id)

    def aborted(self) -> None:
        """A cache that is left in the middle of something, as it is."""
        variant, cache_id = self._variant(), self._make()
        of_upload, drop = bool(self._random.integers(2)), bool(self._random.integers(2))
        if of_upload:
            call = self._calls.append_call()
            call.send(start_message(cache_id, KEYS))
            call.receive("accepted")
            call.send(variant.chunks[0])
            if self._random.integers(2):
                call.receive("acknowledged")
        else:
            self._write(cache_id, variant)
            call = self._search(cache_id)
            call.receive("accepted")
            call.send(variant.rows)
            if self._random.integers(2):
                call.receive("chunk")
        self.aborts[f"{'upload' if of_upload else 'search'} {'dropped' if drop else 'cancelled'}"] += 1
        if drop:
            self._calls.close()
            self._calls = Calls(self._address)
        call.cancel()

    def connect(self) -> None:
        """Have a connection, whatever was dropped."""
        self._calls.load()

    def close(self) -> None:
        self._calls.close()

    def _variant(self) -> Variant:
        return self._variants[int(self._random.integers(len(self._variants)))]

    def _make(self) -> str:
        spec = KIND.spec(idle_ttl_s=IDLE_TTL_S)
        request = key_cache_pb2.CreateKeyCacheRequest(spec=spec)
        return str(self._calls.key_caches.CreateKeyCache(request, timeout=TIMEOUT_S).key_cache.id)

    def _write(self, cache_id: str, variant: Variant) -> None:
        with self._calls.append_call() as call:
            call.send(start_message(cache_id, KEYS), *variant.chunks, variant.finish)
            call.half_close()
            assert call.rest()[-1].committed.layer_keys == KEYS

    def _search(self, cache_id: str) -> StreamCall:
        call = self._calls.search_call()
        call.send(search_header(KIND, cache_id, TOP_K, start_position=KEYS))
        return call


@dataclass(frozen=True)
class Sample:
    """What the service held when it was left in peace."""

    seconds: float
    caches: int
    frontend: ProcessFigures
    worker: ProcessFigures


@dataclass
class Half:
    """The clean or the aborted caches: what the service held after their warm-up and after each of their rounds."""

    kind: str
    limit_bytes: int  # that memory may grow by, a cache
    samples: list[Sample] = field(default_factory=list)

    @property
    def caches(self) -> int:
        """That were made after the warm-up."""
        return self.samples[-1].caches

    def growth_bytes(self, process: str) -> float:
        """Of resident memory, over all rounds. A straight line through the samples where there are enough of them: what
        the allocator happens to hold at the very first and the very last moment says little."""
        counts = [sample.caches for sample in self.samples]
        held = [getattr(sample, process).resident_bytes for sample in self.samples]
        if len(self.samples) < LINE_SAMPLES:
            return float(held[-1] - held[0])
        return float(np.polyfit(counts, held, 1)[0] * self.caches)


@dataclass
class Outcome:
    """What a run has shown. `allowance_bytes` of memory are granted to a run that is too short for the allocator's own
    steps to be small."""

    clean: Half = field(default_factory=lambda: Half("clean", CLEAN_BYTES))
    aborted: Half = field(default_factory=lambda: Half("aborted", ABORTED_BYTES))
    aborts: Counter[str] = field(default_factory=Counter)
    allowance_bytes: int = 0

    def faults(self) -> list[str]:
        """What did not come back, or grew too much."""
        found = []
        for process in PROCESSES:
            before = getattr(self.aborted.samples[0], process)
            for half in (self.aborted, self.clean):
                after = getattr(half.samples[-1], process)
                found += [f"{process}, {half.kind}: {more}" for more in more_than(before, after)]
                grown, limit = half.growth_bytes(process), half.caches * half.limit_bytes + self.allowance_bytes
                if grown > limit:
                    found.append(f"{process}: {half.caches} {half.kind} caches: {grown:.0f} bytes more, limit {limit}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For a file of results."""
        halves = (self.clean, self.aborted)
        return {
            "clean_caches": self.clean.caches,
            "aborted_caches": self.aborted.caches,
            "aborts": dict(sorted(self.aborts.items())),
            "growth_bytes_per_cache": {
                half.kind: {each: round(half.growth_bytes(each) / max(1, half.caches), 1) for each in PROCESSES}
                for half in halves
            },
            "limit_bytes_per_cache": {half.kind: half.limit_bytes for half in halves},
            "allowance_bytes": self.allowance_bytes,
            "faults": self.faults(),
            "samples": {half.kind: [asdict(sample) for sample in half.samples] for half in halves},
        }


class Soak:
    """Callers on a service. `tell` hears of every round."""

    def __init__(
        self, service: RunningService, callers: int, tell: Callable[[str], object] = lambda line: None
    ) -> None:
        self._service = service
        self._tell = tell
        self._observer = Calls(service.address)
        variants = [Variant(seed) for seed in range(VARIANTS)]
        self._callers = [Caller(service.address, seed, variants) for seed in range(callers)]
        self._pool = ThreadPoolExecutor(callers)
        self._started = time.monotonic()

    def run(self, caches: int, warm_up: int, rounds: int, allowance_bytes: int = 0, seconds: float = 1e9) -> Outcome:
        """Both halves, each in so many rounds after a warm-up of so many caches, until the last or until the time,
        half of it for each, is over.

        Raises AssertionError for a wrong answer, and when the service does not come to rest.
        """
        outcome = Outcome(allowance_bytes=allowance_bytes)
        each = max(1, caches // (2 * rounds))
        fill_ingress(self._observer, self._service.worker_pids()[0])
        self._many(warm_up, clean=True)
        # The aborted first: what the allocator comes to hold in its first tens of thousands of caches is within their
        # limit, and would not be within that of the others.
        for half, end in ((outcome.aborted, seconds / 2), (outcome.clean, seconds)):
            clean = half is outcome.clean
            self._many(warm_up, clean=clean)
            half.samples.append(self._sample(0, outcome.aborted.samples[0] if clean else None))
            if not clean:
                for caller in self._callers:
                    caller.aborts.clear()
            for number in range(1, rounds + 1):
                if time.monotonic() - self._started > end:
                    self._tell(f"the time for {half.kind} caches is over before round {number} of {rounds}")
                    break
                self._many(each, clean=clean)
                half.samples.append(sample := self._sample(number * each, outcome.aborted.samples[0]))
                self._tell(f"{sample.seconds:.0f} s, {sample.caches} {half.kind}: {sample.frontend}, {sample.worker}")
        for caller in self._callers:
            outcome.aborts.update(caller.aborts)
        return outcome

    def close(self) -> None:
        self._pool.shutdown()
        for caller in self._callers:
            caller.close()
        self._observer.close()

    def _many(self, count: int, *, clean: bool) -> None:
        left, lock = [count], threading.Lock()

        def work(caller: Caller) -> None:
            while True:
                with lock:
                    if left[0] == 0:
                        return
                    left[0] -= 1
                if clean:
                    caller.clean()
                else:
                    caller.aborted()

        for done in [self._pool.submit(work, caller) for caller in self._callers]:
            done.result()

    def _sample(self, caches: int, base: Sample | None) -> Sample:
        """Wait until nothing is left of any cache, and look."""

        def at_rest() -> bool:
            load = self._observer.load()
            nothing_held = all(ledger.reserved_bytes == ledger.spare_bytes == 0 for ledger in load.ledgers)
            return is_idle(load) and nothing_held and load.key_caches == load.open_uploads == 0

        wait_for(at_rest, QUIET_S)
        for caller in self._callers:
            caller.connect()
        # Connections, threads and segments that are given up go a moment later than what is counted.
        looks, found = 0, self._look(caches)
        end = time.monotonic() + QUIET_S / 4
        while looks < CALM_LOOKS and time.monotonic() < end:
            if base is not None and not _more(found, base):
                break
            time.sleep(0.05)
            before, found = found, self._look(caches)
            looks = 0 if _more(before, found) or _more(found, before) else looks + 1
        return found

    def _look(self, caches: int) -> Sample:
        (worker,) = self._service.worker_pids()
        seconds = round(time.monotonic() - self._started, 1)
        return Sample(seconds, caches, figures_of(self._service.process.pid), figures_of(worker))


def _more(one: Sample, other: Sample) -> bool:
    """Whether one has more of anything that is counted, memory left aside."""
    return any(more_than(getattr(other, process), getattr(one, process)) for process in PROCESSES)


def main(arguments: list[str]) -> int:
    """Run, write the result, say whether all came back."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--caches", type=int, default=100_000, help="caches after the warm-up, half of them aborted")
    parser.add_argument("--warm-up", type=int, default=5000, help="caches before each half")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no round after so long")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    options = parser.parse_args(arguments)
    head = run_header("tests.faults.soak", arguments) | {"environment": ALLOCATOR, "settings": SETTINGS}
    os.environ.update(ALLOCATOR)  # which the service inherits
    with RunningService(SETTINGS) as service:
        soak = Soak(service, options.callers, tell=lambda line: print(line, flush=True))
        try:
            outcome = soak.run(options.caches, options.warm_up, options.rounds, seconds=options.seconds)
        finally:
            soak.close()
    result = {"header": head, "callers": options.callers, **outcome.as_dict()}
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    told = ("clean_caches", "aborted_caches", "growth_bytes_per_cache", "faults")
    print(json.dumps({name: result[name] for name in told}, indent=1))
    return 1 if outcome.faults() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
