"""Many calls of one connection: one that has ended is in nobody's way, however it ended."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator

import grpc
import pytest
from streamindex.v1 import search_pb2

from tests.support.calls import Calls, batch_item, key_chunks, query_chunks
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY, wait_for
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)
KEYS, ROWS, TOP_K = 1000, 20, 8
STREAMS = 64
TIMES = 24


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    with InProcessServer({**ROOMY, "server": {"max_streams_per_connection": STREAMS}}) as running:
        yield running


@pytest.fixture
def calls(server: InProcessServer) -> Iterator[Calls]:
    with Calls(server.target) as connection:
        yield connection


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Nothing goes but by its references."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(name: str) -> int:
    """Objects of a class."""
    return sum(type(each).__name__ == name for each in gc.get_objects())


def batch(calls: Calls, cache_id: str, **wrong: object) -> search_pb2.SearchBatchResponse:
    queries = Draw(2).queries(KIND, 2, 4 * KEYS - 2)
    items = [batch_item(KIND, cache_id, queries, **wrong) for _ in range(3)]
    request = search_pb2.SearchBatchRequest(items=items, top_k=TOP_K)
    return calls.searches.SearchBatch(request, timeout=60)


def answered_batch(calls: Calls, cache_id: str) -> None:
    assert all(len(result.indices) == 2 * TOP_K * 4 for result in batch(calls, cache_id).results)


def wrong_batch(calls: Calls, cache_id: str) -> None:
    assert {result.error.field for result in batch(calls, cache_id, q=b"").results} == {"q"}


def answered_search(calls: Calls, cache_id: str) -> None:
    indices, _ = calls.search(KIND, cache_id, Draw(3).queries(KIND, ROWS), TOP_K)
    assert indices.shape == (ROWS, TOP_K)


def wrong_search(calls: Calls, cache_id: str) -> None:
    """Refused in the middle: rows before it are on the device."""
    queries = Draw(3).queries(KIND, 2 * ROWS)
    with calls.start_search(KIND, cache_id, TOP_K) as call:
        first, second = query_chunks(KIND, queries, ROWS)
        second.chunk.crc32c += 1
        call.send(first, second)
        assert call.refusal().error.reason == "CHECKSUM"


def left_search(calls: Calls, cache_id: str) -> None:
    with calls.start_search(KIND, cache_id, TOP_K) as call:
        call.send(*query_chunks(KIND, Draw(3).queries(KIND, ROWS), ROWS))
        call.receive("chunk")


def append(calls: Calls, cache_id: str) -> None:
    calls.upload(KIND, cache_id, Draw(4).keys(KIND, KEYS))


def wrong_append(calls: Calls, cache_id: str) -> None:
    call, _ = calls.start_upload(cache_id, KEYS)
    with call:
        (chunk,) = key_chunks(KIND, Draw(4).keys(KIND, KEYS), KEYS)
        chunk.chunk.crc32c += 1
        call.send(chunk)
        assert call.refusal().error.reason == "CHECKSUM"


WAYS = [answered_batch, wrong_batch, answered_search, wrong_search, left_search, append, wrong_append]


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_has_ended_does_not_count(
    server: InProcessServer, calls: Calls, no_collector: None, way: Callable[[Calls, str], None]
) -> None:
    with calls.cache(KIND, Draw(1).keys(KIND, KEYS)) as cache:
        for _ in range(TIMES):
            way(calls, cache.id)
        wait_for(lambda: not server.server._calls.running)
        wait_for(lambda: alive("_ServicerContext") <= 1)  # of the call that gRPC waits for
        assert not gc.isenabled()


def test_messages_of_a_step_go_with_its_call(server: InProcessServer, calls: Calls, no_collector: None) -> None:
    """They may be large, and many."""
    with calls.cache(KIND, Draw(1).keys(KIND, KEYS)) as cache:
        for _ in range(TIMES):
            answered_batch(calls, cache.id)
        wait_for(lambda: not server.server._calls.running)
        wait_for(lambda: alive("_SearchGroup") == alive("BatchSearch") == alive("_SearchMember") == 0)


def test_a_quarter_of_what_a_connection_may_have_is_never_refused(
    server: InProcessServer, calls: Calls, no_collector: None
) -> None:
    """Call after call without a gap: each comes as soon as another has ended."""
    with calls.cache(KIND, Draw(1).keys(KIND, KEYS)) as cache:
        queries = Draw(2).queries(KIND, 2, 4 * KEYS - 2)
        request = search_pb2.SearchBatchRequest(items=[batch_item(KIND, cache.id, queries)], top_k=TOP_K)
        data = request.SerializeToString()

        async def all_answered() -> int:
            options = [("grpc.enable_retries", 0)]
            async with grpc.aio.insecure_channel(server.target, options=options) as channel:
                call = channel.unary_unary("/streamindex.v1.SearchService/SearchBatch")
                turns = asyncio.Semaphore(STREAMS // 4)

                async def one() -> None:
                    async with turns:
                        await call(data, timeout=60)

                return len(await asyncio.gather(*(one() for _ in range(10 * STREAMS))))

        assert asyncio.run(all_answered()) == 10 * STREAMS
