"""Rows for a layer that has to displace another are gathered: they do not have it brought a few at a time."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import numpy as np
import pytest

from streamindex_service.core.band_queue import Band
from streamindex_service.frontend.gathering import Gathering
from streamindex_service.frontend.index_tiles import IndexTiles
from streamindex_service.frontend.read_ahead import _MOST
from tests.support.calls import Calls, StreamCall, answers, query_chunk, search_header
from tests.support.inprocess import InProcessServer
from tests.support.services import SMALL_DEVICE, is_idle, wait_for
from tests.support.tensors import Draw, Keys, Kind, Queries, expected

KIND = Kind(heads=2, head_dim=64)
PAGES, TOP_K = 64, 30  # a layer of 2 MiB, where 3 are left
FIRST, ALL = 5, 20


@pytest.fixture(scope="module")
def server():
    """A copy hardly ever pays for itself: nothing goes because time has passed."""
    scheduler = {"promotion_factor": 1e6, "promotion_wait_s": 600.0}
    with InProcessServer({**SMALL_DEVICE, "scheduler": scheduler}) as running:
        yield running


@pytest.fixture
def calls(server):
    with Calls(server.target) as made:
        yield made
        wait_for(lambda: is_idle(made.load()))


def started(calls: Calls, cache_id: str, queries, rows: int, **header) -> StreamCall:
    call = calls.search_call()
    call.send(search_header(KIND, cache_id, TOP_K, start_position=int(queries.positions[0]), **header))
    call.send(query_chunk(KIND, queries, 0, rows))
    return call


def found(call: StreamCall) -> np.ndarray:
    return answers([m.chunk for m in call.rest() if m.WhichOneof("message") == "chunk"], TOP_K)[0]


def crowd(stack: ExitStack, calls: Calls, keys: Keys, queries: Queries, count: int) -> list:
    """A search that has its layer and goes on, and so many caches that find no room beside it."""
    there, *others = (stack.enter_context(calls.cache(KIND, keys)) for _ in range(1 + count))
    runs = started(calls, there.id, queries, FIRST)
    runs.receive_until("chunk")
    return [runs, *others]


@pytest.mark.parametrize("announced", [False, True])
def test_few_rows_of_a_layer_without_room_wait_for_the_rest(server, calls, announced):
    draw = Draw(1)
    keys = [draw.keys(KIND, PAGES * 256) for _ in range(2)]
    queries = draw.queries(KIND, ALL, start_position=PAGES * 256)
    governor, counters = server.server.service.governor, server.server.service.counters
    before = governor.residency.promoted_pages
    with calls.cache(KIND, keys[0]) as there, calls.cache(KIND, keys[1]) as other:
        runs = started(calls, there.id, queries, FIRST)
        runs.receive_until("chunk")  # and more may come: its layer stays
        received = counters.queries
        waits = started(calls, other.id, queries, FIRST, row_count=ALL if announced else 0)
        wait_for(lambda: counters.queries == received + FIRST)
        for _ in range(3):  # any of them takes longer than rows gather for a layer that is there
            assert np.array_equal(
                calls.search(KIND, there.id, queries, TOP_K)[0], expected(KIND, keys[0], queries, TOP_K)[0]
            )
        assert (len(governor.scheduler), governor.residency.promoted_pages - before) == (0, PAGES)
        waits.send(query_chunk(KIND, queries, FIRST, ALL - FIRST))
        if announced:  # all are there: nobody has to say so
            wait_for(lambda: governor.residency.promoted_pages - before == 2 * PAGES)
        waits.half_close()
        assert np.array_equal(found(waits), expected(KIND, keys[1], queries, TOP_K)[0])
        assert governor.residency.promoted_pages - before == 2 * PAGES  # once, though the rows came in two parts
        runs.half_close()
        runs.rest()


@pytest.mark.parametrize("ends", ["room", "deadline"])
def test_a_caller_who_waits_for_its_answer_gets_it(server, calls, ends):
    """It sends no more before. Once there is room its rows go, and before its deadline they go in any case."""
    draw = Draw(3)
    keys = [draw.keys(KIND, PAGES * 256) for _ in range(2)]
    queries = draw.queries(KIND, FIRST, start_position=PAGES * 256)
    governor, counters = server.server.service.governor, server.server.service.counters
    with calls.cache(KIND, keys[0]) as there, calls.cache(KIND, keys[1]) as other:
        runs = started(calls, there.id, queries, FIRST)
        runs.receive_until("chunk")
        received = counters.queries
        waits = calls.search_call(None if ends == "room" else 6.0)
        waits.send(search_header(KIND, other.id, TOP_K, start_position=int(queries.positions[0])))
        waits.send(query_chunk(KIND, queries, 0, FIRST))
        wait_for(lambda: counters.queries == received + FIRST)
        assert len(governor.scheduler) == 0
        if ends == "room":
            runs.half_close()
            runs.rest()
        chunk = waits.receive_until("chunk")
        assert np.array_equal(answers([chunk], TOP_K)[0], expected(KIND, keys[1], queries, TOP_K)[0])
        waits.half_close()
        waits.rest()
        if ends == "deadline":
            runs.half_close()
            runs.rest()


def test_a_tile_as_large_as_any_gathers_too(server, calls, monkeypatch):
    """Full tiles one at a time would have the layer brought again and again as well."""
    monkeypatch.setattr(IndexTiles, "tile_rows", lambda tiles, keys: 2)
    test_few_rows_of_a_layer_without_room_wait_for_the_rest(server, calls, announced=False)


def test_who_has_to_wait_for_room_holds_one_block_of_rows(server, calls, monkeypatch):
    """A full one goes without waiting for more; what comes behind it stays on the wire until it is done with."""
    draw = Draw(2)
    keys = [draw.keys(KIND, PAGES * 256) for _ in range(2)]
    rows, chunk_rows = 1500, 100  # a block of 256 KiB holds some 600
    queries = draw.queries(KIND, rows, start_position=PAGES * 256)
    few = draw.queries(KIND, FIRST, start_position=PAGES * 256)
    governor, blocks = server.server.service.governor, server.server.service.blocks
    monkeypatch.setattr(governor.room, "may_displace", lambda turn, *, for_age: False)
    with calls.cache(KIND, keys[0]) as there, calls.cache(KIND, keys[1]) as other:
        runs = started(calls, there.id, queries, FIRST)
        runs.receive_until("chunk")
        ingress = calls.ledger("ingress").reserved_bytes
        waits = started(calls, other.id, queries, chunk_rows)
        for first in range(chunk_rows, rows, chunk_rows):
            waits.send(query_chunk(KIND, queries, first, chunk_rows))
        waits.half_close()
        wait_for(lambda: len(governor.scheduler) > 0)
        for _ in range(3):
            calls.search(KIND, there.id, few, TOP_K)
        most = blocks.block_bytes + 2 * chunk_rows * (2 * KIND.heads * KIND.head_dim + 4 * KIND.heads)
        assert blocks.block_bytes <= calls.ledger("ingress").reserved_bytes - ingress <= most
        runs.half_close()
        runs.rest()
        assert np.array_equal(found(waits), expected(KIND, keys[1], queries, TOP_K)[0])


def test_few_of_those_who_wait_for_room_have_rows_ready(server, calls, monkeypatch):
    """The others' rows stay on the wire, and all are answered in the end."""
    draw, waiting, rows = Draw(4), 12, 300
    keys = [draw.keys(KIND, PAGES * 256) for _ in range(2)]
    queries = draw.queries(KIND, rows, start_position=PAGES * 256)
    service = server.server.service
    governor, counters = service.governor, service.counters
    monkeypatch.setattr(governor.room, "may_displace", lambda turn, *, for_age: False)
    with ExitStack() as stack:
        there, *others = (stack.enter_context(calls.cache(KIND, keys[min(number, 1)])) for number in range(1 + waiting))
        runs = started(calls, there.id, queries, FIRST)
        runs.receive_until("chunk")
        received, ingress = counters.queries, calls.ledger("ingress").reserved_bytes
        searches = [started(calls, other.id, queries, rows) for other in others]
        for search in searches:
            search.half_close()
        wait_for(lambda: counters.queries - received == _MOST * rows and len(governor.scheduler) >= _MOST)
        wait_for(lambda: len(service.read_ahead._waiting) == waiting - _MOST)
        assert counters.queries - received == _MOST * rows
        assert calls.ledger("ingress").reserved_bytes - ingress == _MOST * service.blocks.block_bytes
        runs.half_close()
        runs.rest()
        for search in searches:
            assert np.array_equal(found(search), expected(KIND, keys[1], queries, TOP_K)[0])


