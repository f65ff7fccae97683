"""Spans of calls and tiles, of a server on a real socket with a worker of its own."""

from __future__ import annotations

import os
import signal

import pytest
import streamindex_client
import torch

from tests.support.attention import Queries, Rows, Shape
from tests.support.calls import Calls, query_chunk, refused
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY, is_idle, wait_for
from tests.support.spans import KeptSpans
from tests.support.tensors import Draw, Kind

KIND = Kind(heads=2, head_dim=32)
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01", f"00-{TRACE_ID}-{PARENT_ID}-00"
MAX_TILES = 3
ATTRIBUTES = {
    "rpc.system.name",
    "rpc.method",
    "rpc.response.status_code",
    "error.type",
    "streamindex.request_id",
    "streamindex.operation",
    "streamindex.rows",
    "streamindex.tiles",
    "streamindex.failed_tiles",
    "streamindex.queue_s",
    "streamindex.transfer_s",
    "streamindex.device_s",
}


@pytest.fixture(scope="module")
def kept():
    return KeptSpans(MAX_TILES)


@pytest.fixture(scope="module")
def server(kept):
    # Of three tiles one waits; a worker that is stopped for a while is not taken for one that hangs.
    worker = {**ROOMY["worker"], "heartbeat_timeout_s": 60}
    settings = {**ROOMY, "scheduler": {"max_device_tiles": 2}, "worker": worker}
    with InProcessServer(settings, tracing=kept.tracing) as running:
        yield running


@pytest.fixture
def calls(server, kept):
    with Calls(server.target) as connection:
        kept.clear()
        yield connection
        connection.metadata = ()
        wait_for(lambda: is_idle(connection.load()))


