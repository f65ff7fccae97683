"""Items of one batch call beside each other: none is refused, or forgotten, for what the others of its call do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import streamindex_client
from streamindex.v1 import search_pb2

from streamindex_service.frontend import batch_group
from tests.support.attend_batch import ASKED, Sequence
from tests.support.attention import Shape
from tests.support.calls import Calls, batch_item
from tests.support.inprocess import InProcessServer
from tests.support.services import ROOMY, is_idle, wait_for
from tests.support.tensors import Draw, Kind, expected

KIND = Kind(heads=2, head_dim=64)
ROWS, TOP_K = 300, 20


@pytest.fixture(scope="module")
def server() -> Iterator[InProcessServer]:
    with InProcessServer({**ROOMY, "server": {"sweep_s": 3600}, "scheduler": {"max_device_tiles": 2}}) as running:
        yield running


@pytest.fixture
def calls(server) -> Iterator[Calls]:
    with Calls(server.target) as connection:
        yield connection
        wait_for(lambda: is_idle(connection.load()))
        assert connection.ledger("host").reserved_bytes == 0


@contextmanager
def step(calls, items: int, **others) -> Iterator[tuple[search_pb2.SearchBatchRequest, list[str], list[np.ndarray]]]:
    """A decode step of so many caches: the request, the caches, and the indices of each answer."""
    keys = [Draw(seed).keys(KIND, ROWS) for seed in range(items)]
    queries = [Draw(seed).queries(KIND, 2, start_position=ROWS + 1) for seed in range(items)]
    ids = [calls.create(KIND, **others).id for _ in range(items)]
    for cache_id, rows in zip(ids, keys, strict=True):
        calls.upload(KIND, cache_id, rows)
    asked = [batch_item(KIND, cache_id, each) for cache_id, each in zip(ids, queries, strict=True)]
    right = [expected(KIND, rows, each, TOP_K)[0] for rows, each in zip(keys, queries, strict=True)]
    try:
        yield search_pb2.SearchBatchRequest(items=asked, top_k=TOP_K), ids, right
    finally:
        for cache_id in ids:
            calls.delete(cache_id)


def check(results, right) -> None:
    for result, indices in zip(results, right, strict=True):
        assert not result.HasField("error"), result.error
        assert np.array_equal(np.frombuffer(result.indices, np.int32).reshape(-1, TOP_K), indices)


def bound(server, monkeypatch, name: str, value: int) -> None:
    """A bound on what may be open or queued, as a setting would have it."""
    governor = server.server.service.governor
    if name == "max_open":
        monkeypatch.setattr(governor, "limits", replace(governor.limits, max_open=value))
    else:
        scheduler = governor.scheduler
        monkeypatch.setattr(scheduler, "limits", replace(scheduler.limits, **{name: value}))


@pytest.mark.parametrize(("name", "value"), [("max_open", 3), ("max_turns", 1), ("max_bytes", 1)])
def test_items_are_not_in_their_own_way_in_a_small_queue(server, calls, monkeypatch, name, value):
    with step(calls, 12) as (request, _, right):
        bound(server, monkeypatch, name, value)
        check(calls.searches.SearchBatch(request, timeout=60).results, right)


def test_what_others_have_in_the_queue_still_refuses_an_item(server, calls, monkeypatch):
    with step(calls, 3) as (request, ids, _):
        bound(server, monkeypatch, "max_open", 1)
        with calls.start_search(KIND, ids[0], 5):
            results = calls.searches.SearchBatch(request, timeout=60).results
            assert [result.error.reason for result in results] == ["QUEUE_FULL"] * 3
        wait_for(lambda: is_idle(calls.load()))


@pytest.mark.parametrize(("name", "value"), [("max_open", 1), ("max_open", 3)])
def test_groups_of_attention_are_not_in_their_own_way(server, calls, monkeypatch, name, value):
    bound(server, monkeypatch, name, value)
    with streamindex_client.connect(server.target) as client:
        made = [Sequence(client, Shape(), tokens, 2, seed) for seed, tokens in enumerate((400, 40, 700, 300, 900))]
        results = client.sparse_attend_batch([each.item() for each in made], **ASKED)
        for each, result in zip(made, results, strict=True):
            each.check(result)
            each.cache.delete()


@contextmanager
def frozen_worker(server) -> Iterator[None]:
    pid = server.run(lambda: server.server.service.supervisor.link.process.pid)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_caches_do_not_expire_under_a_call_that_names_them(server, calls, monkeypatch):
    """The time to live of the last is over while the first is searched."""
    service = server.server.service
    clock, later_s = service.caches._clock, [0.0]
    monkeypatch.setattr(service.caches, "_clock", lambda: clock() + later_s[0])
    monkeypatch.setattr(batch_group, "_GROUPS_AT_ONCE", 1)
    monkeypatch.setattr(batch_group, "_MOST_MEMBERS", 1)
    reclaim = partial(service.uploads.reclaim, at_once=True)
    with step(calls, 3, idle_ttl_s=600) as (request, ids, right):
        with frozen_worker(server):
            answer = calls.searches.SearchBatch.future(request, timeout=60)
            wait_for(lambda: service.governor.in_flight == 1)
            later_s[0] = 700.0
            assert not server.run(reclaim)
        check(answer.result().results, right)
        assert not server.run(reclaim), "they have been used just now"
        later_s[0] = 1400.0
        assert server.run(reclaim), "nothing keeps them any more"
        later_s[0] = 0.0
        assert not calls.list().key_caches
        ids.clear()