def test_who_sends_a_few_rows_and_waits_keeps_nobody_from_sending(server, calls):
    """Callers without room who wait for an answer before they send more; then one who has all its rows ready."""
    draw, waiting, rows = Draw(5), _MOST + 2, 300
    keys = draw.keys(KIND, PAGES * 256)
    queries = draw.queries(KIND, rows, start_position=PAGES * 256)
    governor, counters = server.server.service.governor, server.server.service.counters
    with ExitStack() as stack:
        runs, last, *others = crowd(stack, calls, keys, queries, 1 + waiting)
        received = counters.queries
        think = [started(calls, other.id, queries, FIRST) for other in others]
        wait_for(lambda: counters.queries == received + waiting * FIRST)
        sends = started(calls, last.id, queries, rows)
        wait_for(lambda: counters.queries == received + waiting * FIRST + rows)
        assert len(governor.scheduler) == 0, "they would gather for ten minutes"
        for search in (runs, sends, *think):
            search.half_close()
        for search in (sends, *think):
            count = rows if search is sends else FIRST
            assert np.array_equal(found(search), expected(KIND, keys, queries, TOP_K)[0][:count])
        runs.rest()


def test_who_does_not_read_its_answers_keeps_nobody_from_sending(server, calls):
    """All that such a caller could bring is computed: its layer leaves, and it holds no place among those who wait."""
    draw, rows, wide = Draw(6), 55, 1024  # one block, whose answers are more than the transport takes without a reader
    keys = draw.keys(KIND, PAGES * 256)
    queries = draw.queries(KIND, rows, start_position=PAGES * 256)
    service = server.server.service
    governor = service.governor
    with ExitStack() as stack:
        last, cold, *others = (stack.enter_context(calls.cache(KIND, keys)) for _ in range(2 + _MOST))
        stuck = []
        for number, other in enumerate(others):
            call = stack.enter_context(Calls(server.target)).search_call()
            call.send(search_header(KIND, other.id, wide, start_position=int(queries.positions[0])))
            call.send(query_chunk(KIND, queries, 0, rows))
            call.half_close()
            stuck.append(call)
            wait_for(lambda number=number: governor.meter.tiles and governor.open_searches == number + 1)
            wait_for(lambda: governor.running and not governor.in_flight and not len(governor.scheduler))
        calls.search(KIND, last.id, queries, TOP_K, priority=int(Band.INTERACTIVE))  # it has the last one's place
        assert governor.open_searches == _MOST
        received = service.counters.queries
        sends = calls.search_call(None)
        sends.send(search_header(KIND, cold.id, TOP_K, start_position=int(queries.positions[0])))
        sends.send(query_chunk(KIND, queries, 0, FIRST))
        wait_for(lambda: service.counters.queries == received + FIRST)
        sends.half_close()
        sends.rest()
        for call in stuck:
            call.cancel()