def test_a_search_from_its_callers_span_down_to_the_device(calls, kept):
    draw = Draw(3)
    with calls.cache(KIND, draw.keys(KIND, 300)) as cache:
        calls.metadata = (("traceparent", SAMPLED), ("x-request-id", "the-request"))
        calls.search(KIND, cache.id, draw.queries(KIND, 5), 8)
        call = kept.call("Search")
    assert call.name == "streamindex.v1.SearchService/Search"
    assert call.kind.name == "SERVER"
    assert call.parent is not None
    assert call.parent.is_remote
    assert (f"{call.context.trace_id:032x}", f"{call.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    assert call.attributes["rpc.response.status_code"] == "OK"
    assert call.attributes["streamindex.request_id"] == "the-request"
    assert call.attributes["streamindex.tiles"] == 1
    assert call.attributes["streamindex.rows"] == 5
    (tile,) = kept.below(call, "tile")
    assert dict(tile.attributes) == {"streamindex.operation": "search", "streamindex.rows": 5}
    (queue,), (transfer,), (device,) = (kept.below(tile, name) for name in ("queue", "transfer", "device"))
    assert {span.context.trace_id for span in (tile, queue, transfer, device)} == {call.context.trace_id}
    times = [tile.start_time, queue.start_time, queue.end_time, transfer.start_time, transfer.end_time]
    times += [device.start_time, device.end_time, tile.end_time]
    assert times == sorted(times)
    assert call.start_time <= tile.start_time
    assert tile.end_time <= call.end_time
    assert [event.name for event in transfer.events] == ["issued"]
    # The worker's clock is the frontend's: what it says needs no correction, unless the frontend was held up between
    # sending the tile and noting when.
    seconds_ns, at_once = 1e9 * call.attributes["streamindex.device_s"], device.start_time == transfer.start_time
    assert device.end_time - device.start_time <= seconds_ns + 5e3
    assert at_once or device.end_time - device.start_time == pytest.approx(seconds_ns, abs=5e3)


def test_a_call_without_a_parent_begins_a_trace(calls, kept):
    calls.capabilities()
    assert kept.call("GetCapabilities").parent is None


def test_a_call_whose_caller_does_not_trace_it_is_not_traced(calls, kept):
    calls.metadata = (("traceparent", UNSAMPLED),)
    calls.list()
    calls.metadata = (("traceparent", SAMPLED),)
    calls.list()
    assert kept.call("ListKeyCaches").parent is not None


def test_tiles_of_a_long_call_are_told_in_groups(calls, kept):
    """Two rows at a time, the next when the last are answered."""
    draw, items = Draw(4), 40
    with calls.cache(KIND, draw.keys(KIND, 300)) as cache:
        queries = draw.queries(KIND, 2 * items)
        with calls.start_search(KIND, cache.id, 8) as search:
            for first in range(0, 2 * items, 2):
                search.send(query_chunk(KIND, queries, first, 2))
                search.receive("chunk")
            search.half_close()
            assert search.rest()[-1].done.row_count == 2 * items
        call = kept.call("Search")
    assert call.attributes["streamindex.tiles"] == items
    assert len(kept.below(call, "tile")) == MAX_TILES
    groups = kept.below(call, "tiles")
    assert [span.attributes["streamindex.tiles"] for span in groups] == [3, 6, 12, 16]
    assert sum(span.attributes["streamindex.rows"] for span in groups) == 2 * (items - MAX_TILES)
    assert all(call.start_time <= span.start_time <= span.end_time <= call.end_time for span in groups)


def test_spans_hold_no_names_of_caches_no_tokens_and_no_tensors(calls, kept):
    draw = Draw(5)
    with calls.cache(KIND, draw.keys(KIND, 300)) as cache:
        calls.metadata = (("authorization", "Bearer sidx_secret"), ("tracestate", "vendor=secret"))
        calls.search(KIND, cache.id, draw.queries(KIND, 5), 8)
        refused(calls.get, "nobodys-cache")
        kept.call("GetKeyCache")
        kept.call("Search")
    assert {"AppendKeys", "CreateKeyCache"} <= {span.name.rpartition("/")[2] for span in kept.all}
    for span in kept.all:
        assert set(span.attributes) <= ATTRIBUTES
        assert all(isinstance(value, int | float | str) for value in span.attributes.values())
        text = span.to_json()
        assert not [word for word in (cache.id, "nobodys-cache", "sidx_", "Bearer") if word in text]


def test_a_refusal_is_the_callers_error(calls, kept):
    refused(calls.get, "nobody's")
    span = kept.call("GetKeyCache")
    assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert span.attributes["error.type"] == "CACHE_NOT_FOUND"
    assert span.status.status_code.name == "UNSET"


def test_a_tile_that_is_cancelled_before_its_turn_has_only_waited(server, calls, kept):
    draw = Draw(7)
    worker = server.server.service.supervisor.link.process.pid
    with calls.cache(KIND, draw.keys(KIND, 300)) as cache:
        os.kill(worker, signal.SIGSTOP)
        try:
            others = []
            for _ in range(2):
                others.append(calls.start_search(KIND, cache.id, 8))
                others[-1].send(query_chunk(KIND, draw.queries(KIND, 5), 0, 5))
            wait_for(lambda: calls.load().device.tiles == 2)
            with calls.start_search(KIND, cache.id, 8) as search:
                search.send(query_chunk(KIND, draw.queries(KIND, 5), 0, 5))
                wait_for(lambda: calls.load().queue.tiles == 1)
            call = kept.call("Search")  # the others still run
        finally:
            os.kill(worker, signal.SIGCONT)
        for other in others:
            other.cancel()
    assert call.attributes["rpc.response.status_code"] == "CANCELLED"
    assert call.status.status_code.name == "UNSET"
    (tile,) = kept.below(call, "tile")
    assert tile.attributes["error.type"] == "CANCELLED"
    assert [span.name for span in kept.all if span.parent and span.parent.span_id == tile.context.span_id] == ["queue"]


def test_attention_is_two_tiles_for_each_rows(server, kept, calls):
    shape = Shape()
    rows, queries = Rows.drawn(shape, 400, 1), Queries.drawn(shape, torch.arange(390, 400), 2)
    with streamindex_client.connect(server.target) as client:
        cache = shape.create(client)
        rows.upload(cache)
        cache.sparse_attend_all(
            layer=0, q=queries.q, index_q=queries.index_q, index_w=queries.index_w, top_k=8, start_position=390,
            window=16, scale=shape.scale,
        )  # fmt: skip
        cache.delete()
    tiles = [tile.attributes for tile in kept.below(kept.call("SparseAttend"), "tile")]
    for operation in ("search", "attend"):
        assert sum(each["streamindex.rows"] for each in tiles if each["streamindex.operation"] == operation) == 10


def test_a_worker_that_dies_ends_its_tile_with_the_reason(server, calls, kept):
    draw = Draw(6)
    worker = server.server.service.supervisor.link.process.pid
    with calls.cache(KIND, draw.keys(KIND, 300)) as cache:
        os.kill(worker, signal.SIGSTOP)
        with calls.start_search(KIND, cache.id, 8) as search:
            search.send(query_chunk(KIND, draw.queries(KIND, 5), 0, 5))
            wait_for(lambda: calls.load().device.tiles > 0)
            os.kill(worker, signal.SIGKILL)
            assert search.refusal().error.reason == "WORKER_LOST"
        call = kept.call("Search")
    assert call.status.status_code.name == "ERROR"
    assert call.attributes["error.type"] == "WORKER_LOST"
    assert call.attributes["streamindex.failed_tiles"] == 1
    (tile,) = kept.below(call, "tile")
    assert tile.status.status_code.name == "ERROR"
    assert tile.attributes["error.type"] == "WORKER_LOST"
    assert [span.name for span in kept.all if span.parent and span.parent.span_id == tile.context.span_id] == ["queue"]
    calls.wait_health(1)
