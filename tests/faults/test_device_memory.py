"""A device without memory in spite of the budget: give back, alone, smaller, refuse; and nobody else notices."""

from __future__ import annotations

import asyncio

import grpc
import numpy as np
import pytest
from streamindex.v1 import search_pb2

from streamindex_service.core.estimates import DeviceSpeed
from streamindex_service.errors import DeviceMemoryError
from tests.support.calls import Calls, batch_item, query_chunk, search_header
from tests.support.services import is_idle, wait_for
from tests.support.tensors import Draw, Kind, expected

KIND = Kind(heads=2, head_dim=32)
ROWS = 20


@pytest.fixture
def short_of_memory(inside, monkeypatch):
    """Tiles of more than `most_rows` find no memory; the list tells (rows, workspace, turns on the device) of each."""
    device, governor = inside.server.service.device, inside.server.service.governor
    submit, seen = device.submit, []
    monkeypatch.setattr(governor, "speed", DeviceSpeed())  # whatever the machine does: all rows are one tile
    monkeypatch.setattr(governor.speed, "observe", lambda flop, seconds: None)

    def limited(most_rows):
        def submit_or_fail(views, block, request_key, message):
            tile = message(0).search_tile
            seen.append((tile.rows, tile.workspace_bytes, governor.in_flight))
            tile_id, future = submit(views, block, request_key, message)
            if tile.rows <= most_rows:
                return tile_id, future
            failed = asyncio.get_running_loop().create_future()
            future.add_done_callback(lambda _: failed.set_exception(DeviceMemoryError("no memory")))
            return tile_id, failed

        monkeypatch.setattr(device, "submit", submit_or_fail)
        return seen

    return limited


@pytest.mark.parametrize(
    ("most_rows", "tried"),
    [(20, [20]), (5, [20, 20, 5, 5, 5, 5]), (2, [20, 20, 5, 2, 2, 1, 2, 2, 1, 2, 2, 1, 2, 2, 1])],
)
def test_a_tile_without_memory_runs_alone_then_in_pieces(inside, short_of_memory, most_rows, tried):
    draw = Draw(1)
    keys, queries = draw.keys(KIND, 900), draw.queries(KIND, ROWS, start_position=880)
    seen = short_of_memory(most_rows)
    with Calls(inside.target) as calls, calls.cache(KIND, keys) as cache:
        request = search_pb2.SearchBatchRequest(items=[batch_item(KIND, cache.id, queries)], top_k=30)
        (result,) = calls.searches.SearchBatch(request, timeout=30).results
        found = np.frombuffer(result.indices, np.int32).reshape(ROWS, 30)
        assert np.array_equal(found, expected(KIND, keys, queries, 30)[0])
        wait_for(lambda: is_idle(calls.load()))
    assert [rows for rows, _, _ in seen] == tried
    assert all(in_flight == 1 for _, _, in_flight in seen)


def test_what_fits_in_no_way_is_refused_and_the_worker_lives(inside, short_of_memory):
    draw = Draw(2)
    keys, queries = draw.keys(KIND, 900), draw.queries(KIND, ROWS, start_position=880)
    with Calls(inside.target) as calls, calls.cache(KIND, keys) as cache:
        restarts = calls.load().worker_restarts
        seen = short_of_memory(0)
        with calls.search_call() as call:
            call.send(search_header(KIND, cache.id, 30, start_position=880), query_chunk(KIND, queries, 0, ROWS))
            refusal = call.refusal()
        assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEVICE_MEMORY")
        assert refusal.error.retry_after_ms
        figures = dict(refusal.error.metadata)
        assert 0 < int(figures["needed_bytes"]) <= int(figures["budget_bytes"])
        assert figures["tries"] == "4"
        assert [rows for rows, _, _ in seen] == [20, 20, 5, 2]
        short_of_memory(ROWS)
        found, _ = calls.search(KIND, cache.id, queries, 30)
        assert np.array_equal(found, expected(KIND, keys, queries, 30)[0])
        wait_for(lambda: is_idle(calls.load()))
        assert calls.load().worker_restarts == restarts


