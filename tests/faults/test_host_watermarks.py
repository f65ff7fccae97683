"""Host memory that is nearly used up: first no upload begins, then nothing takes memory, and what frees it goes on."""

from __future__ import annotations

import contextlib

import grpc
import numpy as np
import pytest
from streamindex.v1 import key_cache_pb2, search_pb2

from streamindex_service.testing.service import RunningService
from tests.support.calls import Calls, batch_item, finish_message, key_chunks, refused, start_message
from tests.support.services import MIB, ROOMY, wait_for
from tests.support.tensors import Draw, Kind, expected

KIND = Kind(heads=2, head_dim=64)  # a page has 32 KiB, 256 fill the budget
PAGE_KEYS, PAGE_BYTES = 256, 32_768
BUDGET = 8 * MIB
HIGH, CRITICAL = int(0.95 * BUDGET), int(0.98 * BUDGET)
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
SETTINGS = {
    **ROOMY,
    "server": {"sweep_s": 3600},  # what has expired goes when somebody needs its memory
    "memory": {**ROOMY["memory"], "host_budget_bytes": BUDGET, "extent_bytes": 65_536, "spare_segments": 128},
}


@pytest.fixture(scope="module")
def service():
    with RunningService(SETTINGS) as running:
        yield running


@pytest.fixture
def calls(service):
    with Calls(service.address) as connection:
        yield connection


@contextlib.contextmanager
def filled(calls, pages, **others):
    """A cache of so many pages."""
    rows = Draw(pages).keys(KIND, pages * PAGE_KEYS)
    with calls.cache(KIND, **others) as cache:
        calls.upload(KIND, cache.id, rows, chunk_rows=4096)
        yield cache, rows


def begun(calls, cache, rows, held, first_row=0):
    """An upload that holds so many of its rows."""
    call, accepted = calls.start_upload(cache.id, len(rows), first_row)
    call.send(*key_chunks(KIND, rows[:held], PAGE_KEYS))
    while call.receive("acknowledged").row_offset < held:
        pass
    return call, accepted.upload_id


def check_figures(error, watermark):
    assert error.reason == "HOST_MEMORY"
    assert error.retry_after_ms
    figures = {name: int(value) for name, value in error.metadata.items()}
    assert (figures["watermark_bytes"], figures["budget_bytes"]) == (watermark, BUDGET)
    assert watermark < figures["reserved_bytes"] + figures["needed_bytes"] <= BUDGET + PAGE_BYTES


def refused_start(calls, cache):
    with calls.append_call() as call:
        call.send(start_message(cache.id, 1))
        refusal = call.refusal()
    assert refusal.code == EXHAUSTED
    return refusal.error


def test_above_the_high_watermark_no_upload_begins(calls):
    draw = Draw(1)
    rows = draw.keys(KIND, 6 * PAGE_KEYS)
    with filled(calls, 240) as (full, keys), calls.cache(KIND) as cache, calls.cache(KIND) as other:
        going, _ = begun(calls, cache, rows, 2 * PAGE_KEYS)
        with going:
            begun(calls, other, rows, PAGE_KEYS)[0].cancel()
            check_figures(refused_start(calls, other), HIGH)
            append = (0, draw.keys(KIND, 1))
            queries = draw.queries(KIND, 1, start_position=len(keys))
            items = [batch_item(KIND, other.id, queries, append), batch_item(KIND, full.id, queries)]
            request = search_pb2.SearchBatchRequest(items=items, top_k=5)
            bad, good = calls.searches.SearchBatch(request, timeout=60).results
            check_figures(bad.error, HIGH)
            found = np.frombuffer(good.indices, np.int32).reshape(1, 5)
            assert np.array_equal(found, expected(KIND, keys, queries, 5)[0])
            # What has begun goes on to its end, and caches are made.
            going.send(*key_chunks(KIND, rows, PAGE_KEYS, first=2 * PAGE_KEYS), finish_message(KIND, rows))
            assert going.receive_until("committed").layer_keys == len(rows)
        calls.delete(calls.create(KIND).id)
        calls.delete(calls.fork(cache.id).id)
        assert HIGH < calls.ledger("host").reserved_bytes < CRITICAL


