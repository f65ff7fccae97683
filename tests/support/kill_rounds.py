"""Rounds of callers at work while frontend or worker are killed or stopped at a point, and what must hold after it.

A round begins and ends with nothing. In between callers upload, search and attend, on a device and a host that do not
hold all of it, so that pages are promoted, evicted, spilled and restored all the time. Whatever happens to the worker,
those with the client library notice nothing: every answer has the bits that it had undisturbed, every acknowledged key
is there. A caller without retries is answered right, or told WORKER_LOST and when to come again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import streamindex_client
import torch

from streamindex_service.testing.failpoints import Action, Point
from tests.support.attention import Queries, Rows, Shape
from tests.support.calls import Calls, answers, query_chunks, search_header
from tests.support.faulty_service import FaultyService, is_gone
from tests.support.resources import ProcessFigures, figures_of, fill_ingress, more_than
from tests.support.services import MIB, WAIT_S, is_idle, small_host, wait_for
from tests.support.tensors import Draw, Kind, expected

SERVING = 1
SHAPE, TOKENS, CACHES, TOP_K, WINDOW = Shape(), 8000, 3, 40, 300
START, ROWS = TOKENS - 60, 60
KIND, KEYS = Kind(heads=2, head_dim=64), 3000
PARTS = 3  # in which a cache is uploaded
POINT_S = 30.0  # until somebody has come by
ONLY_AT_START = frozenset({Point.CANARY_BEGUN, Point.READY_SAID, Point.READY_HEARD})


def settings(spill_dir: Path) -> dict[str, dict[str, Any]]:
    """Little of everything, and a watchdog that does not wait long."""
    base = small_host(spill_dir)
    memory = {
        **base["memory"],
        "device_budget_bytes": 17 * MIB + MIB // 4,  # about two of the caches
        "host_budget_bytes": 7 * MIB,
        "ingress_budget_bytes": 4 * MIB,
        "spare_bytes": 0,
        "ingest_threads": 2,
    }
    worker = {
        **base["worker"],
        "heartbeat_s": 0.2,
        "heartbeat_timeout_s": 1.5,
        "restart_backoff_s": 0.05,
        "ready_timeout_s": 10.0,  # it is forked
        "poison_deaths": 1_000_000,  # the same requests come again and again
    }
    return {**base, "memory": memory, "worker": worker}


class KillRounds:
    """One service, and rounds on it. `told` counts what callers without retries were told."""

    def __init__(self, service: FaultyService, spill_dir: Path) -> None:
        self.told: Counter[str] = Counter()
        self._service = service
        self._spill_dir = spill_dir
        self._rows = [Rows.drawn(SHAPE, TOKENS, seed) for seed in range(CACHES)]
        self._queries = Queries.drawn(SHAPE, torch.arange(START, TOKENS), 9)
        draw = Draw(5)
        self._keys, self._plain = draw.keys(KIND, KEYS), draw.queries(KIND, ROWS, start_position=KEYS)
        self._wanted = expected(KIND, self._keys, self._plain, TOP_K)[0]
        self._first: dict[tuple[int, str], torch.Tensor] = {}  # answers as they were undisturbed
        self._figures: ProcessFigures | None = None
        self._options = streamindex_client.ClientOptions()

    def undisturbed(self) -> None:
        """A round in which a worker is killed between two calls: it shows the answers, and what is held after it."""
        with Calls(self._service.address) as calls:
            fill_ingress(calls, self._service.worker_pids()[0])
            with self._caches() as caches:
                self._attend(caches)
                (worker,) = self._service.worker_pids()
                os.kill(worker, signal.SIGKILL)
                wait_for(lambda: worker not in self._service.worker_pids())
                self._search(caches)
                calls.wait_health(SERVING)
                self._at_work_together(caches, lambda at_work: None)
            self._wait_for_nothing(calls)
            figures = figures_of(self._service.process.pid)
            while (later := _settled(self._service.process.pid)) != figures:
                figures = later
        self._figures = figures

    def play(self, points: Sequence[Point], action: Action) -> None:
        """A round in which this happens at one point after another. Raises AssertionError for a promise not kept."""
        assert points
        if self._figures is None:
            self.undisturbed()
        with Calls(self._service.address) as calls:
            try:
                with self._caches() as caches:
                    self._at_work_together(
                        caches, lambda at_work: [self._have_happen(calls, each, action, at_work) for each in points]
                    )
            finally:
                self._service.points.disarm()
            calls.wait_health(SERVING)
            self._wait_for_nothing(calls)
        self._wait_for_no_more()
        assert len(self._service.worker_pids()) == 1

    def play_frontend(self, point: Point) -> None:
        """A round in which the frontend is killed at a point. No process and no file is left; another service starts in
        its place, and knows none of its caches."""
        processes = self._service.processes()
        # to try again is of no use
        self._options = streamindex_client.ClientOptions(retry=streamindex_client.RetryPolicy(max_attempts=1))
        with contextlib.suppress(grpc.RpcError, streamindex_client.StreamIndexError), self._caches() as caches:
            self._at_work_together(caches, lambda at_work: self._end_frontend(point), ends=True)
        self._options = streamindex_client.ClientOptions()
        assert self._service.points.was_reached(point)
        self._service.process.wait(10)
        wait_for(lambda: all(is_gone(pid) for pid in processes))
        assert os.listdir(self._spill_dir) == []
        self._service.start()
        with Calls(self._service.address) as calls:
            assert calls.load().key_caches == 0
        self._figures = None  # another process

    def _at_work_together(
        self, caches: list[Any], meanwhile: Callable[[list[Any]], object], *, ends: bool = False
    ) -> None:
        """Callers at work until something has happened, and once more. `ends`: it is the end of the service."""
        over = threading.Event()

        def until_over(work: Callable[[], None]) -> None:
            while True:
                last = over.is_set()
                try:
                    work()
                except (grpc.RpcError, streamindex_client.StreamIndexError):
                    if not ends:
                        raise
                    return
                if last:
                    return

        works = (
            lambda: self._attend(caches),
            lambda: self._search(caches),
            self._upload,
            self._search_without_retries,
        )
        with ThreadPoolExecutor(len(works)) as pool:
            at_work = [pool.submit(until_over, work) for work in works]
            try:
                meanwhile(at_work)
            finally:
                over.set()
            for done in at_work:
                done.result()

    def _have_happen(self, calls: Calls, point: Point, action: Action, at_work: list[Any]) -> None:
        """It happens at a point, and another worker is ready, if it is the end of one."""
        restarts = calls.load().worker_restarts
        self._arm(point, action)

        def happened() -> bool:
            assert not any(each.done() for each in at_work), [each.exception() for each in at_work if each.done()]
            return self._service.points.was_reached(point)

        wait_for(happened, POINT_S)
        if action is Action.FAIL_CALL:
            return

        def ready_again() -> bool:
            load = calls.load()
            return load.ready and load.worker_restarts > restarts

        wait_for(ready_again, POINT_S)

    def _arm(self, point: Point, action: Action) -> None:
        self._service.points.arm(point, action)
        if point in ONLY_AT_START:
            for worker in self._service.worker_pids():
                os.kill(worker, signal.SIGKILL)

    def _end_frontend(self, point: Point) -> None:
        self._arm(point, Action.KILL_FRONTEND)
        wait_for(lambda: self._service.points.was_reached(point), POINT_S)

    # What callers do.

    @contextlib.contextmanager
    def _caches(self) -> Iterator[list[Any]]:
        with streamindex_client.connect(self._service.address, options=self._options) as client:
            caches = [SHAPE.create(client) for _ in self._rows]
            for cache, rows in zip(caches, self._rows, strict=True):
                rows.upload(cache)
            yield caches
            for cache in caches:
                cache.delete()

    def _attend(self, caches: list[Any]) -> None:
        queries = self._queries
        for number, cache in enumerate(caches):
            answer = cache.sparse_attend_all(
                layer=0, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, top_k=TOP_K,
                start_position=START, window=WINDOW, scale=SHAPE.scale,
            )  # fmt: skip
            self._compare((number, "attend"), answer.out)

    def _search(self, caches: list[Any]) -> None:
        queries = self._queries
        for number, cache in enumerate(caches):
            found = cache.search_all(
                layer=0, q=queries.index_q, w=queries.index_w, top_k=TOP_K, start_position=START
            ).indices
            self._compare((number, "search"), found)

    def _upload(self) -> None:
        """A cache in parts; each of them is there once it is acknowledged."""
        with streamindex_client.connect(self._service.address, options=self._options) as client:
            cache, keys = SHAPE.create(client), self._rows[0].keys
            part = len(keys) // PARTS
            for number in range(PARTS):
                first = number * part
                cache.append(layer=0, keys=keys[first : first + part], first_row=first)
                assert cache.refresh().layer_keys[0] == first + part
            found = cache.search_all(
                layer=0, q=self._queries.index_q, w=self._queries.index_w, top_k=TOP_K, start_position=START
            ).indices
            self._compare((0, "search"), found)
            cache.delete()

    def _compare(self, which: tuple[int, str], answer: torch.Tensor) -> None:
        assert torch.equal(answer, self._first.setdefault(which, answer.clone())), f"{which}: not the bits it had"

    def _search_without_retries(self) -> None:
        with Calls(self._service.address) as calls, calls.cache(KIND, self._keys) as cache:
            with calls.search_call() as call:
                call.send(search_header(KIND, cache.id, TOP_K, start_position=KEYS))
                call.send(*query_chunks(KIND, self._plain, 7))
                call.half_close()
                messages, error = call.to_the_end()
            chunks = [message.chunk for message in messages if message.WhichOneof("message") == "chunk"]
            found = answers(chunks, TOP_K)[0]
            assert np.array_equal(found, self._wanted[: len(found)]), "a wrong answer"
            if error is None:
                assert len(found) == ROWS
                self.told["answer"] += 1
                return
            last = messages[-1] if messages else None
            if last is None or last.WhichOneof("message") != "refused":
                raise error  # the frontend is gone
            assert last.refused.HasField("retry_after_ms"), last.refused
            assert last.refused.reason in ("WORKER_LOST", "NOT_READY", "HOST_MEMORY"), last.refused
            self.told[last.refused.reason] += 1

    # What must hold.

    def _wait_for_nothing(self, calls: Calls) -> None:
        def nothing() -> bool:
            load = calls.load()
            held = [ledger.reserved_bytes for ledger in load.ledgers if ledger.name != "hbm"]
            counted = load.key_caches + load.open_uploads + load.device.tiles + load.queue.tiles
            return is_idle(load) and not any(held) and counted == 0 and not load.device.resident_bytes

        wait_for(nothing)

    def _wait_for_no_more(self) -> None:
        assert self._figures is not None
        pid, base = self._service.process.pid, self._figures
        end = time.monotonic() + WAIT_S
        while more := more_than(base, figures_of(pid)):
            assert time.monotonic() < end, more
            time.sleep(0.02)


def _settled(pid: int) -> ProcessFigures:
    time.sleep(0.2)
    return figures_of(pid)
