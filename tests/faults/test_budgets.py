"""Little of everything: what can never fit, what does not fit now, and caches that take turns on the device."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from streamindex.v1 import key_cache_pb2, search_pb2

from streamindex_service.core.caches import CACHE_RECORD_BYTES, LAYER_RECORD_BYTES
from streamindex_service.testing.service import RunningService
from tests.support.calls import (
    Calls,
    batch_item,
    finish_message,
    key_chunk,
    key_chunks,
    query_chunk,
    refused,
    search_header,
    start_message,
)
from tests.support.services import TIGHT, is_idle, wait_for
from tests.support.tensors import BF16, FP8, Draw, Kind, expected

# Of the tight service: 19.25 MiB on the device, of which a tile may need 16.25; 8 MiB in the host.
MIB = 1 << 20
DEVICE_BYTES = 19 * MIB + MIB // 4
HOST_BYTES = 8 * MIB + 12 * 1024
KIND = Kind(heads=2, head_dim=64)  # a page has 32 KiB
KEYS_OF_A_MIB = 32 * 256
INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_layer_that_fits_with_the_smallest_workspace_exactly(tight):
    draw = Draw(1)
    keys = draw.keys(KIND, 3 * KEYS_OF_A_MIB)
    queries = draw.queries(KIND, 3, start_position=len(keys))
    with tight.cache(KIND, keys) as cache:
        found, _ = tight.search(KIND, cache.id, queries, 50)
        assert np.array_equal(found, expected(KIND, keys, queries, 50)[0])
        ledger = tight.ledger("hbm")
        assert 19 * MIB < ledger.peak_bytes <= ledger.limit_bytes == DEVICE_BYTES


def test_a_page_that_can_never_fit():
    """Less on the device than the smallest workspace, a block, a merge and a page: only what needs no merge fits."""
    budget = 16 * MIB + MIB // 2
    memory = {**TIGHT["memory"], "device_budget_bytes": budget}
    draw = Draw(2)
    keys = draw.keys(KIND, 9 * 256)
    with RunningService({**TIGHT, "memory": memory}) as service, Calls(service.address) as calls:
        with calls.cache(KIND, keys[: 8 * 256]) as fits:
            queries = draw.queries(KIND, 3, start_position=9 * 256)
            found, _ = calls.search(KIND, fits.id, queries, 5)
            assert np.array_equal(found, expected(KIND, keys[: 8 * 256], queries, 5)[0])
        with calls.cache(KIND, keys) as cache:
            with calls.search_call() as call:
                call.send(search_header(KIND, cache.id, 5))
                refusal = call.refusal()
            assert (refusal.code, refusal.error.reason) == (INVALID, "EXCEEDS_BUDGET")
            figures = {"needed_bytes": str(budget + 32_768), "budget_bytes": str(budget)}
            assert dict(refusal.error.metadata) == figures
            item = batch_item(KIND, cache.id, draw.queries(KIND, 1))
            request = search_pb2.SearchBatchRequest(items=[item], top_k=5)
            error = calls.searches.SearchBatch(request, timeout=30).results[0].error
            assert (error.reason, dict(error.metadata)) == ("EXCEEDS_BUDGET", figures)


@pytest.mark.parametrize(
    ("keys", "layers", "budget"),
    [(3 * KEYS_OF_A_MIB, 1, None), (3 * KEYS_OF_A_MIB + 1, 1, None), (65_536, 2, "host"), (65_536, 256, "host")],
)
def test_what_is_expected_to_outgrow_the_budget_is_refused_at_once(tight, keys, layers, budget):
    kind = Kind(heads=2, head_dim=64, layers=layers)
    request = key_cache_pb2.CreateKeyCacheRequest(spec=kind.spec(expected_keys=keys))
    if budget is None:
        tight.delete(tight.key_caches.CreateKeyCache(request).key_cache.id)
        return
    refusal = refused(tight.key_caches.CreateKeyCache, request)
    assert (refusal.code, refusal.error.reason) == (INVALID, "EXCEEDS_BUDGET")
    assert refusal.error.metadata["budget"] == budget
    assert int(refusal.error.metadata["needed_bytes"]) > int(refusal.error.metadata["budget_bytes"])


def test_host_memory_that_is_used_up(tight):
    """8 MiB: an upload of 9 is refused on the way, in-band; what it held stays, and goes on once there is room."""
    draw = Draw(3)
    keys = draw.keys(KIND, 6 * KEYS_OF_A_MIB)
    with tight.cache(KIND) as cache, tight.cache(KIND, draw.keys(KIND, 3 * KEYS_OF_A_MIB)) as other:
        call, accepted = tight.start_upload(cache.id, len(keys))
        with call:
            call.send(*key_chunks(KIND, keys, KEYS_OF_A_MIB // 2))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (EXHAUSTED, "HOST_MEMORY")
        figures = {name: int(value) for name, value in refusal.error.metadata.items()}
        assert figures["budget_bytes"] == HOST_BYTES
        assert figures["reserved_bytes"] + figures["needed_bytes"] > HOST_BYTES
        held = tight.query_upload(accepted.upload_id).row_offset
        assert held == 5 * KEYS_OF_A_MIB
        tight.delete(other.id)
        call, state = tight.resume_upload(accepted.upload_id)
        with call:
            assert state.row_offset == held
            call.send(*key_chunks(KIND, keys, KEYS_OF_A_MIB // 2, first=held), finish_message(KIND, keys))
            assert call.receive_until("committed").layer_keys == len(keys)
        assert tight.ledger("host").peak_bytes <= HOST_BYTES


def test_a_batch_that_appends_beyond_the_host_memory(tight):
    draw = Draw(4)
    kind = Kind(heads=2, head_dim=256)
    with tight.cache(kind) as cache:
        data = draw.keys(kind, 4096).key_bytes(kind)
        appends = [search_pb2.SearchBatchItem.Append(first_row=4096 * i, row_count=4096, keys=data) for i in range(5)]
        items = [batch_item(kind, cache.id, append=append) for append in appends]
        results = tight.searches.SearchBatch(search_pb2.SearchBatchRequest(items=items, top_k=1), timeout=30).results
        assert [result.layer_keys for result in results] == [4096, 8192, 12288, 16384, 0]
        assert results[4].error.reason == "HOST_MEMORY"
        assert results[4].error.HasField("retry_after_ms")
        assert tight.ledger("host").reserved_bytes == 16384 * 512 + CACHE_RECORD_BYTES + LAYER_RECORD_BYTES
        assert tight.load().open_uploads == 0


def test_too_many_caches(tight):
    made = [tight.create(KIND) for _ in range(6)]
    request = key_cache_pb2.CreateKeyCacheRequest(spec=KIND.spec())
    refusal = refused(tight.key_caches.CreateKeyCache, request)
    assert (refusal.code, refusal.error.reason) == (EXHAUSTED, "TOO_MANY")
    assert refusal.error.metadata["limit"] == "6"
    fork = key_cache_pb2.ForkKeyCacheRequest(key_cache_id=made[0].id)
    assert refused(tight.key_caches.ForkKeyCache, fork).error.reason == "TOO_MANY"
    tight.delete(made.pop().id)
    made.append(tight.create(KIND))
    for cache in made:
        tight.delete(cache.id)


def test_too_many_uploads(tight):
    with tight.cache(KIND) as cache:
        open_ones = [tight.start_upload(cache.id, 10)[0] for _ in range(3)]
        with tight.append_call() as call:
            call.send(start_message(cache.id, 10))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (EXHAUSTED, "TOO_MANY")
        keys = Draw(5).keys(KIND, 10)
        for call in open_ones:
            call.send(key_chunk(KIND, keys, 0), finish_message(KIND, keys))
            call.receive_until("committed")
        tight.start_upload(cache.id, 10)[0].cancel()


@contextlib.contextmanager
def frozen(service):
    """The device does nothing for a while: what it was given stays there."""
    (worker,) = service.worker_pids()
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


def asked(call, cache_id, queries, start_position):
    """All of a search of one row in 5 is sent."""
    call.send(search_header(KIND, cache_id, 5, start_position=start_position), query_chunk(KIND, queries, 0, 1))
    call.half_close()
    return call


def test_a_queue_that_is_full(tight, tight_service):
    draw = Draw(6)
    keys = draw.keys(KIND, 300)
    with tight.cache(KIND, keys) as cache:
        queries = draw.queries(KIND, 1, start_position=299)
        with frozen(tight_service):
            calls = [asked(tight.search_call(), cache.id, queries, 299)]
            wait_for(lambda: tight.load().running_searches == 1)
            calls += [asked(tight.search_call(), cache.id, queries, 299) for _ in range(8)]
            wait_for(lambda: tight.load().queued_searches == 8)
            with tight.search_call() as call:
                call.send(search_header(KIND, cache.id, 5))
                refusal = call.refusal()
            assert (refusal.code, refusal.error.reason) == (EXHAUSTED, "QUEUE_FULL")
            assert refusal.error.metadata["limit"] == refusal.error.metadata["queued"] == "8"
            assert refusal.error.retry_after_ms
        for call in calls:  # nobody is forgotten
            done = call.rest()[-1].done
            assert done.row_count == 1
        assert done.queued_ms > 0


def test_a_search_that_waits_for_its_caller_is_in_nobodys_way(tight):
    """It is open and holds nothing on the device: one tile fits there at a time, and others' run."""
    draw = Draw(6)
    keys = draw.keys(KIND, 300)
    with tight.cache(KIND, keys) as cache, tight.start_search(KIND, cache.id, 5):
        queries = draw.queries(KIND, 3, start_position=299)
        found, _ = tight.search(KIND, cache.id, queries, 5)
        assert np.array_equal(found, expected(KIND, keys, queries, 5)[0])
        assert tight.load().running_searches == 1


