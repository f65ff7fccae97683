"""Callers who say nothing, or read nothing, where a call has only begun or goes on for ever."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from streamindex.v1 import server_pb2

from streamindex_service.errors import SlowConsumerError
from streamindex_service.frontend.messages import MessageWriter
from tests.support.calls import Calls, StreamCall, key_chunks, refusal_of
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY, wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=64)


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    with InProcessServer({**ROOMY, "server": {"max_watchers": 1}, "limits": {"slow_consumer_s": 0.3}}) as running:
        yield running


@pytest.fixture
def calls(server) -> Iterator[Calls]:
    with Calls(server.target) as connection:
        yield connection
        wait_for(lambda: not server.server._calls.running)


@pytest.mark.parametrize("method", ["AppendKeys", "Search", "SparseAttend"])
def test_a_header_that_never_comes_is_not_waited_for(calls, method):
    stubs = {"AppendKeys": calls.key_caches, "Search": calls.searches, "SparseAttend": calls.attention}
    with StreamCall(getattr(stubs[method], method)) as call:
        refusal = call.refusal()
    assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "SLOW_CONSUMER")


def test_who_watches_the_load_and_does_not_read_leaves_the_place_to_others(calls, monkeypatch):
    async def large(service, caller):
        """So that the connection holds few of them."""
        return server_pb2.GetLoadResponse(ledgers=[server_pb2.Ledger(name="x" * 65_536)])

    monkeypatch.setattr("streamindex_service.frontend.server_servicer.load_of", large)
    request = server_pb2.WatchLoadRequest(interval_ms=100)
    lazy = calls.server.WatchLoad(request, timeout=60)
    next(lazy)

    def another_may_watch():
        watch = calls.server.WatchLoad(request, timeout=60)
        try:
            return bool(next(watch))
        except grpc.RpcError as error:
            return refusal_of(error).error.reason != "TOO_MANY"
        finally:
            watch.cancel()

    assert not another_may_watch()
    wait_for(another_may_watch)
    with pytest.raises(grpc.RpcError) as ended:
        list(lazy)
    assert refusal_of(ended.value).error.reason == "SLOW_CONSUMER"


def test_an_upload_whose_acknowledgements_are_not_read_ends(calls, monkeypatch):
    write = MessageWriter.write

    async def write_or_give_up(writer, message):
        if message.WhichOneof("message") == "acknowledged":
            raise SlowConsumerError("answers were not read for too long")
        await write(writer, message)

    cache, rows = calls.create(KIND), Draw(1).keys(KIND, 100)
    monkeypatch.setattr(MessageWriter, "write", write_or_give_up)
    call, accepted = calls.start_upload(cache.id, len(rows))
    with call:
        call.send(*key_chunks(KIND, rows[:50], 50))
        refusal = call.refusal()
    assert refusal.error.reason == "SLOW_CONSUMER"
    assert refusal.error.message == "answers were not read for too long"
    assert calls.query_upload(accepted.upload_id).row_offset == 50
    calls.delete(cache.id)
