"""The device process dies or hangs: callers learn it at once, another one starts, and no key is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from streamindex.v1 import search_pb2

from streamindex_service.ipc.running import TABLE_BYTES, RunningTiles
from streamindex_service.testing.service import RunningService
from tests.support.calls import (
    Calls,
    answers,
    batch_item,
    finish_message,
    key_chunk,
    query_chunk,
    query_chunks,
    search_header,
)
from tests.support.services import ROOMY, WAIT_S, is_idle, wait_for
from tests.support.tensors import FP8, Draw, Kind, Queries, expected

KIND = Kind(heads=3, head_dim=32)
SERVING, NOT_SERVING = 1, 2
SOON_S = 5.0  # the promise is one second; a busy machine is given more


@pytest.fixture(scope="module")
def service():
    settings = {**ROOMY, "worker": {**ROOMY["worker"], "heartbeat_s": 0.2, "heartbeat_timeout_s": 1.5}}
    with RunningService(settings) as running:
        yield running


@pytest.fixture
def calls(service):
    with Calls(service.address) as connection:
        connection.wait_health(SERVING)
        yield connection


def kill(service, number=signal.SIGKILL):
    (worker,) = service.worker_pids()
    os.kill(worker, number)
    return worker


def test_killed_in_the_middle_of_a_search(service, calls):
    draw = Draw(1)
    keys, queries = draw.keys(KIND, 3000), draw.queries(KIND, 2000, start_position=3000)
    wanted, _ = expected(KIND, keys, queries, 64)
    with calls.cache(KIND, keys) as cache:
        restarts = calls.load().worker_restarts
        host = calls.ledger("host").reserved_bytes
        call = calls.start_search(KIND, cache.id, 64, start_position=3000)
        call.send(query_chunk(KIND, queries, 0, 100))
        first = call.receive("chunk")
        worker = kill(service, signal.SIGSTOP)
        call.send(*query_chunks(KIND, queries, 100)[1:])
        # tiles are with the worker, which never answers them
        wait_for(lambda: calls.ledger("ingress").reserved_bytes == 4 << 18)
        os.kill(worker, signal.SIGKILL)
        killed = time.monotonic()
        refusal = call.refusal()
        assert time.monotonic() - killed < SOON_S
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        found, _ = answers([first], 64)
        assert np.array_equal(found, wanted[: len(found)])  # what was answered is valid
        calls.wait_health(NOT_SERVING)
        assert not calls.load().ready
        # asked again it waits for the new worker; nothing is uploaded
        found, _ = calls.search(KIND, cache.id, queries, 64)
        assert np.array_equal(found, wanted)
        calls.wait_health(SERVING)
        load = calls.load()
        assert (load.ready, load.worker_restarts) == (True, restarts + 1)
        assert calls.ledger("host").reserved_bytes == host
        assert calls.get(cache.id).layer_keys[0] == 3000
        wait_for(lambda: is_idle(calls.load()))
        assert worker not in service.worker_pids()


def test_every_caller_hears_of_it_and_every_key_survives(service, calls):
    draw = Draw(2)
    kinds = [KIND, Kind(heads=2, head_dim=64, key_format=FP8), Kind(heads=2, head_dim=32, layers=2)]
    made = []
    for kind in kinds:
        keys = draw.keys(kind, 900)
        made.append((kind, calls.create(kind).id, keys))
        calls.upload(kind, made[-1][1], keys)
    fork = calls.fork(made[0][1])
    upload, accepted = calls.start_upload(made[0][1], 600)
    rows = draw.keys(KIND, 600)
    upload.send(key_chunk(KIND, rows[:300], 0))
    upload.receive("acknowledged")
    searches = []
    for kind, cache_id, _ in made:
        call = calls.start_search(kind, cache_id, 32, start_position=900)
        call.send(query_chunk(kind, draw.queries(kind, 10), 0, 10))
        call.receive("chunk")
        searches.append((kind, call))
    worker = kill(service, signal.SIGSTOP)
    for kind, call in searches:
        call.send(query_chunk(kind, draw.queries(kind, 20), 10, 10))
    items = [batch_item(kind, cache_id, draw.queries(kind, 1)) for kind, cache_id, _ in made]
    batch = calls.searches.SearchBatch.future(search_pb2.SearchBatchRequest(items=items, top_k=5), timeout=60)

    def tiles() -> int:
        load = calls.load()  # asked once: a stopped worker makes it slow, and does not live for long
        return load.device.tiles + load.queue.tiles

    wait_for(lambda: tiles() == 5)  # two items are of one kind, and one tile
    os.kill(worker, signal.SIGKILL)
    # what the worker had is lost; what still waited for it is the next one's
    lost = 0
    for _, call in searches:
        call.half_close()
        messages, error = call.to_the_end()
        lost += error is not None
        last = messages[-1]
        assert last.done.row_count == 20 if error is None else last.refused.reason == "WORKER_LOST"
    for result in batch.result().results:
        lost += result.HasField("error")
        if result.HasField("error"):
            assert result.error.reason == "WORKER_LOST"
            assert result.error.HasField("retry_after_ms")
        else:
            assert len(result.indices) == 5 * 4
    assert lost >= 1
    # an upload has nothing to do with the device: it goes on
    upload.send(key_chunk(KIND, rows[300:], 300), finish_message(KIND, rows))
    assert upload.receive_until("committed").layer_keys == 900
    assert calls.query_upload(accepted.upload_id).committed
    source_keys = rows + made[0][2][600:]
    everything = [(kind, cache_id, keys) for kind, cache_id, keys in made[1:]]
    everything += [(KIND, made[0][1], source_keys), (KIND, fork.id, made[0][2])]
    for kind, cache_id, keys in everything:
        queries = draw.queries(kind, 5, start_position=895)
        found, scores = calls.search(kind, cache_id, queries, 900, want_scores=True)
        wanted = expected(kind, keys, queries, 900)
        assert np.array_equal(found, wanted[0])
        assert np.array_equal(scores, wanted[1])
    for _, cache_id, _ in everything:
        calls.delete(cache_id)
    wait_for(lambda: [ledger.reserved_bytes for ledger in calls.load().ledgers] == [0, 0, 0])


def test_a_search_that_waits_is_served_by_the_next_worker(service, calls):
    draw = Draw(3)
    keys, queries = draw.keys(KIND, 500), draw.queries(KIND, 20, start_position=490)
    with calls.cache(KIND, keys) as cache:
        kill(service)
        calls.wait_health(NOT_SERVING)
        with calls.search_call() as call:
            call.send(search_header(KIND, cache.id, 30, start_position=490), *query_chunks(KIND, queries, 20))
            call.half_close()
            wait_for(lambda: calls.load().queued_searches == 1)
            assert calls.load().running_searches == 0
            found, _ = answers([m.chunk for m in call.rest() if m.WhichOneof("message") == "chunk"], 30)
        assert np.array_equal(found, expected(KIND, keys, queries, 30)[0])


def test_a_worker_that_hangs_is_replaced(service, calls):
    draw = Draw(4)
    keys, queries = draw.keys(KIND, 500), draw.queries(KIND, 20, start_position=490)
    with calls.cache(KIND, keys) as cache:
        call = calls.start_search(KIND, cache.id, 30, start_position=490)
        worker = kill(service, signal.SIGSTOP)
        call.send(query_chunk(KIND, queries, 0, 20))
        refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST")
        found, _ = calls.search(KIND, cache.id, queries, 30)
        assert np.array_equal(found, expected(KIND, keys, queries, 30)[0])
        assert worker not in service.worker_pids()


def end_as_by_a_fault(worker):
    """A stopped worker ends by itself; from outside it would be SIGKILL."""
    os.kill(worker, signal.SIGUSR1)
    os.kill(worker, signal.SIGCONT)


def running_tiles(service):
    """What the worker says that its device has."""
    directory = f"/proc/{service.process.pid}/fd"
    for name in os.listdir(directory):
        with contextlib.suppress(OSError):  # it was closed meanwhile
            path = f"{directory}/{name}"
            if "memfd:streamindex" in os.readlink(path) and os.stat(path).st_size == TABLE_BYTES:
                tiles = RunningTiles.receive(os.open(path, os.O_RDWR))
                found = tiles.oldest_first()
                tiles.close()
                return found
    return []


def stop_in_a_tile(service):
    """Stop the worker while the device has a tile: it comes between two of them, and tries again."""

    def is_stopped(worker):
        return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        wait_for(lambda: running_tiles(service))
        worker = kill(service, signal.SIGSTOP)
        wait_for(lambda worker=worker: is_stopped(worker))
        if running_tiles(service):
            return worker
        os.kill(worker, signal.SIGCONT)
    raise AssertionError("the device had no tile")


def test_a_request_that_kills_its_workers_is_not_tried_for_ever(service, calls):
    draw = Draw(6)
    keys, queries = draw.keys(KIND, 20_000), draw.queries(KIND, 2000, start_position=20_000)
    few = Queries(queries.q[:20], queries.w[:20], queries.positions[:20])
    with calls.cache(KIND, keys) as cache:
        restarts = calls.load().worker_restarts
        for deaths in (1, 2):
            call = calls.start_search(KIND, cache.id, 29, start_position=20_000)
            call.send(*query_chunks(KIND, queries, 500))
            end_as_by_a_fault(stop_in_a_tile(service))
            assert call.refusal().error.reason == "WORKER_LOST"
            wait_for(lambda deaths=deaths: restarts + deaths == calls.load().worker_restarts)
            calls.wait_health(SERVING)
        with calls.search_call() as again:
            again.send(search_header(KIND, cache.id, 29, start_position=20_000))
            refusal = again.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "POISON")
        found, _ = calls.search(KIND, cache.id, few, 30)  # another one is served
        assert np.array_equal(found, expected(KIND, keys, few, 30)[0])


def test_a_request_that_the_device_was_never_given_is_not_blamed(service, calls):
    """Though its tile was the only one that the worker had: it lay in the link."""
    draw = Draw(7)
    keys, queries = draw.keys(KIND, 500), draw.queries(KIND, 20, start_position=490)
    with calls.cache(KIND, keys) as cache:
        restarts = calls.load().worker_restarts
        for deaths in (1, 2):
            call = calls.start_search(KIND, cache.id, 28, start_position=490)
            worker = kill(service, signal.SIGSTOP)
            call.send(query_chunk(KIND, queries, 0, 20))
            wait_for(lambda: calls.load().device.tiles == 1)
            assert running_tiles(service) == []
            end_as_by_a_fault(worker)
            assert call.refusal().error.reason == "WORKER_LOST"
            wait_for(lambda deaths=deaths: restarts + deaths == calls.load().worker_restarts)
            calls.wait_health(SERVING)
        found, _ = calls.search(KIND, cache.id, queries, 28)
        assert np.array_equal(found, expected(KIND, keys, queries, 28)[0])


def test_descriptors_do_not_add_up(service, calls):
    """Three workers later the frontend holds no more than before."""
    keys = Draw(5).keys(KIND, 500)
    queries = Draw(5).queries(KIND, 3)
    with calls.cache(KIND, keys) as cache:
        calls.search(KIND, cache.id, queries, 3)
        before = len(os.listdir(f"/proc/{service.process.pid}/fd"))
        for _ in range(2):
            kill(service)
            calls.wait_health(NOT_SERVING)
            calls.search(KIND, cache.id, queries, 3)
        wait_for(lambda: len(os.listdir(f"/proc/{service.process.pid}/fd")) <= before)
        assert len(service.worker_pids()) == 1