def test_a_deadline_that_cannot_be_met(tight):
    keys = Draw(7).keys(KIND, 300)
    with tight.cache(KIND, keys) as cache:
        tight.search(KIND, cache.id, Draw(7).queries(KIND, 3, start_position=299), 5)  # how fast it is, is known now
        with tight.search_call(timeout_s=20) as call:
            call.send(search_header(KIND, cache.id, 5, start_position=299, row_count=10**10))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (EXHAUSTED, "DEADLINE_UNREACHABLE")
        figures = {name: int(value) for name, value in refusal.error.metadata.items()}
        assert figures["estimated_run_ms"] > figures["deadline_ms"] > 15_000
        assert refusal.error.retry_after_ms


@pytest.mark.parametrize("key_format", [BF16, FP8], ids=["bf16", "fp8"])
def test_caches_that_do_not_fit_together_take_turns(tight, key_format):
    draw = Draw(8)
    kind = Kind(heads=2, head_dim=64, key_format=key_format)
    made = []
    for _ in range(5):
        keys = draw.keys(kind, int(KEYS_OF_A_MIB * 1.4))
        made.append((tight.create(kind).id, keys))
        tight.upload(kind, made[-1][0], keys, chunk_rows=5000)
    for cache_id, keys in made * 2:
        queries = draw.queries(kind, 5, start_position=len(keys))
        found, _ = tight.search(kind, cache_id, queries, 40)
        assert np.array_equal(found, expected(kind, keys, queries, 40)[0])
    assert sum(tight.get(cache_id).resident_bytes for cache_id, _ in made) <= DEVICE_BYTES - 16 * MIB
    for cache_id, _ in made:
        tight.delete(cache_id)
    wait_for(lambda: tight.ledger("hbm").reserved_bytes == 0)
    assert tight.ledger("host").reserved_bytes == 0