def test_a_defect_at_the_moment_of_its_turn_ends_one_search_alone(inside, monkeypatch):
    draw = Draw(4)
    keys, queries = draw.keys(KIND, 900), draw.queries(KIND, ROWS, start_position=880)
    device = inside.server.service.device
    with Calls(inside.target) as calls, calls.cache(KIND, keys) as cache:
        with monkeypatch.context() as patch:
            patch.setattr(device, "submit", lambda *args: 1 / 0)
            with calls.search_call() as call:
                call.send(search_header(KIND, cache.id, 30, start_position=880), query_chunk(KIND, queries, 0, ROWS))
                refusal = call.refusal()
            assert (refusal.code, refusal.error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
            assert "division" not in refusal.error.message
        found, _ = calls.search(KIND, cache.id, queries, 30)
        assert np.array_equal(found, expected(KIND, keys, queries, 30)[0])
        wait_for(lambda: is_idle(calls.load()))


def test_others_wait_while_one_runs_alone(inside, short_of_memory):
    """Items of several kinds, which are tiles of their own."""
    draw, made = Draw(3), []
    with Calls(inside.target) as calls:
        for kind in (KIND, Kind(heads=4, head_dim=32), Kind(heads=2, head_dim=64), Kind(heads=1, head_dim=32)):
            cache_id, keys = calls.create(kind).id, draw.keys(kind, 900)
            calls.upload(kind, cache_id, keys)
            made.append((kind, cache_id, keys, draw.queries(kind, ROWS, start_position=880)))
        seen = short_of_memory(5)
        items = [batch_item(kind, cache_id, queries) for kind, cache_id, _, queries in made]
        results = calls.searches.SearchBatch(search_pb2.SearchBatchRequest(items=items, top_k=30), timeout=60).results
        for (kind, cache_id, keys, queries), result in zip(made, results, strict=True):
            found = np.frombuffer(result.indices, np.int32).reshape(ROWS, 30)
            assert np.array_equal(found, expected(kind, keys, queries, 30)[0])
            calls.delete(cache_id)
        wait_for(lambda: is_idle(calls.load()))
    assert any(in_flight > 1 for rows, _, in_flight in seen if rows == ROWS)
    assert all(in_flight == 1 for rows, _, in_flight in seen if rows < ROWS)


def test_an_item_that_has_failed_has_no_further_tiles(inside, short_of_memory, monkeypatch):
    """Of many tiles of an item, which wait side by side, those that have not begun are not asked for any more; the rest
    of the call goes on."""
    service, draw, made, rows = inside.server.service, Draw(5), [], 64
    submit = service.device.submit
    seen = short_of_memory(0)
    without_memory = service.device.submit

    def by_kind(views, block, request_key, message):
        short = message(0).search_tile.heads == KIND.heads
        return (without_memory if short else submit)(views, block, request_key, message)

    monkeypatch.setattr(service.device, "submit", by_kind)
    monkeypatch.setattr(service.governor.speed, "rows", lambda flop_per_row, seconds, most: 1)  # a tile of each row
    with Calls(inside.target) as calls:
        for kind in (KIND, Kind(heads=4, head_dim=32)):
            cache_id, keys = calls.create(kind).id, draw.keys(kind, 300)
            calls.upload(kind, cache_id, keys)
            made.append((kind, cache_id, keys, draw.queries(kind, rows, start_position=299)))
        items = [batch_item(kind, cache_id, queries) for kind, cache_id, _, queries in made]
        request = search_pb2.SearchBatchRequest(items=items, top_k=30)
        wrong, right = calls.searches.SearchBatch(request, timeout=60).results
        assert wrong.error.reason == "DEVICE_MEMORY"
        kind, _, keys, queries = made[1]
        found = np.frombuffer(right.indices, np.int32).reshape(rows, 30)
        assert np.array_equal(found, expected(kind, keys, queries, 30)[0])
        for _, cache_id, _, _ in made:
            calls.delete(cache_id)
        wait_for(lambda: is_idle(calls.load()))
    tries = service.settings.worker.memory_retries + 1
    assert 0 < len(seen) <= tries * rows // 4  # as many tiles as wait at a time, not all
