"""Callers that go away, give up or do not read: everything they held comes back, and nobody else notices."""

from __future__ import annotations

import os
import signal

import grpc
import numpy as np
import pytest
from streamindex.v1 import search_pb2

from streamindex_service.frontend import gathering, search_stream
from streamindex_service.testing.service import RunningService
from tests.support.calls import (
    Calls,
    StreamCall,
    answers,
    batch_item,
    finish_message,
    key_chunks,
    query_chunk,
    query_chunks,
    refusal_of,
    resume_message,
    search_header,
)
from tests.support.services import ROOMY, is_idle, wait_for
from tests.support.tensors import Draw, Kind, expected

KIND = Kind(heads=3, head_dim=32)
MIB = 1 << 20


@pytest.fixture(scope="module")
def service():
    """Its worker may be stopped for a while without being replaced."""
    with RunningService({**ROOMY, "limits": {"slow_consumer_s": 60}}) as running:
        yield running


@pytest.fixture
def calls(service):
    with Calls(service.address) as connection:
        yield connection


@pytest.fixture
def frozen(service):
    """Stops the worker, and lets it go on at the end at the latest."""
    (worker,) = service.worker_pids()

    def freeze(stop: bool = True) -> None:
        os.kill(worker, signal.SIGSTOP if stop else signal.SIGCONT)

    yield freeze
    freeze(False)


def ledgers(calls):
    return {ledger.name: ledger.reserved_bytes for ledger in calls.load().ledgers}