def test_caches_that_do_not_fit_together_searched_at_once(tight, tight_service):
    """Each waits for its turn; whatever is evicted for it comes back as it was, grown in the meantime."""
    draw = Draw(9)
    made = [(tight.create(KIND).id, draw.keys(KIND, 10_000)) for _ in range(5)]
    for cache_id, keys in made:
        tight.upload(KIND, cache_id, keys[:9_000], chunk_rows=5000)

    uploading = threading.Semaphore(3)  # as many as this service takes

    def work(number: int) -> None:
        cache_id, keys = made[number]
        mine = Draw(200 + number)
        with Calls(tight_service.address) as calls:
            for held in (9_000, 9_500, 10_000):
                if held > 9_000:
                    with uploading:
                        calls.upload(KIND, cache_id, keys[held - 500 : held], first_row=held - 500)
                queries = mine.queries(KIND, 5, start_position=10_000)
                found, _ = calls.search(KIND, cache_id, queries, 40)
                assert np.array_equal(found, expected(KIND, keys[:held], queries, 40)[0])

    with ThreadPoolExecutor(5) as pool:
        for done in [pool.submit(work, number) for number in range(5)]:
            done.result()
    for cache_id, _ in made:
        tight.delete(cache_id)
    wait_for(lambda: is_idle(tight.load()))


def test_a_cache_deleted_under_its_search_makes_room_for_who_waits(tight, tight_service):
    """Its pages go with the search that held them, and then somebody else must be let in."""
    draw = Draw(10)
    first, second = draw.keys(KIND, 2 * KEYS_OF_A_MIB), draw.keys(KIND, 2 * KEYS_OF_A_MIB)
    with tight.cache(KIND, second) as other:
        cache = tight.create(KIND)
        tight.upload(KIND, cache.id, first, chunk_rows=5000)
        queries = draw.queries(KIND, 1, start_position=len(second))
        with frozen(tight_service):
            running = asked(tight.search_call(), cache.id, queries, len(first))
            wait_for(lambda: tight.ledger("hbm").reserved_bytes > 16 * MIB)
            waiting = asked(tight.search_call(), other.id, queries, len(second))
            wait_for(lambda: tight.load().queued_searches == 1)
            tight.delete(cache.id)
        for call, keys in ((running, first), (waiting, second)):
            chunk = next(message.chunk for message in call.rest() if message.WhichOneof("message") == "chunk")
            indices = np.frombuffer(chunk.indices, np.int32).reshape(1, 5)
            assert np.array_equal(indices, expected(KIND, keys, queries, 5)[0])
