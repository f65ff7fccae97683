"""Streams that are open and bring no rows are in nobody's way."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.calls import Calls, answers, query_chunk, search_header
from tests.support.inprocess import InProcessServer
from tests.support.services import SMALL_DEVICE, is_idle, wait_for
from tests.support.tensors import Draw, Kind, expected

KIND = Kind(heads=2, head_dim=64)
ROWS, TOP_K = 12, 30


@pytest.fixture(scope="module")
def server():
    with InProcessServer(SMALL_DEVICE) as running:
        yield running


@pytest.mark.parametrize("priority", ["standard", "batch"])
def test_a_search_passes_those_that_wait_for_their_callers(server, priority):
    draw = Draw(1)
    keys = draw.keys(KIND, 2000)
    queries = draw.queries(KIND, ROWS, start_position=1990)
    right = expected(KIND, keys, queries, TOP_K)[0]
    number = {"standard": 2, "batch": 3}[priority]
    with Calls(server.target) as calls, calls.cache(KIND, keys) as cache:
        header = search_header(KIND, cache.id, TOP_K, start_position=1990, priority=number)
        silent = [calls.search_call() for _ in range(18)]
        for call in silent:
            call.send(header)
        wait_for(lambda: calls.load().running_searches == len(silent))
        for _ in range(3):
            assert np.array_equal(calls.search(KIND, cache.id, queries, TOP_K)[0], right)
        for call in silent:  # and none has lost its own place
            call.send(query_chunk(KIND, queries, 0, ROWS))
            call.half_close()
        for call in silent:
            chunks = [message.chunk for message in call.rest() if message.WhichOneof("message") == "chunk"]
            assert np.array_equal(answers(chunks, TOP_K)[0], right)
        wait_for(lambda: is_idle(calls.load()))