@pytest.mark.parametrize("way", ["cancel", "connection lost", "deadline"])
@pytest.mark.parametrize("moment", ["accepted", "on the device", "answered"])
def test_a_search_that_ends_early_gives_everything_back(service, calls, frozen, way, moment):
    draw = Draw(1)
    keys = draw.keys(KIND, 2000)
    queries = draw.queries(KIND, 4000, start_position=2000)
    with calls.cache(KIND, keys) as cache, Calls(service.address) as other:
        calls.search(KIND, cache.id, draw.queries(KIND, 1), 5)  # the pages are on the device
        before = ledgers(calls)
        assert before["ingress"] == 0
        call = other.start_search(KIND, cache.id, 64, timeout_s=4.0 if way == "deadline" else 60)
        if moment == "answered":
            call.send(query_chunk(KIND, queries, 0, 100))
            call.receive("chunk")
        elif moment == "on the device":
            frozen()
            call.send(*query_chunks(KIND, queries, 200))
            # all four blocks are full of rows that wait for the device
            wait_for(lambda: ledgers(calls)["ingress"] == 4 * MIB // 4)
        assert calls.load().running_searches == 1
        # on the device it holds what its tiles there need, and nothing while it has none
        if moment != "answered":  # then its next tile may run still
            assert (ledgers(calls)["hbm"] > before["hbm"]) == (moment == "on the device")
        if way == "cancel":
            call.cancel()
        elif way == "connection lost":
            other.close()
        else:
            with pytest.raises(grpc.RpcError) as caught:
                call.rest()
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        frozen(False)
        wait_for(lambda: is_idle(calls.load()))
        assert ledgers(calls) == before
        found, _ = calls.search(KIND, cache.id, Draw(2).queries(KIND, 50), 64)
        assert np.array_equal(found, expected(KIND, keys, Draw(2).queries(KIND, 50), 64)[0])


def test_the_device_stops_within_a_tile(calls, frozen):
    """Rows that wait behind the tile that runs are never computed: the next search comes right after that one tile."""
    draw = Draw(3)
    kind = Kind(heads=64, head_dim=128)
    keys = draw.keys(kind, 8000)
    queries = draw.queries(kind, 400, start_position=8000)
    with calls.cache(kind, keys) as cache:
        calls.search(kind, cache.id, draw.queries(kind, 1), 5)
        frozen()
        many = [calls.start_search(kind, cache.id, 64, start_position=8000) for _ in range(8)]
        for call in many:
            call.send(*query_chunks(kind, queries, 100))
        wait_for(lambda: ledgers(calls)["ingress"] == 8 * MIB)  # two tiles are with the worker, and others wait
        for call in many:
            call.cancel()
        last = calls.start_search(kind, cache.id, 64, start_position=8000, want_scores=False)
        last.send(query_chunk(kind, queries, 0, 1))
        last.half_close()
        done = calls.load().device.tiles_done
        frozen(False)
        assert last.rest()[-1].done.row_count == 1
        wait_for(lambda: is_idle(calls.load()))
        # its own, and of the others' what the worker had begun before it heard of their end
        assert 1 <= calls.load().device.tiles_done - done <= 2


def test_a_search_that_waits_in_the_queue_is_cancelled(calls, frozen):
    draw = Draw(4)
    keys = draw.keys(KIND, 300)
    with calls.cache(KIND, keys) as cache:
        calls.search(KIND, cache.id, draw.queries(KIND, 1), 5)
        before = ledgers(calls)
        frozen()
        queries = draw.queries(KIND, 1, start_position=299)
        made = []
        for _ in range(20):
            call = calls.search_call()
            call.send(search_header(KIND, cache.id, 5, start_position=299), query_chunk(KIND, queries, 0, 1))
            made.append(call)
        wait_for(lambda: calls.load().queue.tiles + calls.load().device.tiles == 20)
        waiting = calls.load().queued_searches
        assert waiting >= 4  # 16 MiB each, of 256: at most sixteen are on the device
        for call in made[-3:]:
            call.cancel()
        wait_for(lambda: calls.load().queued_searches == waiting - 3)
        for call in made[:10]:
            call.cancel()
        frozen(False)
        for call in made[10:17]:
            call.half_close()
            assert call.rest()[-1].done.row_count == 1
        wait_for(lambda: is_idle(calls.load()))
        assert ledgers(calls) == before


def test_rows_that_gather_when_their_search_is_cancelled_are_forgotten(inside, monkeypatch):
    """The first tile went just now, and the next waits for more rows: it must not go when its block is another's."""
    monkeypatch.setattr(gathering, "_GATHER_S", 3600.0)
    streams = []
    run = search_stream.SearchStream.run
    monkeypatch.setattr(search_stream.SearchStream, "run", lambda self: streams.append(self) or run(self))
    with Calls(inside.target) as calls, calls.cache(KIND, Draw(5).keys(KIND, 100)) as cache:
        queries = Draw(5).queries(KIND, 10)
        call = calls.start_search(KIND, cache.id, 5)
        call.send(query_chunk(KIND, queries, 0, 4))
        assert call.receive("chunk").row_count == 4
        call.send(query_chunk(KIND, queries, 4, 6))
        (stream,) = streams
        wait_for(lambda: stream._gathered is not None)
        call.cancel()
        wait_for(lambda: is_idle(calls.load()))
        assert stream._gathered.cancelled()


@pytest.fixture(scope="module")
def impatient():
    """A service that waits a second for a reader, with room for some searches at a time."""
    settings = {**ROOMY, "limits": {"slow_consumer_s": 1.0}}
    with RunningService(settings) as running:
        yield running


def test_a_reader_that_stops_reading(impatient):
    draw = Draw(6)
    keys = draw.keys(KIND, 5000)
    queries = draw.queries(KIND, 3000, start_position=5000)
    wanted, _ = expected(KIND, keys, queries, 1024)
    with Calls(impatient.address) as calls, Calls(impatient.address) as lazy, calls.cache(KIND, keys) as cache:
        calls.search(KIND, cache.id, draw.queries(KIND, 1), 5)
        before = ledgers(calls)
        call = lazy.start_search(KIND, cache.id, 1024, start_position=5000)  # 12 MiB of answers
        call.send(*query_chunks(KIND, queries, 100))
        call.half_close()
        wait_for(lambda: ledgers(calls)["ingress"] == 4 * MIB // 4)
        held = []
        while calls.load().running_searches:
            # others go on meanwhile, and what is held for the one who does not read stays bounded
            some = Draw(7).queries(KIND, 20, start_position=4000)
            found, _ = calls.search(KIND, cache.id, some, 16)
            assert np.array_equal(found, expected(KIND, keys, some, 16)[0])
            held.append(ledgers(calls)["ingress"])
        assert held
        assert max(held) <= 8 * MIB
        wait_for(lambda: is_idle(calls.load()))
        assert ledgers(calls) == before
        # it reads again: the answers that were on their way, and why no more came
        messages, error = call.to_the_end()
        assert error is not None
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert refusal_of(error).error.reason == "SLOW_CONSUMER"
        chunks = [message.chunk for message in messages if message.WhichOneof("message") == "chunk"]
        found, _ = answers(chunks, 1024)
        assert 0 < len(found) < 3000
        assert np.array_equal(found, wanted[: len(found)])


def test_a_caller_who_sends_nothing(impatient):
    with Calls(impatient.address) as calls, calls.cache(KIND, Draw(8).keys(KIND, 100)) as cache:
        call = calls.start_search(KIND, cache.id, 5)
        refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_CONSUMER")
        wait_for(lambda: is_idle(calls.load()))


def test_an_uploader_who_reads_no_answers(impatient):
    """It goes away in the end, and its upload can be gone on with."""
    keys = Draw(9).keys(KIND, 30_000)
    with Calls(impatient.address) as calls, Calls(impatient.address) as lazy, calls.cache(KIND) as cache:
        call, accepted = lazy.start_upload(cache.id, 30_000)
        call.send(*key_chunks(KIND, keys, 3))
        wait_for(lambda: calls.query_upload(accepted.upload_id).row_offset == 30_000)
        call.send(finish_message(KIND, keys))
        lazy.close()
        wait_for(lambda: calls.load().open_uploads == 0 or can_resume(calls, accepted.upload_id))


def can_resume(calls, upload_id):
    with calls.append_call() as call:
        call.send(resume_message(upload_id))
        return next(call.rpc).WhichOneof("message") == "accepted"


@pytest.mark.parametrize("round_", range(3))
def test_many_callers_who_go_away_at_any_moment(service, calls, round_):
    """Seeded: how far each gets; afterwards every figure is where it was."""
    draw = Draw(100 + round_)
    keys = draw.keys(KIND, 700)
    queries = draw.queries(KIND, 300, start_position=700)
    with calls.cache(KIND, keys) as cache:
        calls.search(KIND, cache.id, draw.queries(KIND, 1), 5)
        before, threads = ledgers(calls), len(os.listdir(f"/proc/{service.process.pid}/fd"))
        for _ in range(6):
            connections = [Calls(service.address) for _ in range(4)]
            for connection in connections:
                for _ in range(int(draw.random.integers(1, 6))):
                    call = connection.search_call()
                    call.send(search_header(KIND, cache.id, 32, start_position=700))
                    call.send(*query_chunks(KIND, queries, int(draw.random.integers(1, 100))))
                    for _ in range(int(draw.random.integers(0, 3))):  # accepted, and all the rows may come at once
                        next(call.rpc)
                    if draw.random.integers(2):
                        call.cancel()
                    else:
                        call.half_close()
            for connection in connections:
                connection.close()
        wait_for(lambda: is_idle(calls.load()))
        wait_for(lambda: ledgers(calls) == before)
        wait_for(lambda: len(os.listdir(f"/proc/{service.process.pid}/fd")) <= threads + 2)
        found, _ = calls.search(KIND, cache.id, queries, 32)
        assert np.array_equal(found, expected(KIND, keys, queries, 32)[0])


def test_a_cancelled_batch_gives_everything_back(service, calls, frozen):
    draw = Draw(11)
    keys = draw.keys(KIND, 300)
    with calls.cache(KIND, keys) as cache:
        queries = draw.queries(KIND, 3)
        calls.search(KIND, cache.id, queries, 5)
        before = ledgers(calls)
        frozen()
        request = search_pb2.SearchBatchRequest(items=[batch_item(KIND, cache.id, queries)] * 40, top_k=5)
        future = calls.searches.SearchBatch.future(request, timeout=60)
        wait_for(lambda: calls.load().running_searches > 0)
        future.cancel()
        frozen(False)
        wait_for(lambda: is_idle(calls.load()))
        assert ledgers(calls) == before


def test_a_stream_that_never_begins_is_ended(impatient):
    """Before its header as well: it has a place among the calls of its connection, and a drain waits for it."""
    with Calls(impatient.address) as calls:
        streams = [calls.append_call(), calls.search_call(), StreamCall(calls.attention.SparseAttend)]
        for call in streams:
            refusal = call.refusal()
            assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_CONSUMER")
        assert calls.load().ready


def test_an_upload_that_falls_silent_can_be_resumed(impatient):
    draw = Draw(9)
    keys = draw.keys(KIND, 600)
    first, *others = key_chunks(KIND, keys, 300)
    with Calls(impatient.address) as calls, calls.cache(KIND) as cache:
        call, accepted = calls.start_upload(cache.id, 600)
        call.send(first)
        refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_CONSUMER")
        again, resumed = calls.resume_upload(accepted.upload_id)
        assert resumed.row_offset == 300
        again.send(*others, finish_message(KIND, keys))
        assert again.receive_until("committed").layer_keys == 600