def test_above_the_critical_watermark_there_is_finish_search_and_delete(calls):
    draw = Draw(2)
    rows = draw.keys(KIND, 20 * PAGE_KEYS)
    with filled(calls, 238) as (full, keys), calls.cache(KIND) as cache, calls.cache(KIND) as other:
        whole, _ = begun(calls, other, rows[:PAGE_KEYS], PAGE_KEYS)
        going, upload_id = begun(calls, cache, rows, PAGE_KEYS)
        with whole, going:
            going.send(*key_chunks(KIND, rows, PAGE_KEYS, first=PAGE_KEYS))
            refusal = going.refusal()
            assert refusal.code == EXHAUSTED
            check_figures(refusal.error, CRITICAL)
            held = calls.query_upload(upload_id).row_offset
            assert held == 11 * PAGE_KEYS  # 250 pages; one more would pass 98 %
            # Nothing that takes memory, but for the records that fit below the watermark.
            record = Kind(heads=2, head_dim=64, layers=50)
            small = calls.create(record)
            make = key_cache_pb2.CreateKeyCacheRequest(spec=record.spec())
            fork = key_cache_pb2.ForkKeyCacheRequest(key_cache_id=full.id)
            for method, request in ((calls.key_caches.CreateKeyCache, make), (calls.key_caches.ForkKeyCache, fork)):
                refusal = refused(method, request)
                assert refusal.code == EXHAUSTED
                check_figures(refusal.error, CRITICAL)
            with calls.resume_upload(upload_id)[0] as again:
                again.send(*key_chunks(KIND, rows, PAGE_KEYS, first=held))
                check_figures(again.refusal().error, CRITICAL)
            # Finish, search, and what tells and frees
            whole.send(finish_message(KIND, rows[:PAGE_KEYS]))
            assert whole.receive_until("committed").layer_keys == PAGE_KEYS
            queries = draw.queries(KIND, 3, start_position=len(keys))
            found, _ = calls.search(KIND, full.id, queries, 50)
            assert np.array_equal(found, expected(KIND, keys, queries, 50)[0])
            assert calls.ledger("host").peak_bytes <= BUDGET
            assert len(calls.list().key_caches) == 4
            calls.delete(small.id)
            assert calls.truncate(full.id, 100 * PAGE_KEYS).layer_keys == [100 * PAGE_KEYS]
        with calls.resume_upload(upload_id)[0] as again:
            again.send(*key_chunks(KIND, rows, PAGE_KEYS, first=held), finish_message(KIND, rows))
            assert again.receive_until("committed").layer_keys == len(rows)


def test_freed_memory_that_is_kept_warm_does_not_count(calls):
    with filled(calls, 242) as (full, _), calls.cache(KIND) as other:
        begun(calls, other, Draw(3).keys(KIND, 2 * PAGE_KEYS), 2 * PAGE_KEYS)[0].cancel()
        check_figures(refused_start(calls, other), HIGH)
        calls.delete(full.id)
        assert calls.ledger("host").spare_bytes > BUDGET // 2
        with filled(calls, 242) as (again, _):
            assert calls.get(again.id).host_bytes == 242 * PAGE_BYTES


def test_what_has_expired_goes_before_anybody_is_refused(calls):
    """The sweep comes an hour later: it is the upload that finds what nobody has named for too long."""
    with calls.cache(KIND) as other, filled(calls, 243, idle_ttl_s=1) as (idle, _):

        def begins():
            with calls.append_call() as call:
                call.send(start_message(other.id, 1))
                return next(call.rpc).WhichOneof("message") == "accepted"

        wait_for(begins)
        get = key_cache_pb2.GetKeyCacheRequest(key_cache_id=idle.id)
        assert refused(calls.key_caches.GetKeyCache, get).error.reason == "CACHE_NOT_FOUND"
        assert calls.ledger("host").reserved_bytes < BUDGET // 2
