"""Keys of the search that goes next are copied while the device still works; what becomes of them when it does not."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from streamindex_service.ipc.supervisor import WorkerLink
from tests.support.calls import Calls, answers, query_chunk, search_header
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY, is_idle, wait_for
from tests.support.tensors import Draw, Kind, expected

KIND = Kind(heads=2, head_dim=64)
PAGES, ROWS, TOP_K = 12, 20, 30
SEARCHES = 3  # one that runs, one that is ready, and one that waits


@pytest.fixture
def server():
    with InProcessServer({**ROOMY, "scheduler": {"device_ahead_s": 1e-9}}) as running:
        yield running


def asked(calls, cache_id, queries):
    call = calls.search_call()
    start = int(queries.positions[0])
    call.send(search_header(KIND, cache_id, TOP_K, start_position=start), query_chunk(KIND, queries, 0, ROWS))
    call.half_close()
    return call


def answer(call):
    return answers([m.chunk for m in call.rest() if m.WhichOneof("message") == "chunk"], TOP_K)[0]


@pytest.mark.parametrize("end", ["done", "cancelled", "killed"])
def test_the_next_searches_keys_come_while_a_tile_runs(server, end):
    draw = Draw(1)
    keys = [draw.keys(KIND, PAGES * 256) for _ in range(SEARCHES)]
    queries = draw.queries(KIND, ROWS, start_position=PAGES * 256)
    wanted = [expected(KIND, each, queries, TOP_K)[0] for each in keys]
    service = server.server.service
    with Calls(server.target) as calls:
        caches = [calls.create(KIND).id for _ in keys]
        for cache_id, rows in zip(caches, keys, strict=True):
            calls.upload(KIND, cache_id, rows)
        worker = service.supervisor.link.process.pid
        os.kill(worker, signal.SIGSTOP)
        try:
            searches = []
            for number, cache_id in enumerate(caches):
                searches.append(asked(calls, cache_id, queries))
                wait_for(lambda opened=number + 1: service.governor.open_searches == opened)
                wait_for(lambda turns=number + 1: service.governor.in_flight + len(service.governor.scheduler) == turns)
            # The second's keys were asked for behind the first's tile; the third's were not.
            assert (service.governor.in_flight, len(service.governor.scheduler)) == (2, 1)
            resident = [calls.get(cache_id).resident_bytes // (256 * KIND.row_bytes) for cache_id in caches]
            assert resident == [PAGES, PAGES, 0]
            if end == "cancelled":  # its copies still go on; their places are others' by then
                searches[1].cancel()
                calls.delete(caches[1])
        finally:
            os.kill(worker, signal.SIGKILL if end == "killed" else signal.SIGCONT)
        for number in {"done": (0, 1, 2), "cancelled": (0, 2), "killed": (2,)}[end]:
            assert np.array_equal(answer(searches[number]), wanted[number])
        if end == "killed":  # what the worker had is lost; what waited is the next one's
            assert [call.refusal().error.reason for call in searches[:2]] == ["WORKER_LOST"] * 2
        elif end == "done":
            assert service.governor.residency.promoted_pages == SEARCHES * PAGES  # each came once
        with calls.cache(KIND, keys[1]) as again:
            found, _ = calls.search(KIND, again.id, queries, TOP_K)
            assert np.array_equal(found, wanted[1])
        wait_for(lambda: is_idle(calls.load()))


def test_the_worker_is_told_how_long_a_tile_takes_once_its_pages_are_there(server, monkeypatch):
    """It is given to the device then; by the time of the copy the next one would come too late."""
    tiles, send = [], WorkerLink.send

    def listen(link, message, fd=None):
        if message.WhichOneof("message") == "search_tile":
            tiles.append(message.search_tile)
        send(link, message, fd)

    monkeypatch.setattr(WorkerLink, "send", listen)
    draw, copy_s = Draw(2), 5.0
    service = server.server.service
    keys, queries = draw.keys(KIND, PAGES * 256), draw.queries(KIND, ROWS, start_position=PAGES * 256)
    monkeypatch.setattr(service.governor.speed, "copy_bytes_per_s", PAGES * 256 * KIND.row_bytes / copy_s)
    with Calls(server.target) as calls, calls.cache(KIND, keys) as cache:
        found, _ = calls.search(KIND, cache.id, queries, TOP_K)
    assert np.array_equal(found, expected(KIND, keys, queries, TOP_K)[0])
    assert tiles
    assert all(tile.estimated_us < 1e6 * copy_s / 10 for tile in tiles)
