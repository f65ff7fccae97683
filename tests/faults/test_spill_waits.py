"""Those who wait for the disk, and what others do to the memory, the layer and the cache meanwhile."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from tests.support.calls import search_header
from tests.support.inprocess import InProcessServer
from tests.support.services import wait_for
from tests.support.spilling import KIND, PAGE_KEYS, calls_that_leave_nothing, check, filled, settings, spill_all
from tests.support.tensors import Draw, ModelCache, expected


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with InProcessServer(settings(tmp_path_factory.mktemp("spill"))) as running:
        yield running


@pytest.fixture
def calls(server):
    with calls_that_leave_nothing(server) as connection:
        yield connection


@contextmanager
def slow_disk(monkeypatch, name) -> Iterator[tuple[threading.Event, threading.Event]]:
    """A call of the disk waits: the first event is that one has begun, the second lets all go on."""
    call, begun, go_on = getattr(os, name), threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go_on.wait(60)
        return call(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(f"streamindex_service.frontend.spill_files.os.{name}", slow)
        try:
            yield begun, go_on
        finally:
            go_on.set()


@contextmanager
def busy_disk(server) -> Iterator[None]:
    """The disk is somebody's; within, whoever needs it waits."""
    room = server.server.service.room
    server.run(lambda: room._disk_is_mine.acquire())
    try:
        yield
    finally:
        server.run(lambda: room._disk_is_mine.release())


def wait_for_waiters(server, count: int = 1) -> None:
    room = server.server.service.room
    wait_for(lambda: len(room._disk_is_mine._waiters or ()) == count)


def test_a_move_whose_pages_come_into_use_is_followed_by_another(server, calls, monkeypatch):
    """Its memory is not free then; another cache's can be."""
    used, used_model = filled(calls, KIND, 40 * PAGE_KEYS, seed=1)
    idle, idle_model = filled(calls, KIND, 40 * PAGE_KEYS, seed=2)
    other, rows = calls.create(KIND), Draw(3).keys(KIND, 60 * PAGE_KEYS)
    with slow_disk(monkeypatch, "pwrite") as (begun, go_on), ThreadPoolExecutor(1) as pool:
        upload = pool.submit(calls.upload, KIND, other.id, rows)
        assert begun.wait(60)  # of the cache used longest ago
        with calls.start_search(KIND, used, 5):
            go_on.set()
            assert upload.result() == len(rows)
            assert calls.get(idle).spilled_bytes > 0
            assert calls.get(used).spilled_bytes == 0
    copy = ModelCache(KIND)
    copy.write(0, 0, rows)
    for cache_id, model in ((used, used_model), (idle, idle_model), (other.id, copy)):
        check(calls, KIND, cache_id, model)
        calls.delete(cache_id)


def test_memory_that_comes_free_while_the_disk_is_waited_for(server, calls):
    """Nothing can be spilled any more when the turn comes, and nothing has to be."""
    used, model = filled(calls, KIND, 80 * PAGE_KEYS, seed=4)
    leaves, _ = filled(calls, KIND, 40 * PAGE_KEYS, seed=5)
    other, rows = calls.create(KIND), Draw(6).keys(KIND, 30 * PAGE_KEYS)
    with calls.start_search(KIND, used, 5), ThreadPoolExecutor(1) as pool:
        with busy_disk(server):
            upload = pool.submit(calls.upload, KIND, other.id, rows)
            wait_for_waiters(server)
            calls.delete(leaves)
        assert upload.result() == len(rows)
    check(calls, KIND, used, model)
    for each in (used, other.id):
        calls.delete(each)


def test_a_layer_that_is_rewritten_while_its_rows_wait_for_the_disk(server, calls):
    """Its old pages and its new ones do not fit together, and nobody wants the old ones any more."""
    cache_id, model = filled(calls, KIND, 80 * PAGE_KEYS, seed=7)
    spill_all(server)
    restored = calls.load().spill.restored_pages
    rows, queries = Draw(8).keys(KIND, 80 * PAGE_KEYS), Draw(9).queries(KIND, 2, start_position=80 * PAGE_KEYS)
    with ThreadPoolExecutor(1) as pool:
        with busy_disk(server):
            search = pool.submit(calls.search, KIND, cache_id, queries, 100)
            wait_for_waiters(server)
            model.write(0, 0, rows)
            calls.upload(KIND, cache_id, rows)
        assert np.array_equal(search.result()[0], expected(KIND, rows, queries, 100)[0])
    assert calls.load().spill.restored_pages == restored
    calls.delete(cache_id)


def test_a_caller_who_goes_while_the_disk_is_waited_for_has_nothing_brought(server, calls):
    cache_id, model = filled(calls, KIND, 80 * PAGE_KEYS, seed=9)
    spill_all(server)
    kept, kept_model = filled(calls, KIND, 100 * PAGE_KEYS, seed=10)
    before = calls.load().spill
    with busy_disk(server):
        with calls.search_call() as call:
            call.send(search_header(KIND, cache_id, 5))
            wait_for_waiters(server)
        wait_for(lambda: server.server.service.counters.of("Search").running == 0)
    wait_for(lambda: not server.server.service._background)
    after = calls.load().spill
    assert (after.restored_pages, after.spilled_pages) == (before.restored_pages, before.spilled_pages)
    for each, its_model in ((kept, kept_model), (cache_id, model)):
        check(calls, KIND, each, its_model)
        calls.delete(each)


@pytest.mark.parametrize("what", ["upload", "fork"])
def test_a_cache_does_not_expire_under_a_call_that_waits_for_memory(server, calls, monkeypatch, what):
    """Nothing can be spilled before the search ends, and the time to live is over by then."""
    service = server.server.service
    clock, later_s = service.caches._clock, [0.0]
    monkeypatch.setattr(service.caches, "_clock", lambda: clock() + later_s[0])
    used, _ = filled(calls, KIND, 100 * PAGE_KEYS, seed=11, idle_ttl_s=3600)
    named, model = filled(calls, KIND, 20 * PAGE_KEYS, seed=12, idle_ttl_s=600)
    spare = service.host.free_bytes
    with ThreadPoolExecutor(1) as pool, calls.start_search(KIND, used, 5):
        assert server.run(lambda: service.host.try_reserve(spare))  # so that the call needs some
        try:
            with busy_disk(server):
                rows = Draw(13).keys(KIND, PAGE_KEYS)
                arguments = (KIND, named, rows, len(model.layers[0])) if what == "upload" else (named,)
                call = pool.submit(getattr(calls, what), *arguments)
                wait_for_waiters(server)
                later_s[0] = 700.0
                server.run(lambda: service.uploads.reclaim(at_once=True))
        finally:
            server.run(lambda: service.host.release(spare))
        made = call.result()
    if what == "upload":
        model.write(0, len(model.layers[0]), rows)
    else:
        check(calls, KIND, made.id, model)
        calls.delete(made.id)
    check(calls, KIND, named, model)
    for each in (used, named):
        calls.delete(each)