def test_before_its_deadline_a_search_brings_its_rows_in_any_case(server, calls, monkeypatch):
    draw, rows = Draw(7), 300
    keys = draw.keys(KIND, PAGES * 256)
    queries = draw.queries(KIND, rows, start_position=PAGES * 256)
    governor, counters = server.server.service.governor, server.server.service.counters
    monkeypatch.setattr(governor.room, "may_displace", lambda turn, *, for_age: False)
    with ExitStack() as stack:
        runs, last, *others = crowd(stack, calls, keys, queries, 1 + _MOST)
        received = counters.queries
        searches = [started(calls, other.id, queries, rows) for other in others]
        for search in searches:
            search.half_close()
        wait_for(lambda: counters.queries == received + _MOST * rows)
        hurries = calls.search_call(12.0)
        hurries.send(search_header(KIND, last.id, TOP_K, start_position=int(queries.positions[0])))
        hurries.send(query_chunk(KIND, queries, 0, rows))
        wait_for(lambda: governor.queued >= _MOST + 1)  # it is told as one that waits
        assert counters.queries == received + _MOST * rows
        wait_for(lambda: counters.queries == received + (_MOST + 1) * rows, 10.0)
        runs.half_close()
        runs.rest()
        for search in searches:
            search.rest()
        hurries.half_close()
        hurries.rest()


def test_rows_sent_before_the_answers_are_known_for_it_though_they_wait_for_the_loop(server, calls, monkeypatch):
    """What counts is when they came, not when there was a turn to copy them: by then there may be answers."""
    told = []
    came = Gathering.rows_came
    monkeypatch.setattr(
        Gathering, "rows_came", lambda self, *, unasked: told.append(unasked) or came(self, unasked=unasked)
    )
    draw = Draw(8)
    keys, queries = draw.keys(KIND, 500), draw.queries(KIND, 20, start_position=500)
    turns = server.server.service.loop_turns

    async def slow(rank, *, behind=False):
        await asyncio.sleep(0.3)

    monkeypatch.setattr(turns, "next", slow)
    with calls.cache(KIND, keys) as cache:
        call = calls.start_search(KIND, cache.id, TOP_K)
        for first in (0, 5, 10):
            call.send(query_chunk(KIND, queries, first, 5))
        call.half_close()
        assert sum(m.chunk.row_count for m in call.rest() if m.WhichOneof("message") == "chunk") == 15
        assert told == [False, True, True]
        told.clear()
        call = calls.start_search(KIND, cache.id, TOP_K)
        for first in (0, 5, 10):
            call.send(query_chunk(KIND, queries, first, 5))
            call.receive("chunk")
        call.half_close()
        call.rest()
        assert told == [False, False, False]
